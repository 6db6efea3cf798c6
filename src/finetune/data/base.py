"""What every dataset is here: labelled images that are read one by one, and their splits."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from finetune.data.read import read_image


class Images(Protocol):
    """N images, read one by one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor:
        """Image as uint8 (3, H, W), values 0 to 255. Sizes may differ between images."""
        ...


@dataclass(frozen=True)
class ImageFiles:
    """Images as files, decoded when they are asked for."""

    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return read_image(self.paths[index])


@dataclass(frozen=True)
class ImageArray:
    """Images in memory. array: uint8 (N, 1 or 3, H, W); grey is repeated to three channels."""

    array: Tensor

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> Tensor:
        image = self.array[index]
        return image.expand(3, -1, -1) if image.shape[0] == 1 else image


@dataclass(frozen=True)
class LabelledImages:
    """One split. indices choose among images; labels belong to the chosen ones, in order."""

    images: Images
    indices: tuple[int, ...]
    labels: tuple[int, ...]

    @classmethod
    def of(cls, images: Images, labels: Sequence[int]) -> "LabelledImages":
        """All images, with one label each."""
        return cls(images, tuple(range(len(images))), tuple(int(label) for label in labels))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        return self.images[self.indices[position]], self.labels[position]

    def subset(self, positions: Sequence[int]) -> "LabelledImages":
        """The images at these positions, in this order."""
        return replace(
            self,
            indices=tuple(self.indices[p] for p in positions),
            labels=tuple(self.labels[p] for p in positions),
        )


@dataclass(frozen=True)
class Splits:
    """A dataset as it is on disk. val or test is None where the dataset has none.

    skipped: {path, why} of files that were left out.
    """

    classes: tuple[str, ...]
    train: LabelledImages
    val: LabelledImages | None
    test: LabelledImages | None
    skipped: tuple[dict[str, str], ...] = field(default=())


def label_counts(labels: Sequence[int], num_classes: int) -> list[int]:
    """Images per class, (K,)."""
    return torch.bincount(torch.tensor(labels, dtype=torch.long), minlength=num_classes).tolist()

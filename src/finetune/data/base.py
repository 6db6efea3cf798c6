"""What every dataset is here: labelled images that are read one by one, and their splits."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from finetune.data.read import MAX_PIXELS, read_image


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
    max_pixels: int = MAX_PIXELS

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return read_image(self.paths[index], self.max_pixels)

    def fingerprint(self, indices: Iterable[int]) -> str:
        """Digest of the path, size and time of change of these files, in this order."""
        found = hashlib.blake2b(digest_size=16)
        for index in indices:
            path = os.path.abspath(self.paths[index])  # noqa: PTH100  pathlib takes ten times as long
            try:
                status = os.stat(path)  # noqa: PTH116  likewise
                facts = f"{status.st_size} {status.st_mtime_ns}"
            except OSError:  # told by name when it is read
                facts = "missing"
            found.update(os.fsencode(path) + f"\0{facts}\n".encode())
        return found.hexdigest()


@dataclass(frozen=True)
class ImageArray:
    """Images in memory. array: uint8 (N, 1 or 3, H, W); grey is repeated to three channels."""

    array: Tensor

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> Tensor:
        image = self.array[index]
        return image.expand(3, -1, -1) if image.shape[0] == 1 else image

    def fingerprint(self, indices: Iterable[int]) -> str:
        """Digest of the array, and of which images of it, in which order."""
        found = hashlib.blake2b(f"{tuple(self.array.shape)} {[*indices]}".encode(), digest_size=16)
        found.update(self.array.contiguous().numpy().data)
        return found.hexdigest()


Label = int | tuple[int, ...]  # of an image: its class; or, multi-label, any number of classes


@dataclass(frozen=True)
class LabelledImages:
    """One split. indices choose among images; labels belong to the chosen ones, in order.

    num_classes: K where an image has any number of labels, a tuple; None where it has one.
    """

    images: Images
    indices: tuple[int, ...]
    labels: tuple[Label, ...]
    num_classes: int | None = None

    @classmethod
    def of(
        cls, images: Images, labels: Sequence[Label], num_classes: int | None = None
    ) -> "LabelledImages":
        """All images, with their labels."""
        plain = (label if isinstance(label, tuple) else int(label) for label in labels)
        return cls(images, tuple(range(len(images))), tuple(plain), num_classes)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, int | Tensor]:
        """Image, and its label or, multi-label, its targets: 0 or 1, float (K,)."""
        image, label = self.images[self.indices[position]], self.labels[position]
        if self.num_classes is None:
            assert isinstance(label, int)
            return image, label
        return image, target_matrix([label], self.num_classes)[0]

    def targets(self, num_classes: int) -> Tensor:
        """1 where an image has a class, else 0: float (N, K)."""
        return target_matrix(self.labels, num_classes)

    def fingerprint(self) -> str | None:
        """Digest that changes when an image does, or their order; None where images have none."""
        of = getattr(self.images, "fingerprint", None)
        return None if of is None else str(of(self.indices))

    def strata(self) -> list[int]:
        """One class per image to cut by: its label; of several, the rarest here; K if it has none.

        Of equally rare ones it is the first.
        """
        if self.num_classes is None:
            return [label for label in self.labels if isinstance(label, int)]
        counts = [*label_counts(self.labels, self.num_classes), len(self) + 1]
        none = (self.num_classes,)
        return [min(labels_of(label) or none, key=lambda k: counts[k]) for label in self.labels]

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

    skipped: {path, why} of files that were left out. doubles: paths of files with the same bytes.
    """

    classes: tuple[str, ...]
    train: LabelledImages
    val: LabelledImages | None
    test: LabelledImages | None
    skipped: tuple[dict[str, str], ...] = field(default=())
    doubles: tuple[tuple[str, ...], ...] = field(default=())


def labels_of(label: Label) -> tuple[int, ...]:
    """The classes of an image: one, or any number."""
    return label if isinstance(label, tuple) else (label,)


def label_counts(labels: Sequence[Label], num_classes: int) -> list[int]:
    """Images per class, (K,)."""
    flat = [k for label in labels for k in labels_of(label)]
    return torch.bincount(torch.tensor(flat, dtype=torch.long), minlength=num_classes).tolist()


def target_matrix(labels: Sequence[Label], num_classes: int) -> Tensor:
    """1 where an image has a class, else 0: float (N, K)."""
    matrix = torch.zeros(len(labels), num_classes)
    for row, label in zip(matrix, labels, strict=True):
        row[list(labels_of(label))] = 1
    return matrix

"""What every dataset is here: labelled images that are read one by one, and their splits."""

import hashlib
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from finetune.data.path_list import MISSING, Paths, inside
from finetune.data.read import MAX_PIXELS, read_image


class Images(Protocol):
    """N images, read one by one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor:
        """Image as uint8 (3, H, W), values 0 to 255. Sizes may differ between images."""
        ...


class ImageFiles:
    """Images as files, decoded when they are asked for."""

    def __init__(self, paths: Iterable[Path | str], max_pixels: int = MAX_PIXELS) -> None:
        self.paths = paths if isinstance(paths, Paths) else Paths.of(paths)
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return read_image(self.paths[index], self.max_pixels)

    def fingerprint(self, indices: Sequence[int]) -> str:
        """Digest of the path, size and time of change of these files, in this order."""
        found = hashlib.blake2b(digest_size=16)

        def absolute(folder: str) -> str:
            return inside(os.path.abspath(folder))  # noqa: PTH100  pathlib leaves a .. in it

        for path, size, time in self.paths.status(indices, absolute):
            # what is missing is told by name when it is read
            facts = b"missing" if size == MISSING else b"%d %d" % (size, time)
            found.update(path + b"\0" + facts + b"\n")
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

    num_classes: K where an image has any number of labels, a tuple; None where it has one. Both
    sequences are arrays where they are long: 8 bytes a number.
    """

    images: Images
    indices: Sequence[int]
    labels: Sequence[Label]
    num_classes: int | None = None

    @classmethod
    def of(
        cls, images: Images, labels: Sequence[Label], num_classes: int | None = None
    ) -> "LabelledImages":
        """All images, with their labels."""
        indices = array("q", range(len(images)))
        return cls(images, indices, _packed(labels, num_classes), num_classes)

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

    def strata(self) -> Sequence[int]:
        """One class per image to cut by: its label; of several, the rarest here; K if it has none.

        Of equally rare ones it is the first.
        """
        if self.num_classes is None:
            return cast(Sequence[int], self.labels)
        counts = [*label_counts(self.labels, self.num_classes), len(self) + 1]
        none = (self.num_classes,)
        return [min(labels_of(label) or none, key=lambda k: counts[k]) for label in self.labels]

    def subset(self, positions: Sequence[int]) -> "LabelledImages":
        """The images at these positions, in this order."""
        return replace(
            self,
            indices=array("q", map(self.indices.__getitem__, positions)),
            labels=_packed(map(self.labels.__getitem__, positions), self.num_classes),
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
    single = isinstance(labels, array)
    flat = labels if single else [k for label in labels for k in labels_of(label)]
    counts: list[int] = np.bincount(np.asarray(flat, np.int64), minlength=num_classes).tolist()
    return counts


def target_matrix(labels: Sequence[Label], num_classes: int) -> Tensor:
    """1 where an image has a class, else 0: float (N, K)."""
    matrix = torch.zeros(len(labels), num_classes)
    for row, label in zip(matrix, labels, strict=True):
        row[list(labels_of(label))] = 1
    return matrix


def _packed(labels: Iterable[Label], num_classes: int | None) -> Sequence[Label]:
    """The same, one label each in 8 bytes."""
    if num_classes is not None:
        return tuple(labels)
    return array("q", map(int, cast(Iterable[int], labels)))

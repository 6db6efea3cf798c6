"""Cuts and limits splits, class by class, by a seed; test is never touched."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from finetune.data.base import LabelledImages, Splits, label_counts
from finetune.errors import ConfigError, DataError

log = logging.getLogger(__name__)

TRAIN_VAL_TEST = (0.7, 0.15, 0.15)

# How people call their splits, in lower case.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def cut(
    labels: Sequence[int], fractions: Sequence[float], seed: int, classes: Sequence[str] = ()
) -> list[list[int]]:
    """Positions of each part, ascending; stratified: each class is cut by the same fractions.

    fractions: of the parts, they sum to 1. A class gives every part at least one image; where it
    has too few for that, it stays wholly in the first part, and a warning names it by classes.
    """
    parts: list[list[int]] = [[] for _ in fractions]
    too_small = []
    for label, shuffled in _shuffled_classes(labels, seed):
        counts = [max(1, round(len(shuffled) * fraction)) for fraction in fractions[1:]]
        first = len(shuffled) - sum(counts)
        if first < 1:
            too_small.append(label)
            first, counts = len(shuffled), [0] * len(counts)
        bounds = np.cumsum([first, *counts])[:-1]
        for part, positions in zip(parts, np.split(shuffled, bounds), strict=True):
            part.extend(positions.tolist())
    if too_small:
        log.warning(
            "%d of the classes have too few images to cut into %d parts and stay in train: %s",
            len(too_small), len(parts), _names(too_small, classes),
        )  # fmt: skip
    return [sorted(part) for part in parts]


def cut_splits(images: LabelledImages, classes: tuple[str, ...], seed: int) -> Splits:
    """Splits of a set that is published or stored in one piece: 70, 15 and 15 %, stratified."""
    train, val, test = cut(images.labels, TRAIN_VAL_TEST, seed, classes)
    if images.labels and not val:
        raise DataError(
            f"{len(images)} images of {len(classes)} classes cannot be cut into train, val and "
            "test: no class has three images. Add images, or make the splits yourself"
        )
    return Splits(classes, images.subset(train), images.subset(val), images.subset(test))


def cut_val(splits: Splits, seed: int, fraction: float = 0.15) -> Splits:
    """The same with val cut from train where val is None, stratified."""
    if splits.val is not None:
        return splits
    train, val = cut(splits.train.labels, (1 - fraction, fraction), seed, splits.classes)
    if splits.train.labels and not val:
        raise DataError(
            "val cannot be cut from train: no class has two images. "
            "Add images, or a val split of your own"
        )
    return replace(splits, train=splits.train.subset(train), val=splits.train.subset(val))


def limit_train(splits: Splits, shots: int | None, fraction: float | None, seed: int) -> Splits:
    """The same with fewer training images: shots per class, or a fraction of each class.

    A class keeps at least one image. With one seed, fewer shots are a subset of more shots.
    """
    check_limits(shots, fraction)
    if shots is not None and shots < 1:
        raise ConfigError(f"data.shots={shots}: at least 1 image per class, or null for all")
    if fraction is not None and not 0 < fraction <= 1:
        raise ConfigError(f"data.fraction={fraction:g}: above 0 and at most 1, or null for all")
    if shots is None and fraction is None:
        return splits

    kept: list[int] = []
    short = []
    for label, shuffled in _shuffled_classes(splits.train.labels, seed):
        wanted = shots or max(1, round(len(shuffled) * (fraction or 1)))
        if wanted > len(shuffled):
            short.append(label)
        kept.extend(shuffled[:wanted].tolist())
    if short:
        log.warning(
            "data.shots=%s: %d of the classes have fewer images in train and give them all: %s",
            shots, len(short), _names(short, splits.classes),
        )  # fmt: skip
    return replace(splits, train=splits.train.subset(sorted(kept)))


def check_limits(shots: int | None, fraction: float | None) -> None:
    """Raise ConfigError if both are given; a data leaf may give one."""
    if shots is not None and fraction is not None:
        raise ConfigError(
            f"data.shots={shots} and data.fraction={fraction:g} both limit train; "
            "type data.shots=null too, or data.fraction=null"
        )


def check_splits(splits: Splits) -> None:
    """Raise DataError where training could not work; warn of classes that val does not measure."""
    if len(splits.train) == 0:
        raise DataError("train has no images")
    if len(splits.classes) < 2:
        raise DataError(
            f"there is one class only, '{splits.classes[0]}'; a classifier needs at least two"
        )
    held_out = {"val": splits.val, "test": splits.test}
    present = {"train": _present(splits.train, splits.classes)}
    for name, images in held_out.items():
        if images is None:
            continue
        if len(images) == 0:
            raise DataError(f"{name} has no images")
        present[name] = _present(images, splits.classes)
        unknown = [c for c in splits.classes if c in present[name] - present["train"]]
        if unknown:
            raise DataError(
                f"{name} has classes that train lacks, so they could never be learnt: "
                f"{listed(unknown)}. Add training images of them, or take them out of {name}"
            )
    if len(present["train"]) < 2:
        raise DataError(f"train has images of one class only, '{min(present['train'])}'")
    if "val" in present and (unseen := present["train"] - present["val"]):
        ordered = [c for c in splits.classes if c in unseen]
        log.warning(
            "%d of the classes in train have no image in val, which cannot judge them: %s",
            len(ordered), listed(ordered),
        )  # fmt: skip


def listed(names: Sequence[str], most: int = 20) -> str:
    """Names for a message: 'cat', 'dog', and 3 more."""
    shown = ", ".join(repr(name) for name in names[:most])
    return shown + (f", and {len(names) - most} more" if len(names) > most else "")


def _shuffled_classes(labels: Sequence[int], seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """Each class that occurs, ascending, with its positions in an order of the seed's.

    A class has its own stream: images added to another class leave its order as it was.
    """
    array = np.asarray(labels, dtype=np.int64)
    order = np.argsort(array, kind="stable")
    values, starts = np.unique(array[order], return_index=True)
    for label, positions in zip(values.tolist(), np.split(order, starts[1:]), strict=True):
        # RandomState: numpy froze its stream for good (NEP 19), so a seed's split stays the same
        yield label, positions[np.random.RandomState([seed, label]).permutation(len(positions))]


def _present(images: LabelledImages, classes: Sequence[str]) -> set[str]:
    counts = label_counts(images.labels, len(classes))
    return {name for name, count in zip(classes, counts, strict=True) if count}


def _names(labels: Sequence[int], classes: Sequence[str]) -> str:
    return listed([classes[label] if classes else str(label) for label in labels])

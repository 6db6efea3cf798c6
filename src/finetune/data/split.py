"""Cuts and limits splits, class by class, by a seed; test is never touched."""

import logging
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches
from itertools import islice, product

import numpy as np

from finetune.data.base import (
    ImageFiles,
    Label,
    LabelledImages,
    Splits,
    label_counts,
    labels_of,
)
from finetune.data.paths import printable
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
    parts, too_small = _dealt(labels, fractions, seed)
    if too_small:
        log.warning(
            "%d of the classes have too few images to cut into %d parts and stay in train: %s",
            len(too_small), len(parts), _names(too_small, classes),
        )  # fmt: skip
    return parts


def _dealt(
    labels: Sequence[int], fractions: Sequence[float], seed: int
) -> tuple[list[list[int]], list[int]]:
    """The parts, and the labels that are too small to be cut."""
    parts: list[list[np.ndarray]] = [[] for _ in fractions]
    too_small = []
    for label, shuffled in _shuffled_classes(labels, seed):
        counts = [max(1, round(len(shuffled) * fraction)) for fraction in fractions[1:]]
        first = len(shuffled) - sum(counts)
        if first < 1:
            too_small.append(label)
            first, counts = len(shuffled), [0] * len(counts)
        bounds = np.cumsum([first, *counts])[:-1]
        for part, positions in zip(parts, np.split(shuffled, bounds), strict=True):
            part.append(positions)
    none = np.zeros(0, np.int64)
    return [np.sort(np.concatenate([none, *part])).tolist() for part in parts], too_small


def cut_images(
    images: LabelledImages, fractions: Sequence[float], seed: int, classes: Sequence[str] = ()
) -> list[list[int]]:
    """As cut; images with several labels go by the rarest one of each.

    Their first part then gets an image of every class, and the others too, if another part keeps
    one of each of its classes without that image.
    """
    if images.num_classes is None:
        return cut(images.strata(), fractions, seed, classes)
    parts, _ = _dealt(images.strata(), fractions, seed)
    counts = [label_counts([images.labels[p] for p in part], images.num_classes) for part in parts]

    def spare(part: int, label: int, must_keep: bool) -> int | None:
        for position in parts[part]:
            labels = labels_of(images.labels[position])
            if label in labels and not (must_keep and any(counts[part][k] < 2 for k in labels)):
                return position
        return None

    for taker, label in product(range(len(parts)), range(images.num_classes)):
        if counts[taker][label]:
            continue
        for giver in range(len(parts)):
            if (position := spare(giver, label, must_keep=taker > 0)) is not None:
                parts[giver].remove(position)
                parts[taker].append(position)
                for k in labels_of(images.labels[position]):
                    counts[giver][k] -= 1
                    counts[taker][k] += 1
                break
    return [sorted(part) for part in parts]


def cut_splits(images: LabelledImages, classes: tuple[str, ...], seed: int) -> Splits:
    """Splits of a set that is published or stored in one piece: 70, 15 and 15 %, stratified."""
    train, val, test = cut_images(images, TRAIN_VAL_TEST, seed, classes)
    if len(images) and not val:
        raise DataError(
            f"{len(images)} images of {len(classes)} classes cannot be cut into train, val and "
            "test: no class has three images. Add images, or make the splits yourself"
        )
    return Splits(classes, images.subset(train), images.subset(val), images.subset(test))


def cut_val(splits: Splits, seed: int, fraction: float = 0.15) -> Splits:
    """The same with val cut from train where val is None, stratified."""
    if splits.val is not None:
        return splits
    train, val = cut_images(splits.train, (1 - fraction, fraction), seed, splits.classes)
    if splits.train.labels and not val:
        raise DataError(
            "val cannot be cut from train: no class has two images. "
            "Add images, or a val split of your own"
        )
    return replace(splits, train=splits.train.subset(train), val=splits.train.subset(val))


def select_classes(splits: Splits, names: Sequence[str | int] | None) -> Splits:
    """The same with the images of these classes only, in every split; labels are re-numbered.

    names: in any order, since the classes keep that of the dataset; a whole number stands for the
    name that it spells. None for all. Raises ConfigError for a name that the dataset lacks.
    Of images with several labels all stay: one without any of these classes is an example of none.
    """
    if names is None:
        return splits
    wanted = [str(name) for name in names]
    if unknown := [name for name in wanted if name not in splits.classes]:
        close = dict.fromkeys(
            match for name in unknown for match in get_close_matches(name, splits.classes, n=3)
        )
        raise ConfigError(
            f"data.classes: no class {listed(unknown)}; "
            + (f"close: {listed(list(close))}" if close else f"there are {listed(splits.classes)}")
        )
    if len(set(wanted)) < len(wanted) or len(wanted) < 2:
        raise ConfigError(f"data.classes=[{','.join(wanted)}]: two or more different classes")
    kept = [label for label, name in enumerate(splits.classes) if name in wanted]

    def selected(images: LabelledImages | None) -> LabelledImages | None:
        if images is None:
            return None
        if images.num_classes is not None:
            labels = (tuple(new[k] for k in labels_of(old) if k in new) for old in images.labels)
            return replace(images, labels=tuple(labels), num_classes=len(new))
        chosen = images.subset([p for p, k in enumerate(images.strata()) if k in new])
        return replace(chosen, labels=array("q", [new[k] for k in chosen.strata()]))

    new = {label: position for position, label in enumerate(kept)}
    train = selected(splits.train)
    assert train is not None
    return replace(
        splits,
        classes=tuple(splits.classes[label] for label in kept),
        train=train,
        val=selected(splits.val),
        test=selected(splits.test),
    )


def limit_train(splits: Splits, shots: int | None, fraction: float | None, seed: int) -> Splits:
    """The same with fewer training images: shots per class, or a fraction of each class.

    A class keeps at least one image. With one seed, fewer shots are a subset of more shots. Images
    with several labels go by the rarest one of each; shots are not for them.
    """
    check_limits(shots, fraction)
    if shots is not None and shots < 1:
        raise ConfigError(f"data.shots={shots}: at least 1 image per class, or null for all")
    if fraction is not None and not 0 < fraction <= 1:
        raise ConfigError(f"data.fraction={fraction:g}: above 0 and at most 1, or null for all")
    if shots is None and fraction is None:
        return splits
    images = splits.train
    if shots is not None and images.num_classes is not None:
        raise ConfigError(
            f"data.shots={shots}: with several labels per image no number of images per class can "
            "be kept; type data.fraction=0.1, or another part"
        )

    kept: list[int] = []
    short = []
    for label, shuffled in _shuffled_classes(images.strata(), seed):
        wanted = shots or max(1, round(len(shuffled) * (fraction or 1)))
        if wanted > len(shuffled):
            short.append(label)
        kept.extend(shuffled[:wanted].tolist())
    if short:
        log.warning(
            "data.shots=%s: %d of the classes have fewer images in train and give them all: %s",
            shots, len(short), _names(short, splits.classes),
        )  # fmt: skip
    # a class that is nowhere the rarest may have lost all of its images
    counts = label_counts([images.labels[p] for p in kept], len(splits.classes))
    for label in (label for label, count in enumerate(counts) if count == 0):
        having = (p for p, labels in enumerate(images.labels) if label in labels_of(labels))
        kept.extend(islice(having, 1))
    return replace(splits, train=images.subset(sorted({*kept})))


def stratified(labels: Sequence[int], most: int, seed: int) -> list[int]:
    """Positions of at most that many, ascending; of each class the same share, at least one."""
    shuffled = [positions for _, positions in _shuffled_classes(labels, seed)]
    shares = np.concatenate([np.arange(len(p)) / len(p) for p in shuffled])
    positions = np.concatenate(shuffled)
    first = np.lexsort((positions, shares))[:most]  # by share, then by position
    chosen: list[int] = np.sort(positions[first]).tolist()
    return chosen


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


def warn_of_case(classes: Sequence[str]) -> None:
    """Tell of classes that are one class but for capitals, perhaps."""
    folded: dict[str, list[str]] = {}
    for name in classes:
        folded.setdefault(name.casefold(), []).append(name)
    if alike := [name for names in folded.values() if len(names) > 1 for name in names]:
        log.warning("classes that differ only in capitals: %s; are they one?", listed(alike))


def warn_of_doubles(splits: Splits) -> None:
    """Tell of files with the same bytes that are in train and in val or test, or labelled apart."""
    if not splits.doubles:
        return
    doubled = {path for group in splits.doubles for path in group}
    places: dict[str, tuple[str, Label]] = {}
    for name, images in {"train": splits.train, "val": splits.val, "test": splits.test}.items():
        if images is not None and isinstance(images.images, ImageFiles):
            for index, label in zip(images.indices, images.labels, strict=True):
                if (path := images.images.paths.text(index)) in doubled:
                    places[path] = name, label
    leaks, contradictions = [], []
    for group in splits.doubles:
        known = [path for path in reversed(group) if path in places]
        by_split = {places[path][0]: path for path in known}
        by_label = {places[path][1]: path for path in known}
        if len(by_split) > 1:
            leaks.append(" and ".join(f"{printable(by_split[s])} ({s})" for s in sorted(by_split)))
        if len(by_label) > 1:
            named = {
                printable(path): ", ".join(splits.classes[k] for k in labels_of(label))
                for label, path in sorted(by_label.items())
            }
            contradictions.append(" and ".join(f"{path} ({name})" for path, name in named.items()))
    for pairs, what in (
        (leaks, "are in two splits, byte for byte, which flatters the results"),
        (contradictions, "have two labels, byte for byte"),
    ):
        if pairs:
            more = f"; and {len(pairs) - 5} more" if len(pairs) > 5 else ""
            log.warning("%d images %s: %s%s", len(pairs), what, "; ".join(pairs[:5]), more)


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

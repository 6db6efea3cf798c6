"""Images in folders, one per class, with or without folders for the splits above them."""

import logging
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.data.base import ImageFiles, LabelledImages, Splits
from finetune.data.path_list import Paths
from finetune.data.paths import existing_folder, printable, text_of
from finetune.data.read import IMAGE_SUFFIXES, MAX_PIXELS, BadImage
from finetune.data.scan import SKIP, BadData, Folder, OnBad, Problem, Scan, problems_of, skipped
from finetune.data.split import SPLIT_NAMES, cut_splits, listed, warn_of_case
from finetune.errors import DataError

log = logging.getLogger(__name__)

_EXPECTED = "expected <root>/train|val|test/<class>/<image> or <root>/<class>/<image>"
_TABLE = "For a table of paths: data=csv data.table=FILE"


def image_folder(
    root: str,
    split_seed: int = 0,
    on_bad: OnBad = "error",
    max_pixels: int = MAX_PIXELS,
    rescan: bool = False,
) -> Splits:
    """root/train|val|test/<class>/... as it stands, or root/<class>/... cut 70 / 15 / 15.

    Classes are the folders of train (or of root) in alphabetical order; images lie at any depth
    below them. Hidden files and folders and __MACOSX are left out, other types of files counted.
    split_seed: of the cut. val or test is None where root has splits but not this one.
    on_bad: what becomes of images that cannot be read, all of which are read once before; rescan:
    again, though they are as they were. BadData lists all that is wrong.
    """
    folder = existing_folder(root, f"Unpack it if it is an archive. {_TABLE}")
    with Scan("image_folder", folder, max_pixels, rescan) as scan:
        walk = _Walk(scan)
        found = _split_folders(folder, walk)
        parts = {"": _class_folders(folder, walk)} if not found else {}
        if found:
            parts["train"] = _class_folders(found["train"], walk)
            for split in ("val", "test"):
                if split in found:
                    classes = parts["train"].classes
                    parts[split] = _class_folders(found[split], walk, classes)
        scan.look(walk.with_images)
        doubles = scan.doubles(walk.with_images)
    walk.warn_of_left_out(folder)

    bad = walk.bad | scan.bad
    if walk.problems or (bad and on_bad == "error"):
        files = problems_of(bad) if on_bad == "error" else []
        advice = SKIP if files and not walk.problems else ""
        raise BadData(printable(folder), [*walk.problems, *files], advice)
    labelled = {split: part.labelled(bad, max_pixels) for split, part in parts.items()}
    left_out = skipped(printable(folder), bad)
    classes = parts["train" if found else ""].classes
    warn_of_case(classes)
    if found:
        splits = Splits(classes, labelled["train"], labelled.get("val"), labelled.get("test"))
    else:
        splits = cut_splits(labelled[""], classes, split_seed)
    return replace(splits, skipped=left_out, doubles=doubles)


@dataclass(frozen=True)
class _Class:
    """The folders of a class, and paths below it that bear an image's name but are none."""

    folders: list[Folder]
    misnamed: list[str]

    def paths(self) -> Paths:
        """Of the images, sorted."""
        paths = Paths.joined([folder.images() for folder in self.folders])
        if len(self.folders) == 1:
            return paths
        texts = [*paths.texts()]
        return paths.take(sorted(range(len(texts)), key=texts.__getitem__))

    def __bool__(self) -> bool:
        return bool(self.misnamed) or any(folder.names for folder in self.folders)


@dataclass(frozen=True)
class _Part:
    """A split: where it lies, and its images by class. names: of the folders, as in classes."""

    place: str
    classes: tuple[str, ...]
    images: dict[str, _Class]

    def labelled(self, bad: Mapping[str, BadImage], max_pixels: int) -> LabelledImages:
        """Those that are not bad. DataError if that leaves a class without any."""
        paths, labels, emptied = [], array("q"), []
        for name, found in self.images.items():
            kept = found.paths()
            if bad:
                kept = kept.take([i for i, path in enumerate(kept.texts()) if path not in bad])
            if not kept:
                emptied.append(name)
            paths.append(kept)
            labels += array("q", [self.classes.index(name)]) * len(kept)
        if emptied:
            lost = self.images[emptied[0]]
            example = bad[min([*lost.paths().texts(), *lost.misnamed])]
            raise DataError(
                f"{self.place}: data.on_bad=skip would leave no image of {listed(emptied)}, since "
                f"none can be read, such as {example}"
            )
        return LabelledImages.of(ImageFiles(Paths.joined(paths), max_pixels), labels)


class _Walk:
    """One walk over all folders: what is wrong, and what is left out."""

    def __init__(self, scan: Scan) -> None:
        self.problems: list[Problem] = []
        self.bad: dict[str, BadImage] = {}  # what bears an image's name but is none
        self.with_images: list[Folder] = []
        self._scan = scan
        self._entered: dict[tuple[int, int], str] = {}
        self._read: dict[str, Folder] = {}

    def says(self, kind: str, what: str) -> None:
        self.problems.append(Problem(kind, what))

    def folder(self, path: Path | str) -> Folder:
        """What lies straight in it; nothing, and a problem, if it cannot be read."""
        path = str(path)
        if path not in self._read:
            try:
                found = self._scan.folder(path)
            except OSError as error:
                self.says(
                    "unreadable folder", f"{printable(path)} cannot be read: {error.strerror}"
                )
                found = Folder(path, 0, 0, 0)
            for link in found.below(found.stuck):
                self.says("link in a circle", f"{printable(link)} {_why_stuck(link)}; remove it")
            self._read[path] = found
        return self._read[path]

    def images_below(self, path: str) -> _Class:
        """What bears an image's name, at any depth below a folder."""
        folder = self.folder(path)
        earlier = self._entered.setdefault(folder.identity, path)
        if earlier != path and folder.identity != (0, 0):
            self.says(
                "folder reached twice",
                f"{printable(path)} and {printable(earlier)} are the same folder "
                "(a symbolic link): its images would count twice. Remove the link",
            )
            return _Class([], [])
        self.with_images.append(folder)
        found = _Class([folder], [])
        for file in folder.below(folder.metadata):
            why = "it is macOS metadata (AppleDouble), not the image; delete it"
            self.bad[file] = BadImage(Path(file), "macOS metadata", why)
            found.misnamed.append(file)
        for inner in folder.below(folder.folders):
            if Path(inner).suffix.lower() in IMAGE_SUFFIXES:
                why = "it is a folder that bears the name of an image"
                self.bad[inner] = BadImage(Path(inner), "folder with an image's name", why)
                found.misnamed.append(inner)
            else:
                below = self.images_below(inner)
                found.folders.extend(below.folders)
                found.misnamed.extend(below.misnamed)
        return found

    def warn_of_left_out(self, root: Path) -> None:
        """Tell what lies there and is not read."""
        others: Counter[str] = Counter()
        for folder in self._read.values():
            others.update(folder.others)
        if others:
            counts = ", ".join(f"{n} {suffix}" for suffix, n in others.most_common())
            log.warning("%s: left out files that are no images: %s", printable(root), counts)
        hidden = [path for folder in self._read.values() for path in folder.below(folder.hidden)]
        if hidden:
            log.warning(
                "%s: left out what is hidden or of __MACOSX, such as %s; %d in all",
                printable(root), printable(hidden[0]), len(hidden),
            )  # fmt: skip


def _why_stuck(link: str) -> str:
    try:
        Path(link).stat()
    except OSError as error:
        return f"is a link that cannot be followed: {error.strerror}"
    return "is a link that could not be followed"


def _split_folders(root: Path, walk: _Walk) -> dict[str, Path]:
    """Split name to its folder; empty where the folders in root are the classes."""
    here = walk.folder(root)
    folders = [Path(path) for path in here.below(here.folders)]
    found: dict[str, Path] = {}
    for path in folders:
        split = SPLIT_NAMES.get(path.name.lower())
        if split in found:
            raise DataError(
                f"{printable(path)} and {printable(found[split])} are both the {split} split; "
                "merge them or rename one"
            )
        if split:
            found[split] = path
    # A class may be called train, among others: bus, car, train
    if len(found) == 1 and len(folders) > 1 and not walk.folder(*found.values()).folders:
        return {}
    if found and "train" not in found:
        raise DataError(
            f"{printable(root)} has {listed([path.name for path in found.values()])} "
            f"but no train folder; {_EXPECTED}"
        )
    if found and (others := [path.name for path in folders if path not in found.values()]):
        log.warning(
            "%s: left out the folders %s, which are neither train, val nor test",
            printable(root), listed(others),
        )  # fmt: skip
    if found and here.names:
        log.warning(
            "%s: left out %d images straight in it, such as %s",
            printable(root), len(here.names), printable(here.names[0]),
        )  # fmt: skip
    return found


def _class_folders(parent: Path, walk: _Walk, train_classes: tuple[str, ...] = ()) -> _Part:
    """The classes in parent and their images. train_classes: what val, test may have."""
    place, here = printable(parent), walk.folder(parent)
    loose, folders = here.below(here.names), here.below(here.folders)
    if not folders:
        what = f"but {len(loose)} images straight in it" if loose else "nor images"
        if here.identity != (0, 0):  # else it could not be read, which was told
            walk.says(
                "no class folders", f"{place} has no class folders, {what}; {_EXPECTED}. {_TABLE}"
            )
        return _Part(place, train_classes, {})
    if loose:
        walk.says(
            "images outside of classes",
            f"{place} holds {len(loose)} images outside its class folders, such as "
            f"{printable(loose[0])}; move them to the folder of their class",
        )
    names = [text_of(name) for name in here.folders]
    classes = train_classes or tuple(names)
    if unknown := [name for name in names if name not in classes]:
        walk.says(
            "class that train lacks",
            f"{place} has classes that train lacks: {listed(unknown)}; "
            "add training images of them, or remove these folders",
        )
    nested = [path for path in folders if walk.folder(path).folders]
    if not train_classes and nested and {name.lower() for name in names} <= SPLIT_NAMES.keys():
        walk.says(
            "splits within a split",
            f"{place} holds the folders {listed(names)} where classes are expected; "
            f"did you mean data.root={place}?",
        )
    elif len(classes) == 1:
        hint = f"; did you mean data.root={printable(nested[0])}?" if nested else ""
        walk.says(
            "one class",
            f"{place} has one class folder only, {listed(names)}; {_EXPECTED}{hint}",
        )
    images, empty = {}, []
    for name, path in zip(names, folders, strict=True):
        before = len(walk.problems)
        images[name] = walk.images_below(path)
        if not images[name] and len(walk.problems) == before:
            empty.append(name)
    if empty:
        walk.says(
            "class without images",
            f"{place} has class folders without images: {listed(empty)}; "
            f"remove them or add images ({' '.join(sorted(IMAGE_SUFFIXES))})",
        )
    return _Part(place, classes, images)

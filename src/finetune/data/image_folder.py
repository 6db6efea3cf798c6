"""Images in folders, one per class, with or without folders for the splits above them."""

import logging
import os
from collections import Counter
from pathlib import Path

from finetune.data.base import ImageFiles, LabelledImages, Splits
from finetune.data.paths import existing_folder, printable
from finetune.data.read import IMAGE_SUFFIXES
from finetune.data.split import SPLIT_NAMES, cut_splits, listed
from finetune.errors import DataError

log = logging.getLogger(__name__)

_EXPECTED = "expected <root>/train|val|test/<class>/<image> or <root>/<class>/<image>"
_TABLE = "For a table of paths: data=csv data.table=FILE"


def image_folder(root: str, split_seed: int = 0) -> Splits:
    """root/train|val|test/<class>/... as it stands, or root/<class>/... cut 70 / 15 / 15.

    Classes are the folders of train (or of root) in alphabetical order; images lie at any depth
    below them. Hidden files and folders and __MACOSX are left out, other types of files counted.
    split_seed: of the cut. val or test is None where root has splits but not this one.
    """
    folder = existing_folder(root, f"Unpack it if it is an archive. {_TABLE}")
    walk = _Walk()
    found = _split_folders(folder)
    if not found:
        classes, images = _class_folders(folder, walk)
        walk.log_left_out(folder)
        return cut_splits(images, classes, split_seed)

    if "train" not in found:
        raise DataError(
            f"{printable(folder)} has {listed([path.name for path in found.values()])} "
            f"but no train folder; {_EXPECTED}"
        )
    classes, train = _class_folders(found["train"], walk)
    held_out = {
        split: _class_folders(found[split], walk, train_classes=classes)[1]
        for split in ("val", "test")
        if split in found
    }
    walk.log_left_out(folder)
    return Splits(classes, train, held_out.get("val"), held_out.get("test"))


class _Walk:
    """One walk over all folders: which were already read, and which files are no images."""

    def __init__(self) -> None:
        self._read: dict[tuple[int, int], str] = {}
        self._left_out: Counter[str] = Counter()

    def images_below(self, folder: str) -> list[str]:
        """Paths of the images at any depth below folder, sorted."""
        status = Path(folder).stat()
        earlier = self._read.setdefault((status.st_dev, status.st_ino), folder)
        if earlier != folder:
            raise DataError(
                f"{printable(folder)} and {printable(earlier)} are the same folder "
                "(a symbolic link): its images would count twice. Remove the link"
            )
        folders, images, others = _entries(folder)
        self._left_out.update(others)
        for inner in folders:
            images += self.images_below(inner)
        return sorted(images)

    def log_left_out(self, root: Path) -> None:
        if self._left_out:
            counts = ", ".join(f"{n} {suffix}" for suffix, n in self._left_out.most_common())
            log.warning("%s: left out files that are no images: %s", printable(root), counts)


def _entries(folder: Path | str) -> tuple[list[str], list[str], list[str]]:
    """What lies straight in folder: paths of folders, sorted, and of images; others' suffixes."""
    folders, images, others = [], [], []
    try:
        with os.scandir(folder) as found:
            for entry in found:
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                if entry.is_dir():
                    folders.append(entry.path)
                    continue
                # pathlib would take seconds for a million files
                suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122
                if suffix in IMAGE_SUFFIXES:
                    images.append(entry.path)
                else:
                    others.append(suffix or "without suffix")
    except OSError as error:
        raise DataError(f"{printable(folder)} cannot be read: {error.strerror}") from error
    return sorted(folders), images, others


def _split_folders(root: Path) -> dict[str, Path]:
    """Split name to its folder; empty where the folders in root are the classes."""
    folders = [Path(path) for path in _entries(root)[0]]
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
    if len(found) == 1 and len(folders) > 1 and not _holds_folders(*found.values()):
        return {}
    if found and (others := [path.name for path in folders if path not in found.values()]):
        log.warning(
            "%s: left out the folders %s, which are neither train, val nor test",
            printable(root), listed(others),
        )  # fmt: skip
    return found


def _class_folders(
    parent: Path, walk: _Walk, train_classes: tuple[str, ...] = ()
) -> tuple[tuple[str, ...], LabelledImages]:
    """The classes in parent and their images. train_classes: what val, test may have."""
    place = printable(parent)
    folders, loose, _ = _entries(parent)
    if not folders:
        what = f"but {len(loose)} images straight in it" if loose else "nor images"
        raise DataError(f"{place} has no class folders, {what}; {_EXPECTED}. {_TABLE}")
    if loose:
        raise DataError(
            f"{place} holds {len(loose)} images outside its class folders, such as "
            f"{printable(min(loose))}; move them to the folder of their class"
        )
    names = [Path(folder).name for folder in folders]
    classes = train_classes or tuple(names)
    if unknown := [name for name in names if name not in classes]:
        raise DataError(
            f"{place} has classes that train lacks: {listed(unknown)}; "
            "add training images of them, or remove these folders"
        )
    if len(classes) == 1:
        inner = Path(folders[0])
        hint = f"; did you mean data.root={printable(inner)}?" if _holds_folders(inner) else ""
        raise DataError(f"{place} has one class folder only, {listed(names)}; {_EXPECTED}{hint}")

    images = [walk.images_below(folder) for folder in folders]
    if empty := [name for name, found in zip(names, images, strict=True) if not found]:
        raise DataError(
            f"{place} has class folders without images: {listed(empty)}; "
            f"remove them or add images ({' '.join(sorted(IMAGE_SUFFIXES))})"
        )
    labels = [
        label
        for name, found in zip(names, images, strict=True)
        for label in [classes.index(name)] * len(found)
    ]
    paths = [Path(path) for found in images for path in found]
    return classes, LabelledImages.of(ImageFiles(paths), labels)


def _holds_folders(folder: Path) -> bool:
    return bool(_entries(folder)[0])

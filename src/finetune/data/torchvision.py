"""torchvision's classification sets by name, downloaded on first use."""

import difflib
import importlib.util
import logging
import os
import socket
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tarfile import TarError
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torchvision import datasets

from finetune.data.base import ImageArray, ImageFiles, LabelledImages, Splits
from finetune.data.path_list import MISSING
from finetune.data.paths import printable
from finetune.data.split import cut_splits
from finetune.errors import ConfigError, DataError
from finetune.network import why_unreachable

log = logging.getLogger(__name__)

_Part = Any  # one of torchvision's datasets, which have neither a base nor names in common

# What a broken connection, a full disk or half an archive raises; URLError is an OSError
_BROKEN = (RuntimeError, OSError, ValueError, EOFError, TarError, BadZipFile, zlib.error)
_STALLED = 15  # seconds without a byte after which a download is given up


def torchvision(
    name: str, root: str = "datasets", download: bool = True, split_seed: int = 0
) -> Splits:
    """The published splits; val is None where none was published, for val is never test.

    name: a key of SETS. root: the folder that holds all of them, in torchvision's layout.
    split_seed: of the 70 / 15 / 15 cut of sets that were published in one piece.
    DataError says which files to put where if they are neither there nor can be downloaded.
    """
    check(name)
    known = SETS[name]
    if known.needs_scipy and importlib.util.find_spec("scipy") is None:
        raise DataError(f"data={name} has labels in MATLAB's format: pip install scipy")

    folder = Path(root).expanduser().absolute()
    parts = _prepared(known, folder)
    if parts is None:
        if not download:
            raise DataError(
                f"data={name}: not found in {printable(folder)}. {known.what_to_put(folder)}, "
                "or download it: data.download=true"
            )
        parts = _downloaded(name, known, folder)

    images = {split: known.read(part) for split, part in parts.items()}
    for split, labelled in images.items():
        _check_complete(f"data={name}", labelled, known.sizes[split], folder)
    classes = tuple(known.classes(parts["train"]))
    if list(images) == ["train"]:
        return cut_splits(images["train"], classes, split_seed)
    return Splits(classes, images["train"], images.get("val"), images["test"])


def check(name: str, **others: Any) -> None:
    """Raise ConfigError if there is no set of that name. others: arguments of torchvision."""
    if name not in SETS:
        close = difflib.get_close_matches(name, SETS)
        hint = f"close: {', '.join(close)}" if close else f"there are: {', '.join(SETS)}"
        raise ConfigError(f"data.name: no torchvision set '{name}'; {hint}")


@dataclass(frozen=True)
class _Set:
    """One set: its class in torchvision.datasets, and what torchvision does not tell of it.

    splits: train, val and test to the keyword arguments that choose them; train alone where the
    set was published in one piece. sizes: published number of images of each.
    archives: URLs; they are unpacked in root/folder. content: what lies there afterwards.
    """

    kind: str
    splits: Mapping[str, Mapping[str, Any]]
    sizes: Mapping[str, int]
    archives: tuple[str, ...]
    folder: str
    content: tuple[str, ...]
    read: Callable[[_Part], LabelledImages]
    classes: Callable[[_Part], Sequence[str]] = field(default=lambda part: part.classes)
    needs_scipy: bool = False

    def load(self, root: Path, download: bool) -> dict[str, _Part]:
        """The dataset object of each split; raises whatever torchvision raises."""
        kind = getattr(datasets, self.kind)
        return {s: kind(root, download=download, **choice) for s, choice in self.splits.items()}

    def archive_files(self, root: Path) -> list[Path]:
        return [root / self.folder / url.rsplit("/", 1)[1] for url in self.archives]

    def what_to_put(self, root: Path) -> str:
        where = printable(root / self.folder)
        content = f"{', '.join(self.content)} in {where}"
        if self.archives:
            return f"Put {', '.join(self.archives)} in {where} (or unpacked: {content})"
        return f"Put {content}"


def _prepared(known: _Set, root: Path) -> dict[str, _Part] | None:
    """The splits if their files are in root, else None."""
    if not root.is_dir():
        return None
    try:
        return known.load(root, download=False)
    except (RuntimeError, OSError, ValueError):  # torchvision's ways to say: not there, not whole
        return None


def _downloaded(name: str, known: _Set, root: Path) -> dict[str, _Part]:
    if not known.archives:
        raise DataError(
            f"data={name}: not found in {printable(root)}, and its authors offer it no longer. "
            f"{known.what_to_put(root)}"
        )
    if not all(file.is_file() for file in known.archive_files(root)):
        url = known.archives[0]
        if reason := why_unreachable(url):
            raise DataError(
                f"data={name}: not found in {printable(root)}, and {url} cannot be reached "
                f"({reason}). {known.what_to_put(root)}; elsewhere: data.root=FOLDER"
            )
        log.info("%s: downloading to %s", name, root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _giving_up_when_stalled():
            return known.load(root, download=True)
    except _BROKEN as error:
        raise DataError(
            f"data={name}: it could not be downloaded and unpacked in {printable(root)}: {error}. "
            f"Delete what is incomplete there and start again, or: {known.what_to_put(root)}"
        ) from error


@contextmanager
def _giving_up_when_stalled() -> Iterator[None]:
    # torchvision opens its connections without a timeout
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_STALLED)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _check_complete(name: str, labelled: LabelledImages, published: int, root: Path) -> None:
    """An interrupted unpacking leaves a folder that torchvision takes for the whole."""
    if len(labelled) != published:
        log.warning(
            "%s: %d images where %d were published; if unpacking was interrupted, "
            "delete its folder in %s", name, len(labelled), published, root,
        )  # fmt: skip
    if isinstance(labelled.images, ImageFiles):
        status = labelled.images.paths.status(range(len(labelled)))
        missing = [os.fsdecode(path) for path, size, _ in status if size == MISSING]
        if missing:
            raise DataError(
                f"{name}: {len(missing)} of {len(labelled)} images are missing, such as "
                f"{printable(missing[0])}; unpack the archive again"
            )


def _array(part: _Part, labels: Sequence[int]) -> LabelledImages:
    """part.data: uint8 (N, 3, H, W)."""
    return LabelledImages.of(ImageArray(torch.from_numpy(np.ascontiguousarray(part.data))), labels)


def _cifar(part: _Part) -> LabelledImages:
    images = torch.from_numpy(part.data).permute(0, 3, 1, 2)
    return LabelledImages.of(ImageArray(images), part.targets)


def _files(part: _Part) -> LabelledImages:
    return LabelledImages.of(ImageFiles(part._image_files), part._labels)


def _samples(samples: Sequence[tuple[str, int]]) -> LabelledImages:
    paths, labels = zip(*samples, strict=True)
    return LabelledImages.of(ImageFiles(paths), labels)


def _caltech101(part: _Part) -> LabelledImages:
    folder = Path(part.root) / "101_ObjectCategories"
    paths = [
        folder / part.categories[label] / f"image_{number:04d}.jpg"
        for label, number in zip(part.y, part.index, strict=True)
    ]
    return LabelledImages.of(ImageFiles(paths), part.y)


def _pets(part: _Part) -> LabelledImages:
    return LabelledImages.of(ImageFiles(part._images), part._labels)


# The 43 signs of GTSRB in the order of their numbers, which is all that the files hold
_TRAFFIC_SIGNS = (
    *(f"speed limit {limit}" for limit in (20, 30, 50, 60, 70, 80)),
    *("end of speed limit 80", "speed limit 100", "speed limit 120", "no passing"),
    *("no passing for trucks", "right of way at the next crossing", "priority road", "yield"),
    *("stop", "no vehicles", "no trucks", "no entry", "danger", "curve left", "curve right"),
    *("double curve", "bumpy road", "slippery road", "road narrows on the right", "road works"),
    *("traffic lights", "pedestrians", "children", "bicycles", "ice or snow", "wild animals"),
    *("end of all limits", "turn right ahead", "turn left ahead", "ahead only"),
    *("straight or right", "straight or left", "keep right", "keep left", "roundabout"),
    *("end of no passing", "end of no passing for trucks"),
)

_TRAIN_TEST = {"train": {"split": "train"}, "test": {"split": "test"}}
_TRAIN_VAL_TEST = {split: {"split": split} for split in ("train", "val", "test")}
_CIFAR = {"train": {"train": True}, "test": {"train": False}}

_TORONTO = "https://www.cs.toronto.edu/~kriz"
_OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
_ERDA = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370"
_HOUSES = "http://ufldl.stanford.edu/housenumbers"

SETS: Mapping[str, _Set] = {
    "cifar10": _Set(
        "CIFAR10",
        _CIFAR,
        sizes={"train": 50000, "test": 10000},
        archives=(f"{_TORONTO}/cifar-10-python.tar.gz",),
        folder="",
        content=("cifar-10-batches-py/",),
        read=_cifar,
    ),
    "cifar100": _Set(
        "CIFAR100",
        _CIFAR,
        sizes={"train": 50000, "test": 10000},
        archives=(f"{_TORONTO}/cifar-100-python.tar.gz",),
        folder="",
        content=("cifar-100-python/",),
        read=_cifar,
    ),
    "flowers102": _Set(
        "Flowers102",
        _TRAIN_VAL_TEST,
        sizes={"train": 1020, "val": 1020, "test": 6149},
        archives=tuple(
            f"{_OXFORD}/flowers/102/{file}"
            for file in ("102flowers.tgz", "imagelabels.mat", "setid.mat")
        ),
        folder="flowers-102",
        content=("jpg/", "imagelabels.mat", "setid.mat"),
        read=_files,
        needs_scipy=True,
    ),
    "oxford_iiit_pet": _Set(
        "OxfordIIITPet",
        {"train": {"split": "trainval"}, "test": {"split": "test"}},
        sizes={"train": 3680, "test": 3669},
        archives=(f"{_OXFORD}/pets/data/images.tar.gz", f"{_OXFORD}/pets/data/annotations.tar.gz"),
        folder="oxford-iiit-pet",
        content=("images/", "annotations/"),
        read=_pets,
    ),
    "dtd": _Set(  # partition 1 of its 10, as torchvision's default and most papers
        "DTD",
        _TRAIN_VAL_TEST,
        sizes={"train": 1880, "val": 1880, "test": 1880},
        archives=(f"{_OXFORD}/dtd/download/dtd-r1.0.1.tar.gz",),
        folder="dtd",
        content=("dtd/",),
        read=_files,
    ),
    "fgvc_aircraft": _Set(
        "FGVCAircraft",
        _TRAIN_VAL_TEST,
        sizes={"train": 3334, "val": 3333, "test": 3333},
        archives=(f"{_OXFORD}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz",),
        folder="",
        content=("fgvc-aircraft-2013b/",),
        read=_files,
    ),
    "stanford_cars": _Set(
        "StanfordCars",
        _TRAIN_TEST,
        sizes={"train": 8144, "test": 8041},
        archives=(),
        folder="stanford_cars",
        content=(
            "devkit/cars_meta.mat",
            "devkit/cars_train_annos.mat",
            "cars_test_annos_withlabels.mat",
            "cars_train/*.jpg",
            "cars_test/*.jpg",
        ),
        read=lambda part: _samples(part._samples),
        needs_scipy=True,
    ),
    "food101": _Set(
        "Food101",
        _TRAIN_TEST,
        sizes={"train": 75750, "test": 25250},
        archives=("http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",),
        folder="",
        content=("food-101/",),
        read=_files,
    ),
    "eurosat": _Set(
        "EuroSAT",
        {"train": {}},
        sizes={"train": 27000},
        archives=(
            "https://huggingface.co/datasets/torchgeo/eurosat/resolve/"
            "c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip",
        ),
        folder="eurosat",
        content=("2750/",),
        read=lambda part: _samples(part.samples),
    ),
    "svhn": _Set(
        "SVHN",
        _TRAIN_TEST,
        sizes={"train": 73257, "test": 26032},
        archives=(f"{_HOUSES}/train_32x32.mat", f"{_HOUSES}/test_32x32.mat"),
        folder="",
        content=("train_32x32.mat", "test_32x32.mat"),
        read=lambda part: _array(part, part.labels),
        classes=lambda part: tuple("0123456789"),
        needs_scipy=True,
    ),
    "stl10": _Set(
        "STL10",
        _TRAIN_TEST,
        sizes={"train": 5000, "test": 8000},
        archives=("http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",),
        folder="",
        content=("stl10_binary/",),
        read=lambda part: _array(part, part.labels),
    ),
    "caltech101": _Set(
        "Caltech101",
        {"train": {}},
        sizes={"train": 8677},
        archives=("https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip",),
        folder="caltech101",
        content=("101_ObjectCategories/",),
        read=_caltech101,
        classes=lambda part: part.categories,
    ),
    "gtsrb": _Set(
        "GTSRB",
        _TRAIN_TEST,
        sizes={"train": 26640, "test": 12630},
        archives=tuple(
            f"{_ERDA}/GTSRB{part}.zip"
            for part in ("-Training_fixed", "_Final_Test_Images", "_Final_Test_GT")
        ),
        folder="gtsrb",
        content=("GTSRB/Training/", "GTSRB/Final_Test/Images/", "GT-final_test.csv"),
        read=lambda part: _samples(part._samples),
        classes=lambda part: _TRAFFIC_SIGNS,
    ),
    "imagenette": _Set(  # it was published as train and val only: its val is the test here
        "Imagenette",
        {
            "train": {"split": "train", "size": "320px"},
            "test": {"split": "val", "size": "320px"},
        },
        sizes={"train": 9469, "test": 3925},
        archives=("https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz",),
        folder="",
        content=("imagenette2-320/",),
        read=lambda part: _samples(part._samples),
        classes=lambda part: [names[0] for names in part.classes],
    ),
}

"""Images kept as they were read: in memory that workers share, or in a file for later runs."""

import hashlib
import logging
import mmap
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import PIL
import torch
import torchvision
from torch import Tensor

from finetune.data.base import ImageFiles, LabelledImages
from finetune.data.read import image_size
from finetune.data.scan import alone
from finetune.data.transforms import Transform
from finetune.errors import ConfigError, DataError
from finetune.files import is_newer, make_room, note_read, readable, sweep_abandoned, write_whole
from finetune.machine import threads, usable_cores

log = logging.getLogger(__name__)

FORMAT = 2
SHARE_OF_MEMORY = 0.25  # of what is free, as long as nobody asks for more
SAMPLE, MARGIN = 200, 1.1  # files whose headers are read, and what the others may have above them
MOST_ON_DISK = 50e9  # bytes of all files; those that were not read for longest go first
READ_AT_ONCE = 2e9  # bytes of a file; its pixels are looked at before it is taken
_BLOCK = 2**26  # bytes of memory taken at once; a part that is not used costs nothing
_AT_ONCE = 16  # images that a thread takes
_PROGRESS_EVERY = 30  # seconds
_COLUMNS = 6  # of places
_FOOTER = 16  # bytes

Read = Callable[[int], Tensor]


@dataclass(frozen=True)
class Need:
    """Of a split of files: bytes that it takes when it is kept, and how often a run reads it."""

    num_bytes: int
    reads: int


@dataclass(frozen=True)
class Choice:
    """Where images are kept, and of which splits. most: bytes of a split, where auto chose.

    kind: device: training images are there, other splits in memory. why: training images are
    not kept, where something could be done about it. tentative: they are kept in memory, should
    they turn out to be of several sizes.
    """

    kind: Literal["ram", "disk", "device", "none"] = "none"
    splits: tuple[str, ...] = ()
    most: int | None = None
    why: str | None = None
    tentative: bool = False


def choose(asked: str, needs: Mapping[str, Need], memory: int | None, ranks: int) -> Choice:
    """What data.cache= comes to. memory: free bytes, None if not known. ranks: on this machine.

    Raises ConfigError where what was typed cannot be.
    """
    if asked == "disk":  # also for later runs
        return Choice("disk", tuple(name for name, need in needs.items() if need.reads))
    again = {name: need.num_bytes for name, need in needs.items() if need.reads > 1}
    if asked == "none" or not again:
        return Choice()
    total = sum(again.values())
    if asked == "ram":
        if ranks > 1:
            raise ConfigError(
                f"data.cache=ram: each of {ranks} devices would hold a copy; all of them share "
                "data.cache=disk"
            )
        if memory is not None and total > memory:
            raise ConfigError(
                f"data.cache=ram: the images take about {readable(total)} decoded, and "
                f"{readable(memory)} of memory are free; type data.cache=disk or data.cache=none"
            )
        return Choice("ram", tuple(again))
    if ranks > 1:
        return Choice(why=f"{ranks} devices would hold a copy each; they share data.cache=disk")
    if memory is None:
        return Choice(why="the free memory is not known here; there is data.cache=ram")
    kept, left, why = [], SHARE_OF_MEMORY * memory, None
    for name, num_bytes in again.items():
        if num_bytes <= left:
            kept.append(name)
            left -= num_bytes
        elif name == "train":
            why = (
                f"decoded they take about {readable(num_bytes)}, and {readable(memory)} of memory "
                "are free; there is data.cache=disk"
            )
            if total <= memory:
                why += ", and data.cache=ram for more than a quarter"
    return Choice("ram" if kept else "none", tuple(kept), memory // 2, why)


def decoded_bytes(images: LabelledImages) -> int:
    """Bytes of all images of a split; where they are many, a guess from the sizes of some."""
    found = sizes_of_some(images)
    if not found:  # what is wrong is told by name when they are read
        return 0
    margin = 1.0 if len(images) <= SAMPLE else MARGIN
    mean = sum(3 * height * width for height, width in found) / len(found)
    return int(margin * mean * len(images))


def sizes_of_some(images: LabelledImages) -> list[tuple[int, int]]:
    """Height and width of some images all over a split, those left out that cannot be read."""
    chosen = np.linspace(0, len(images) - 1, min(len(images), SAMPLE), dtype=int).tolist()
    return [size for position in chosen if (size := _size(images, position))]


def _size(images: LabelledImages, position: int) -> tuple[int, int] | None:
    try:
        if isinstance(images.images, ImageFiles):
            return image_size(images.images.paths[images.indices[position]])
        height, width = images[position][0].shape[-2:]
        return height, width
    except DataError:
        return None


class CachedImages:
    """N images that were read once, uint8 (3, H, W), with the strides that they had.

    blocks: flat uint8. places: int64 (N, 6): block, first byte, CRC-32, H, W, 1 where a pixel's
    channels stand together. path: of the file that holds them; None for memory, without CRCs.
    """

    def __init__(
        self, blocks: Sequence[np.ndarray], places: np.ndarray, path: Path | None = None
    ) -> None:
        self.blocks, self.places, self.path = blocks, places, path
        self._sound = np.zeros(len(places), bool)  # what was found to be so

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Tensor:
        block, first, _, height, width, together = self.places[index].tolist()
        if self.path is not None and not self.is_sound(index):
            try:
                self.path.unlink()
                then = "The file is removed"
            except OSError as error:
                then = f"Remove the file, which is refused here ({error.strerror})"
            raise DataError(
                f"{self.path}: an image that is kept there is damaged. {then}; the next run makes "
                "it anew, and this one goes on with resume="
            )
        # a copy: a transform that writes into its image would write into all later epochs
        flat = torch.from_numpy(self.blocks[block][first : first + 3 * height * width].copy())
        # as they were in memory, too: kernels for the one order may round unlike those for another
        if together:
            return flat.view(height, width, 3).permute(2, 0, 1)
        return flat.view(3, height, width)

    def is_sound(self, index: int) -> bool:
        """Whether an image of a file is what was written; asked once."""
        if not self._sound[index]:
            block, first, crc, height, width, _ = self.places[index].tolist()
            pixels = self.blocks[block][first : first + 3 * height * width]
            self._sound[index] = zlib.crc32(pixels) == crc
        return bool(self._sound[index])

    def __reduce__(self) -> Any:
        """A worker that is no fork opens the file again; without one it gets a copy."""
        if self.path is None:
            return CachedImages, ([*self.blocks], self.places)
        return opened, (self.path, len(self))

    @property
    def nbytes(self) -> int:
        """Of the pixels."""
        return num_bytes_of(self.places)


class ImageCache:
    """Reads each split that is to be kept once, with all cores, before its first batch is drawn.

    folder: of the files of data.cache=disk. since: a time; what is older there is made anew.
    """

    def __init__(self, choice: Choice, folder: Path, since: float = 0.0) -> None:
        self.choice, self.folder, self.since = choice, folder, since
        self._kept: dict[str, CachedImages | None] = {}
        self._made: set[Path] = set()  # files of this run

    def has(self, name: str) -> bool:
        """Whether images of a split are there by now."""
        return self._kept.get(name) is not None

    def get(
        self, name: str, images: LabelledImages, transform: Transform | None
    ) -> CachedImages | None:
        """Images of a split, in its order; transformed, if the transform is given: a fixed one.

        None where they are not kept. DataError names an image that cannot be read.
        """
        if name not in self.choice.splits:
            return None
        if name not in self._kept:
            try:
                self._kept[name] = self._keep(name, images, transform)
            except (OSError, _TooLarge) as error:
                reason = getattr(error, "strerror", None) or error
                log.warning("images of %s are read again in every epoch: %s", name, reason)
                self._kept[name] = None
        return self._kept[name]

    def stacked(self, images: LabelledImages, transform: Transform | None) -> Tensor | None:
        """Training images of one size, uint8 (N, 3, H, W).

        If they have several, ConfigError; where the choice is tentative None, and get has them.
        """
        kept = self._keep("train", images, transform)
        sizes = np.unique(kept.places[:, 3:5], axis=0).tolist()
        if len(sizes) > 1 and self.choice.tentative:
            self._kept["train"], self.choice = kept, replace(self.choice, kind="ram")
            return None
        if len(sizes) > 1:
            raise ConfigError(
                f"data.cache=device: augment= crops images of one size there, and these have "
                f"{len(sizes)}, such as {' and '.join(f'{w} x {h}' for h, w in sizes[:2])}; type "
                "data.cache=ram"
            )
        pixels = torch.empty(len(kept), 3, *sizes[0], dtype=torch.uint8)
        for position in range(len(kept)):
            pixels[position] = kept[position]
        return pixels

    def _keep(self, name: str, images: LabelledImages, transform: Transform | None) -> CachedImages:
        began = time.monotonic()

        def read(position: int) -> Tensor:
            image = images[position][0]
            return image if transform is None else transform(image)

        if self.choice.kind != "disk":
            memory = _Memory(self.choice.most)
            kept = CachedImages(memory.blocks, _read_all(len(images), read, memory.append))
            where, how = "in memory", "read"
        else:
            kept, how = self._on_disk(images, read, transform)
            where = f"in {kept.path}"
        form = "as decoded" if transform is None else "as the model sees them"
        log.info(
            "images: %s of %s kept %s %s, %s, %s in %.1f s (data.cache=)",
            f"{len(kept):,}", name, where, form, readable(kept.nbytes), how,
            time.monotonic() - began,
        )  # fmt: skip
        return kept

    def _on_disk(
        self, images: LabelledImages, read: Read, transform: Transform | None
    ) -> tuple[CachedImages, str]:
        """The file of these images; of several processes the first one makes it."""
        name = digest(images, transform)
        if name is None:
            raise ConfigError(
                "data.cache=disk: these images have no fingerprint to be found by; type "
                "data.cache=ram or data.cache=none"
            )
        path = self.folder / f"{name}.images"
        with alone(path.with_suffix(".lock"), "another process reads the same images"):
            if is_newer(path, self.since) and (found := opened(path, len(images))):
                self._made.add(path)
                note_read(path)
                return found, "found"
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep_abandoned(path, alone=True)
            if transform is None:
                needed = decoded_bytes(images)
            else:
                needed = transform(torch.zeros(3, 1, 1, dtype=torch.uint8)).nbytes * len(images)
            free = shutil.disk_usage(self.folder).free
            if needed > free:
                raise ConfigError(
                    f"data.cache=disk: the images take about {readable(needed)}, and {self.folder} "
                    f"has room for {readable(free)}; type data.cache=none, or name another disk "
                    "in the environment: FINETUNE_CACHE=FOLDER"
                )
            write_whole(path, lambda file: _write(file, len(images), read))
            self._made.add(path)
            make_room(self._made, MOST_ON_DISK)
            made = opened(path, len(images))
        if made is None:
            raise OSError(f"{path} does not hold what was written")
        return made, "read"


def digest(images: LabelledImages, transform: Transform | None) -> str | None:
    """Of the files and of all that makes pixels of them; None where images have no fingerprint."""
    files = images.fingerprint()
    if files is None:
        return None
    readers = (PIL.__version__, str(torchvision.__version__), str(torch.__version__))
    parts = (FORMAT, readers, files, None if transform is None else repr(transform))
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def opened(path: Path, num_images: int) -> CachedImages | None:
    """The images in a file; None if it is not there or not whole."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        tail = num_images * _COLUMNS * 8 + _FOOTER
        if size > tail:
            file.seek(size - tail)
            stored, footer = file.read(tail - _FOOTER), file.read(_FOOTER)
            if footer == _footer(stored):  # what stands elsewhere in a file are no places
                places = np.frombuffer(stored, "<i8").reshape(num_images, _COLUMNS)
                if num_bytes_of(places) == size - tail:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                    found = CachedImages([np.frombuffer(mapped, np.uint8)], places, path)
                    # a larger one is read when it is needed
                    if size > READ_AT_ONCE or all(map(found.is_sound, range(num_images))):
                        return found
    log.warning("%s is not whole and is made anew", path)
    return None


def num_bytes_of(places: np.ndarray) -> int:
    """Bytes of all images."""
    return int(3 * (places[:, 3] * places[:, 4]).sum())


class _TooLarge(Exception):
    """More bytes than were allowed."""


class _Memory:
    """Takes memory that forked workers share with this process, as images come."""

    def __init__(self, most: int | None) -> None:
        self.blocks: list[np.ndarray] = []
        self._most, self._total, self._used = most, 0, 0

    def append(self, pixels: np.ndarray) -> tuple[int, int]:
        self._total += pixels.size
        if self._most is not None and self._total > self._most:
            raise _TooLarge(f"they take more than {readable(self._most)} (data.cache=)")
        if not self.blocks or self._used + pixels.size > self.blocks[-1].size:
            # no file in /dev/shm, which is 64 MB small in containers
            taken = mmap.mmap(-1, max(_BLOCK, pixels.size))
            self.blocks.append(np.frombuffer(taken, np.uint8))
            self._used = 0
        first = self._used
        self._used += pixels.size
        self.blocks[-1][first : self._used] = pixels
        return len(self.blocks) - 1, first


def _write(file: BinaryIO, num_images: int, read: Read) -> None:
    def append(pixels: np.ndarray) -> tuple[int, int]:
        first = file.tell()
        file.write(pixels.data)
        return 0, first

    places = _read_all(num_images, read, append, checked=True).astype("<i8").tobytes()
    file.write(places + _footer(places))


def _footer(places: bytes) -> bytes:
    return hashlib.blake2b(places, digest_size=_FOOTER, person=b"images %d" % FORMAT).digest()


def _read_all(
    num_images: int,
    read: Read,
    append: Callable[[np.ndarray], tuple[int, int]],
    checked: bool = False,
) -> np.ndarray:
    """Hand all images to append, one at a time and in any order; gives their places.

    checked: with CRCs. Of several that cannot be read the first is raised.
    """
    places = np.zeros((num_images, _COLUMNS), np.int64)
    lock, stop = threading.Lock(), threading.Event()

    def some(start: int) -> None:
        for position in range(start, min(start + _AT_ONCE, num_images)):
            if stop.is_set():
                break
            image = read(position)
            together = not image.is_contiguous() and image.permute(1, 2, 0).is_contiguous()
            flat = (image.permute(1, 2, 0) if together else image).contiguous().flatten().numpy()
            crc = zlib.crc32(flat.data) if checked else 0
            with lock:
                place = append(flat)
            places[position] = (*place, crc, image.shape[1], image.shape[2], together)

    starts = range(0, num_images, _AT_ONCE)
    began = told = time.monotonic()
    with threads(1):  # torch spreads nothing over more
        pool = ThreadPoolExecutor(max(1, min(usable_cores(), len(starts))))
        try:
            for start, _ in zip(starts, pool.map(some, starts), strict=True):
                if time.monotonic() - told >= _PROGRESS_EVERY:
                    told = time.monotonic()
                    log.info("read %d of %d images, %.0f s", start, num_images, told - began)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    return places

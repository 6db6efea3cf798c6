"""A look at every image before the training: what cannot be read, and what stands there twice.

What is good is kept in a cache beside other users' caches, never among the data. A later start
then reads the time of change of the folders only: files in a folder that changed are held against
the cache by size and time of change, and what was bad is looked at again. A file that was
overwritten in place, which leaves its folder's time as it was, is seen with rescan alone.
"""

import json
import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
import torchvision

from finetune.data.path_list import UNASKED, Names, Paths, inside, size_and_time
from finetune.data.paths import printable
from finetune.data.read import IMAGE_SUFFIXES, LARGE, BadImage, check_image
from finetune.errors import DataError
from finetune.files import cache_folder, note_read, remove_oldest, write_whole
from finetune.machine import process_rank, usable_cores

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

OnBad = Literal["error", "skip"]
MOST_SHOWN = 20
SKIP = "To go on without these files: data.on_bad=skip"

_STARTED = time.time()  # of this process, nearly
_VERSION = 1  # of the cache
_FILE = np.dtype([("size", "<i8"), ("mtime", "<i8"), ("digest", "<u8", 2), ("state", "u1")])
_UNKNOWN, _GOOD, _GOOD_BUT_LARGE = range(3)
# of a folder, in the cache as they are; its names and files stand beside
_STORED = ("changed_at", "inode", "folders", "others", "hidden", "metadata", "stuck")
_MOST_ON_DISK = 1e9  # bytes of all caches: some 20 million files
_TICK = 2_000_000_000  # ns: two changes within it may leave the same time behind (FAT: 2 s)
_AT_ONCE = 64  # files that a thread takes
_ANNOUNCED = 5_000  # files whose scan is announced
_PROGRESS_EVERY = 30  # seconds
_OTHERS_SCAN = "another process scans the same images"


@dataclass(frozen=True)
class Problem:
    """Something wrong with the data. kind: few words, to count by. what: one line."""

    kind: str
    what: str


class BadData(DataError):
    """All that is wrong with a data set, in one message: the first 20, and counts by kind."""

    def __init__(self, place: str, problems: Sequence[Problem], advice: str = "") -> None:
        self.problems = problems
        super().__init__(_message(place, problems, advice))

    def listed_in(self, path: Path) -> DataError:
        """The same, and where all of the problems stand, a line each, if it shows only some."""
        if len(self.problems) <= MOST_SHOWN:
            return self
        lines = "".join(f"{problem.kind}\t{problem.what}\n" for problem in self.problems)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda file: file.write(lines.encode()))
        except OSError as error:
            return DataError(f"{self}\n{path} for all of them cannot be written: {error.strerror}")
        return DataError(f"{self}\nAll of them: {path}")


def _message(place: str, problems: Sequence[Problem], advice: str) -> str:
    if len(problems) == 1:
        return f"{problems[0].what}. {advice}" if advice else problems[0].what
    lines = [f"{place}: {len(problems)} problems: {by_kind(p.kind for p in problems)}"]
    lines += [f"  {problem.what}" for problem in problems[:MOST_SHOWN]]
    if len(problems) > MOST_SHOWN:
        lines.append(f"  and {len(problems) - MOST_SHOWN} more")
    return "\n".join([*lines, advice] if advice else lines)


def by_kind(kinds: Iterable[str]) -> str:
    """Such as: 3 truncated, 1 empty."""
    return ", ".join(f"{count} {kind}" for kind, count in Counter(kinds).most_common())


def problems_of(bad: Mapping[str, BadImage]) -> list[Problem]:
    """The files that cannot be read, in the order of their paths."""
    return [Problem(bad[path].kind, str(bad[path])) for path in sorted(bad)]


def skipped(place: str, bad: Mapping[str, BadImage]) -> tuple[dict[str, str], ...]:
    """{path, why} of the files that are left out, for run.json; a warning tells of them."""
    if bad:
        first = min(bad)
        log.warning(
            "%s: data.on_bad=skip leaves out %d files that cannot be read: %s; such as %s: %s",
            place, len(bad), by_kind(error.kind for error in bad.values()),
            printable(first), bad[first].why,
        )  # fmt: skip
    return tuple({"path": printable(path), "why": bad[path].why} for path in sorted(bad))


@dataclass
class Folder:
    """What lies straight in a folder; or, where a table lists them, some of its images.

    names: of the images. files: what is known of each. is_fresh: it did not change since the cache
    was written, so that what is known still holds.
    """

    path: str
    changed_at: int  # ns
    inode: int
    device: int
    is_fresh: bool = False
    names: Names = field(default_factory=Names)
    files: np.ndarray = field(default_factory=lambda: np.zeros(0, _FILE))
    folders: list[str] = field(default_factory=list)  # names
    others: dict[str, int] = field(default_factory=dict)  # suffixes of what is no image, counted
    hidden: list[str] = field(default_factory=list)  # folders, and images
    metadata: list[str] = field(default_factory=list)  # of macOS: ._photo.jpg
    stuck: list[str] = field(default_factory=list)  # links that cannot be followed

    def below(self, names: Iterable[str]) -> list[str]:
        """Their paths, sorted."""
        start = inside(self.path)
        return sorted(start + name for name in names)

    def images(self) -> Paths:
        """Their paths, sorted; with their sizes and times, if look() has just asked for those."""
        good = (self.files["state"] != _UNKNOWN) & (not self.is_fresh)
        asked = np.stack([self.files["size"], self.files["mtime"]], axis=1)
        return Paths.below(self.path, self.names, np.where(good[:, None], asked, UNASKED))

    @property
    def identity(self) -> tuple[int, int]:
        """The same for two paths to one folder."""
        return self.device, self.inode


class Scan(AbstractContextManager["Scan"]):
    """A look at folders and at the images in them. bad: what cannot be read, after look().

    what: names the cache, with root, to which its paths are relative.
    While one process has a scan of the same data open, others wait, and find what it found.
    """

    def __init__(self, what: str, root: Path, max_pixels: int, rescan: bool) -> None:
        self.max_pixels, self._key_root = max_pixels, _absolute(str(root))
        self.bad: dict[str, BadImage] = {}
        self._seen: dict[str, Folder] = {}
        self._earlier: dict[str, Folder] = {}
        self._rescan = rescan
        self._began = time.time_ns()
        self._is_new = False  # whether there is something to keep
        self._stop = threading.Event()
        self._open = ExitStack()
        self._key = {
            "version": _VERSION,
            "of": f"{what} {printable(self._key_root)}",
            "max_pixels": max_pixels,
            "readers": [PIL.__version__, str(torchvision.__version__)],
        }
        name = blake2b(os.fsencode(f"{what}\0{self._key_root}"))
        self.cache = cache_folder("scans") / f"{name.hexdigest()[:20]}.npz"

    def __enter__(self) -> "Scan":
        self._open.enter_context(alone(self.cache.with_suffix(".lock"), _OTHERS_SCAN))
        self._earlier, written_at = self._load()
        if process_rank() > 0 and written_at >= _STARTED:  # the first rank has just done it
            self._rescan = False
        return self

    def __exit__(self, *error: object) -> None:
        try:  # what was seen before a signal, too
            if self._is_new or not all(folder.is_fresh for folder in self._seen.values()):
                self._save()
        except OSError as failed:
            log.warning(
                "%s cannot be written (%s): the next start will look at all images again",
                self.cache, failed.strerror,
            )  # fmt: skip
        finally:
            self._open.close()

    def folder(self, path: str, names: Sequence[str] | None = None) -> Folder:
        """A folder, read unless it is as it was. names: the images in it that a table lists.

        Raises OSError; not with names, since the reason is told of each image.
        """
        key = _absolute(path).removeprefix(self._key_root)
        if found := self._seen.get(key):
            return found
        try:
            status = os.stat(path)  # noqa: PTH116
        except OSError:
            if names is None:
                raise
            return Folder(path, 0, 0, 0, False, Names.of(names), np.zeros(len(names), _FILE))
        earlier = None if self._rescan else self._earlier.get(key)
        is_fresh = bool(
            earlier
            and earlier.is_fresh
            and (earlier.changed_at, earlier.inode) == (status.st_mtime_ns, status.st_ino)
        )
        if earlier and is_fresh and names is None:
            found = earlier
            found.path, found.device = path, status.st_dev
        else:
            found = Folder(path, status.st_mtime_ns, status.st_ino, status.st_dev, is_fresh)
            if names is None:
                _list(found)
            else:
                found.names = Names.of(names)
            found.files = np.zeros(len(found.names), _FILE)
            if earlier:
                _take_over(found, earlier)
        self._seen[key] = found
        return found

    def look(self, folders: Sequence[Folder]) -> None:
        """Read every image in these folders of which the cache does not say that it is good."""
        chunks = [(folder, part) for folder in folders for part in _parts(folder)]
        count, num_read = sum(len(positions) for _, positions in chunks), 0
        threads = max(1, min(usable_cores(), len(chunks)))
        if count >= _ANNOUNCED:
            log.info("scanning %d images with %d threads", count, threads)
        began = told = time.monotonic()
        pool = ThreadPoolExecutor(threads)
        try:
            for done, read in enumerate(pool.map(lambda chunk: self._look(*chunk), chunks)):
                num_read += read
                self._is_new |= read > 0
                if time.monotonic() - told >= _PROGRESS_EVERY:
                    told = time.monotonic()
                    log.info("scanned %d of %d images", (done + 1) * count // len(chunks), count)
        except BaseException:
            self._stop.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        if num_read:
            log.info("scanned %d images in %.1f s", num_read, time.monotonic() - began)
        self._warn_of_large(folders)

    def _look(self, folder: Folder, positions: Sequence[int]) -> int:
        """Number of images that were read. In a thread: each writes rows of its own."""
        num_read, start = 0, inside(folder.path)
        for position in positions:
            if self._stop.is_set():
                break
            path = start + folder.names[position]
            row, now = folder.files[position], size_and_time(path)
            if row["state"] and (row["size"], row["mtime"]) == now:
                continue
            num_read += 1
            row["state"] = _UNKNOWN
            try:
                pixels, digest = check_image(Path(path), self.max_pixels)
            except BadImage as error:
                self.bad[path] = error
            else:
                state = _GOOD_BUT_LARGE if pixels > LARGE else _GOOD
                folder.files[position] = (*now, np.frombuffer(digest, "<u8"), state)
        return num_read

    def _warn_of_large(self, folders: Sequence[Folder]) -> None:
        large = [
            path
            for folder in folders
            for path in folder.below(
                folder.names[i]
                for i in np.flatnonzero(folder.files["state"] == _GOOD_BUT_LARGE).tolist()
            )
        ]
        if large:
            log.warning(
                "%d images have more than %d pixels, such as %s; each takes gigabytes to decode",
                len(large), LARGE, printable(large[0]),
            )  # fmt: skip

    def doubles(self, folders: Sequence[Folder]) -> tuple[tuple[str, ...], ...]:
        """Paths of the good images with the same bytes, a group for each content."""
        good = [np.flatnonzero(folder.files["state"]) for folder in folders]
        if not sum(map(len, good)):
            return ()
        digests = np.concatenate(
            [f.files["digest"][chosen] for f, chosen in zip(folders, good, strict=True)]
        )
        order = np.argsort(digests[:, 0], kind="stable")
        equal = np.flatnonzero(np.diff(digests[order, 0].astype(np.uint64)) == 0)
        ends = np.cumsum([len(chosen) for chosen in good])
        groups: dict[bytes, list[str]] = {}
        for place in np.unique(order[np.concatenate([equal, equal + 1])]).tolist():
            which = int(np.searchsorted(ends, place, side="right"))
            position = good[which][place - ends[which] + len(good[which])]
            (path,) = folders[which].below([folders[which].names[int(position)]])
            groups.setdefault(digests[place].tobytes(), []).append(path)
        return tuple(tuple(group) for group in groups.values() if len(group) > 1)

    def _load(self) -> tuple[dict[str, Folder], float]:
        """The folders in the cache by path, and when it was written; none if it does not fit."""
        try:
            with self.cache.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                header = json.loads(bytes(stored["header"]))
                if header["key"] != self._key:
                    return {}, 0
                names = Names(bytes(stored["names"]) + b"\0")
                files, at, found = stored["files"], 0, {}
            for facts in header["folders"]:
                key, count = facts.pop("key"), facts.pop("count")
                part, known = names.part(at, at + count), files[at : at + count]
                found[key] = Folder(key, device=0, names=part, files=known, **facts)
                at += count
            note_read(self.cache)
            return found, float(header["written_at"])
        except (FileNotFoundError, NotADirectoryError):
            return {}, 0
        except Exception as error:  # whatever half a file raises
            log.warning("%s cannot be read (%s) and is made anew", self.cache, type(error).__name__)
            return {}, 0

    def _save(self) -> None:
        now = time.time_ns()
        folders, files = [], []
        for key, folder in self._seen.items():
            kept = folder.files.copy()
            # what changed just now could change once more and leave the same time behind
            recent = (kept["mtime"] >= self._began - _TICK) & (kept["mtime"] <= now + _TICK)
            kept["state"][recent] = _UNKNOWN
            settled = not self._began - _TICK <= folder.changed_at <= now + _TICK
            folders.append(
                {
                    "key": key,
                    "count": len(folder.names),
                    "is_fresh": bool(settled and not recent.any()),
                    **{name: getattr(folder, name) for name in _STORED},
                }
            )
            files.append(kept)
        header = {"key": self._key, "written_at": time.time(), "folders": folders}
        names = b"".join([folder.names.packed for folder in self._seen.values()])[:-1]
        arrays: dict[str, Any] = {
            "header": np.frombuffer(json.dumps(header).encode(), np.uint8),
            "names": np.frombuffer(names, np.uint8),
            "files": np.concatenate([np.zeros(0, _FILE), *files]),
        }
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.cache, lambda file: np.savez(file, **arrays))
        remove_oldest(_caches(self.cache.parent), _MOST_ON_DISK, kept=[self.cache])


def _caches(folder: Path) -> list[Path]:
    """Of all scans, and what is left of those whose writing was cut off."""
    ours = re.compile(r"[0-9a-f]{20}\.npz(\.\d+\.part)?")
    return [path for path in folder.iterdir() if ours.fullmatch(path.name)]


def _list(folder: Folder) -> None:
    """Sort what lies in a folder by what it is. Raises OSError."""
    images = []
    with os.scandir(folder.path) as found:
        for entry in found:
            name, suffix = entry.name, os.path.splitext(entry.name)[1].lower()  # noqa: PTH122
            try:
                is_folder, is_stuck = entry.is_dir(), False
            except OSError:  # a link to itself
                is_folder, is_stuck = False, True
            if name.startswith("._") and not is_folder and suffix in IMAGE_SUFFIXES:
                folder.metadata.append(name)
            elif name.startswith(".") or name == "__MACOSX":
                if is_folder or suffix in IMAGE_SUFFIXES:
                    folder.hidden.append(name)
            elif is_folder:
                folder.folders.append(name)
            elif suffix in IMAGE_SUFFIXES:
                images.append(name)
            elif is_stuck:
                folder.stuck.append(name)
            else:
                suffix = suffix or "without suffix"
                folder.others[suffix] = folder.others.get(suffix, 0) + 1
    folder.names = Names.of(sorted(images))
    folder.folders.sort()


def _take_over(folder: Folder, earlier: Folder) -> None:
    """What is known of the files by these names."""
    places = {name: place for place, name in enumerate(earlier.names)}
    pairs = [(i, places[name]) for i, name in enumerate(folder.names) if name in places]
    if pairs:
        here, there = zip(*pairs, strict=True)
        folder.files[list(here)] = earlier.files[list(there)]


def _parts(folder: Folder) -> Iterator[Sequence[int]]:
    """Positions of the files to look at, as many at once as a thread takes."""
    chosen = range(len(folder.names))
    positions = (
        np.flatnonzero(folder.files["state"] == _UNKNOWN).tolist() if folder.is_fresh else chosen
    )
    for start in range(0, len(positions), _AT_ONCE):
        yield positions[start : start + _AT_ONCE]


def _absolute(path: str) -> str:
    return os.path.abspath(path)  # noqa: PTH100 - without '..'


@contextmanager
def alone(path: Path, why_wait: str) -> Iterator[None]:
    """Wait until no other process holds the lock, and hold it; without one where it cannot be.

    why_wait: what another process does meanwhile, to be told.
    """
    descriptor = None
    with suppress(OSError):  # told when the cache is written
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None and descriptor is not None:
            _wait_for(descriptor, why_wait)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _wait_for(descriptor: int, why: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info("%s; waiting for what it finds", why)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:  # some network volumes: each process works by itself then
        log.debug("no lock: %s", error)

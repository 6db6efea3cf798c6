"""Paths of a million files in little memory: their names end to end, no object for each of them."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from finetune.machine import usable_cores

UNASKED, MISSING = -2, -1  # in place of a size
_AT_ONCE = 4096  # files whose paths are spelt out together

Array = npt.NDArray[np.int64]


class Names(Sequence[str]):
    """Names of files. packed: bytes as the file system has them, a NUL behind each."""

    def __init__(self, packed: bytes = b"") -> None:
        self.packed = packed
        # of each name; the first begins at 0
        self.ends = np.flatnonzero(np.frombuffer(packed, np.uint8) == 0)

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        """These, in this order."""
        return cls(b"".join([os.fsencode(name) + b"\0" for name in names]))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        (name,) = self.encoded([range(len(self))[index]])
        return os.fsdecode(name)

    def __iter__(self) -> Iterator[str]:
        return iter(os.fsdecode(self.packed[:-1]).split("\0") if self.packed else [])

    def part(self, start: int, stop: int) -> "Names":
        """Those from start to stop."""
        begin, end = (int(self.ends[at - 1]) + 1 if at else 0 for at in (start, stop))
        return Names(self.packed[begin:end])

    def take(self, positions: Sequence[int] | Array) -> "Names":
        """Those at these positions, in this order."""
        return Names(b"".join([name + b"\0" for name in self.encoded(positions)]))

    def encoded(self, positions: Sequence[int] | Array) -> list[bytes]:
        """The names at these positions, none of them negative."""
        chosen = np.asarray(positions, np.int64)
        begins = np.where(chosen > 0, self.ends[chosen - 1] + 1, 0).tolist()
        ends = self.ends[chosen].tolist()
        return [self.packed[begin:end] for begin, end in zip(begins, ends, strict=True)]


class Paths(Sequence[Path]):
    """Paths of files: some 30 bytes each and the bytes of its name.

    folders: such as photos/cat/. places: int32 (N,), which of them a file is in.
    """

    def __init__(self, folders: Sequence[str], places: npt.NDArray[np.int32], names: Names) -> None:
        self._folders, self._places, self._names = folders, places, names
        self._encoded = [*map(os.fsencode, folders)]
        self._asked = np.full((len(names), 2), UNASKED, np.int64)

    @classmethod
    def of(cls, paths: Iterable[Path | str]) -> "Paths":
        """These, in this order."""
        folders: dict[str, int] = {}
        places, names = [], []
        for path in paths:
            folder, name = os.path.split(path)
            places.append(folders.setdefault(folder, len(folders)))
            names.append(name)
        return cls(
            [inside(str(Path(folder))) for folder in folders],
            np.array(places, np.int32),
            Names.of(names),
        )

    @classmethod
    def below(cls, folder: str, names: Names, asked: Array | None = None) -> "Paths":
        """Files straight in a folder. asked: sizes and times, int64 (N, 2), if known."""
        paths = cls([inside(folder)], np.zeros(len(names), np.int32), names)
        if asked is not None:
            paths._asked = asked
        return paths

    @classmethod
    def joined(cls, parts: Sequence["Paths"]) -> "Paths":
        """One after another."""
        if not parts:
            return cls.of([])
        starts = np.cumsum([0, *(len(part._folders) for part in parts)])
        places = [part._places + start for part, start in zip(parts, starts[:-1], strict=True)]
        paths = cls(
            [folder for part in parts for folder in part._folders],
            np.concatenate(places).astype(np.int32),
            Names(b"".join([part._names.packed for part in parts])),
        )
        paths._asked = np.concatenate([part._asked for part in parts])
        return paths

    def take(self, positions: Sequence[int]) -> "Paths":
        """Those at these positions, in this order."""
        chosen = np.asarray(positions, np.int64)
        paths = Paths(self._folders, self._places[chosen], self._names.take(chosen))
        paths._asked = self._asked[chosen]
        return paths

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> list[Path]: ...
    def __getitem__(self, index: int | slice) -> Path | list[Path]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return Path(self.text(index))

    def text(self, index: int) -> str:
        """Of one path; Path takes ten times as long."""
        return self._folders[int(self._places[index])] + self._names[index]

    def texts(self) -> Iterator[str]:
        """Of all of them."""
        folders = map(self._folders.__getitem__, self._places.tolist())
        yield from map(str.__add__, folders, self._names)

    def folder(self, indices: Sequence[int]) -> str:
        """The innermost one that has all of these files in it or below it."""
        used: list[int] = np.unique(self._places[np.asarray(indices, np.int64)]).tolist()
        return os.path.commonpath([self._folders[place] for place in used])

    def status(
        self, indices: Sequence[int], spelt: Callable[[str], str] = str
    ) -> Iterator[tuple[bytes, int, int]]:
        """Path, size and time of change in ns of each of these files; -1, -1 if it is MISSING.

        A file is asked once, however often this is called. spelt: makes of a folder, which ends in
        a separator, what stands before the names.
        """
        chosen = np.asarray(indices, np.int64)
        new = chosen[self._asked[chosen, 0] == UNASKED]
        if len(new) > _AT_ONCE:
            with ThreadPoolExecutor(usable_cores()) as pool:
                deque(pool.map(self._ask, _parts(new)), maxlen=0)
        elif len(new):
            self._ask(new)
        folders = [os.fsencode(spelt(folder)) for folder in self._folders]
        for part in _parts(chosen):
            yield from zip(self._spelt(part, folders), *self._asked[part].T.tolist(), strict=True)

    def _ask(self, indices: Array) -> None:
        paths = self._spelt(indices, self._encoded)
        self._asked[indices] = [size_and_time(path) for path in paths]

    def _spelt(self, indices: Array, folders: Sequence[bytes]) -> list[bytes]:
        names, places = self._names.encoded(indices), self._places[indices].tolist()
        return [folders[place] + name for place, name in zip(places, names, strict=True)]


def _parts(indices: Array) -> list[Array]:
    return [indices[start : start + _AT_ONCE] for start in range(0, len(indices), _AT_ONCE)]


def inside(folder: str) -> str:
    """What stands before the names of the files in a folder: nothing for . itself."""
    return "" if folder == os.curdir else os.path.join(folder, "")  # noqa: PTH118  Path drops it


def size_and_time(path: str | bytes) -> tuple[int, int]:
    """Bytes, and when it was changed in ns; MISSING, -1 where it cannot be told."""
    try:
        status = os.stat(path)  # noqa: PTH116  pathlib takes ten times as long
    except OSError:
        return MISSING, -1
    return status.st_size, status.st_mtime_ns

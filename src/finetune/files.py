"""Files that are whole or absent: written beside their target, then renamed."""

import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

ABANDONED = 86_400  # seconds since anything was added to a file that is not whole


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call write with a file that becomes path when all of it is on the disk.

    Raises OSError with path untouched and nothing left behind.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # not on Windows: the rename itself must reach the disk
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def output_file(typed: str | None, folder: Path, name: str) -> Path:
    """The file that output= names; a folder, which exists or ends in /, gets name. None: folder."""
    path = Path(typed or folder)
    return path / name if path.is_dir() or str(typed).endswith(("/", os.sep)) else path


def cache_folder(name: str) -> Path:
    """Where what can be made again is kept; it need not exist, nor be writable.

    In FINETUNE_CACHE, or in finetune among the user's caches.
    """
    if chosen := os.environ.get("FINETUNE_CACHE"):
        return Path(chosen).absolute() / name
    try:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # a user without a home, as in some containers
        caches = tempfile.gettempdir()
    return Path(caches, "finetune", name).absolute()


def sweep_parts(folder: Path) -> None:
    """Remove the files of write_whole in a folder whose writer was killed."""
    for part in folder.glob("*.part"):
        if re.fullmatch(r".+\.\d+\.part", part.name) and part.is_file():
            part.unlink(missing_ok=True)


def sweep_abandoned(path: Path, alone: bool = False) -> None:
    """Remove what killed processes left, long ago, of a cache's files with this one's suffix.

    alone: nobody else writes this one, and what is left of it goes at once.
    """
    for part in path.parent.glob(f"*{path.suffix}.*.part"):
        if not re.fullmatch(rf"[0-9a-f]{{32}}{re.escape(path.suffix)}\.\d+\.part", part.name):
            continue  # whatever else lies in a folder that was named stays
        with suppress(OSError):
            ours = alone and part.name.startswith(f"{path.name}.")
            if ours or time.time() - part.stat().st_mtime > ABANDONED:
                part.unlink()


def is_newer(path: Path, since: float) -> bool:
    """Whether a file is there that was written at that time or later."""
    try:
        return path.stat().st_mtime >= since
    except OSError:
        return False


def note_read(path: Path) -> None:
    """Say that a file of a cache was read now: it is the last to go."""
    with suppress(OSError):  # it is another user's
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def remove_oldest(files: Iterable[Path], most: float, kept: Collection[Path]) -> None:
    """Remove those that were not read for longest until the others take at most so many bytes.

    Whoever reads one says so by note_read. kept: stay, whatever they take.
    """
    status = {}
    for path in files:
        with suppress(FileNotFoundError):  # another process does the same
            status[path] = path.stat()
    total = sum(found.st_size for found in status.values())
    for path in sorted(status, key=lambda path: status[path].st_atime):
        if total <= most or path in kept:
            continue
        with suppress(PermissionError):  # it is another user's
            path.unlink(missing_ok=True)
            total -= status[path].st_size


def make_room(kept: Collection[Path], most: float) -> None:
    """Do so among the files beside them: with their suffix, and 32 hex digits for a name."""
    one = next(iter(kept))
    # whatever else lies in a folder that was named stays
    beside = one.parent.glob(f"*{one.suffix}")
    ours = (path for path in beside if re.fullmatch(r"[0-9a-f]{32}", path.stem))
    remove_oldest(ours, most, kept)


def readable(num_bytes: float) -> str:
    """Such as 1.2 GB."""
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"


def try_to_write(path: Path) -> None:
    """Make the folder of path, and a file in it that is gone again. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    trial = path.with_name(f"{path.name}.{os.getpid()}.part")
    trial.touch()
    trial.unlink()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write value as indented JSON, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=True) + "\n"
    # a byte of a path that is no UTF-8 becomes \udc.., which is how JSON spells it
    write_whole(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))

"""Paths that users give: how they are shown in messages, and folders that must exist."""

import os
import unicodedata
from pathlib import Path

from finetune.errors import DataError


def printable(path: Path | str) -> str:
    r"""Path for a message: bytes that are no UTF-8 and control characters as \x escapes."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def text_of(name: str) -> str:
    r"""Name as text for any file: bytes that are no UTF-8 and control characters as \x escapes."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) == "Cc" else c for c in text)


def existing_folder(root: str, advice: str) -> Path:
    """data.root as a path, ~ expanded. advice: what to type where root is a file."""
    folder = Path(root).expanduser()
    if folder.is_dir():
        return folder
    here = folder.absolute()
    if folder.exists():
        raise DataError(
            f"data.root={printable(root)}: {printable(here)} is a file, not a folder. {advice}"
        )
    known = next(parent for parent in here.parents if parent.is_dir())
    inside = sorted(p.name for p in known.iterdir() if p.is_dir() and not p.name.startswith("."))
    shown = ", ".join(repr(name) for name in inside[:8]) + (", ..." if len(inside) > 8 else "")
    raise DataError(
        f"data.root={printable(root)}: {printable(here)} does not exist; "
        f"{printable(known)} holds {'the folders ' + shown if inside else 'no folders'}"
    )

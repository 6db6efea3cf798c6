"""What tells whether two objects do the same: what they were built with, and their code."""

import hashlib
import inspect
import io
import pickle
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGES = ("torch", "torchvision", "timm")  # whose versions tell of all their code


class NoOrigin(Exception):
    """An object that cannot be told from others, such as a lambda; the message says why."""


def built_with(value: Any) -> tuple[str, set[Any]]:
    """Digest of all that an object holds, and the classes and functions in it. Raises NoOrigin."""
    file = io.BytesIO()
    pickler = _Plain(file)
    try:
        pickler.dump(value)
    except (pickle.PicklingError, AttributeError, TypeError, ValueError) as error:
        raise NoOrigin(str(error)) from error
    return hashlib.blake2b(file.getvalue(), digest_size=16).hexdigest(), pickler.code


class _Plain(pickle.Pickler):
    """Writes the same for equal objects: no address of a tensor, and no reference to what it wrote.

    code: classes and functions that it met.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=4)
        self.fast = True
        self.code: set[Any] = set()

    def reducer_override(self, value: Any) -> Any:
        """As pickle asks for it: NotImplemented for its own way."""
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            return bytes, (f"{value.dtype} {[*value.shape]} ".encode() + flat.numpy().tobytes(),)
        if isinstance(value, type) or inspect.isfunction(value):
            self.code.add(value)
        return NotImplemented


def sources(code: Iterable[Any]) -> list[str]:
    """Digests of the files that classes, with those they inherit from, and functions stand in.

    Those of PACKAGES are left out. What a file imports is not looked at.
    """
    owners = [owner for found in code for owner in getattr(found, "__mro__", [found])]
    files = set()
    for module in {owner.__module__ for owner in owners}:
        file = getattr(sys.modules.get(module), "__file__", None)
        if file and module.partition(".")[0] not in PACKAGES and Path(file).is_file():
            files.add(file)
    return [
        hashlib.blake2b(Path(file).read_bytes(), digest_size=16).hexdigest()
        for file in sorted(files)
    ]

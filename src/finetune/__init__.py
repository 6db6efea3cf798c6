"""Supervised fine-tuning for images: a pretrained backbone, a new head, your labels."""

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.restore import load as load

started = time.time()  # the process, as near as a package can tell, or its job of a sweep


__all__ = ["load"]


def __getattr__(name: str) -> object:
    """finetune.load, imported when it is asked for: --help must not wait for torch."""
    if name == "load":
        from finetune.restore import load

        return load
    raise AttributeError(f"module 'finetune' has no attribute '{name}'")

"""What tells one split from another, wherever it lies: file names and sizes, or pixels; labels."""

import hashlib
import os

from finetune.data.base import ImageArray, ImageFiles, LabelledImages


def digest(images: LabelledImages) -> str:
    """Of images and labels in their order, 32 hex digits.

    Files count by their path below the folder that all of them share, and their size, which takes
    a second for a hundred thousand of them; images in memory by their pixels.
    """
    seen = hashlib.blake2b(digest_size=16)
    seen.update(repr((len(images), images.num_classes, images.labels)).encode())
    if isinstance(images.images, ImageFiles):
        paths = [os.fsencode(images.images.paths[i]) for i in images.indices]
        shared = os.path.commonpath(paths) if len(paths) > 1 else os.path.dirname(paths[0])  # noqa: PTH120
        for path in paths:
            try:
                size = os.stat(path).st_size  # noqa: PTH116  pathlib is ten times slower
            except OSError:
                size = -1
            seen.update(path[len(shared) :] + b"\0%d\0" % size)
    elif isinstance(images.images, ImageArray):
        array = images.images.array
        seen.update(repr((array.shape[1:], array.dtype)).encode())
        for index in images.indices:
            seen.update(array[index].contiguous().numpy().tobytes())
    return seen.hexdigest()

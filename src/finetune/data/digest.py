"""What tells one split from another, wherever it lies: file names and sizes, or pixels; labels."""

import hashlib
import os

from finetune.data.base import ImageArray, ImageFiles, LabelledImages


def digest(images: LabelledImages) -> str:
    """Of images and labels in their order, 32 hex digits.

    Files count by their path below the folder that all of them share, and their size; images in
    memory by their pixels.
    """
    seen = hashlib.blake2b(digest_size=16)
    seen.update(repr((len(images), images.num_classes, tuple(images.labels))).encode())
    if isinstance(images.images, ImageFiles):
        paths = images.images.paths
        shared = len(os.fsencode(paths.folder(images.indices)))
        for path, size, _ in paths.status(images.indices):
            seen.update(path[shared:] + b"\0%d\0" % size)
    elif isinstance(images.images, ImageArray):
        array = images.images.array
        seen.update(repr((array.shape[1:], array.dtype)).encode())
        for index in images.indices:
            seen.update(array[index].contiguous().numpy().tobytes())
    return seen.hexdigest()

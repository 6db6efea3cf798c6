"""Reads any image file as RGB, and says which file it is when it cannot."""

import io
import stat
from pathlib import Path

import numpy as np
import torch
import torchvision.io  # noqa: F401  registers torch.ops.image
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from finetune.data.paths import printable
from finetune.errors import DataError

# Which files in a folder are images; what is in them decides how they are decoded.
# fmt: off
IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".avif",
    ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2",
))
# fmt: on

_JPEG_MAGIC = b"\xff\xd8\xff"
_RGB = 3  # torchvision.io.ImageReadMode.RGB

# What stands in files that bear an image's name; the first bytes in lower case.
_NO_IMAGES = {
    b"version https://git-lfs": "it is a Git LFS pointer; fetch the image with: git lfs pull",
    b"<!doctype html": "it is an HTML page, as a failed download leaves it",
    b"<html": "it is an HTML page, as a failed download leaves it",
    b"<svg": "it is an SVG drawing; export it as PNG",
    b"<?xml": "it is XML, perhaps an SVG drawing; export it as PNG",
}


def read_image(path: Path) -> Tensor:
    """Image as uint8 (3, H, W) RGB, upright, on white where it is transparent.

    The content decides the format, not the suffix. 16-bit grey is scaled to 8 bits, an animation
    gives its first frame. DataError names the path and the reason; half an image is an error.
    """
    try:
        data = _read_bytes(path)
        if not data.startswith(_JPEG_MAGIC):
            return _decode_with_pillow(data)
        try:
            return _decode_jpeg(data)
        except (RuntimeError, AttributeError):  # a JPEG it refuses; no such operator any more
            return _decode_with_pillow(data)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise nearly anything on a damaged file
        raise DataError(f"{printable(path)} cannot be read: {_reason(error)}") from error


def _read_bytes(path: Path) -> bytes:
    if not stat.S_ISREG(path.stat().st_mode):  # opening a named pipe would wait for ever
        raise ValueError("it is not a regular file")
    data = path.read_bytes()
    if not data:
        raise ValueError("it is empty (0 bytes)")
    head = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for start, what in _NO_IMAGES.items():
        if head.startswith(start):
            raise ValueError(what)
    return data


def _decode_jpeg(data: bytes) -> Tensor:
    # A third faster than Pillow, same pixels: both call libjpeg-turbo. The operator itself, since
    # torchvision 0.29 warns in every call of its wrapper that all will go; Pillow takes over then.
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    image: Tensor = torch.ops.image.decode_jpeg(encoded, _RGB, True)  # True: EXIF orientation
    return image


def _decode_with_pillow(data: bytes) -> Tensor:
    with Image.open(io.BytesIO(data)) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I") or image.mode == "F":
            grey = _grey_16_to_8(image, opened.format)
            return torch.from_numpy(grey).expand(3, -1, -1).contiguous()
        if image.has_transparency_data:
            image = _on_white(image.convert("RGBA"))
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _grey_16_to_8(image: Image.Image, source: str | None) -> np.ndarray:
    """(H, W) uint8: 65535 becomes 255. Pillow's own convert("RGB") clips at 255 instead."""
    # Mode I is 32 bits wide; only these two formats fill it from 16
    if not (image.mode.startswith("I;16") or (image.mode == "I" and source in ("PPM", "PNG"))):
        raise ValueError(
            f"its pixels (Pillow mode {image.mode}) have no known range; save it with 8 or 16 bits"
        )
    pixels = np.asarray(image).astype(np.float32)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        pixels[pixels == transparent] = 65535
    return (pixels / 257).round().astype(np.uint8)


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "its content is no image format known here"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__

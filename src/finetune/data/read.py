"""Reads any image file as RGB, and says which file it is when it cannot."""

import errno
import io
import re
import stat
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
import torchvision.io  # noqa: F401  registers torch.ops.image
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from finetune.data.paths import printable
from finetune.errors import DataError
from finetune.files import readable

# Which files in a folder are images; what is in them decides how they are decoded.
# fmt: off
IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".avif",
    ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2",
))
# fmt: on
# The same as Pillow names them. Not all that it knows: EPS, for one, starts Ghostscript.
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "AVIF", "TIFF", "PPM", "JPEG2000")

LARGE = 89_478_485  # pixels, above which Pillow warns
MAX_PIXELS = 2 * LARGE  # above which it refuses

_JPEG_MAGIC = b"\xff\xd8\xff"
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
# libjpeg, too, passes over what stands between two segments
_MARKER = re.compile(rb"\xff+([^\xff])", re.DOTALL)
_RGB = 3  # torchvision.io.ImageReadMode.RGB

# What stands in files that bear an image's name: the first bytes in lower case, kind, reason
_NO_IMAGES = {
    b"version https://git-lfs": (
        "Git LFS pointer",
        "it is a Git LFS pointer; fetch the image with: git lfs pull",
    ),
    b"<!doctype html": ("HTML page", "it is an HTML page, as a failed download leaves it"),
    b"<html": ("HTML page", "it is an HTML page, as a failed download leaves it"),
    b"<svg": ("SVG drawing", "it is an SVG drawing; export it as PNG"),
    b"<?xml": ("SVG drawing", "it is XML, perhaps an SVG drawing; export it as PNG"),
    b"\0\x05\x16\x07": ("macOS metadata", "it is macOS metadata (AppleDouble), not the image"),
}

_opening = threading.Lock()
_large = threading.RLock()


class BadImage(DataError):
    """A file that is no image, or not one that can be read. kind: few words, to count by."""

    def __init__(self, path: Path, kind: str, why: str) -> None:
        super().__init__(path, kind, why)  # all of them: a worker sends it by pickle
        self.path, self.kind, self.why = path, kind, why

    def __str__(self) -> str:
        return f"{printable(self.path)} cannot be read: {self.why}"


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Image as uint8 (3, H, W) RGB, upright, on white where it is transparent.

    The content decides the format, not the suffix. 16-bit grey is scaled to 8 bits, an animation
    gives its first frame. BadImage names the path and the reason; half an image is an error, and
    so is one of more than max_pixels, before it is decoded.
    """
    with _told_of(path):
        return _decoded(_read_bytes(path, max_pixels), max_pixels)


def check_image(path: Path, max_pixels: int) -> tuple[int, bytes]:
    """Number of pixels and a digest of the bytes, 16 long. BadImage as read_image has it."""
    with _told_of(path):
        data = _read_bytes(path, max_pixels)
        return _decoded(data, max_pixels)[0].numel(), blake2b(data, digest_size=16).digest()


def image_size(path: Path) -> tuple[int, int]:
    """Height and width by an image's header, however many pixels. BadImage as read_image has it."""
    with _told_of(path), _opened(path) as image:
        return image.height, image.width


class _Unreadable(Exception):
    """kind and why, as in BadImage."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind


@contextmanager
def _told_of(path: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise nearly anything on a damaged file
        raise BadImage(path, *_reason(error, path)) from error


def _read_bytes(path: Path, max_pixels: int) -> bytes:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
        names = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
        what = names.get(stat.S_IFMT(status.st_mode), "a device")
        raise _Unreadable("not a regular file", f"it is not a regular file but {what}")
    if status.st_size > 8 * max_pixels + 2**26:  # 16 bits of 4 channels, and metadata
        raise _Unreadable(
            "decompression bomb",
            f"it has {readable(status.st_size)}, more than {max_pixels} pixels need; "
            "see data.max_pixels",
        )
    data = path.read_bytes()
    if not data:
        raise _Unreadable("empty", "it is empty (0 bytes)")
    head = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for start, (kind, why) in _NO_IMAGES.items():
        if head.startswith(start):
            raise _Unreadable(kind, why)
    return data


def _decoded(data: bytes, max_pixels: int) -> Tensor:
    if data.startswith(_JPEG_MAGIC):
        width, height = _jpeg_size(data)
        with _turn(width, height, max_pixels):
            try:
                return _decode_jpeg(data)
            except (RuntimeError, AttributeError):  # a JPEG it refuses; no such operator any more
                return _decode_with_pillow(data, max_pixels)
    if data.startswith(_PNG_MAGIC):
        _check_png(data)
    return _decode_with_pillow(data, max_pixels)


def _turn(width: int, height: int, max_pixels: int) -> AbstractContextManager[object]:
    """Refuse what is too large; of images that need gigabytes, threads decode one at a time."""
    if width * height > max_pixels:
        raise _Unreadable(
            "decompression bomb",
            f"it has {width} x {height} pixels, more than {max_pixels} (data.max_pixels): a "
            "decompression bomb?",
        )
    return _large if width * height > LARGE // 4 else nullcontext()


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Width and height of a JPEG, which has its end; libjpeg fills what is missing with grey."""
    size, at = None, 2
    while found := _MARKER.search(data, at):
        at, marker = found.end(), found[1][0]
        if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD9:  # they have no content
            continue
        if marker == 0xDA:  # the pixels
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = (int.from_bytes(data[at + k : at + k + 2]) for k in (3, 5))
            size = size or (width, height)
        at += int.from_bytes(data[at : at + 2])
    if size is None or not found:
        raise _Unreadable("truncated", "it is truncated: it ends before its pixels begin")
    if data.rfind(b"\xff\xd9", at) < 0:
        raise _Unreadable("truncated", "it is truncated: its end is missing")
    return size


def _check_png(data: bytes) -> None:
    """Hold all of its checksums against its bytes, and find its end; Pillow leaves most of them."""
    view, at = memoryview(data), len(_PNG_MAGIC)
    while at + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            break
        if zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end]):
            chunk = ascii(name.decode("latin-1"))
            raise _Unreadable("wrong checksum", f"its chunk {chunk} does not have its checksum")
        if name == b"IEND":
            return
        at = end
    raise _Unreadable("truncated", "it is truncated: its end is missing")


def _decode_jpeg(data: bytes) -> Tensor:
    # A third faster than Pillow, same pixels: both call libjpeg-turbo. The operator itself, since
    # torchvision 0.29 warns in every call of its wrapper that all will go; Pillow takes over then.
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    image: Tensor = torch.ops.image.decode_jpeg(encoded, _RGB, True)  # True: EXIF orientation
    return image


def _decode_with_pillow(data: bytes, max_pixels: int) -> Tensor:
    with _opened(data) as opened, _turn(*_largest_part(opened), max_pixels):
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I") or image.mode == "F":
            grey = _grey_16_to_8(image, opened.format)
            return torch.from_numpy(grey).expand(3, -1, -1).contiguous()
        if image.has_transparency_data:
            image = _on_white(image.convert("RGBA"))
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _opened(source: bytes | Path) -> Image.Image:
    """The image in bytes or a file, of which only the header was read."""
    # Pillow's own limit is one for the whole process, and it warns by itself; ours follows at once
    with _opening:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            return Image.open(file, formats=_FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _largest_part(image: Image.Image) -> tuple[int, int]:
    """What has to be held in memory at once: the image, or a tile of a TIFF that is larger."""
    tags = getattr(image, "tag_v2", {})
    tile = int(tags.get(322) or 0), int(tags.get(323) or 0)
    return max(image.size, tile, key=lambda size: size[0] * size[1])


def _grey_16_to_8(image: Image.Image, source: str | None) -> np.ndarray:
    """(H, W) uint8: 65535 becomes 255. Pillow's own convert("RGB") clips at 255 instead."""
    # Mode I is 32 bits wide; only these two formats fill it from 16
    if not (image.mode.startswith("I;16") or (image.mode == "I" and source in ("PPM", "PNG"))):
        raise _Unreadable(
            "pixels without a range",
            f"its pixels (Pillow mode {image.mode}) have no known range; save it with 8 or 16 bits",
        )
    pixels = np.asarray(image).astype(np.float32)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        pixels[pixels == transparent] = 65535
    return (pixels / 257).round().astype(np.uint8)


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image)


def _reason(error: Exception, path: Path) -> tuple[str, str]:
    """Kind and why."""
    if isinstance(error, _Unreadable):
        return error.kind, str(error)
    if isinstance(error, FileNotFoundError) and path.is_symlink():
        return "dangling link", f"it is a link to {printable(path.readlink())}, which is missing"
    if isinstance(error, UnidentifiedImageError):
        return "unknown format", "its content is no image format known here"
    if isinstance(error, OSError) and error.strerror:
        kinds = {
            errno.ENOENT: "missing",
            errno.ENOTDIR: "missing",
            errno.EACCES: "no permission",
            errno.EPERM: "no permission",
            errno.ELOOP: "link in a circle",
        }
        return kinds.get(error.errno or 0, "unreadable"), error.strerror
    why = str(error) or type(error).__name__
    if "MAX_TEXT_CHUNK" in why or "text chunks" in why:  # Pillow's limits on what unpacks
        return "metadata bomb", f"its text or colour profile is a metadata bomb ({why})"
    return "truncated" if "truncated" in why.lower() else "damaged", why

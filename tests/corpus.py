"""Every kind of good and bad image, folder and table, each with what is to be made of it.

No pytest here: a script can write each case and read it as a training does.
"""

import csv
import io
import os
import socket
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, features

RED, GREEN, BLUE, WHITE, BLACK = (
    (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0),
)  # fmt: skip
COLOURS = (RED, GREEN, BLUE, WHITE)
NOBODY = 65534


@dataclass(frozen=True)
class Case:
    """write: fills a folder and gives the keys of data= to read it with.

    words: what the error or the warnings say. skips: what data.on_bad=skip leaves out, below the
    folder; nothing where it does not help. corners: colours of the image in the file that is called
    odd; an error of 4 is JPEG's.
    """

    write: Callable[[Path], dict[str, str]]
    verdict: Literal["error", "warning", "right"]
    words: tuple[str, ...] = ()
    skips: str | None = None
    corners: Sequence[tuple[int, int, int]] = ()
    as_user: bool = False  # root may read everything
    slow: bool = False
    can_be: bool = True  # here: the system has it, and Pillow


CASES: dict[str, Case] = {}


# ---- what cases are made of


def picture() -> Image.Image:
    """16 x 16: red and green above blue and white."""
    blocks = np.array(COLOURS, np.uint8).reshape(2, 2, 3)
    return Image.fromarray(np.kron(blocks, np.ones((8, 8, 1), np.uint8)))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """The bytes of a file of this kind."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    """Of a PNG."""
    checksum = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """One that claims to be of this size. chunks: before its only row of pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0\0"))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def noise(seed: int) -> bytes:
    """A small PNG like no other."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return encoded(Image.fromarray(pixels), "PNG")


def put(path: Path, data: bytes) -> None:
    """Write a file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def sound(folder: Path, *without: str) -> dict[str, str]:
    """Folders of which nothing is to be said. without: some of them."""
    names = (
        *(f"train/{name}/{i}.png" for name in ("cat", "dog") for i in range(2)),
        *(f"{split}/{name}/0.png" for split in ("val", "test") for name in ("cat", "dog")),
    )
    for seed, name in enumerate(names):
        if not name.startswith(tuple(without)):
            put(folder / name, noise(seed))
    return {"data": "image_folder", "root": str(folder)}


def table(folder: Path, text: str | bytes | None = None) -> dict[str, str]:
    """A table of the images of sound(). text: instead of its own."""
    sound(folder)
    rows = [
        (str(path.relative_to(folder)), path.parent.name, path.parent.parent.name)
        for path in sorted(folder.rglob("*.png"))
    ]
    if text is None:
        buffer = io.StringIO()
        csv.writer(buffer).writerows([("path", "label", "split"), *rows])
        text = buffer.getvalue()
    put(folder / "labels.csv", text if isinstance(text, bytes) else text.encode())
    return {"data": "csv", "table": str(folder / "labels.csv")}


def rows(*more: str, start: str = "") -> Callable[[Path], dict[str, str]]:
    """A good table with these lines behind it. start: before its header."""

    def write(folder: Path) -> dict[str, str]:
        table(folder)
        text = (folder / "labels.csv").read_text()
        return table(folder, start + text + "".join(f"{line}\n" for line in more))

    return write


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Root reads and writes everything; here it is nobody."""
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    if is_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


# ---- files that are errors, or are skipped


def bad_file(
    name: str,
    words: str,
    make: bytes | Callable[[Path], object],
    file: str = "odd.jpg",
    as_user: bool = False,
    can_be: bool = True,
) -> None:
    """A case of a good data set and one bad file. make: its bytes, or a function of its path."""
    place = f"train/cat/{file}"

    def write(folder: Path) -> dict[str, str]:
        keys = sound(folder)
        if isinstance(make, bytes):
            put(folder / place, make)
        else:
            make(folder / place)
        return keys

    CASES[name] = Case(write, "error", (place, words), place, as_user=as_user, can_be=can_be)


def forbidden(path: Path) -> None:
    put(path, noise(99))
    path.chmod(0)


def socket_at(path: Path) -> None:
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{short}/s")  # such a path has 108 characters at most
        Path(short, "s").rename(path)


def jpeg(**options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    return encoded(Image.fromarray(pixels), "JPEG", **options)


JPEG, PNG = jpeg(), noise(98)
START_OF_FRAME = JPEG.index(b"\xff\xc0") + 5
LOST = zlib.compress(bytes(50_000_000))

bad_file("truncated JPEG", "it is truncated", JPEG[: len(JPEG) // 2])
bad_file("truncated JPEG, filled with zeros", "it is truncated", JPEG[:1000] + bytes(len(JPEG)))
bad_file("JPEG without its last two bytes", "it is truncated", JPEG[:-2])
bad_file("truncated progressive JPEG", "it is truncated", jpeg(progressive=True)[:-300])
bad_file("truncated PNG", "it is truncated", PNG[: len(PNG) // 2], "odd.png")
bad_file("PNG without its end", "it is truncated", PNG[:-12], "odd.png")
bad_file(
    "bad PNG CRC",
    "its chunk 'IDAT' does not have its checksum",
    PNG[: PNG.index(b"IEND") - 5] + b"\0" + PNG[PNG.index(b"IEND") - 4 :],
    "odd.png",
)
bad_file("zero bytes", "it is empty (0 bytes)", b"")
bad_file("HTML", "it is an HTML page", b"<!DOCTYPE html>\n<html><title>404</title></html>")
bad_file("SVG", "it is an SVG drawing", b"<svg xmlns='http://www.w3.org/2000/svg'/>")
bad_file("SVG with a head", "perhaps an SVG drawing", b"<?xml version='1.0'?>\n<svg/>")
bad_file(
    "Git LFS pointer",
    "git lfs pull",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n",
)
bad_file("text", "its content is no image format known here", b"hello")
bad_file("PostScript", "its content is no image format known here", b"%!PS-Adobe-3.0 EPSF-3.0\n")
if hasattr(os, "mkfifo"):
    bad_file("named pipe", "not a regular file but a named pipe", lambda path: os.mkfifo(path))
bad_file("socket", "not a regular file but a socket", socket_at, can_be=hasattr(socket, "AF_UNIX"))
bad_file("dangling link", "it is a link to gone.jpg", lambda path: path.symlink_to("gone.jpg"))
bad_file(
    "link to itself with an image's name",
    "Too many levels of symbolic links",
    lambda path: path.symlink_to("odd.jpg"),
)
bad_file("no permission", "Permission denied", forbidden, as_user=True)
bad_file("decompression bomb, PNG", "65000 x 65000 pixels", png(65000, 65000), "odd.png")
bad_file(
    "decompression bomb, JPEG",
    "65000 x 65000 pixels",
    JPEG[:START_OF_FRAME] + struct.pack(">HH", 65000, 65000) + JPEG[START_OF_FRAME + 4 :],
)
bad_file(
    "decompression bomb, BMP",
    "60000 x 60000 pixels",
    b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 1, 1, 0, 0),
    "odd.bmp",
)
for kind, content in {
    "zTXt": b"key\0\0" + LOST, "iTXt": b"key\0\1\0\0\0" + LOST, "iCCP": b"key\0\0" + LOST,
}.items():  # fmt: skip
    bomb = png(1, 1, chunk(kind.encode(), content))
    bad_file(f"metadata bomb, {kind}", "is a metadata bomb", bomb, "odd.png")
bad_file(
    "float TIFF",
    "save it with 8 or 16 bits",
    encoded(Image.fromarray(np.array([[0.5]], np.float32)), "TIFF"),
    "odd.tif",
)
bad_file("AppleDouble", "it is macOS metadata", b"\0\5\x16\7\0\2\0\0Mac OS X", "._0.png")
bad_file("folder named x.jpg", "a folder that bears the name of an image", Path.mkdir, "x.jpg")


# ---- folders that are errors


def case(name: str, verdict: Literal["error", "warning"], *words: str, **facts: bool):
    """Register a function that fills a folder as a case."""

    def register(write: Callable[[Path], dict[str, str] | None]) -> None:
        def complete(folder: Path) -> dict[str, str]:
            return write(folder) or {"data": "image_folder", "root": str(folder)}

        CASES[name] = Case(complete, verdict, words, **facts)

    return register


@case("images straight in train", "error", "train has no class folders, but 2 images straight in")
def _(folder: Path) -> None:
    for i, split in enumerate(("train/0", "train/1", "val/0", "test/0")):
        put(folder / f"{split}.png", noise(i))


@case("images beside the classes", "error", "images outside its class folders", "train/0.png")
def _(folder: Path) -> None:
    sound(folder)
    put(folder / "train/0.png", noise(50))


@case("link to a folder above", "error", "are the same folder", "train/cat/loop")
def _(folder: Path) -> None:
    sound(folder)
    (folder / "train/cat/loop").symlink_to("..")


@case("link to itself", "error", "train/cat/loop is a link that cannot be followed")
def _(folder: Path) -> None:
    sound(folder)
    (folder / "train/cat/loop").symlink_to("loop")


@case("folder reached twice", "error", "val/cat and", "train/cat are the same folder")
def _(folder: Path) -> None:
    sound(folder, "val/cat")
    (folder / "val/cat").symlink_to("../train/cat")


@case("empty class folder", "error", "train has class folders without images: 'emu'")
def _(folder: Path) -> None:
    sound(folder)
    (folder / "train/emu").mkdir()


@case("unreadable class folder", "error", "train/emu cannot be read: Permission", as_user=True)
def _(folder: Path) -> None:
    sound(folder)
    put(folder / "train/emu/0.png", noise(50))
    (folder / "train/emu").chmod(0)


@case("class in val that train lacks", "error", "val has classes that train lacks: 'emu'")
def _(folder: Path) -> None:
    sound(folder)
    put(folder / "val/emu/0.png", noise(50))


@case("one class only", "error", "train has one class folder only, 'cat'")
def _(folder: Path) -> None:
    sound(folder, "train/dog", "val/dog", "test/dog")


@case("train within train", "error", "did you mean data.root=", "/train?")
def _(folder: Path) -> None:
    sound(folder / "train")


@case("nothing but train within train", "error", "did you mean data.root=", "/train?")
def _(folder: Path) -> None:
    sound(folder / "train", "val", "test")


@case("splits one folder down", "error", "one class folder only, 'photos'", "/photos?")
def _(folder: Path) -> None:
    sound(folder / "photos")


# ---- tables that are errors

CASES["table without the columns"] = Case(
    lambda folder: table(folder, "file,class\ntrain/cat/0.png,cat\n"),
    "error",
    ("lacks the columns 'path', 'label'",),
)
CASES["table with an empty label"] = Case(
    rows("train/cat/../cat/0.png,,train"), "error", ("line 10: ", "has no label ('')")
)
CASES["table with the label nan"] = Case(
    rows("train/cat/../cat/0.png,NaN,train"), "error", ("line 10: ", "has no label ('NaN')")
)
CASES["table with a path outside"] = Case(
    rows("../../etc/passwd,cat,train", "/etc/passwd,cat,train"),
    "error",
    ("line 10: '../../etc/passwd' is outside", "line 11: '/etc/passwd' is outside"),
)
CASES["table with missing files"] = Case(
    rows("gone.png,cat,train", "away/gone.png,cat,train", "train/cat/0.png/x.png,cat,train"),
    "error",
    ("3 missing file", "line 10: 'gone.png' does", "line 11: 'away/gone.png'", "line 12: "),
)
CASES["table with one class"] = Case(
    lambda folder: table(folder, "path,label\ntrain/cat/0.png,cat\ntrain/cat/1.png,cat\n"
                                 "train/dog/0.png,cat\ntrain/dog/1.png,cat\n"),
    "error",
    ("one class only, 'cat'",),
)  # fmt: skip
CASES["table whose val has a class that train lacks"] = Case(
    lambda folder: table(
        folder,
        "path,label,split\ntrain/cat/0.png,cat,train\ntrain/dog/0.png,dog,train\n"
        "val/cat/0.png,cat,val\nval/dog/0.png,emu,val\n",
    ),
    "error",
    ("val has classes that train lacks", "'emu'"),
)
CASES["table with a contradiction"] = Case(
    rows("./train/cat/0.png,dog,train"), "error", ("labelled 'dog' here and 'cat' in line",)
)


def _table_with_a_bad_image(folder: Path) -> dict[str, str]:
    put(folder / "odd.jpg", JPEG[:900])
    return rows("odd.jpg,cat,train")(folder)


CASES["table with a bad image"] = Case(
    _table_with_a_bad_image, "error", ("line 10: ", "odd.jpg", "it is truncated"), "odd.jpg"
)


# ---- what is told, and no more


@case("class that val lacks", "warning", "have no image in val", "'dog'")
def _(folder: Path) -> None:
    sound(folder, "val/dog")


@case("the same bytes in train and val", "warning", "1 images are in two splits", "train/cat/0.png",
      "val/cat/copy.png")  # fmt: skip
def _(folder: Path) -> None:
    sound(folder)
    put(folder / "val/cat/copy.png", (folder / "train/cat/0.png").read_bytes())


@case("the same bytes in train and test", "warning", "1 images are in two splits",
      "train/cat/0.png", "test/cat/copy.png")  # fmt: skip
def _(folder: Path) -> None:
    sound(folder)
    put(folder / "test/cat/copy.png", (folder / "train/cat/0.png").read_bytes())


@case("the same bytes under two labels", "warning", "1 images have two labels",
      "train/cat/0.png (cat)", "train/dog/copy.png (dog)")  # fmt: skip
def _(folder: Path) -> None:
    sound(folder)
    put(folder / "train/dog/copy.png", (folder / "train/cat/0.png").read_bytes())


@case("classes that differ in capitals", "warning", "differ only in capitals: 'Cat', 'cat'")
def _(folder: Path) -> None:
    sound(folder)
    put(folder / "train/Cat/0.png", noise(50))


@case("hidden folders", "warning", "left out what is hidden", "/.thumbs; 2 in all")
def _(folder: Path) -> None:
    sound(folder)
    put(folder / "train/cat/.thumbs/0.png", b"")
    put(folder / "train/dog/.0.png", b"")


@case("__MACOSX", "warning", "left out what is hidden or of __MACOSX, such as", "/__MACOSX; 1 in")
def _(folder: Path) -> None:
    sound(folder)
    put(folder / "__MACOSX/train/cat/._0.png", b"")


@case("unknown types of files", "warning", "left out files that are no images: 2 .txt, 1 .heic")
def _(folder: Path) -> None:
    sound(folder)
    for name in ("README.txt", "train/cat/notes.TXT", "train/dog/0.heic"):
        put(folder / name, b"?")


@case("image between the two limits", "warning", "1 images have more than 89478485 pixels",
      slow=True)  # fmt: skip
def _(folder: Path) -> None:
    sound(folder)
    put(folder / "train/cat/large.jpg", encoded(Image.new("L", (9500, 9500)), "JPEG"))


CASES["table with spaces around labels"] = Case(
    lambda folder: table(
        folder, "path,label\n" + "".join(f"{s}/{n}/0.png, {n} \n" for s in ("train", "val", "test")
                                         for n in ("cat", "dog"))
    ),
    "warning",
    ("spaces around 6 labels were stripped",),
)  # fmt: skip
CASES["table with double rows"] = Case(
    rows("train/cat/0.png,cat,train"), "warning", ("1 rows stand there twice and count once",)
)
CASES["table with a byte order mark"] = Case(
    rows(start="\ufeff"), "warning", ("begins with a byte order mark",)
)


# ---- what is read right


def good_file(
    name: str,
    make: bytes | Callable[[], bytes],
    file: str | bytes = "odd.png",
    corners: Sequence[tuple[int, int, int]] = COLOURS,
    can_be: bool = True,
) -> None:
    """A case of a good data set and one more file. make: its bytes, or what gives them."""

    def write(folder: Path) -> dict[str, str]:
        keys = sound(folder)
        path = os.fsencode(folder / "train/cat") + b"/" + os.fsencode(file)
        put(Path(os.fsdecode(path)), make if isinstance(make, bytes) else make())
        return keys

    CASES[name] = Case(write, "right", corners=corners, can_be=can_be)


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right, so it lies turned to the left
    return encoded(picture().rotate(90), "JPEG", quality=100, subsampling=0, exif=exif)


def _seen_through() -> Image.Image:
    image = picture().convert("RGBA")
    image.putalpha(Image.fromarray(np.kron([[0, 255], [51, 255]], np.ones((8, 8))).astype("u1")))
    return image


def _grey(*values: int) -> tuple[tuple[int, int, int], ...]:
    return tuple((value,) * 3 for value in values)


def _sixteen(kind: str) -> bytes:
    return encoded(Image.fromarray(np.array([[0, 257], [32768, 65535]], np.uint16)), kind)


GREY = Image.fromarray(np.array([[0, 100], [200, 255]], np.uint8))
LA = Image.merge("LA", [Image.new("L", (2, 2), 100), Image.new("L", (2, 2), 51)])
BIT = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("1")
SECOND_FRAME = [Image.new("RGB", (16, 16), "black")]

good_file("EXIF orientation", _turned, "odd.jpg")
good_file("16-bit grey PNG", _sixteen("PNG"), corners=_grey(0, 1, 128, 255))
good_file("16-bit grey TIFF", _sixteen("TIFF"), "odd.tif", _grey(0, 1, 128, 255))
good_file("palette", encoded(picture().quantize(8), "PNG"))
good_file(
    "transparency on white",
    encoded(_seen_through(), "PNG"),
    corners=(WHITE, GREEN, (204, 204, 255), WHITE),
)
good_file("CMYK", encoded(picture().convert("CMYK"), "JPEG", quality=100), "odd.jpg")
good_file("grey with alpha", encoded(LA, "PNG"), corners=_grey(224, 224, 224, 224))
good_file("grey", encoded(GREY, "PNG"), corners=_grey(0, 100, 200, 255))
good_file("1-bit", encoded(BIT, "PNG"), corners=(BLACK, WHITE, WHITE, BLACK))
good_file("WebP", encoded(picture(), "WEBP", lossless=True), "odd.webp")
good_file(
    "AVIF",
    lambda: encoded(picture(), "AVIF", quality=100, subsampling="4:4:4"),
    "odd.avif",
    can_be=features.check("avif"),
)
good_file("PNG in a .jpg", encoded(picture(), "PNG"), "odd.jpg")
good_file("JPEG in a .png", encoded(picture(), "JPEG", quality=100, subsampling=0))
good_file(
    "first frame of a GIF",
    encoded(picture(), "GIF", save_all=True, append_images=SECOND_FRAME),
    "odd.gif",
)
good_file("1 x 1", encoded(Image.new("RGB", (1, 1), "red"), "PNG"), corners=(RED,) * 4)
for size in ((1, 6000), (6000, 1)):
    good_file(
        f"{size[0]} x {size[1]}",
        encoded(Image.linear_gradient("L").resize(size), "PNG"),
        corners=_grey(0, 0, 255, 255) if size[0] == 1 else _grey(127, 127, 127, 127),
    )
good_file("upper-case extension", encoded(picture(), "PNG"), "odd.PNG")
good_file("odd name", encoded(picture(), "PNG"), "odd 日本 'a\"\n\\x.png")
good_file(
    "name that is no UTF-8",
    encoded(picture(), "PNG"),
    b"odd caf\xe9 \xff.png",
    can_be=sys.platform == "linux",
)

"""Every kind of image file is read right, or refused by name."""

import io
import os
import pickle
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from finetune.data.read import IMAGE_SUFFIXES, BadImage, read_image
from finetune.errors import DataError

WHITE = [255, 255, 255]
GREY_RAMP = np.array([[0, 257, 32768, 65535]], np.uint16)


@pytest.fixture
def colours():
    """(16, 24, 3): flat blocks of 8 pixels, which JPEG keeps nearly as they are."""
    blocks = np.array(
        [[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[255, 255, 0], [20, 30, 40], [200, 210, 220]]]
    )
    return np.kron(blocks, np.ones((8, 8, 1))).astype(np.uint8)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def written(folder, data, name="image.jpg"):
    path = folder / name
    path.write_bytes(data)
    return path


def pixels(path):
    """(H, W, 3), checked to be what read_image promises."""
    image = read_image(path)
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "GIF", "JPEG2000"])
def test_lossless_formats_are_read_exactly_whatever_their_name(tmp_path, colours, kind):
    options = {"WEBP": {"lossless": True}, "JPEG2000": {"irreversible": False}}
    path = written(tmp_path, encoded(Image.fromarray(colours), kind, **options.get(kind, {})))
    np.testing.assert_array_equal(pixels(path), colours)


@pytest.mark.parametrize("name", ["image.jpg", "image.JPEG", "image.png", "image"])
def test_jpeg_is_read_as_pillow_reads_it_whatever_its_name(tmp_path, colours, name):
    data = encoded(Image.fromarray(colours), "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    # 1: libjpeg builds may round differently
    np.testing.assert_allclose(pixels(written(tmp_path, data, name)), expected, atol=1)


def test_jpeg_is_read_without_torchvisions_decoder(tmp_path, colours, monkeypatch):
    def gone(data):
        raise AttributeError("no decode_jpeg")

    path = written(tmp_path, encoded(Image.fromarray(colours), "JPEG", quality=95))
    expected = pixels(path)
    monkeypatch.setattr("finetune.data.read._decode_jpeg", gone)
    np.testing.assert_allclose(pixels(path), expected, atol=1)  # libjpeg builds may round


def test_grey_jpeg_has_three_equal_channels(tmp_path):
    data = encoded(Image.new("L", (8, 8), 77), "JPEG")
    np.testing.assert_array_equal(pixels(written(tmp_path, data)), np.full((8, 8, 3), 77))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read(tmp_path, colours):
    data = encoded(Image.fromarray(colours), "AVIF", quality=100, subsampling="4:4:4")
    np.testing.assert_allclose(pixels(written(tmp_path, data)), colours, atol=3)  # lossy


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(tmp_path, colours, kind, orientation):
    undo = {  # what a camera held that way would have stored
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a),
        7: lambda a: np.rot90(a.transpose(1, 0, 2), 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo(colours)))
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    path = written(tmp_path, encoded(stored, kind, exif=exif, **options))
    np.testing.assert_allclose(pixels(path), colours, atol=4)  # JPEG is lossy


@pytest.mark.parametrize(("name", "kind"), [("g.png", "PNG"), ("g.tif", "TIFF"), ("g.pgm", "PPM")])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, name, kind):
    path = written(tmp_path, encoded(Image.fromarray(GREY_RAMP), kind), name)
    assert pixels(path)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_16_bit_colour_keeps_its_brightness(tmp_path):
    path = written(tmp_path, png(bits=16, colour=2, row=struct.pack(">3H", 65535, 32768, 0)))
    assert pixels(path)[0, 0].tolist() == [255, 128, 0]


def test_16_bit_grey_shows_its_transparent_value_white(tmp_path):
    data = png(bits=16, colour=0, row=struct.pack(">H", 1000), chunks=[(b"tRNS", b"\x03\xe8")])
    assert pixels(written(tmp_path, data))[0, 0].tolist() == WHITE


def test_palette_gives_its_colours(tmp_path, colours):
    path = written(tmp_path, encoded(Image.fromarray(colours).quantize(8), "PNG"), "p.png")
    np.testing.assert_array_equal(pixels(path), colours)


def test_transparent_palette_entry_is_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    path = written(tmp_path, encoded(image, "PNG", transparency=0), "p.png")
    assert pixels(path)[0].tolist() == [WHITE, [40, 50, 60]]


def test_transparency_is_composed_on_white(tmp_path):
    rgba = np.array([[[100, 0, 0, 0], [100, 0, 0, 255], [100, 0, 0, 51]]], np.uint8)
    path = written(tmp_path, encoded(Image.fromarray(rgba), "PNG"), "t.png")
    # alpha 51 is a fifth: 0.2 * 100 + 0.8 * 255 = 224, 0.8 * 255 = 204
    assert pixels(path)[0].tolist() == [WHITE, [100, 0, 0], [224, 204, 204]]


def test_grey_with_alpha_is_composed_on_white(tmp_path):
    image = Image.merge("LA", [Image.new("L", (1, 1), 100), Image.new("L", (1, 1), 51)])
    assert pixels(written(tmp_path, encoded(image, "PNG")))[0, 0].tolist() == [224] * 3


def test_one_bit_is_black_and_white(tmp_path):
    image = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    assert pixels(written(tmp_path, encoded(image, "PNG")))[0].tolist() == [[0] * 3, WHITE]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_the_same_colours(tmp_path, colours, kind):
    options = {"quality": 100} if kind == "JPEG" else {}
    path = written(tmp_path, encoded(Image.fromarray(colours).convert("CMYK"), kind, **options))
    np.testing.assert_allclose(pixels(path), colours, atol=4)  # JPEG is lossy


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame(tmp_path, kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert pixels(written(tmp_path, data))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("size", [(1, 1), (1, 6000), (6000, 1)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_extreme_shapes_are_read(tmp_path, size, kind):
    path = written(tmp_path, encoded(Image.new("RGB", size, "white"), kind))
    assert read_image(path).shape == (3, size[1], size[0])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_odd_names_are_read(tmp_path, colours, kind):
    data = encoded(Image.fromarray(colours), kind)
    for name in (b"caf\xe9.jpg", "日本 語.jpg".encode(), b"a\nb'\".jpg"):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        path.write_bytes(data)
        assert pixels(path).shape == colours.shape


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_an_odd_name_is_printable_in_the_error(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\x1b[31m.jpg"))
    path.write_bytes(b"")
    with pytest.raises(DataError) as caught:
        read_image(path)
    assert r"caf\xe9\x1b[31m.jpg cannot be read: it is empty (0 bytes)" in str(caught.value)
    str(caught.value).encode()  # a lone surrogate could not be printed


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.95])
def test_half_a_file_is_an_error_never_half_an_image(tmp_path, kind, kept):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    path = written(tmp_path, data[: int(len(data) * kept)])
    with pytest.raises(DataError, match=r"image\.jpg cannot be read: \S"):
        read_image(path)


def test_a_png_with_a_wrong_checksum_is_an_error(tmp_path, colours):
    data = bytearray(encoded(Image.fromarray(colours), "PNG"))
    data[data.index(b"IDAT") + 6] ^= 1
    with pytest.raises(DataError, match="cannot be read"):
        read_image(written(tmp_path, bytes(data)))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", r"it is empty \(0 bytes\)"),
        (b"hello", "its content is no image format known here"),
        (b"\n <!DOCTYPE html><title>404</title>", "it is an HTML page"),
        (b"<html>", "it is an HTML page"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it is an SVG drawing"),
        (b"\xef\xbb\xbf<?xml version='1.0'?><svg/>", "perhaps an SVG drawing"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"\xff\xd8\xff", "it is truncated"),
        (b"\0\x05\x16\x07\0\2\0\0Mac OS X", "it is macOS metadata"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image format known"),
    ],
)
def test_what_is_no_image_is_called_what_it_is(tmp_path, content, why):
    with pytest.raises(DataError, match=why):
        read_image(written(tmp_path, content))


def test_float_pixels_have_no_range_and_are_refused(tmp_path):
    image = Image.fromarray(np.array([[0.5]], np.float32))
    with pytest.raises(DataError, match="save it with 8 or 16 bits"):
        read_image(written(tmp_path, encoded(image, "TIFF"), "f.tif"))


def test_32_bit_pixels_have_no_range_and_are_refused(tmp_path):
    image = Image.fromarray(np.array([[70000]], np.int32))
    with pytest.raises(DataError, match="save it with 8 or 16 bits"):
        read_image(written(tmp_path, encoded(image, "TIFF"), "i.tif"))


def test_missing_files_folders_and_dangling_links_are_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jpg cannot be read: No such file or directory"):
        read_image(tmp_path / "gone.jpg")
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(DataError, match=r"folder\.jpg cannot be read: it is not a regular file"):
        read_image(tmp_path / "folder.jpg")
    (tmp_path / "link.jpg").symlink_to("nowhere")
    with pytest.raises(
        DataError, match=r"link\.jpg cannot be read: it is a link to nowhere, which"
    ):
        read_image(tmp_path / "link.jpg")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(DataError, match="it is not a regular file"):
        read_image(tmp_path / "pipe.jpg")


@pytest.mark.parametrize("end", [b"", b"\0" * 400])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_end_is_truncated(tmp_path, colours, end, progressive):
    image = Image.fromarray(colours)
    inner = encoded(image, "JPEG")  # a thumbnail has an end of its own
    exif = b"Exif\0\0" + inner
    data = encoded(image, "JPEG", progressive=progressive, exif=exif)
    path = written(tmp_path, data[:-2] + end)
    with pytest.raises(BadImage, match="it is truncated: its end is missing"):
        read_image(path)
    path.write_bytes(data + b"trailer of some camera")
    assert pixels(path).shape == colours.shape


def test_every_checksum_of_a_png_counts(tmp_path, colours):
    data = encoded(Image.fromarray(colours), "PNG")
    for place in (data.index(b"IDAT") - 5, data.index(b"IEND") - 5):  # of IHDR, of IDAT
        damaged = bytearray(data)
        damaged[place] ^= 1
        with pytest.raises(BadImage, match="does not have its checksum") as caught:
            read_image(written(tmp_path, bytes(damaged)))
        assert caught.value.kind == "wrong checksum"


def test_a_decompression_bomb_is_refused(tmp_path):
    data = png(bits=8, colour=0, row=b"\0", size=(65000, 65000))
    with pytest.raises(
        DataError, match=r"65000 x 65000 pixels, more than 178956970 \(data\.max_pixels\)"
    ):
        read_image(written(tmp_path, data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
def test_max_pixels_holds_for_every_decoder(tmp_path, colours, kind):
    path = written(tmp_path, encoded(Image.fromarray(colours), kind))
    assert read_image(path, max_pixels=16 * 24).shape == (3, 16, 24)
    with pytest.raises(
        BadImage, match=r"24 x 16 pixels, more than 383 \(data\.max_pixels\)"
    ) as caught:
        read_image(path, max_pixels=16 * 24 - 1)
    assert caught.value.kind == "decompression bomb"


def test_pillows_own_limit_neither_stops_nor_warns_below_max_pixels(tmp_path, colours, monkeypatch):
    path = written(tmp_path, encoded(Image.fromarray(colours), "PNG"))
    for limit in (300, 100):  # it would warn; it would refuse
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        np.testing.assert_array_equal(pixels(path), colours)
        assert limit == Image.MAX_IMAGE_PIXELS


def test_a_tile_larger_than_its_image_is_a_bomb_too(tmp_path):
    size = {
        256: 16,
        257: 16,
        258: 8,
        259: 1,
        262: 1,
        277: 1,
        322: 32768,
        323: 32768,
        324: 8,
        325: 1,
    }
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in size.items())
    data = b"II*\0\x08\0\0\0" + struct.pack("<H", len(size)) + entries + bytes(4)
    with pytest.raises(BadImage, match="32768 x 32768 pixels, more than"):
        read_image(written(tmp_path, data))


def test_a_file_larger_than_its_pixels_could_need_is_not_read(tmp_path):
    path = tmp_path / "image.tif"
    with path.open("wb") as file:
        file.truncate(5 * 10**11)  # of nothing: it takes no room on the disk
    with pytest.raises(BadImage, match=r"it has 500 GB, more than 178956970 pixels"):
        read_image(path)


@pytest.mark.parametrize("name", [b"zTXt", b"iTXt", b"iCCP"])
def test_metadata_that_unpacks_to_much_is_a_bomb(tmp_path, name):
    packed = zlib.compress(bytes(50_000_000))
    content = b"k\0\1\0\0\0" + packed if name == b"iTXt" else b"k\0\0" + packed
    data = png(bits=8, colour=0, row=b"\0", chunks=[(name, content)])
    with pytest.raises(BadImage, match="is a metadata bomb") as caught:
        read_image(written(tmp_path, data))
    assert caught.value.kind == "metadata bomb"


def test_the_reason_survives_the_way_out_of_a_worker(tmp_path):
    with pytest.raises(BadImage) as caught:
        read_image(written(tmp_path, b""))
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.kind) == (str(caught.value), "empty")


def test_suffixes_are_lower_case_with_their_dot():
    assert all(s.startswith(".") and s == s.lower() for s in IMAGE_SUFFIXES)


def png(bits, colour, row, size=(1, 1), chunks=()):
    """A PNG made by hand, for what Pillow cannot write. row: the bytes of its only row."""
    header = struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, 0)
    body = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in body
    )

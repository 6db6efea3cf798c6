"""Letters drawn from fonts: a source task for the digits that needs no download."""

import functools
import importlib.util
import string
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from finetune.data.base import ImageArray, LabelledImages, Splits
from finetune.errors import ConfigError, DataError

# The text fonts; matplotlib's others are made for formulas or lack letters.
_FONTS = [
    f"DejaVu{family}.ttf"
    for family in (
        *("Sans", "Sans-Bold", "Sans-Oblique", "Sans-BoldOblique"),
        *("SansMono", "SansMono-Bold", "SansMono-Oblique", "SansMono-BoldOblique"),
        *("Serif", "Serif-Bold", "Serif-Italic", "Serif-BoldItalic"),
    )
]
_STROKES = (0, 2, 4)  # pixels added to each side of a line, of _GLYPH_SIZE
_GLYPH_SIZE = 64
_BITMAP_SIZE = 32
_WARP = 0.1  # SD of the bends, in half widths of the bitmap: as a hand is not a font


def letters(num_images: int = 20000, seed: int = 0) -> Splits:
    """A-Z and a-z, 8 x 8 grey, made as the digits were: 4 x 4 block means of a 32 x 32 bitmap.

    Each glyph fills its box, as the digits do, so C and c differ by their form at most. Font,
    stroke width, rotation, shear, scale, shift and a smooth warp are drawn by seed.
    num_images: of all splits together; 80 % train, 10 % val, 10 % test.
    Source of the fonts: dejavu-fonts.github.io, in matplotlib's copy.
    """
    classes = tuple(string.ascii_uppercase + string.ascii_lowercase)
    if num_images < 10 * len(classes):
        raise ConfigError(
            f"data.num_images={num_images}: at least {10 * len(classes)}, 10 of each letter"
        )
    glyphs = _glyphs(classes)  # (K, V, H, W), a variant being a font and a stroke width
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_images) % len(classes)
    variants = torch.randint(glyphs.shape[1], (num_images,), generator=generator)
    affine = _random_affine(num_images, generator)
    warp = _WARP * torch.randn(num_images, 2, 4, 4, generator=generator)
    chunks = [
        _drawn(glyphs[labels[i], variants[i]], affine[i], warp[i])
        for i in torch.arange(num_images).split(2000)
    ]
    array = torch.cat(chunks)
    whole = LabelledImages.of(ImageArray(array), labels.tolist())
    first, second = int(0.8 * num_images), int(0.9 * num_images)
    return Splits(
        classes,
        whole.subset(range(first)),
        whole.subset(range(first, second)),
        whole.subset(range(second, num_images)),
    )


def _random_affine(num_images: int, generator: torch.Generator) -> Tensor:
    """(N, 2, 3): from a place in the bitmap to its place in the glyph, both within -1 to 1."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(num_images, generator=generator)

    angle, shear = torch.deg2rad(uniform(-15, 15)), uniform(-0.3, 0.3)
    width, height = uniform(0.7, 1.1), uniform(0.85, 1.1)
    cos, sin = angle.cos(), angle.sin()
    rows = [
        torch.stack([(cos + shear * sin) / width, (shear * cos - sin) / width, uniform(-0.1, 0.1)]),
        torch.stack([sin / height, cos / height, uniform(-0.1, 0.1)]),
    ]
    return torch.stack(rows).permute(2, 0, 1)


def _drawn(glyphs: Tensor, affine: Tensor, warp: Tensor) -> Tensor:
    """uint8 (N, 1, 8, 8). glyphs: uint8 (N, H, W). warp: bends of a coarse grid, (N, 2, 4, 4)."""
    size = (_BITMAP_SIZE, _BITMAP_SIZE)
    places = F.affine_grid(affine, [len(glyphs), 1, *size], align_corners=False)
    places += F.interpolate(warp, size, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    bitmaps = F.grid_sample(glyphs[:, None].float(), places, align_corners=False) > 127
    return (255 * F.avg_pool2d(bitmaps.float(), 4)).round().to(torch.uint8)


@functools.cache
def _glyphs(letters: tuple[str, ...]) -> Tensor:
    """uint8 (K, V, H, W): each letter in each font and stroke width, filling its box."""
    folder = _font_folder()
    fonts = [ImageFont.truetype(str(folder / name), _GLYPH_SIZE) for name in _FONTS]
    drawn = [
        [_glyph(letter, font, stroke) for font in fonts for stroke in _STROKES]
        for letter in letters
    ]
    return torch.from_numpy(np.array(drawn))


def _glyph(letter: str, font: ImageFont.FreeTypeFont, stroke: int) -> np.ndarray:
    left, top, right, bottom = (int(x) for x in font.getbbox(letter, stroke_width=stroke))
    canvas = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(canvas).text((-left, -top), letter, fill=255, font=font, stroke_width=stroke)
    scale = _GLYPH_SIZE / max(canvas.size)
    width, height = (max(1, round(side * scale)) for side in canvas.size)
    box = Image.new("L", (_GLYPH_SIZE, _GLYPH_SIZE))
    corner = ((_GLYPH_SIZE - width) // 2, (_GLYPH_SIZE - height) // 2)
    box.paste(canvas.resize((width, height), Image.Resampling.BILINEAR), corner)
    return np.asarray(box)


def _font_folder() -> Path:
    # find_spec: importing matplotlib would take half a second
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise DataError("data=letters draws with matplotlib's fonts: pip install matplotlib")
    return Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"

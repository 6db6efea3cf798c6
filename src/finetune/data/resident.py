"""Training images that live on the device, where batches are cut and augmented at once."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from finetune.data import twister
from finetune.data.transforms import ATTEMPTS, Flip, ResizedCrop, Transform, middle

Kernel = Callable[[Tensor], Tensor]
Drawn = tuple[Tensor, Tensor]  # top, left, height, width of each crop, int64 (N, 4); flips, (N,)

AT_ONCE = 2**24  # values of the images that are cropped together on a GPU, 64 MB
AT_ONCE_ON_CPU = 2**18  # what its caches hold
SMALL_IMAGE = 64  # pixels a side, up to which a CPU crops whole batches sooner than image by image
DRAWN_AT_ONCE = 2**15  # crops; 0.5 kB of memory for each


@dataclass(frozen=True)
class Crops:
    """Crops of random area and shape, resized to a square. flip: probability of a mirror image.

    kernel: how much a pixel counts by its distance.
    """

    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    kernel: Kernel


def crops_of(transform: Transform) -> Crops | None:
    """What a transform does, as far as it is crops and flips; None if it does anything else."""
    parts = list(getattr(transform, "transforms", ()))
    if not parts or type(parts[0]) not in (ResizedCrop, v2.RandomResizedCrop) or len(parts) > 2:
        return None
    crop = parts[0]
    if any(type(part) not in (Flip, v2.RandomHorizontalFlip) for part in parts[1:]):
        return None
    # in torchvision its value will do
    kernel = KERNELS.get(getattr(crop.interpolation, "value", crop.interpolation))
    if kernel is None or not crop.antialias or len({*crop.size}) > 1:
        return None
    (least, most), (narrow, wide) = crop.scale, crop.ratio
    flip = float(parts[1].p) if len(parts) > 1 else 0.0
    return Crops(crop.size[0], (least, most), (narrow, wide), flip, kernel)


def draw(crops: Crops, seeds: Sequence[int], height: int, width: int) -> Drawn:
    """What the transform draws of an image of this size after each seed: its very numbers."""
    words = twister.words(np.array(seeds, np.int64), 2 * ATTEMPTS + 3)
    shortest, longest = torch.log(torch.tensor(crops.ratio)).tolist()
    area = height * width * twister.uniform(words[0:-3:2], *crops.scale).astype(np.float64)
    logs = torch.from_numpy(twister.uniform(words[1:-3:2], shortest, longest))
    stretch = logs.exp().double().numpy()
    widths, heights = np.sqrt(area * stretch).round(), np.sqrt(area / stretch).round()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    found, first, images = fits.any(0), fits.argmax(0), np.arange(len(seeds))
    w, h = (sides[first, images].astype(np.int64) for sides in (widths, heights))
    used = np.where(found, 2 * first + 2, 2 * ATTEMPTS)
    # where none fits, these are not used
    top = words[used, images] % np.maximum(1, height - h + 1)
    left = words[used + 1, images] % np.maximum(1, width - w + 1)
    elsewhere = np.array(middle(height, width, crops.ratio))[:, None]
    boxes = np.where(found, (top, left, h, w), elsewhere)
    flips = twister.uniform(words[used + 2 * found, images], 0, 1) < crops.flip
    return torch.from_numpy(boxes.T.copy()), torch.from_numpy(flips)


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _cubic(x: Tensor) -> Tensor:
    """With a = -0.5, as Pillow and torch's antialiased kernels have it."""
    x = x.abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


KERNELS: Mapping[str, Kernel] = {"bilinear": _triangle, "bicubic": _cubic}


def weights(
    first: Tensor,
    length: Tensor,
    total: int,
    size: int,
    kernel: Kernel,
    flips: Tensor | None = None,
) -> Tensor:
    """What each pixel of a line gives to each of a resized part of it, (B, size, total).

    first, length: of the part, (B,). flips: whether it is mirrored, (B,). With antialiasing, as
    torch resizes a crop: a pixel beyond its edge gives nothing.
    """
    length = length[:, None]
    scale = length / size
    reach = scale.clamp(min=1)
    centres = scale * (torch.arange(size, device=first.device) + 0.5)
    if flips is not None:
        centres = torch.where(flips[:, None], length - centres, centres)
    places = torch.arange(total, device=first.device) + 0.5 - first[:, None]
    inside = (places > 0) & (places < length)
    places = torch.where(inside, places / reach, math.inf)  # where no kernel reaches
    given = kernel(places[:, None] - (centres / reach)[..., None])
    return given / given.sum(-1, keepdim=True)


def resized(images: Tensor, boxes: Tensor, flips: Tensor, size: int, kernel: Kernel) -> Tensor:
    """A box of each image (B, C, H, W), mirrored or not, as uint8 (B, C, size, size).

    Compiled, it is compiled for each kernel: of what is looked up by a name, torch 2.14 would take
    the first for all names.
    """
    top, left, height, width = boxes.unbind(1)
    rows = weights(top, height, images.shape[2], size, kernel)
    columns = weights(left, width, images.shape[3], size, kernel, flips)
    # rounded in between, as torch has it: what a cubic kernel overshoots is cut off there, too
    across = (images.float() @ columns[:, None].mT).round_().clamp_(0, 255)
    return (rows[:, None] @ across).round_().clamp_(0, 255).to(torch.uint8)


class ResidentImages:
    """N images on a device, uint8 (N, 1 or 3, H, W). crops: None: they are seen as they are.

    compiled: torch.compile makes a few kernels of the many that crop.
    """

    def __init__(self, pixels: Tensor, crops: Crops | None, compiled: bool = False) -> None:
        self.pixels, self.crops = pixels, crops
        self._resized = torch.compile(resized, dynamic=False) if compiled else resized

    @property
    def most_at_once(self) -> int:
        """Images that are cropped together: small ones of many batches, a GPU starts slowly."""
        side: int = max(*self.pixels.shape[2:], self.crops.size if self.crops else 1)
        values = AT_ONCE_ON_CPU if self.pixels.device.type == "cpu" else AT_ONCE
        return values // (3 * side**2)

    def drawn(self, seeds: Sequence[int]) -> Drawn | None:
        """Crops after these seeds, on the CPU; None where images are seen as they are."""
        if self.crops is None:
            return None
        parts = [
            draw(self.crops, seeds[start : start + DRAWN_AT_ONCE], *self.pixels.shape[2:])
            for start in range(0, len(seeds), DRAWN_AT_ONCE)
        ]
        boxes, flips = (torch.cat(part) for part in zip(*parts, strict=True))
        return boxes, flips

    def on_device(self, drawn: Drawn | None) -> Drawn | None:
        """The same where the images are."""
        return drawn and (drawn[0].to(self.pixels.device), drawn[1].to(self.pixels.device))

    def batch(self, positions: Tensor, drawn: Drawn | None, one_look: bool = False) -> Tensor:
        """uint8 (B, 3, S, S) of images at positions (B,), cropped as it was drawn, (B, ...).

        one_look: nothing is compiled for it.
        """
        images, crop = self.pixels[positions], resized if one_look else self._resized
        if self.crops is not None and drawn is not None:
            images = crop(images, *drawn, self.crops.size, self.crops.kernel)
        return images.expand(-1, 3, -1, -1).contiguous()

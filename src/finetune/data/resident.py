"""Training images that live on the device, where batches are cut and augmented at once."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from finetune.data.sampler import stable_hash
from finetune.data.transforms import Flip, ResizedCrop, Transform

Kernel = Callable[[Tensor], Tensor]

AT_ONCE = 2**24  # values of the images that are cropped together on a GPU, 64 MB
AT_ONCE_ON_CPU = 2**18  # what its caches hold
SMALL_IMAGE = 64  # pixels a side, up to which a CPU crops whole batches sooner than image by image
ATTEMPTS = 10  # as RandomResizedCrop: after them it takes what fits in the centre


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
    if crop.interpolation not in KERNELS or len({*crop.size}) > 1:
        return None
    (least, most), (narrow, wide) = crop.scale, crop.ratio
    flip = float(parts[1].p) if len(parts) > 1 else 0.0
    kernel = KERNELS[crop.interpolation]
    return Crops(crop.size[0], (least, most), (narrow, wide), flip, kernel)


def draw(
    crops: Crops, num_images: int, height: int, width: int, seed: int, epoch: int
) -> tuple[Tensor, Tensor]:
    """Top, left, height, width of a crop of each image, int64 (N, 4), and flips, bool (N,).

    Distributed as RandomResizedCrop's are; drawn on the CPU: the same for every device.
    """
    generator = torch.Generator().manual_seed(stable_hash("crops", seed, epoch))
    numbers = torch.rand(2 * ATTEMPTS + 3, num_images, generator=generator, dtype=torch.float64)
    area, shape, (x, y, flip) = numbers[:ATTEMPTS], numbers[ATTEMPTS:-3], numbers[-3:]
    area = height * width * (crops.scale[0] + (crops.scale[1] - crops.scale[0]) * area)
    least, most = (math.log(ratio) for ratio in crops.ratio)
    ratio = torch.exp(least + (most - least) * shape)
    widths, heights = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first, images = fits.int().argmax(0), torch.arange(num_images)
    ratio_of_all = min(max(width / height, crops.ratio[0]), crops.ratio[1])
    centre_width = min(width, round(height * ratio_of_all))
    centre_height = min(height, round(width / ratio_of_all))
    found = fits.any(0)
    heights = torch.where(found, heights[first, images], centre_height)
    widths = torch.where(found, widths[first, images], centre_width)
    top = torch.where(found, (y * (height - heights + 1)).floor(), (height - centre_height) // 2)
    left = torch.where(found, (x * (width - widths + 1)).floor(), (width - centre_width) // 2)
    return torch.stack([top, left, heights, widths], 1).long(), flip < crops.flip


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _cubic(x: Tensor) -> Tensor:
    """With a = -0.5, as Pillow and torch's antialiased kernels have it."""
    x = x.abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


KERNELS: Mapping[InterpolationMode, Kernel] = {
    InterpolationMode.BILINEAR: _triangle,
    InterpolationMode.BICUBIC: _cubic,
}


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

    def __init__(
        self, pixels: Tensor, crops: Crops | None, seed: int, compiled: bool = False
    ) -> None:
        self.pixels, self.crops, self.seed = pixels, crops, seed
        self._resized = torch.compile(resized, dynamic=False) if compiled else resized
        self._epoch = -1
        self._boxes, self._flips = torch.empty(0), torch.empty(0)

    @property
    def most_at_once(self) -> int:
        """Images that are cropped together: small ones of many batches, a GPU starts slowly."""
        side: int = max(*self.pixels.shape[2:], self.crops.size if self.crops else 1)
        values = AT_ONCE_ON_CPU if self.pixels.device.type == "cpu" else AT_ONCE
        return values // (3 * side**2)

    def batch(self, epoch: int, positions: Tensor, rows: Tensor, one_look: bool = False) -> Tensor:
        """uint8 (B, 3, S, S) of images at positions (B,), each cropped as its row (B,) is drawn.

        one_look: nothing is compiled for it.
        """
        images, crop = self.pixels[positions], resized if one_look else self._resized
        if self.crops is not None:
            self._draw(epoch)
            boxes, flips = self._boxes[rows], self._flips[rows]
            images = crop(images, boxes, flips, self.crops.size, self.crops.kernel)
        return images.expand(-1, 3, -1, -1).contiguous()

    def _draw(self, epoch: int) -> None:
        if self.crops is not None and epoch != self._epoch:
            count, _, height, width = self.pixels.shape
            drawn = draw(self.crops, count, height, width, self.seed, epoch)
            self._boxes, self._flips = (values.to(self.pixels.device) for values in drawn)
            self._epoch = epoch

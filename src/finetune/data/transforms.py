"""From an image of any size to the uint8 (3, S, S) that a backbone expects."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from finetune.specs import InputSpec

Transform = Callable[[Tensor], Tensor]

ATTEMPTS = 10  # of a random crop, as in RandomResizedCrop: then it takes what fits in the middle

# what torchvision resizes without a detour over floats, as this machine's vector units allow
RESIZED_AS_UINT8 = {InterpolationMode.BICUBIC}
if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
    RESIZED_AS_UINT8.add(InterpolationMode.BILINEAR)


def evaluation(spec: InputSpec) -> Transform:
    """Shorter side to spec.resize, centre crop of spec.size: what the weights were tested with."""
    return v2.Compose(
        [
            v2.Resize(spec.resize, InterpolationMode(spec.interpolation), antialias=True),
            v2.CenterCrop(spec.size),
        ]
    )


def from_anything(spec: InputSpec) -> Transform:
    """Evaluation of a PIL image, an array (H, W, C) or a tensor (C, H, W), each RGB or grey."""
    return v2.Compose([v2.ToImage(), v2.RGB(), evaluation(spec), v2.ToPureTensor()])


def none(spec: InputSpec) -> Transform:
    """No augmentation: training sees what evaluation sees."""
    return evaluation(spec)


def crop(spec: InputSpec, margin: float = 1.25, flip: bool = True) -> Transform:
    """Squashed to a square, a crop of it at random, and flip.

    margin: side of the square, of spec.size. flip: as in light.
    Source: Kolesnikov et al. 2020, Big Transfer: 160 to 128, or 512 to 480 pixels.
    """
    side = round(margin * spec.size)
    mode = InterpolationMode(spec.interpolation)
    return v2.Compose(
        [
            v2.Resize((side, side), mode, antialias=True),
            v2.RandomCrop(spec.size),
            *([v2.RandomHorizontalFlip()] if flip else []),
        ]
    )


def light(spec: InputSpec, scale: tuple[float, float] = (0.2, 1.0), flip: bool = True) -> Transform:
    """Random resized crop and flip.

    scale: share of the image's area that a crop covers. flip: mirror half of the images; False
    where left and right mean something, as in digits and text.
    Source: the ImageNet recipes; 0.2 as the least share is BiT's and the transfer literature's.
    """
    mode = InterpolationMode(spec.interpolation)
    resized_crop = ResizedCrop(spec.size, (scale[0], scale[1]), interpolation=mode)
    return v2.Compose([resized_crop, *([Flip()] if flip else [])])


def subpixel(spec: InputSpec, scale: tuple[float, float] = (0.7, 1.0)) -> Transform:
    """Random resized crop whose edges lie anywhere between the pixels, no flip.

    For drawings of few pixels: 8 x 8 have a dozen crops along their pixels, which soon are learned
    by heart. scale: as in light.
    """
    return v2.Compose([evaluation(spec), SubpixelCrop(scale)])


class SubpixelCrop(torch.nn.Module):
    """A crop of uint8 (C, H, W), enlarged to the same size. scale: share of the area it covers."""

    def __init__(self, scale: tuple[float, float]) -> None:
        super().__init__()
        self.least, self.most = scale

    def extra_repr(self) -> str:
        """For a digest: what the crops depend on."""
        return f"scale=({self.least}, {self.most})"

    def forward(self, image: Tensor) -> Tensor:
        """Bilinear; width to height is between 3/4 and 4/3, as in RandomResizedCrop."""
        area, stretch, x, y = torch.rand(4).tolist()
        area = self.least + (self.most - self.least) * area
        stretch = (4 / 3) ** (2 * stretch - 1)
        width, height = min(1.0, math.sqrt(area * stretch)), min(1.0, math.sqrt(area / stretch))
        places = torch.tensor(
            [[[width, 0, (1 - width) * (2 * x - 1)], [0, height, (1 - height) * (2 * y - 1)]]]
        )
        grid = F.affine_grid(places, [1, *image.shape], align_corners=False)
        pixels = image[None].float()
        moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
        return moved[0].round().to(torch.uint8)


def strong(
    spec: InputSpec,
    scale: tuple[float, float] = (0.2, 1.0),
    flip: bool = True,
    erase: float = 0.25,
) -> Transform:
    """Light, then TrivialAugment and random erasing.

    scale, flip: as in light. erase: probability that a rectangle is blanked.
    Source: Müller & Hutter 2021 (TrivialAugment), Zhong et al. 2020 (random erasing).
    """
    return v2.Compose([light(spec, scale, flip), v2.TrivialAugmentWide(), v2.RandomErasing(erase)])


def randaugment(
    spec: InputSpec,
    scale: tuple[float, float] = (0.2, 1.0),
    flip: bool = True,
    num_ops: int = 2,
    magnitude: int = 9,
    erase: float = 0.25,
) -> Transform:
    """Light, then RandAugment and random erasing.

    scale, flip: as in light. num_ops: operations per image. magnitude: of 0 to 30. erase: as in
    strong. Source: Cubuk et al. 2020, with their values for ResNet-50 on ImageNet.
    """
    operations = v2.RandAugment(num_ops, magnitude)
    return v2.Compose([light(spec, scale, flip), operations, v2.RandomErasing(erase)])


class ResizedCrop(v2.RandomResizedCrop):
    """The same crops of the same bits, of one tensor (3, H, W): a third of the time for small ones.

    Of an image of 32 pixels, torchvision spends most of it on finding the tensor and the kernel.
    """

    def forward(self, image: Tensor) -> Tensor:
        """(3, H, W) to (3, S, S)."""
        top, left, height, width = self.draw(*image.shape[-2:])
        cut = image[:, top : top + height, left : left + width]
        if image.dtype is not torch.uint8 or self.interpolation not in RESIZED_AS_UINT8:
            size = list(self.size)
            return v2.functional.resize(cut, size, self.interpolation, antialias=self.antialias)
        if (height, width) == tuple(self.size):
            return cut
        mode = self.interpolation.value
        antialias = bool(self.antialias)
        return F.interpolate(cut[None], list(self.size), mode=mode, antialias=antialias)[0]

    def draw(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, height and width of a crop, as make_params draws them."""
        shortest, longest = self._log_ratio.tolist()
        for _ in range(ATTEMPTS):
            area = height * width * torch.empty(1).uniform_(*self.scale).item()
            stretch = torch.empty(1).uniform_(shortest, longest).exp_().item()
            w, h = round(math.sqrt(area * stretch)), round(math.sqrt(area / stretch))
            if 0 < w <= width and 0 < h <= height:
                top = int(torch.randint(height - h + 1, (1,)))
                return top, int(torch.randint(width - w + 1, (1,))), h, w
        return middle(height, width, (self.ratio[0], self.ratio[1]))


def middle(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    """Top, left, height and width of the largest part in the middle whose ratio is allowed.

    What RandomResizedCrop takes where no attempt fits. ratio: least and most of width to height.
    """
    w, h = width, height
    if width < height * min(ratio):
        h = round(width / min(ratio))
    elif width > height * max(ratio):
        w = round(height * max(ratio))
    return (height - h) // 2, (width - w) // 2, h, w


class Flip(v2.RandomHorizontalFlip):
    """The same of one tensor (3, H, W), without the search for it."""

    def forward(self, image: Tensor) -> Tensor:
        """Mirrored, or as it was."""
        return image.flip(-1) if float(torch.rand(1)) < self.p else image


def seeded(transform: Transform, image: Tensor, seed: int) -> Tensor:
    """transform(image) with torch's generator set to seed, and put back afterwards.

    The augmentation of an image then depends on seed alone: not on the worker, the batch, or what
    was drawn before it.
    """
    generator = torch.default_generator  # not torch.manual_seed: that also reaches for the GPU
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        return transform(image)
    finally:
        generator.set_state(state)

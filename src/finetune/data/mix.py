"""Mixup and cutmix: a training batch blended with itself, images and targets alike."""

import math

import numpy as np
import torch.nn.functional as F
from torch import Tensor

Box = tuple[int, int, int, int]  # top, bottom, left, right: pixels


def mix(
    images: Tensor, labels: Tensor, num_classes: int, mixup: float, cutmix: float, seed: int
) -> tuple[Tensor, Tensor]:
    """A batch mixed by one draw of lambda: images (B, 3, S, S), values 0 to 255, targets (B, K).

    labels: classes (B,) or targets (B, K). mixup, cutmix: alpha of Beta(alpha, alpha), the draw of
    lambda; 0.0 for neither. With both, each batch gets one of them, by a fair draw.
    """
    draw = np.random.default_rng(seed)
    targets = soft_targets(labels, num_classes)
    if cutmix and (not mixup or draw.random() < 0.5):
        kept = float(draw.beta(cutmix, cutmix))
        height, width = images.shape[-2:]
        centre = int(draw.integers(height)), int(draw.integers(width))
        return paste_box(images, targets, cut_box(kept, centre, (height, width)))
    return blend(images, targets, float(draw.beta(mixup, mixup)))


def soft_targets(labels: Tensor, num_classes: int) -> Tensor:
    """Float targets (B, K): one-hot for classes (B,); what is (B, K) already stays as it is."""
    return (F.one_hot(labels, num_classes) if labels.ndim == 1 else labels).float()


def blend(images: Tensor, targets: Tensor, kept: float) -> tuple[Tensor, Tensor]:
    """Each image and target times kept (lambda), plus the one before it times the rest.

    The images become float, still 0 to 255: uint8 would round them.
    Source: Zhang et al. 2018. They pair by a permutation; batches are shuffled already.
    """
    return _weighted(images.float(), kept), _weighted(targets, kept)


def cut_box(kept: float, centre: tuple[int, int], size: tuple[int, int]) -> Box:
    """A box of the image's shape and 1 - kept of its area, cut off at the image's border.

    centre: row, column. size: height, width.
    """
    sides = []
    for at, length in zip(centre, size, strict=True):
        half = int(0.5 * math.sqrt(1 - kept) * length)
        sides += [max(at - half, 0), min(at + half, length)]
    top, bottom, left, right = sides
    return top, bottom, left, right


def paste_box(images: Tensor, targets: Tensor, box: Box) -> tuple[Tensor, Tensor]:
    """The box of each image from the one before it; targets weighted by the pixels of each.

    Source: Yun et al. 2019.
    """
    top, bottom, left, right = box
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images.roll(1, 0)[..., top:bottom, left:right]
    kept = 1 - (bottom - top) * (right - left) / (images.shape[-2] * images.shape[-1])
    return mixed, _weighted(targets, kept)


def _weighted(values: Tensor, kept: float) -> Tensor:
    return values.roll(1, 0) * (1 - kept) + values * kept

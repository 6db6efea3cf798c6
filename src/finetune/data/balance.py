"""Classes of unequal size: what data.balance makes of their counts in train."""

import logging
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Balance = Literal["none", "sampler", "weights", "logit_adjust"]
WARN_ABOVE = 10  # times as many images in the largest class as in the smallest


def class_weights(counts: Sequence[int]) -> Tensor:
    """Inverse frequency, (K,): images of train have the mean weight 1; 0 for an empty class."""
    images = torch.tensor(counts, dtype=torch.float64)
    present = images > 0
    weights = images.sum() / (present.sum() * images.clamp(min=1))
    return (weights * present).float()


def log_priors(counts: Sequence[int]) -> Tensor:
    """Log of each class's share of train, (K,): added to the logits in training only.

    An empty class counts as one image: its logit stays finite.
    Source: Menon et al. 2021, Long-tail learning via logit adjustment, equation 10 with tau = 1.
    """
    images = torch.tensor(counts, dtype=torch.float64).clamp(min=1)
    return (images / images.sum()).log().float()


def warn_of_imbalance(counts: Sequence[int], classes: Sequence[str]) -> None:
    """Warn where the largest class has more than 10 times the images of the smallest."""
    present = [(count, name) for count, name in zip(counts, classes, strict=True) if count]
    (least, smallest), (most, largest) = min(present), max(present)
    if most > WARN_ABOVE * least:
        log.warning(
            "classes are unequal in train: '%s' has %d images, '%s' %d. To give each the same "
            "weight: data.balance=sampler, weights or logit_adjust; to leave it: data.balance=none",
            largest, most, smallest, least,
        )  # fmt: skip

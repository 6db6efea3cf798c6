"""Facts that flow from data to model and from model to data, as frozen dataclasses."""

from dataclasses import dataclass
from typing import Literal

Interpolation = Literal["nearest", "bilinear", "bicubic"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DataSpec:
    """What a model must know of its data. classes: names, the label is the index."""

    classes: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """K, the width of the head."""
        return len(self.classes)


@dataclass(frozen=True)
class InputSpec:
    """What a backbone expects of an image: it comes from the weights, never from the data.

    size: H = W in pixels after the crop. resize: the shorter side in pixels before the centre
    crop; equal to size where evaluation keeps no margin. mean, std: per channel, of values in
    [0, 1].
    """

    size: int
    resize: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: Interpolation = "bilinear"

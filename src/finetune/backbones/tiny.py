"""The small backbone of the embedded default: pretrained on rendered letters, shipped with us."""

from collections import OrderedDict
from pathlib import Path

from torch import nn

from finetune.backbones.base import Backbone
from finetune.backbones.weights import (
    existing_file,
    load_weights,
    looks_like_path,
    read_state_dict,
)
from finetune.errors import CheckpointError, ConfigError
from finetune.specs import InputSpec

LETTERS = Path(__file__).with_name("tiny.safetensors")


def tiny(weights: str | None = "letters", input_size: int | None = None) -> Backbone:
    """Seven 3 x 3 convolutions with BatchNorm for images of 8 x 8, 0.3 M parameters, D = 128.

    weights: "letters" (the shipped file; experiment=letters trains it again), a file, or None.
    """
    size = 8 if input_size is None else input_size
    if size < 4:
        raise ConfigError(f"model.input_size: tiny halves an image twice and needs 4, got {size}")
    net = nn.Sequential(
        OrderedDict(
            stem=_convolution(3, 32),
            stage1=nn.Sequential(_convolution(32, 32), _convolution(32, 32)),
            stage2=nn.Sequential(nn.MaxPool2d(2), _convolution(32, 64), _convolution(64, 64)),
            stage3=nn.Sequential(nn.MaxPool2d(2), _convolution(64, 128), _convolution(128, 128)),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
        )
    )
    if weights is not None:
        file = _weights_file(weights)
        load_weights(net, read_state_dict(file), file.name)
    spec = InputSpec(size, size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return Backbone(net, 128, spec, {"family": "tiny", "input_size": size})


def check(weights: str | None = "letters", input_size: int | None = None) -> None:
    """Raise ConfigError or CheckpointError for weights or a file that there are not."""
    if weights is not None:
        _weights_file(weights)


def _convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def _weights_file(weights: str) -> Path:
    if weights == "letters":
        if not LETTERS.is_file():
            raise CheckpointError(
                f"{LETTERS} is missing. Make it with: python train.py experiment=letters, "
                "or start from scratch with model.weights=null"
            )
        return LETTERS
    if not Path(weights).expanduser().is_file() and not looks_like_path(weights):
        raise ConfigError(f"model.weights: '{weights}'; tiny knows letters, null, or a file")
    return existing_file(weights)

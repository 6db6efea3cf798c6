"""A user's own network as a backbone: any nn.Module class that can be imported."""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from finetune.backbones.base import Backbone, Recipe, split_head
from finetune.backbones.source_head import head_loader
from finetune.backbones.weights import existing_file, load_weights, read_state_dict
from finetune.errors import ConfigError
from finetune.specs import IMAGENET_MEAN, IMAGENET_STD, InputSpec


def module(
    target: str,
    weights: str | None = None,
    input_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Backbone:
    """The class at a dotted path, called without arguments, its last Linear or Conv2d taken off.

    target: importable as from the working directory. weights: a file or None. input_size: pixels,
    by default 224. mean, std: what the network was trained with, three values each, by default
    ImageNet's.
    """
    spec = _input_spec(input_size, mean, std)
    net = _call(target)
    num_features, head = split_head(net)
    own_head = None
    if weights is not None:
        state = read_state_dict(weights)
        load_weights(net, state, weights)
        own_head = head_loader(head, state, weights)
    recipe: Recipe = {"family": "module", "target": target, "input_size": spec.size}
    backbone = Backbone(net, num_features, spec, recipe, own_head)
    _check_output(backbone, target, head)
    return backbone


def check(
    target: str,
    weights: str | None = None,
    input_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> None:
    """Raise ConfigError or CheckpointError for what there is not, and for bad values."""
    _input_spec(input_size, mean, std)
    _class_at(target)
    if weights is not None:
        existing_file(weights)


def _input_spec(
    input_size: int | None, mean: Sequence[float] | None, std: Sequence[float] | None
) -> InputSpec:
    size = 224 if input_size is None else input_size
    spec = InputSpec(
        size,
        size,
        mean=IMAGENET_MEAN if mean is None else _per_channel("mean", mean),
        std=IMAGENET_STD if std is None else _per_channel("std", std),
    )
    if min(spec.std) <= 0:
        raise ConfigError(f"model.std: must be positive, got {list(spec.std)}")
    return spec


def _per_channel(name: str, values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) != 3:
        raise ConfigError(f"model.{name}: needs three values, R G B, got {list(values)}")
    red, green, blue = values
    return float(red), float(green), float(blue)


def _class_at(target: str) -> type[nn.Module]:
    path, _, name = target.rpartition(".")
    if not path:
        raise ConfigError(f"model.target: '{target}' is no dotted path; type package.module.Class")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # where a user's own modules lie
    try:
        found = getattr(import_module(path), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"model.target: cannot import '{target}' from {here}: {error}. It must be "
            "package.module.Class, installed or in this folder"
        ) from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(f"model.target: '{target}' is no class of nn.Module, but {found!r}")
    return found


def _call(target: str) -> nn.Module:
    found = _class_at(target)
    try:
        return found()
    except TypeError as error:
        raise ConfigError(
            f"model.target: {target}() must work without arguments: {error}. "
            "Give its parameters defaults, or name a subclass that does"
        ) from error


def _check_output(backbone: Backbone, target: str, head: str) -> None:
    size, width = backbone.input_spec.size, backbone.num_features
    backbone.eval()
    try:
        with torch.no_grad():
            features = backbone(torch.zeros(2, 3, size, size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"model.target: {target} without its head '{head}' fails on images of "
            f"{size} x {size}: {error}. The last Linear or Conv2d must be the classifier"
        ) from error
    finally:
        backbone.train()
    shape = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
    if shape != (2, width):
        raise ConfigError(
            f"model.target: {target} without its head '{head}' gives {shape} for 2 images, "
            f"expected (2, {width}). The last Linear or Conv2d must be the classifier"
        )

"""Every classifier of torchvision as a backbone, with its weights and their preprocessing."""

import http.client
import logging
from collections import OrderedDict
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import WeightsEnum, get_model, get_model_weights, list_models
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings
from torchvision.ops import StochasticDepth

from finetune.backbones.base import Backbone, Recipe, check_size, split_head
from finetune.backbones.source_head import head_loader
from finetune.backbones.weights import (
    align_names,
    existing_file,
    load_weights,
    looks_like_path,
    read_state_dict,
)
from finetune.errors import CheckpointError, ConfigError
from finetune.network import why_unreachable
from finetune.specs import InputSpec

log = logging.getLogger(__name__)


def torchvision(
    name: str,
    weights: str | None = "DEFAULT",
    input_size: int | None = None,
    dropout: float | None = None,
    drop_path: float | None = None,
) -> Backbone:
    """The classifier of that name with its head taken off.

    weights: a member of its weights enum (downloaded once into torch's hub folder), a file, or
    None. The input spec is that of the member, of DEFAULT for a file or None. input_size: pixels;
    evaluation then resizes to it without a crop margin, and the position embeddings of a ViT are
    interpolated. dropout, drop_path: set_dropout and set_drop_path; None leaves the family's own.
    """
    check(name, weights)
    members = get_model_weights(name)
    source = _source(name, weights, members)
    spec = _input_spec(
        source if isinstance(source, WeightsEnum) else members["DEFAULT"], input_size
    )
    net = _build(name, spec.size, initialize=source is None)
    num_features, head = split_head(net)
    if input_size is not None:
        check_size(net, spec.size)
    own_head = None
    if source is not None:
        state = _download(source) if isinstance(source, WeightsEnum) else read_state_dict(source)
        load_weights(net, _fit_positions(net, align_names(state, net.state_dict())), str(source))
        own_head = head_loader(head, state, str(source))
    if dropout is not None and not set_dropout(net, dropout):
        log.warning("model.dropout=%s has no effect: %s has no dropout", dropout, name)
    if drop_path is not None and not set_drop_path(net, drop_path):
        log.warning("model.drop_path=%s has no effect: %s has no drop-path", drop_path, name)
    recipe: Recipe = {"family": "torchvision", "name": name, "input_size": spec.size}
    return Backbone(net, num_features, spec, recipe, own_head)


def set_dropout(net: nn.Module, probability: float) -> int:
    """Give every dropout of a torchvision network this probability; return how many there are."""
    found = 0
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        elif hasattr(module, "drop_rate"):  # DenseNet's
            module.drop_rate = probability  # type: ignore[assignment]
        else:
            continue
        found += 1
    return found


def set_drop_path(net: nn.Module, largest: float) -> int:
    """Scale drop-path so that the last block is skipped with this probability; return how many.

    The growth with depth, linear from 0, stays as torchvision has built it.
    """
    paths = [module for module in net.modules() if isinstance(module, StochasticDepth)]
    before = max((path.p for path in paths), default=0.0)
    for path in paths:
        path.p *= largest / before
    return len(paths)


def check(name: str, weights: str | None = "DEFAULT", **others: Any) -> None:
    """Raise ConfigError or CheckpointError for a name, weights or a file that there are not.

    others: arguments of the backbone that are checked elsewhere.
    """
    if name not in (names := list_models(module=models)):
        close = get_close_matches(name, names, n=5, cutoff=0.5)
        raise ConfigError(
            f"model.name: no torchvision classifier '{name}'; "
            f"{'close: ' if close else 'there are '}{', '.join(close or names)}"
        )
    _source(name, weights, get_model_weights(name))


def _source(
    name: str, weights: str | None, members: type[WeightsEnum]
) -> WeightsEnum | Path | None:
    if weights is None:
        return None
    if weights in members.__members__:
        return members[weights]
    if Path(weights).expanduser().is_file() or looks_like_path(weights):
        return existing_file(weights)
    raise ConfigError(
        f"model.weights: {name} has no weights '{weights}'; "
        f"choose {', '.join(members.__members__)}, null, or a file"
    )


def _input_spec(weights: WeightsEnum, input_size: int | None) -> InputSpec:
    preset = weights.transforms()
    return InputSpec(
        size=preset.crop_size[0] if input_size is None else input_size,
        resize=preset.resize_size[0] if input_size is None else input_size,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
    )


def _build(name: str, size: int, initialize: bool) -> nn.Module:
    arguments: dict[str, object] = {}
    if name in ("googlenet", "inception_v3"):
        # Their auxiliary heads classify the source task. transform_input maps ImageNet's
        # normalisation to the one that the weights were trained with: always on, so that a net
        # built without weights computes the same. init_weights is torchvision's own, slow one.
        arguments = {"aux_logits": False, "transform_input": True, "init_weights": initialize}
    elif name.startswith("vit_"):
        arguments = {"image_size": size}
    elif name.startswith("maxvit_"):
        arguments = {"input_size": (size, size)}
    try:
        return get_model(name, weights=None, **arguments)
    except (AssertionError, ValueError) as error:  # how torchvision refuses a size
        raise ConfigError(f"model.input_size: {name} cannot take {size}: {error}") from error


def _fit_positions(net: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(net, VisionTransformer) or "encoder.pos_embedding" not in state:
        return state
    return dict(interpolate_embeddings(net.image_size, net.patch_size, OrderedDict(state)))


def _download(weights: WeightsEnum) -> dict[str, Tensor]:
    folder = Path(torch.hub.get_dir(), "checkpoints")
    file = folder / Path(urlparse(weights.url).path).name
    remedy = f"Download it to {file}, or use model.weights=FILE or model.weights=null"
    if not file.is_file() and (reason := why_unreachable(weights.url)):
        raise CheckpointError(f"cannot download {weights.url}: {reason}. {remedy}")
    if file.is_file():
        return read_state_dict(file)
    try:
        return dict(weights.get_state_dict(progress=True, check_hash=True))
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        raise CheckpointError(f"cannot download {weights.url}: {error}. {remedy}") from error

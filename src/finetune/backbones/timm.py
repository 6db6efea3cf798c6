"""Every model of timm as a backbone, with its weights and their preprocessing; timm is optional."""

import logging
import re
from difflib import get_close_matches
from functools import partial
from math import floor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from finetune.backbones.base import Backbone, Recipe, SourceHead, check_size
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

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

log = logging.getLogger(__name__)

# what the files of a model are called on the Hugging Face hub, in the order timm asks for them
_HUB_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)


def timm(
    name: str,
    weights: str | None = "DEFAULT",
    input_size: int | None = None,
    dropout: float | None = None,
    drop_path: float | None = None,
) -> Backbone:
    """The model of that name, built without its classifier.

    name: an architecture, or architecture.tag for other weights than its first. weights: DEFAULT
    (those of the name, downloaded once), a file, or None. input_size: pixels; evaluation then
    resizes to it without a crop margin, and position embeddings are interpolated. dropout: of the
    features; drop_path: of the last block, from 0 at the first. None leaves the model's own.
    """
    config = _config(name)
    spec = _input_spec(config, input_size)
    file = _weights_file(name, weights, config)
    # only models of one fixed size take img_size
    resized = config.fixed_input_size and tuple(config.input_size[1:]) != (spec.size, spec.size)
    arguments: dict[str, Any] = {"img_size": spec.size} if resized else {}
    rates = {"drop_rate": dropout, "drop_path_rate": drop_path}
    arguments |= {key: rate for key, rate in rates.items() if rate is not None}
    if weights == "DEFAULT":
        net = _build_pretrained(name, config, arguments)
    else:
        net = _build(name, arguments)
    if input_size is not None:
        check_size(net, spec.size)
    if file is not None:
        state = align_names(read_state_dict(file), net.state_dict())
        load_weights(net, _fit_positions(net, state), str(file))
    recipe: Recipe = {"family": "timm", "name": name, "input_size": spec.size}
    own_head = None
    if weights is not None:
        own_head = partial(_load_head, name=name, config=config, arguments=arguments, file=file)
    return Backbone(net, net.head_hidden_size, spec, recipe, own_head)  # type: ignore[arg-type]


def check(name: str, weights: str | None = "DEFAULT", **others: Any) -> None:
    """Raise ConfigError or CheckpointError for a name, weights or a file that there are not.

    others: arguments of the backbone that are checked elsewhere.
    """
    _weights_file(name, weights, _config(name))


def _config(name: str) -> "PretrainedCfg":
    """What timm knows of the weights of that name."""
    try:
        import timm as library
        from timm.models import PretrainedCfg
    except ImportError as error:
        raise ConfigError(
            'model=timm needs timm, which is not installed; type: pip install -e ".[timm]"'
        ) from error
    architecture, _, tag = name.partition(".")
    if not library.is_model(architecture):
        close = get_close_matches(architecture, library.list_models(), n=5, cutoff=0.5)
        hint = f"close: {', '.join(close)}" if close else "timm.list_models() lists them"
        raise ConfigError(f"model.name: no timm model '{name}'; {hint}")
    try:
        return library.get_pretrained_cfg(name) or PretrainedCfg()
    except RuntimeError as error:
        tags = library.list_pretrained(f"{architecture}.*")
        raise ConfigError(
            f"model.name: timm has no weights '{tag}' of {architecture}; "
            f"choose {', '.join(tags) or f'{architecture} with model.weights=null'}"
        ) from error


def _input_spec(config: "PretrainedCfg", input_size: int | None) -> InputSpec:
    facts = vars(config)
    size = facts["input_size"][-1]
    # a crop_pct above 1, which three models have, would pad the image
    resize = max(size, floor(size / facts["crop_pct"]))
    return InputSpec(
        size=size if input_size is None else input_size,
        resize=resize if input_size is None else input_size,
        mean=facts["mean"],
        std=facts["std"],
        interpolation=facts["interpolation"],
    )


def _weights_file(name: str, weights: str | None, config: "PretrainedCfg") -> Path | None:
    if weights is None:
        return None
    if weights == "DEFAULT":
        if not config.has_weights:
            raise ConfigError(f"model.weights: timm has none of {name}; model.weights=null or FILE")
        return None
    if Path(weights).expanduser().is_file() or looks_like_path(weights):
        return existing_file(weights)
    raise ConfigError(
        f"model.weights: '{weights}'; choose DEFAULT, null, or a file. Other weights of timm are "
        f"part of the name: model.name={name.partition('.')[0]}.{weights}"
    )


def _load_head(
    backbone: Backbone,
    name: str,
    config: "PretrainedCfg",
    arguments: dict[str, Any],
    file: Path | None,
) -> SourceHead:
    """The classifier that this model was published with, or that the file holds."""
    layer = config.classifier
    if not isinstance(layer, str):
        held = f"{len(layer)} heads ({', '.join(layer)})" if layer else "no head"
        raise ConfigError(f"head=keep: {name} has {held}; type head=linear for a new one")
    if file is not None:
        return head_loader(layer, read_state_dict(file), str(file))(backbone)
    whole = _build_pretrained(name, config, arguments | {"num_classes": config.num_classes})
    return head_loader(layer, whole.state_dict(), f"timm's {name}")(backbone)


def _build(name: str, arguments: dict[str, Any]) -> nn.Module:
    """Headless, unless arguments say how many classes."""
    from timm import create_model

    try:
        return create_model(name, **{"num_classes": 0} | arguments)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        if unknown := re.search(r"argument.*'(drop_rate|drop_path_rate)'", str(error)):
            rate = unknown[1]
            key = {"drop_rate": "dropout", "drop_path_rate": "drop_path"}[rate]
            log.warning("model.%s=%s has no effect: timm's %s has none", key, arguments[rate], name)
            return _build(name, {k: v for k, v in arguments.items() if k != rate})
        if "img_size" not in arguments:
            raise
        size = arguments["img_size"]  # each architecture refuses a size in its own way
        raise ConfigError(f"model.input_size: {name} cannot take {size}: {error}") from error


def _build_pretrained(name: str, config: "PretrainedCfg", arguments: dict[str, Any]) -> nn.Module:
    from huggingface_hub.constants import ENDPOINT

    cached = _cached(config)
    repository = (config.hf_hub_id or "").partition("@")[0]
    address = f"{ENDPOINT}/{repository}" if repository else str(config.url)
    remedy = f"Download the weights of {name} from {address} and use model.weights=FILE, or null"
    if cached is None and (reason := why_unreachable(address)):
        raise CheckpointError(f"cannot download {address}: {reason}. {remedy}")
    # timm converts names of other code bases and interpolates positions on its way. A file in the
    # cache is named, so that the hub is not asked whether there is a newer one.
    overlay = {"file": str(cached), "custom_load": False} if cached else None
    try:
        net = _build(name, arguments | {"pretrained": True, "pretrained_cfg_overlay": overlay})
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot load {cached or address}: {error}. {remedy}") from error
    log.info("loaded the weights of timm's %s from %s", name, cached or address)
    return net


def _cached(config: "PretrainedCfg") -> Path | None:
    """Where an earlier download put the weights."""
    from huggingface_hub import try_to_load_from_cache

    if not config.hf_hub_id:
        file = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(str(config.url)).path).name)
        return file if file.is_file() else None
    repository, _, revision = config.hf_hub_id.partition("@")
    names = (config.hf_hub_filename,) if config.hf_hub_filename else _HUB_FILES
    for name in names:
        found = try_to_load_from_cache(repository, name, revision=revision or None)
        if isinstance(found, str):
            return Path(found)
    return None


def _fit_positions(net: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    from timm.layers.pos_embed import resample_abs_pos_embed

    theirs, ours = state.get("pos_embed"), getattr(net, "pos_embed", None)
    grid = getattr(getattr(net, "patch_embed", None), "grid_size", None)
    if theirs is None or ours is None or grid is None or theirs.shape == ours.shape:
        return state
    num_prefix_tokens = ours.shape[1] - grid[0] * grid[1]
    fitted = resample_abs_pos_embed(theirs, list(grid), num_prefix_tokens=num_prefix_tokens)
    return state | {"pos_embed": fitted}

"""The backbone of an earlier run: what was learnt there is the pretraining here."""

import logging
from dataclasses import replace
from pathlib import Path

from finetune import checkpoint
from finetune.backbones import FAMILIES
from finetune.backbones.base import Backbone
from finetune.checkpoint import Checkpoint
from finetune.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)


def run(path: str, input_size: int | None = None, target: str | None = None) -> Backbone:
    """Take the best backbone of the run directory path; its head stays behind.

    input_size: pixels; None for that of the run. target: dotted path of the class, if the run was
    one of model=module.
    """
    check(path)
    best = checkpoint.best_path(Path(path))
    saved = checkpoint.read(best)
    backbone = rebuild(saved, best, target, input_size)
    names = [name for name in saved.state_dict if name.startswith("backbone.")]
    weights = {name.removeprefix("backbone."): saved.state_dict[name] for name in names}
    try:
        backbone.load_state_dict(weights)
    except RuntimeError as error:
        if input_size is not None:  # positions of a transformer, which belong to one size
            raise ConfigError(
                f"model.input_size={input_size}: this backbone was trained for "
                f"{saved.input_spec.size} pixels and takes no other; leave model.input_size out"
            ) from error
        raise misfit(best, saved, error) from error
    log.info(
        "loaded all %d tensors of the backbone from %s; its head stays behind", len(names), best
    )
    return backbone


def check(path: str, input_size: int | None = None, target: str | None = None) -> None:
    """Raise CheckpointError if path is no run directory with weights."""
    best = checkpoint.best_path(Path(path))
    if not best.is_file():
        raise CheckpointError(
            f"model.path={path} is no run directory with weights: {best} is missing. Give the "
            "folder that train.py named at the end"
        )


def rebuild(
    saved: Checkpoint, path: Path, target: str | None, input_size: int | None = None
) -> Backbone:
    """The architecture of a checkpoint, without its weights: calls of our own functions only.

    target: what a checkpoint names as a user's own class is never called; it is typed again.
    input_size: pixels; None for those of the checkpoint.
    """
    recipe = dict(saved.backbone)
    family = recipe.pop("family", None)
    if family not in FAMILIES:
        raise CheckpointError(f"{path}: unknown family of backbones '{family}'")
    if family == "module":
        if target is None:
            raise CheckpointError(
                f"{path} was trained with a class of your own, and what a checkpoint names is "
                f"never run unasked; type model.target={recipe.get('target')}"
            )
        recipe["target"] = target
    elif target is not None:
        log.warning("model.target=%s has no effect: %s holds a %s backbone", target, path, family)
    try:
        size = {} if input_size is None else {"input_size": input_size}
        backbone = FAMILIES[family](**recipe | size, weights=None)
    except TypeError as error:
        raise CheckpointError(f"{path}: {recipe} does not describe a {family} backbone") from error
    spec = saved.input_spec
    if input_size is not None:
        spec = replace(spec, size=input_size, resize=input_size)
    backbone.input_spec = spec
    return backbone


def misfit(path: Path, saved: Checkpoint, error: Exception) -> CheckpointError:
    """The message for weights that do not fit what their checkpoint describes."""
    reason = " ".join(str(error).split())[:300]
    return CheckpointError(f"{path} does not fit its own backbone {saved.backbone}: {reason}")

"""Weights files: read safely, matched by name and shape, and an account of what fitted."""

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from finetune.checkpoint import load_whole, why_unreadable
from finetune.errors import CheckpointError

log = logging.getLogger(__name__)

# where training scripts keep the weights among other things, the plain ones before the averaged
_HOLDERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "weights",
    "net",
    "backbone",
    "model_ema",
    "state_dict_ema",
)
# what wrappers put in front of a name: DataParallel and DDP, Lightning, torch.compile, ourselves
_PREFIXES = ("module.", "model.", "backbone.", "net.", "_orig_mod.")
_COUNTER = "num_batches_tracked"
# names in torchvision's own files that its modules no longer have
_RENAMED = (
    (re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.(?=[12]\.)"), r"\1"),
    (re.compile(r"\bmlp\.linear_1\."), "mlp.0."),
    (re.compile(r"\bmlp\.linear_2\."), "mlp.3."),
)


def looks_like_path(weights: str) -> bool:
    """Whether a value that names no known weights was meant as a file."""
    return "/" in weights or "\\" in weights or Path(weights).suffix != ""


def existing_file(weights: str | Path) -> Path:
    """A weights file as a path, ~ expanded. Raises CheckpointError if there is none."""
    path = Path(weights).expanduser()
    if not path.is_file():
        raise CheckpointError(f"model.weights: no such weights file: {path}")
    return path


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU, from a .safetensors file or a torch file.

    A torch file is a state dict or a dict that holds one (a training checkpoint). It is read with
    weights_only=True: a file can never run code.
    """
    path = existing_file(path)
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        content = load_whole(path)
    except Exception as error:  # a damaged or foreign file fails in any of a dozen ways
        raise CheckpointError(
            f"{path} is not a weights file that can be read: {why_unreadable(path, error)}. "
            "Expected .safetensors, or what torch.save(net.state_dict(), FILE) writes"
        ) from error
    state = _find_state_dict(content)
    if state is None:
        held = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path} holds no state dict, only: {held[:200] or 'nothing'}")
    return state


def _find_state_dict(content: object, depth: int = 0) -> dict[str, Tensor] | None:
    if not isinstance(content, Mapping):
        return None
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    holders = [content[name] for name in _HOLDERS if isinstance(content.get(name), Mapping)]
    if holders and depth < 2:
        found = (_find_state_dict(holder, depth + 1) for holder in holders)
        return next((state for state in found if state), tensors or None)
    return tensors or None


def align_names(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Rename what names knows without a wrapper's prefix or under a newer name."""
    known = set(names)
    return {_known_as(name, known): tensor for name, tensor in state.items()}


def _known_as(name: str, known: set[str]) -> str:
    newer = name
    for pattern, replacement in _RENAMED:
        newer = pattern.sub(replacement, newer)
    for short in (name, newer):
        while short not in known:
            prefix = next((prefix for prefix in _PREFIXES if short.startswith(prefix)), None)
            if prefix is None:
                break
            short = short[len(prefix) :]
        if short in known:
            return short
    return name


def load_weights(net: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy into a headless net, in place, what fits by name and shape; log the account.

    The classifier of the source task is left over, as it should be. Nothing that matches, or a
    backbone tensor of another shape, is a CheckpointError; a backbone matched in part a warning.
    """
    own = net.state_dict()
    aligned = align_names(state, own)
    # NaN is how vgg16's IMAGENET1K_FEATURES marks the layers that it does not have
    broken = [name for name, tensor in aligned.items() if tensor.isnan().any()]
    state = {name: tensor for name, tensor in aligned.items() if name not in broken}
    matching = [name for name in own if name in state]
    # files older than PyTorch 0.4.1 do not count BatchNorm's batches, and nothing needs them
    if all(name.endswith(_COUNTER) for name in matching):
        raise CheckpointError(
            f"{source} does not fit this model: "
            + (f"{len(broken)} of its tensors are NaN" if broken else "no name in common")
            + f". The model has {_some(own)}; the weights have {_some(aligned)}"
        )
    clashes = [
        f"{name} {tuple(state[name].shape)}, the model {tuple(own[name].shape)}"
        for name in matching
        if state[name].shape != own[name].shape
    ]
    if clashes:
        raise CheckpointError(
            f"{source} does not fit this model: {len(clashes)} of {len(matching)} tensors have "
            f"another shape. The weights have {'; '.join(clashes[:3])}. Another model.name?"
        )
    net.load_state_dict(own | {name: state[name] for name in matching})

    missing = [name for name in own if name not in state and not name.endswith(_COUNTER)]
    log.log(
        logging.WARNING if missing else logging.INFO,
        "loaded %d of %d tensors from %s; missing: %s; left over: %s%s",
        len(matching),
        len(matching) + len(missing),
        source,
        _some(missing),
        _some([name for name in state if name not in own]),
        f"; NaN: {_some(broken)}" if broken else "",
    )


def _some(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more or "none"

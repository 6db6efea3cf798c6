"""The classifier that a pretrained network came with, for a run that keeps it."""

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.backbones.base import Backbone, LoadHead, SourceHead
from finetune.backbones.weights import align_names
from finetune.errors import CheckpointError, ConfigError


def head_loader(name: str, state: Mapping[str, Tensor], source: str) -> LoadHead:
    """What gives the head called name in a net, with its weights in state; source: their file."""
    known = (f"{name}.weight", f"{name}.bias")
    aligned = align_names(state, known)
    # these alone: a state dict is as large as its network
    found = {key.rpartition(".")[2]: aligned[key] for key in known if key in aligned}
    return partial(load_head, name=name, found=found, source=source)


def load_head(
    backbone: Backbone, name: str, found: Mapping[str, Tensor], source: str
) -> SourceHead:
    """The head as a linear layer on the backbone's features.

    name: of the layer that backbone.net had, where nn.Identity stands now. found: its "weight",
    (K, D) or (K, D, 1, 1), and its "bias" if it has one. Raises CheckpointError if source does not
    hold it, ConfigError if the net did more with it than a linear layer can.
    """
    weight, bias = found.get("weight"), found.get("bias")
    if weight is None:
        raise CheckpointError(
            f"head=keep: {source} has no {name}.weight, the head; type head=linear for a new one"
        )
    if weight.shape[1:] not in ((backbone.num_features,), (backbone.num_features, 1, 1)):
        raise ConfigError(
            f"head=keep: {name} has weights of {tuple(weight.shape)}, and only a Linear or a 1 x 1 "
            f"Conv2d of {backbone.num_features} features can be kept; type head=linear"
        )
    original: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    if weight.ndim == 4:
        original = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=bias is not None)
    original.load_state_dict(dict(found))
    state = {key: tensor.detach().flatten(1) if tensor.ndim > 1 else tensor.detach()
             for key, tensor in original.state_dict().items()}  # fmt: skip
    _check_logits(backbone, name, original, state)
    recipe = {"kind": "linear", "dropout": None, "bias": bias is not None}
    return SourceHead(recipe, state, num_classes=len(weight))


def _check_logits(
    backbone: Backbone, name: str, original: nn.Module, state: Mapping[str, Tensor]
) -> None:
    """Raise ConfigError unless the features and the head give what the whole network gives."""
    size, training = backbone.input_spec.size, backbone.training
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    backbone.eval()
    try:
        with torch.no_grad():
            ours = F.linear(backbone(images), state["weight"], state.get("bias"))
            backbone.net.set_submodule(name, original)
            theirs = backbone.net(images)
    except (RuntimeError, AttributeError) as error:
        raise ConfigError(
            f"head=keep: {name} cannot be put back: {error}; type head=linear"
        ) from error
    finally:
        backbone.net.set_submodule(name, nn.Identity())
        backbone.train(training)
    if isinstance(theirs, Tensor) and theirs.ndim == 4:
        theirs = theirs.mean(dim=(2, 3))
    # sums in another order where a map is pooled before the head and was after it
    if not (
        isinstance(theirs, Tensor)
        and theirs.shape == ours.shape
        and torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(ours.abs().max()))
    ):
        raise ConfigError(
            f"head=keep: {type(backbone.net).__name__} does more after its layer {name} than pool, "
            "so that layer alone is not its head; type head=linear"
        )

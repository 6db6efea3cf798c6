"""Heads: what stands in place of a pretrained network's last layer; (B, D) features to (B, K)."""

import logging
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from finetune.backbones.base import Backbone
from finetune.data.split import listed
from finetune.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

Init = Literal["random", "zero", "ridge"]


class Linear(nn.Linear):
    """Dropout, then one linear layer. recipe: what rebuilds it, as plain data."""

    def __init__(
        self, num_features: int, num_classes: int, dropout: float | None = None, bias: bool = True
    ) -> None:
        super().__init__(num_features, num_classes, bias)
        self.dropout = nn.Dropout(dropout or 0.0)
        self.recipe = {"kind": "linear", "dropout": dropout, "bias": bias}

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) features to (B, K) logits."""
        return super().forward(self.dropout(features))


class MLP(nn.Module):
    """One hidden layer, dropout on what it gives, then a linear layer. hidden: None for D."""

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        hidden: int | None = None,
        dropout: float | None = None,
    ) -> None:
        hidden = num_features if hidden is None else hidden
        super().__init__()
        self.hidden = nn.Linear(num_features, hidden)
        self.activation = nn.GELU()
        self.dropout = nn.Dropout(dropout or 0.0)
        self.output = nn.Linear(hidden, num_classes)
        self.recipe = {"kind": "mlp", "hidden": hidden, "dropout": dropout}

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) features to (B, K) logits."""
        logits: Tensor = self.output(self.dropout(self.activation(self.hidden(features))))
        return logits


Head = Linear | MLP
KINDS: dict[str, type[Linear] | type[MLP]] = {"linear": Linear, "mlp": MLP}


def linear(
    backbone: Backbone,
    classes: tuple[str, ...],
    dropout: float | None = None,
    init: Init | None = None,
) -> Linear:
    """A new linear layer.

    dropout: probability, of the features; None for none. init: random (None) as torch does, zero,
    or ridge: random until the training features are there, see finetune.fit.
    """
    head = Linear(backbone.num_features, len(classes), dropout)
    if init == "zero":
        _to_zero(head)
    return head


def mlp(
    backbone: Backbone,
    classes: tuple[str, ...],
    hidden: int | None = None,
    dropout: float | None = None,
    init: Init | None = None,
) -> MLP:
    """A new hidden layer and a new linear layer.

    hidden: its width; None for that of the features. dropout: probability, of the hidden layer's
    outputs. init: random (None) as torch does, or zero for the last layer; the first one must be
    random to learn at all.
    """
    head = MLP(backbone.num_features, len(classes), hidden, dropout)
    if init == "zero":
        _to_zero(head.output)
    return head


def keep(backbone: Backbone, classes: tuple[str, ...]) -> Head:
    """The pretrained network's own head with its weights; output k is the k-th class.

    Raises ConfigError where there is none, or where it is one for other classes.
    """
    if backbone.load_head is None:
        raise ConfigError(
            f"head=keep: the weights of model={backbone.recipe.get('family')} bring no head; "
            "type head=linear for a new one"
        )
    source = backbone.load_head(backbone)
    if source.classes is not None and source.classes != classes:
        raise ConfigError(
            f"head=keep: the head was trained on {listed(source.classes, most=5)}; the data has "
            f"{listed(classes, most=5)}. Type head=linear for a new one"
        )
    if source.num_classes != len(classes):
        raise ConfigError(
            f"head=keep: the head has {source.num_classes} outputs and the data {len(classes)} "
            "classes; type head=linear for a new one"
        )
    head = rebuild(source.recipe, backbone.num_features, source.num_classes, "head=keep")
    try:
        head.load_state_dict(source.state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"head=keep: {source.recipe} does not fit its weights: {reason}"
        ) from error
    log.info("head: kept; its outputs are taken to be, in order: %s", listed(classes, most=10))
    return head


def rebuild(recipe: Mapping[str, Any], num_features: int, num_classes: int, source: str) -> Head:
    """The head of a checkpoint, without its weights: calls of our own classes only.

    source: where recipe was read, for messages.
    """
    arguments = dict(recipe)
    kind = arguments.pop("kind", None)
    if kind not in KINDS:
        raise CheckpointError(f"{source}: unknown kind of head '{kind}'")
    try:
        return KINDS[kind](num_features, num_classes, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{source}: {recipe} does not describe a head: {error}") from error


def _to_zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)

"""One optimizer group per (layer, decays or not), from step 0 on, for every strategy."""

import re
from typing import Any

from torch import nn

from finetune.layering import layer_of_parameter
from finetune.model import Classifier

# in the own name of a parameter: class_token, pos_embed, relative_position_bias_table, rel_pos_h
SPARED_WORDS = {"token", "tokens", "pos", "position", "positional", "rel", "bias", "biases"}


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: biases, norms, tokens, positions and scales are spared.

    Norms, biases and scales (LayerScale) are the vectors, whatever dimensions of size 1 they have.
    Source: the habit of BERT, MAE and timm; Swin V2 for the network that makes its positions.
    """
    if parameter.ndim <= 1 or "cpb_mlp" in name:
        return False
    own = name.rpartition(".")[2]
    is_vector = parameter.numel() == max(parameter.shape) and own != "weight"  # of a convolution
    return not is_vector and SPARED_WORDS.isdisjoint(re.findall("[a-z]+", own))


def param_groups(model: Classifier, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer: {params, layer, weight_decay, name}, from the stem to the head.

    layer: as in a strategy, the head being the number of the backbone's layers.
    """
    layers = layer_of_parameter(model.backbone.net)
    depth = model.depth
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.backbone.net.named_parameters():
        groups.setdefault((layers[name], decays(name, parameter)), []).append(parameter)
    for name, parameter in model.head.named_parameters():
        groups.setdefault((depth, decays(name, parameter)), []).append(parameter)
    names = [*(f"layer{layer}" for layer in range(depth)), "head"]
    return [
        {
            "params": groups[layer, decay],
            "layer": layer,
            "weight_decay": weight_decay if decay else 0.0,
            "name": names[layer] if decay else f"{names[layer]}_no_decay",
        }
        for layer, decay in sorted(groups, key=lambda key: (key[0], not key[1]))
    ]

"""Which parameter is in which optimizer group."""

import pytest
import torchvision
from torch import nn

from finetune.backbones.base import Backbone, split_head
from finetune.backbones.tiny import tiny
from finetune.model import Classifier
from finetune.param_groups import param_groups
from finetune.specs import InputSpec


def classifier(name):
    if name == "tiny":
        return Classifier(tiny(weights=None), ("a", "b"))
    net = torchvision.models.get_model(name, weights=None)
    width, _ = split_head(net)
    return Classifier(Backbone(net, width, InputSpec(32, 32), {}), ("a", "b"))


@pytest.mark.parametrize("name", ["tiny", "resnet18", "vit_b_16", "convnext_tiny"])
def test_every_parameter_is_in_one_group(name):
    model = classifier(name)
    groups = param_groups(model, weight_decay=0.1)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters()}
    layers = [group["layer"] for group in groups]
    assert layers == sorted(layers)
    assert set(layers) == set(range(model.depth + 1))
    assert len({group["name"] for group in groups}) == len(groups)


@pytest.mark.parametrize("name", ["tiny", "resnet18", "vit_b_16"])
def test_norms_biases_and_tokens_do_not_decay(name):
    model = classifier(name)
    decay = {
        id(p): group["weight_decay"]
        for group in param_groups(model, weight_decay=0.1)
        for p in group["params"]
    }
    norms = (nn.BatchNorm2d, nn.LayerNorm)
    spared = {
        id(p) for m in model.modules() if isinstance(m, norms) for p in m.parameters(recurse=False)
    }
    spared |= {id(p) for n, p in model.named_parameters() if n.endswith("bias")}
    spared |= {
        id(p) for n, p in model.named_parameters() if n.endswith(("class_token", "pos_embedding"))
    }
    assert spared
    assert {decay[i] for i in spared} == {0.0}
    assert {value for i, value in decay.items() if i not in spared} == {0.1}


def test_the_head_is_the_last_layer():
    model = classifier("tiny")
    last = [g for g in param_groups(model, 0.0) if g["layer"] == model.depth]
    assert [g["name"] for g in last] == ["head", "head_no_decay"]
    assert last[0]["params"] == [model.head.weight]
    assert last[1]["params"] == [model.head.bias]

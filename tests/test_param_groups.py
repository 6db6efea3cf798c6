"""Which parameter is in which optimizer group."""

import pytest
import torch
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


def headless(net):
    """Any network as a Classifier, of which only the parameters count."""
    return Classifier(Backbone(net, 8, InputSpec(32, 32), {}), ("a", "b"))


def spared(model):
    """Names in the backbone of what does not decay."""
    groups = param_groups(model, weight_decay=0.1)
    free = {id(p) for g in groups if g["weight_decay"] == 0.0 for p in g["params"]}
    return {name for name, p in model.backbone.net.named_parameters() if id(p) in free}


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("swin_t", ["relative_position_bias_table"]),
        ("swin_v2_t", ["cpb_mlp.0.weight", "cpb_mlp.2.weight", "logit_scale"]),
        ("maxvit_t", ["relative_position_bias_table"]),
        ("convnext_tiny", ["layer_scale"]),  # (C, 1, 1)
    ],
)
def test_relative_positions_and_layer_scales_do_not_decay(name, kinds):
    with torch.device("meta"):
        net = torchvision.models.get_model(name, weights=None)
    model = headless(net)
    names = spared(model)
    for kind in kinds:
        found = {n for n, _ in net.named_parameters() if n.endswith(kind)}
        assert found
        assert found <= names
    # all the rest with two dimensions or more, which are matrices and kernels, decay
    rest = {n for n, p in net.named_parameters() if p.ndim > 1 and not n.endswith(tuple(kinds))}
    assert rest
    assert rest.isdisjoint(names)


@pytest.mark.parametrize(
    "name",
    ["beit_base_patch16_224", "cait_xxs24_224", "convnext_atto", "deit_tiny_distilled_patch16_224",
     "deit3_small_patch16_224", "eva02_tiny_patch14_224", "levit_128s", "mvitv2_tiny",
     "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "vit_small_patch14_reg4_dinov2"],
)  # fmt: skip
def test_what_timm_spares_does_not_decay(name):
    library = pytest.importorskip("timm")
    with torch.device("meta"):
        net = library.create_model(name, num_classes=0)
    theirs = set(net.no_weight_decay()) if hasattr(net, "no_weight_decay") else set()
    names = spared(headless(net))
    assert theirs & {n for n, _ in net.named_parameters()} <= names
    for kind in ("token", "pos_embed", "relative_position_bias_table", "gamma", "bias"):
        assert {n for n, _ in net.named_parameters() if n.endswith(kind)} <= names, kind
    matrices = {n for n, p in net.named_parameters() if n.endswith("weight") and p.ndim > 1}
    assert matrices - {n for n in matrices if "cpb_mlp" in n} == matrices - names


def test_a_kernel_with_a_single_value_per_channel_decays():
    net = nn.Sequential(nn.Conv2d(8, 8, 1, groups=8), nn.Conv2d(8, 1, 1))
    assert spared(headless(net)) == {"0.bias", "1.bias"}


def test_the_head_is_the_last_layer():
    model = classifier("tiny")
    last = [g for g in param_groups(model, 0.0) if g["layer"] == model.depth]
    assert [g["name"] for g in last] == ["head", "head_no_decay"]
    assert last[0]["params"] == [model.head.weight]
    assert last[1]["params"] == [model.head.bias]

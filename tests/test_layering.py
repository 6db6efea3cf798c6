"""Layers: one rule gives the stem and the stages or blocks of every network."""

import pytest
import torch
from torch import nn
from torchvision import models

from finetune.backbones.base import split_head
from finetune.backbones.tiny import tiny
from finetune.layering import layer_modules, layer_of_parameter

# how many layers a person counts, and what stands at the start of some of them
TABLE = {
    "alexnet": (7, {0: "features.0", 5: "classifier.1", 6: "classifier.4"}),
    "convnext_tiny": (5, {0: "features.0", 1: "features.1", 2: "features.2", 4: "features.6"}),
    "densenet121": (5, {0: "features.conv0", 1: "features.denseblock1", 2: "features.transition1"}),
    "efficientnet_b0": (9, {0: "features.0", 8: "features.8"}),
    "googlenet": (10, {0: "conv1", 1: "conv2", 2: "inception3b", 9: "inception5b"}),
    "inception_v3": (12, {0: "Conv2d_1a_3x3", 2: "Mixed_5c", 11: "Mixed_7c"}),
    "maxvit_t": (6, {0: "stem", 1: "blocks.0", 4: "blocks.3", 5: "classifier"}),
    "mnasnet0_5": (8, {0: "layers.0", 2: "layers.9", 7: "layers.14"}),
    "mobilenet_v2": (19, {0: "features.0", 18: "features.18"}),
    "mobilenet_v3_large": (18, {0: "features.0", 16: "features.16", 17: "classifier"}),
    "regnet_x_400mf": (5, {0: "stem", 1: "trunk_output.block1", 4: "trunk_output.block4"}),
    "resnet18": (5, {0: "conv1", 1: "layer1", 2: "layer2", 3: "layer3", 4: "layer4"}),
    "resnet50": (5, {0: "conv1", 1: "layer1", 4: "layer4"}),
    "shufflenet_v2_x0_5": (5, {0: "conv1", 1: "stage2", 4: "conv5"}),
    "squeezenet1_1": (9, {0: "features.0", 1: "features.3", 8: "features.12"}),
    "swin_t": (5, {0: "features.0", 1: "features.1", 2: "features.2", 4: "features.6"}),
    "vgg11": (10, {0: "features.0", 1: "features.3", 8: "classifier.0", 9: "classifier.3"}),
    "vit_b_32": (13, {0: "conv_proj", 1: "encoder.layers.encoder_layer_0"}),
}
TIMM_TABLE = {
    "beit_base_patch16_224": (13, {0: "patch_embed", 1: "blocks.0", 12: "blocks.11"}),
    "cait_xxs24_224": (26, {1: "blocks.0", 24: "blocks.23", 25: "blocks_token_only"}),
    "coatnet_nano_rw_224": (5, {0: "stem", 1: "stages.0", 4: "stages.3"}),
    "convnextv2_atto": (5, {0: "stem", 1: "stages.0", 4: "stages.3"}),
    "deit3_small_patch16_224": (13, {0: "patch_embed", 1: "blocks.0", 12: "blocks.11"}),
    "densenet121": (5, {0: "features.conv0", 1: "features.denseblock1"}),
    "efficientnet_b0": (9, {0: "conv_stem", 1: "blocks.0", 7: "blocks.6", 8: "conv_head"}),
    "maxvit_tiny_rw_224": (5, {0: "stem", 1: "stages.0", 4: "stages.3"}),
    "mixer_s16_224": (9, {0: "stem", 1: "blocks.0"}),
    "mobilenetv4_conv_small": (7, {0: "conv_stem", 1: "blocks.0", 6: "conv_head"}),
    "poolformer_s12": (5, {0: "stem", 1: "stages.0", 4: "stages.3"}),
    "regnety_004": (5, {0: "stem", 1: "s1", 4: "s4"}),
    "resnet50": (5, {0: "conv1", 1: "layer1", 4: "layer4"}),
    "resnetv2_50x1_bit": (5, {0: "stem", 1: "stages.0", 4: "stages.3"}),
    "swinv2_tiny_window8_256": (5, {0: "patch_embed", 1: "layers.0", 4: "layers.3"}),
    "vit_small_patch14_reg4_dinov2": (13, {0: "patch_embed", 1: "blocks.0", 12: "blocks.11"}),
    "xcit_nano_12_p16_224": (14, {1: "pos_embed", 2: "blocks.1", 13: "cls_attn_blocks"}),
    "convnext_atto": (5, {0: "stem", 1: "stages.0", 4: "stages.3"}),
    "deit_tiny_distilled_patch16_224": (13, {0: "patch_embed", 1: "blocks.0", 12: "blocks.11"}),
    "eva02_tiny_patch14_224": (13, {0: "patch_embed", 1: "blocks.0", 12: "blocks.11"}),
    "mobilenetv3_small_050": (8, {0: "conv_stem", 1: "blocks.0", 7: "conv_head"}),
    "resnet18d": (5, {0: "conv1", 1: "layer1", 4: "layer4"}),
    "swin_tiny_patch4_window7_224": (5, {0: "patch_embed", 1: "layers.0", 4: "layers.3"}),
}


@pytest.fixture(autouse=True)
def no_init(monkeypatch):
    for name in ("kaiming_normal_", "kaiming_uniform_", "normal_", "trunc_normal_", "uniform_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)


def build(name):
    own_init = name in ("googlenet", "inception_v3")
    arguments = {"aux_logits": False, "init_weights": False} if own_init else {}
    net = models.get_model(name, weights=None, **arguments)
    split_head(net)
    return net


def check(net, num_layers, starts):
    layers = layer_modules(net)
    assert len(layers) == num_layers
    assert {layer: next(iter(layers[layer])) for layer in starts} == starts

    # every module with parameters, statistics or randomness of its own is in exactly one layer
    leaves = [module for module in net.modules() if not list(module.children())]
    held = [leaf for layer in layers for m in layer.values() for leaf in m.modules()]
    for leaf in leaves:
        assert sum(module is leaf for module in held) == 1, leaf

    layer_of = layer_of_parameter(net)
    assert list(layer_of) == [name for name, _ in net.named_parameters()]
    assert set(layer_of.values()) == set(range(num_layers))


@pytest.mark.parametrize("name", TABLE)
def test_layers_of_torchvision_are_what_a_person_counts(name):
    check(build(name), *TABLE[name])


@pytest.mark.parametrize("name", TIMM_TABLE)
def test_layers_of_timm_are_what_a_person_counts(name):
    library = pytest.importorskip("timm")
    with torch.device("meta"):
        net = library.create_model(name, num_classes=0)
    check(net, *TIMM_TABLE[name])


def test_the_layers_of_tiny_are_stem_and_three_stages():
    check(tiny(None).net, 4, {0: "stem", 1: "stage1", 2: "stage2", 3: "stage3"})


def test_a_class_token_and_positions_belong_to_the_stem():
    layer_of = layer_of_parameter(build("vit_b_32"))
    assert layer_of["class_token"] == layer_of["encoder.pos_embedding"] == 0
    assert layer_of["conv_proj.weight"] == 0
    assert layer_of["encoder.layers.encoder_layer_11.mlp.3.bias"] == 12
    assert layer_of["encoder.ln.weight"] == 12


def test_a_wrapper_changes_only_the_names():
    net = nn.Sequential()
    net.add_module("body", build("resnet18"))
    names = [["body." + name for name in layer] for layer in layer_modules(net.body)]
    assert [list(layer) for layer in layer_modules(net)] == names


def test_a_single_layer_is_one_layer():
    assert [list(layer) for layer in layer_modules(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))] == [
        ["0", "1"]
    ]
    assert layer_modules(nn.Sequential()) == [{}]

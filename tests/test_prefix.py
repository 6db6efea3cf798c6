"""A network taken apart after its first layers: the same logits by the same modules, or why not."""

import random

import pytest
import torch
from torch import nn
from torchvision.models import convnext_tiny, mobilenet_v3_small, resnet18
from torchvision.models.vision_transformer import VisionTransformer

import nets
from finetune.backbones.base import split_head
from finetune.layering import layer_modules
from finetune.prefix import Unsplittable, split


def small_vit():
    return VisionTransformer(32, 8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=16)


NETS = {
    "nets.Cnn": (nets.Cnn, 8),
    "nets.Swin": (nets.Swin, 8),
    "resnet18": (resnet18, 32),
    "vit": (small_vit, 32),
    "convnext_tiny": (convnext_tiny, 32),
    "mobilenet_v3_small": (mobilenet_v3_small, 32),
}


@pytest.mark.parametrize("name", NETS)
def test_two_parts_give_what_the_whole_gives(name):
    make, size = NETS[name]
    torch.manual_seed(0)
    net = make()
    split_head(net)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        expected = net.eval()(images)
        net.train()
        for layers in range(1, len(layer_modules(net))):
            parts = split(net, layers, size)
            assert all(module.training for module in net.modules())
            net.eval()
            values = parts.head(images)
            assert values[0].numel() == parts.num_values
            torch.testing.assert_close(parts.rest(values), expected, rtol=1e-5, atol=1e-5)
            net.train()
    assert net.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


class Odd(nets.Cnn):
    """A network whose forward is given by the test."""

    def forward(self, images):
        x = self.stage1(self.stem(images))
        return self.flatten(self.pool(self.stage3(self.between(x, self.stage2(x)))))


@pytest.mark.parametrize(
    ("between", "said"),
    [
        (lambda net, x, y: y, None),
        (lambda net, x, y: y * y.shape[1], None),
        (lambda net, x, y: y + x.mean(dim=(2, 3), keepdim=True), "take more than"),
        (lambda net, x, y: y.reshape(len(x), 8, 4, 4), "cannot be followed"),
        (lambda net, x, y: y if y.sum() > 0 else -y, "cannot be followed"),
        (lambda net, x, y: nn.functional.dropout(y, 0.5, net.training), "another in training"),
        (lambda net, x, y: nn.functional.dropout(y, 0.5), "something else"),
        (lambda net, x, y: y * torch.ones(1), "makes tensors"),
        (lambda net, x, y: y + random.random(), "draws random numbers"),
        (lambda net, x, y: y.permute(2, 3, 0, 1).permute(2, 3, 0, 1), None),
    ],
)
def test_what_cannot_be_taken_apart_is_told(between, said):
    net = Odd()
    split_head(net)
    net.between = between.__get__(net)
    if said is None:
        for layers in (1, 2, 3):
            split(net, layers, 8)
    else:
        with pytest.raises(Unsplittable, match=said):
            split(net, 3 if "something" in said else 2, 8)


def test_layers_frozen_or_not_keep_their_own_mode():
    """Dropout in the rest is on where its layer trains, and gradients reach the net's own."""
    net = nets.Cnn()
    split_head(net)
    parts = split(net, 2, 8)
    with torch.no_grad():
        values = parts.head(torch.randn(4, 3, 8, 8))
    net.eval()
    net.stage2.train()
    one, other = parts.rest(values), parts.rest(values)
    assert not torch.equal(one, other)
    one.sum().backward()
    assert net.stage3[0][0].weight.grad is not None
    assert net.stem[0].weight.grad is None

"""What trains when: tables of factors by layer and epoch."""

import pytest

from finetune.strategies.full import Full
from finetune.strategies.linear_probe import LinearProbe


@pytest.mark.parametrize("epoch", [0, 1, 99])
def test_full_trains_every_layer_at_the_base_lr(epoch):
    assert [Full().lr_scale(layer, 3, epoch) for layer in range(4)] == [1.0] * 4


@pytest.mark.parametrize("epoch", [0, 1, 99])
def test_linear_probe_trains_the_head_alone(epoch):
    assert [LinearProbe().lr_scale(layer, 3, epoch) for layer in range(4)] == [0.0, 0.0, 0.0, 1.0]

"""What trains when: tables of factors by layer and epoch."""

import pytest

from finetune.strategies import for_run, scales
from finetune.strategies.effect import without_effect
from finetune.strategies.freeze_until import FreezeUntil
from finetune.strategies.full import Full
from finetune.strategies.gradual_unfreeze import GradualUnfreeze
from finetune.strategies.head_lr import HeadLr
from finetune.strategies.layer_decay import LayerDecay
from finetune.strategies.linear_probe import LinearProbe
from finetune.strategies.lp_ft import LpFt


@pytest.mark.parametrize("epoch", [0, 1, 99])
def test_full_trains_every_layer_at_the_base_lr(epoch):
    assert [Full().lr_scale(layer, 3, epoch) for layer in range(4)] == [1.0] * 4


@pytest.mark.parametrize("epoch", [0, 1, 99])
def test_linear_probe_trains_the_head_alone(epoch):
    assert [LinearProbe().lr_scale(layer, 3, epoch) for layer in range(4)] == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("epoch", [0, 1, 99])
def test_layer_decay_is_a_power_of_the_layers_up_to_the_head(epoch):
    factors = [LayerDecay(0.5).lr_scale(layer, 3, epoch) for layer in range(4)]
    assert factors == [0.125, 0.25, 0.5, 1.0]


def test_layer_decay_of_one_is_full():
    assert scales(LayerDecay(1), 3, 2) == scales(Full(), 3, 2)


@pytest.mark.parametrize("epoch", [0, 1, 99])
def test_head_lr_moves_the_backbone_at_a_fraction(epoch):
    assert [HeadLr(0.1).lr_scale(layer, 3, epoch) for layer in range(4)] == [0.1, 0.1, 0.1, 1.0]


def test_lp_ft_probes_and_then_trains_everything_at_a_fraction():
    strategy = LpFt(Full(), probe_epochs=2, tune_lr=0.1)
    assert scales(strategy, 2, 4) == [
        [0.0, 0.0, 0.1, 0.1], [0.0, 0.0, 0.1, 0.1], [1.0, 1.0, 0.1, 0.1],
    ]  # fmt: skip


def test_lp_ft_scales_what_comes_then_by_layer():
    strategy = LpFt(LayerDecay(0.5), probe_epochs=1, tune_lr=0.2)
    assert [factors[1] for factors in scales(strategy, 2, 2)] == [0.05, 0.1, 0.2]


def test_the_epochs_of_what_comes_after_the_probe_count_from_there():
    strategy = LpFt(GradualUnfreeze(Full(), every=1), probe_epochs=3, tune_lr=1.0)
    assert scales(strategy, 2, 6) == [
        [0.0, 0.0, 0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0, 1.0, 1.0], [1.0] * 6,
    ]  # fmt: skip


@pytest.mark.parametrize(("epochs", "probe"), [(1, 1), (2, 1), (3, 1), (10, 5), (11, 5)])
def test_the_probe_of_lp_ft_is_half_of_the_run_unless_it_is_given(epochs, probe):
    assert for_run(LpFt(Full()), 4, epochs) == LpFt(Full(), probe)
    assert for_run(LpFt(Full(), 7), 4, epochs) == LpFt(Full(), 7)


def test_gradual_unfreeze_goes_from_the_head_to_the_stem():
    assert scales(GradualUnfreeze(Full(), every=2), 2, 6) == [
        [0.0, 0.0, 0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0, 1.0, 1.0], [1.0] * 6,
    ]  # fmt: skip
    decayed = GradualUnfreeze(LayerDecay(0.5), every=1)
    assert scales(decayed, 2, 3) == [[0.0, 0.0, 0.25], [0.0, 0.5, 0.5], [1.0, 1.0, 1.0]]


@pytest.mark.parametrize(("depth", "epochs"), [(1, 2), (4, 8), (4, 30), (5, 100), (13, 26)])
def test_all_layers_train_by_half_of_the_run_where_every_is_left_open(depth, epochs):
    stem = scales(for_run(GradualUnfreeze(Full()), depth, epochs), depth, epochs)[0]
    assert stem[epochs // 2 :] == [1.0] * (epochs - epochs // 2)
    # one epoch more for each layer would be too late
    slower = GradualUnfreeze(Full(), for_run(GradualUnfreeze(Full()), depth, epochs).every + 1)
    assert scales(slower, depth, epochs)[0][epochs // 2] == 0.0


def test_what_is_inside_is_filled_for_the_epochs_that_are_left():
    inner = GradualUnfreeze(LpFt(Full()))
    filled = for_run(LpFt(inner, probe_epochs=8), 2, 16)
    assert filled == LpFt(GradualUnfreeze(LpFt(Full(), 4), 2), 8)


def test_freeze_until_stands_above_any_strategy():
    strategy = FreezeUntil(LpFt(LayerDecay(0.5), probe_epochs=1, tune_lr=1.0), 2)
    assert scales(strategy, 3, 2) == [[0.0, 0.0], [0.0, 0.0], [0.0, 0.5], [1.0, 1.0]]


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        (LpFt(Full(), 3), "does no more than strategy=linear_probe in this run of 3 epochs"),
        (LpFt(Full(), 99), "does no more than strategy=linear_probe"),
        (LpFt(LinearProbe(), 1), "never trains 4 of 4 layers in this run of 3 epochs: 0, 1, 2, 3"),
        (LpFt(LayerDecay(1.0), 1), "strategy.then: LayerDecay(decay=1.0) does no more than full"),
        (LayerDecay(1.0), "LayerDecay(decay=1.0) does no more than strategy=full"),
        (HeadLr(1.0), "does no more than strategy=full"),
        (HeadLr(0.0), "does no more than strategy=linear_probe"),
        (GradualUnfreeze(Full(), 3), "does no more than strategy=linear_probe"),
        (GradualUnfreeze(Full(), 1), "never trains 2 of 4 layers in this run of 3 epochs: 0, 1"),
        (FreezeUntil(LinearProbe(), 1), "freeze_until=1 has no effect: these layers never train"),
    ],
)
def test_a_choice_without_effect_is_told(strategy, said):
    (line,) = without_effect(strategy, 4, 3)
    assert said in line


@pytest.mark.parametrize(
    "strategy",
    [
        Full(), LinearProbe(), LpFt(Full(), 1), LpFt(LayerDecay(), 2), LayerDecay(), HeadLr(),
        GradualUnfreeze(LayerDecay(), 1), FreezeUntil(Full(), 4), FreezeUntil(LpFt(Full(), 1), 1),
    ],
)  # fmt: skip
def test_a_choice_with_an_effect_is_not(strategy):
    assert list(without_effect(strategy, 4, 5)) == []


def test_a_class_of_ones_own_needs_one_method():
    class Mine:
        def lr_scale(self, layer, depth, epoch):
            return 1.0 if layer == depth else 0.0

    mine = Mine()
    assert for_run(mine, 4, 3) is mine
    assert len(list(without_effect(mine, 4, 3))) == 1

"""The table of layers says what trains when, so that a person can check it."""

import pytest
from torch import nn

from finetune.backbones.tiny import tiny
from finetune.layer_table import compact, frozen_in_words, in_words, layer_facts, text
from finetune.strategies.freeze_until import FreezeUntil
from finetune.strategies.full import Full
from finetune.strategies.layer_decay import LayerDecay
from finetune.strategies.lp_ft import LpFt


@pytest.mark.parametrize(
    ("factors", "words", "frozen"),
    [
        ([1.0, 1.0], "1", "no"),
        ([0.0, 0.0], "0", "yes"),
        ([0.0] * 5 + [0.1] * 5, "0 -> 0.1 from epoch 5", "until epoch 5"),
        ([1.0, 0.1, 0.1], "1 -> 0.1 from epoch 1", "no"),
        ([0.0, 1.0, 0.0], "0 -> 1 from epoch 1 -> 0 from epoch 2", "at times"),
        ([0.75**13], "0.0238", "no"),
        (
            [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7],
            "0.1 -> 0.2 from epoch 1 -> 0.3 from epoch 2 -> 0.4 from epoch 3 -> 0.5 from epoch 4 "
            "-> ... 0.7",
            "no",
        ),
    ],
)
def test_factors_over_the_epochs_in_words(factors, words, frozen):
    assert in_words(factors) == words
    assert frozen_in_words(factors) == frozen


def counted(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_every_parameter_is_counted_in_its_layer():
    net, head = tiny(None).net, nn.Linear(128, 10)
    rows = layer_facts(net, head, LpFt(LayerDecay(0.5), probe_epochs=5), epochs=10)
    assert [row.parameters for row in rows] == [
        counted(module) for module in (net.stem, net.stage1, net.stage2, net.stage3, head)
    ]
    assert [row.modules[0] for row in rows] == ["stem", "stage1", "stage2", "stage3", "head"]
    assert rows[3].lr_scale == "0 -> 0.05 from epoch 5"
    assert rows[4].lr_scale == "1 -> 0.1 from epoch 5"
    assert [row.frozen for row in rows] == ["until epoch 5"] * 4 + ["no"]


def test_layers_that_train_alike_are_one_line_of_the_log():
    net, head = tiny(None).net, nn.Linear(128, 10)
    rows = layer_facts(net, head, FreezeUntil(Full(), 2), epochs=3)
    lines = [line.split() for line in text(compact(rows)).splitlines()]
    below, above = (
        f"{counted(a) + counted(b):,}"
        for a, b in ((net.stem, net.stage1), (net.stage2, net.stage3))
    )
    assert lines[1:] == [
        ["0-1", "stem", "...", "stage1", below, "0", "yes"],
        ["2-3", "stage2", "...", "stage3", above, "1", "no"],
        ["4", "head", "1,290", "1", "no"],
    ]

"""python -m finetune.layers: what a model is made of and what a strategy would do with it."""

import pytest

from finetune.backbones import weights


def rows(done):
    assert done.code == 0, done.err
    return [line.split() for line in done.out.splitlines() if not line.startswith("warning")][1:]


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """Neither a file nor a download is read."""

    def refuse(*args, **kwargs):
        raise AssertionError("weights are read")

    for name in ("tiny", "torchvision", "timm"):
        monkeypatch.setattr(f"finetune.backbones.{name}.load_weights", refuse)
    monkeypatch.setattr(weights, "read_state_dict", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)


def test_the_layers_of_any_model_are_listed_without_its_weights(command):
    table = rows(command("layers", "model=resnet18"))
    # the parameters as He et al. 2016 have them: 3 x 7 x 7 x 64 and BatchNorm's 2 x 64, ...
    assert table == [
        ["0", "conv1", "9,536", "1", "no"],
        ["1", "layer1", "147,968", "1", "no"],
        ["2", "layer2", "525,568", "1", "no"],
        ["3", "layer3", "2,099,712", "1", "no"],
        ["4", "layer4", "8,393,728", "1", "no"],
        ["5", "head", "by", "classes", "1", "no"],
    ]


def test_a_strategy_is_shown_over_the_epochs(command):
    done = command("layers", "strategy=lp_ft", "strategy@strategy.then=layer_decay",
                   "strategy.then.decay=0.5", "freeze_until=1", "epochs=6")  # fmt: skip
    factors = [" ".join(row[3:]) for row in rows(done)]
    assert factors[0] == "0 yes"
    assert factors[3] == "0 -> 0.05 from epoch 3 until epoch 3"
    assert factors[4] == "classes 1 -> 0.1 from epoch 3 no"


def test_more_frozen_layers_than_there_are_is_told_with_their_number(command):
    done = command("layers", "freeze_until=5")
    assert done.code == 1
    assert "freeze_until=5: the backbone has 4 layers; type at most 4" in done.err
    assert "Traceback" not in done.err


def test_what_has_no_effect_is_told(command):
    done = command("layers", "strategy=lp_ft", "strategy.probe_epochs=10")
    assert done.code == 0
    assert "does no more than strategy=linear_probe in this run of 10 epochs" in done.out


def test_a_sweep_is_refused(command, tmp_path):
    done = command("layers", "-m", "strategy=full,lp_ft")
    assert done.code == 1
    assert "leave out -m" in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("strategy=lpft", "strategy=lpft: no such option in conf/strategy/; close: lp_ft"),
        ("model=resnet81", "no such option in conf/model/; close: resnet"),
        ("optimizer.lr=1", "optimizer.lr: no such key"),
        ("epochs=0", "epochs=0: must be a whole number from 1"),
    ],
)
def test_a_mistake_is_named(command, argument, said):
    done = command("layers", argument)
    assert done.code == 1
    assert said in done.err

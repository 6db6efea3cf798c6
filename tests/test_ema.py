"""The moving average is what is validated, kept and tested; the training does not see it."""

import copy

import lightning as L
import pytest
import torch
from torch.nn import functional as F

import finetune
from conftest import SMALL, composed, facts_of, plain, series
from finetune import build, checkpoint
from finetune.ema import EMA, decay_at
from finetune.errors import Interrupted
from finetune.fit import fit
from finetune.tasks.classification import Classification


class Watch(L.Callback):
    """The model as it was built, and after each optimizer step; stands before EMA."""

    def __init__(self):
        self.states = {}

    def on_train_start(self, trainer, task):
        self.states[0] = copy.deepcopy(task.model.state_dict())

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        # the first of a step: an accumulating batch moves BatchNorm's statistics on
        self.states.setdefault(trainer.global_step, copy.deepcopy(task.model.state_dict()))


def average_of(states, decay, last):
    """Closed form in float64: each state weighted by its own share and all later decays."""
    decays = [min(decay, (1 + t) / (10 + t)) for t in range(1, last + 1)]
    weights = [1.0, *(1 - d for d in decays)]
    for t, d in enumerate(decays, start=1):
        weights[:t] = [w * d for w in weights[:t]]
    return {
        name: sum(w * states[t][name].double() for t, w in enumerate(weights))
        for name, value in states[0].items()
        if value.is_floating_point()
    }


@pytest.fixture
def watched(train, monkeypatch):
    """watched("ema=0.9"): a run and the states of its steps."""
    make = build.build_trainer

    def run(*overrides, name="run"):
        watch = Watch()
        monkeypatch.setattr(
            build, "build_trainer",
            lambda cfg, run, budget, callbacks, loggers: make(
                cfg, run, budget, [watch, *callbacks], loggers
            ),
        )  # fmt: skip
        return train(*overrides, name=name), watch.states

    return run


def test_the_decay_grows_from_a_fifth_to_what_was_asked_for():
    assert [decay_at(t, 0.999) for t in (1, 2, 90)] == [2 / 11, 3 / 12, 91 / 100]
    assert decay_at(10**6, 0.999) == 0.999
    assert decay_at(90, 0.5) == 0.5


@pytest.mark.parametrize(
    "changes", [(), ("trainer.accumulate_grad_batches=2", "trainer.precision=bf16-mixed")]
)
def test_the_best_checkpoint_holds_the_average_of_its_step(watched, changes):
    run, states = watched("ema=0.4", "epochs=3", "optimizer.lr=0.05", *changes)
    saved = checkpoint.read(checkpoint.best_path(run))
    assert len(states) == 1 + (9 if changes else 15)
    raw, expected = states[saved.step], average_of(states, 0.4, saved.step)
    assert saved.state_dict.keys() == raw.keys()
    for name, value in saved.state_dict.items():
        if name in expected:  # BatchNorm's statistics among them
            assert torch.allclose(value.double(), expected[name], rtol=1e-5, atol=1e-6), name
            assert not torch.equal(value, raw[name]), name
        else:
            assert torch.equal(value, raw[name]), name
    assert any(name.endswith("running_var") for name in expected)
    assert len(expected) < len(raw)  # num_batches_tracked


def test_the_training_does_not_notice_the_average(train):
    plain, averaged = train(name="plain"), train("ema=0.9", name="averaged")
    assert series(plain, "train/loss") == series(averaged, "train/loss")
    assert series(plain, "val/loss") != series(averaged, "val/loss")
    ends = [checkpoint.load(checkpoint.step_paths(run)[0]) for run in (plain, averaged)]
    first, second = (end["state_dict"] for end in ends)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_val_and_test_are_measured_with_what_the_best_checkpoint_holds(train):
    run = train("ema=0.9")
    model, transform, _ = finetune.load(run)
    splits, facts = build.build_splits(composed(*SMALL)), facts_of(run)
    for split in ("val", "test"):
        images = getattr(splits, split)
        batch = torch.stack([transform(images[i][0]) for i in range(len(images))])
        with torch.no_grad():
            loss = float(F.cross_entropy(model(batch), torch.tensor(images.labels)))
        assert facts[split][f"{split}/loss"] == pytest.approx(loss, rel=1e-5)


def test_a_frozen_layer_is_its_own_average_bit_for_bit(watched):
    run, states = watched("ema=0.9", "strategy=linear_probe")
    saved = checkpoint.read(checkpoint.best_path(run)).state_dict
    for name, value in saved.items():
        assert torch.equal(value, states[0][name]) == name.startswith("backbone."), name


@pytest.fixture
def fitted(tmp_path):
    """A task that was trained, its data, its trainer and its average."""
    cfg = plain(*SMALL)
    splits = build.build_splits(cfg)
    model = build.build_model(cfg, splits.classes)
    budget = build.build_budget(cfg, len(splits.train))
    task, ema = build.build_task(cfg, model, budget), EMA(0.9)
    datamodule = build.build_datamodule(cfg, splits, model)
    trainer = build.build_trainer(cfg, tmp_path, budget, [ema], [])
    trainer.fit(task, datamodule=datamodule)
    return task, datamodule, trainer, ema


def test_a_validation_by_itself_measures_the_average_and_puts_the_weights_back(fitted):
    task, datamodule, trainer, ema = fitted
    weights, average = copy.deepcopy((task.model.state_dict(), ema.average))
    seen = []
    task.on_validation_epoch_end = lambda: seen.append(copy.deepcopy(task.model.state_dict()))
    trainer.validate(task, datamodule=datamodule, verbose=False)
    for name, value in weights.items():
        assert torch.equal(seen[0][name], average[name])
        assert torch.equal(task.model.state_dict()[name], value)
        assert torch.equal(ema.average[name], average[name])
    trainer.test(task, datamodule=datamodule, verbose=False)
    assert torch.equal(task.model.head.weight, weights["head.weight"])


def test_a_validation_that_is_stopped_puts_the_weights_back(fitted):
    task, datamodule, trainer, _ = fitted
    weights = copy.deepcopy(task.model.state_dict())

    def stop(*_):
        raise Interrupted(15)

    task.validation_step = stop
    with pytest.raises(Interrupted):
        trainer.validate(task, datamodule=datamodule, verbose=False)
    assert all(map(torch.equal, task.model.state_dict().values(), weights.values()))


def test_before_any_training_there_is_nothing_to_stand_in(train):
    plain, averaged = train("max_steps=0", name="plain"), train("max_steps=0", "ema=0.9", name="a")
    assert facts_of(plain)["val"] == facts_of(averaged)["val"]


@pytest.mark.slow
def test_an_average_that_a_run_is_too_short_for_does_not_ruin_it(tmp_path):
    # without warm-up .999 would leave 90 % of the start after 100 steps, and a chance of .1
    digits = (
        "data=digits",
        "data.shots=10",
        "batch_size=16",
        "max_steps=100",
        "logger=csv",
        "trainer.accelerator=cpu",
        "recipe=none",
        "optimizer=adamw",
        "optimizer.lr=0.001",
    )
    accuracies = []
    for ema in ("null", "0.999"):
        fit(composed(*digits, f"ema={ema}"), tmp_path / ema, [], "as asked for")
        accuracies.append(series(tmp_path / ema, "val/accuracy")[-1])
    raw, averaged = accuracies
    assert raw > 0.8
    assert averaged > raw - 0.05


def test_zero_is_off(train, monkeypatch):
    monkeypatch.setattr(Classification, "on_train_start", lambda task: seen.extend(
        type(callback) for callback in task.trainer.callbacks), raising=False)  # fmt: skip
    for value, there in (("0", False), ("null", False), ("0.5", True)):
        seen = []
        train(f"ema={value}", "max_steps=1", name=f"ema{value}")
        assert (EMA in seen) == there

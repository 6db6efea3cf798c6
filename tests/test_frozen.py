"""Frozen means frozen: every strategy, on a CNN with BatchNorm, on a transformer with dropout."""

import copy
from dataclasses import dataclass, field
from functools import partial

import lightning as L
import pytest
import torch

from conftest import SMALL, assert_same_end, finish, layer_of, plain, same
from finetune import build, checkpoint
from finetune.callbacks.checkpoints import BestCheckpoint, Pace, StepCheckpoints
from finetune.callbacks.guard import FiniteGuard
from finetune.fit import quiet_libraries
from finetune.overrides import CONF

NETS = ("nets.Cnn", "nets.Swin")
STRATEGIES = [
    *((f"strategy={path.stem}",) for path in sorted((CONF / "strategy").glob("*.yaml"))),
    ("freeze_until=2",),
    ("strategy=lp_ft", "strategy@strategy.then=layer_decay", "freeze_until=1"),
]
CASES = [(f"model.target={net}", *strategy) for strategy in STRATEGIES for net in NETS]
# pairs of one of 4 layers and one of 4 epochs
FROZEN_PAIRS = {
    "strategy=full": 0, "strategy=linear_probe": 16, "strategy=lp_ft": 8,
    "strategy=gradual_unfreeze": 4 + 3 + 2 + 1, "freeze_until=2": 8,
    "strategy=lp_ft strategy@strategy.then=layer_decay freeze_until=1": 8 + 2,
}  # fmt: skip
# 5 steps an epoch; weight decay and momentum would move a frozen parameter that is stepped
RUN = (
    *SMALL, "epochs=4", "model=module", "model.weights=null", "model.input_size=8",
    "optimizer=adamw", "optimizer.lr=0.001", "schedule=one_cycle", "augment=strong",
)  # fmt: skip


@dataclass
class Watch(L.Callback):
    """Keeps the state before each epoch and at the end, and the mode and lr of each step."""

    states: list = field(default_factory=list)
    modes: list = field(default_factory=list)
    backbones: list = field(default_factory=list)
    lrs: list = field(default_factory=list)

    def keep(self, task):
        self.states.append(copy.deepcopy(task.model.state_dict()))

    def on_train_epoch_start(self, trainer, task):
        self.keep(task)

    def on_before_optimizer_step(self, trainer, task, optimizer):
        layers = task.model.modules_by_layer()
        self.modes.append([{m.training for part in layer for m in part.modules()}
                           for layer in layers])  # fmt: skip
        self.backbones.append({m.training for m in task.model.backbone.modules()})
        self.lrs.append({g["layer"]: g["lr"] for g in optimizer.param_groups})

    def on_train_end(self, trainer, task):
        self.keep(task)


class Lose(L.Callback):
    """The power fails in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_before_optimizer_step(self, trainer, task, optimizer):
        if trainer.global_step == self.step:
            raise RuntimeError("the power is gone")


def fit(case, folder, *callbacks, resume=None):
    """Train as composed; returns the task. case: overrides."""
    quiet_libraries()
    cfg = plain(*RUN, *case)
    splits = build.build_splits(cfg)
    model = build.build_model(cfg, splits.classes)
    budget = build.build_budget(cfg, len(splits.train))
    task = build.build_task(cfg, model, budget)
    trainer = build.build_trainer(cfg, folder, budget, list(callbacks), [])
    datamodule = build.build_datamodule(cfg, splits, model)
    trainer.fit(task, datamodule=datamodule, ckpt_path=resume, weights_only=True)
    return task


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def whole(request, tmp_path_factory):
    """Case, task and watch of an uninterrupted run."""
    watch = Watch()
    return request.param, fit(request.param, tmp_path_factory.mktemp("whole"), watch), watch


def test_what_is_frozen_stays_bit_for_bit_and_what_trains_moves(whole):
    case, task, watch = whole
    parameters = dict(task.model.named_parameters())
    assert len(watch.states) == 5
    pairs = set()
    for epoch in range(4):
        before, after = watch.states[epoch], watch.states[epoch + 1]
        for name, value in before.items():
            layer = layer_of(task, name)
            if frozen := task.lr_scale(layer, epoch) == 0.0:
                pairs.add((layer, epoch))
            # of buffers only BatchNorm's move: the indices of Swin's positions are constants
            if frozen or name in parameters or "running" in name or "num_batches" in name:
                assert torch.equal(value, after[name]) == frozen, (epoch, name)
    assert len(pairs) == FROZEN_PAIRS.get(" ".join(case[1:]), len(pairs))
    assert task.model.depth == 4


def test_what_is_frozen_is_in_eval_mode(whole):
    _, task, watch = whole
    assert len(watch.modes) == 20
    for step, modes in enumerate(watch.modes):
        trains = [task.lr_scale(layer, step // 5) > 0.0 for layer in range(5)]
        assert modes == [{training} for training in trains], step
        if not any(trains[:4]):  # nor may what holds the layers drop anything
            assert watch.backbones[step] == {False}


def test_one_cycle_works_from_the_first_step_on(whole):
    _, task, watch = whole
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.001, 20, cycle_momentum=False)
    for step, lrs in enumerate(watch.lrs):
        base = cycle.get_last_lr()[0]
        for layer, lr in lrs.items():
            assert lr == pytest.approx(base * task.lr_scale(layer, step // 5), rel=1e-9, abs=0)
        optimizer.step()
        if step < 19:
            cycle.step()


def test_a_resume_is_in_the_state_of_the_uninterrupted_run(whole, tmp_path):
    case, task, _ = whole
    best = BestCheckpoint(tmp_path, "val/accuracy", Pace())
    steps = partial(StepCheckpoints, tmp_path, every_n_steps=1, guard=FiniteGuard(""), best=best)
    resume = None
    for lost in (7, 12):  # lp_ft: in the probe, and after it
        with pytest.raises(RuntimeError, match="the power is gone"):
            fit(case, tmp_path, steps(), Lose(lost), resume=resume)
        resume = checkpoint.step_paths(tmp_path)[0]
        assert resume.name == f"step-{lost}.ckpt"
    watch = Watch()
    resumed = fit(case, tmp_path, watch, resume=resume)
    assert same(resumed.model.state_dict(), task.model.state_dict())
    ours, theirs = (t.trainer.optimizers[0].state_dict()["state"] for t in (resumed, task))
    assert same(ours, theirs)
    assert watch.modes[0] == whole[2].modes[12]


def test_a_run_of_lp_ft_that_was_lost_goes_on_as_it_was_chosen(command, tmp_path, monkeypatch):
    case = ("strategy=lp_ft", "strategy@strategy.then=layer_decay", "strategy.then.decay=0.5")
    typed = [*SMALL, "epochs=4", "checkpoint.every_n_steps=2", "logger=csv", *case]
    finish(tmp_path / "whole", *typed)
    for lost in (7, 13):
        lose = partial(Lose.on_before_optimizer_step, Lose(lost))
        with monkeypatch.context() as patch:
            patch.setattr(
                StepCheckpoints, "on_before_optimizer_step",
                lambda self, *arguments, lose=lose: lose(*arguments), raising=False,
            )  # fmt: skip
            again = ["resume=run"] if lost == 13 else [*typed, "hydra.run.dir=run"]
            done = command("train", *again)
        assert done.code == 1
        # what trains when is told at the start
        assert "221,696 0 -> 0.05 from epoch 2 until epoch 2" in " ".join(done.out.split())
    assert command("train", "resume=run").code == 0
    assert_same_end(tmp_path / "run", tmp_path / "whole")

"""What trains at which lr, and that the rest does not move."""

import copy
import math

import lightning as L
import pytest
import torch
from torch import nn

from conftest import SMALL, layer_of, metrics_of, plain
from finetune import build
from finetune.strategies.full import Full
from finetune.strategies.linear_probe import LinearProbe
from finetune.tasks.base import clip


class ThawFromTheTop:
    """A stand-in for later strategies: one more layer per epoch, the lower the slower."""

    def lr_scale(self, layer: int, depth: int, epoch: int) -> float:
        return 0.5 ** (depth - layer) if depth - layer <= epoch else 0.0


class Watch(L.Callback):
    """Keeps what each step was made with."""

    def __init__(self):
        self.states, self.lrs, self.modes, self.grads = [], [], [], []

    def on_train_start(self, trainer, task):
        self.states.append(copy.deepcopy(task.model.state_dict()))

    def on_before_optimizer_step(self, trainer, task, optimizer):
        self.lrs.append({g["name"]: g["lr"] for g in optimizer.param_groups})
        self.grads.append([[p.grad is not None for p in group["params"]]
                           for group in optimizer.param_groups])  # fmt: skip
        layers = task.model.modules_by_layer()
        self.modes.append([{m.training for part in layer for m in part.modules()}
                           for layer in layers])  # fmt: skip

    def on_train_epoch_end(self, trainer, task):
        self.states.append(copy.deepcopy(task.model.state_dict()))


def watched(strategy, tmp_path, *overrides):
    """Train with a strategy; everything else as composed."""
    cfg = plain(*SMALL, "optimizer.weight_decay=0.1", *overrides)
    splits = build.build_splits(cfg)
    model = build.build_model(cfg, splits.classes)
    # dropout, so that its mode can be told too
    model.backbone.net.stage2.add_module("dropout", nn.Dropout(0.5))
    budget = build.build_budget(cfg, len(splits.train))
    task = build.build_task(cfg, model, budget)
    task.strategy_ = strategy
    watch = Watch()
    trainer = build.build_trainer(cfg, tmp_path, budget, [watch], [])
    trainer.fit(task, datamodule=build.build_datamodule(cfg, splits, model))
    return task, watch


def test_linear_probe_keeps_the_backbone_bit_for_bit(tmp_path):
    task, watch = watched(LinearProbe(), tmp_path)
    before, after = watch.states[0], watch.states[-1]
    for name, value in before.items():  # BatchNorm's statistics and counts among them
        assert torch.equal(value, after[name]) == name.startswith("backbone."), name
    assert any(name.endswith("running_mean") for name in before)
    assert watch.modes == [[{False}] * task.model.depth + [{True}]] * len(watch.modes)
    trains = {name for name, p in task.model.named_parameters() if p.requires_grad}
    assert trains == {"head.weight", "head.bias"}


def test_full_moves_every_parameter_and_every_statistic(tmp_path):
    _, watch = watched(Full(), tmp_path)
    assert not any(map(torch.equal, watch.states[0].values(), watch.states[-1].values()))
    assert {mode for step in watch.modes for layer in step for mode in layer} == {True}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_layer_stays_bit_for_bit_until_its_strategy_lets_it_train(tmp_path, optimizer):
    # with weight decay and momentum, which move a parameter that has no gradient but is stepped
    task, watch = watched(ThawFromTheTop(), tmp_path, "epochs=3", f"optimizer={optimizer}")
    depth = task.model.depth
    assert depth > 2
    for epoch in range(3):
        before, after = watch.states[epoch], watch.states[epoch + 1]
        for name, value in before.items():
            frozen = depth - layer_of(task, name) > epoch
            assert torch.equal(value, after[name]) == frozen, (epoch, name)


def test_a_frozen_layer_has_no_gradient_and_is_in_eval_mode(tmp_path):
    task, watch = watched(ThawFromTheTop(), tmp_path, "epochs=3")
    depth, steps = task.model.depth, len(watch.grads) // 3
    groups = [g["layer"] for g in task.trainer.optimizers[0].param_groups]
    for step, (grads, modes) in enumerate(zip(watch.grads, watch.modes, strict=True)):
        thawed = [depth - layer <= step // steps for layer in range(depth + 1)]
        assert modes == [{trains} for trains in thawed]
        assert grads == [[thawed[layer]] * len(g) for layer, g in zip(groups, grads, strict=True)]
    # what trains at the end of the run stays in autograd from the start, for DDP
    trains = {layer_of(task, n) for n, p in task.model.named_parameters() if p.requires_grad}
    assert trains == set(range(depth - 2, depth + 1))


def test_lr_is_base_times_schedule_times_scale(tmp_path):
    task, watch = watched(ThawFromTheTop(), tmp_path, "epochs=3", "optimizer.lr=0.02",
                          "schedule=cosine", "schedule.warmup=0.0")  # fmt: skip
    total = len(watch.lrs)
    assert total == 15
    depth = task.model.depth
    for step, lrs in enumerate(watch.lrs):
        cosine = 0.5 * (1 + math.cos(math.pi * step / total))
        for name, lr in lrs.items():
            stem = name.removesuffix("_no_decay")
            layer = depth if stem == "head" else int(stem.removeprefix("layer"))
            scale = 0.5 ** (depth - layer) if depth - layer <= step // 5 else 0.0
            assert lr == pytest.approx(0.02 * cosine * scale, rel=1e-9, abs=0)


def test_the_curves_show_the_lr_that_each_step_used(train):
    run = train("strategy=linear_probe", "schedule=linear", "schedule.warmup=0.0")
    lrs = [(step, v) for step, name, v in metrics_of(run) if name == "lr/head"]
    assert lrs == [(step, pytest.approx(0.01 * (1 - step / 10))) for step in range(10)]
    stem = {value for _, name, value in metrics_of(run) if name == "lr/layer0"}
    assert stem == {0.0}


def test_accumulated_batches_make_one_step(train):
    run = train("trainer.accumulate_grad_batches=2", "trainer.log_every_n_steps=1")
    # 18 images: 5 batches (of 4, 4, 4, 4, 2), 3 steps an epoch, the last one of a single batch
    steps = [step for step, name, _ in metrics_of(run) if name == "train/loss"]
    assert steps == list(range(6))


def test_dropout_is_the_same_whatever_was_drawn_before(tmp_path):
    _, first = watched(Full(), tmp_path)
    torch.manual_seed(12345)
    _, second = watched(Full(), tmp_path)
    assert all(map(torch.equal, first.states[-1].values(), second.states[-1].values()))


@pytest.mark.parametrize(
    "length", [0.0, 0.1, 1.0 - 5e-7, 1.0, 1.0 + 1e-6, 30.0, math.inf, math.nan]
)
def test_gradients_are_clipped_to_the_bits_of_torch(length):
    def parameters():
        generator = torch.Generator().manual_seed(0)
        found = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 5), (7,), (2,))]
        grads = [torch.randn(p.shape, generator=generator) for p in found[:2]]  # one has none
        norm = torch.cat([grad.flatten() for grad in grads]).norm()
        for parameter, grad in zip(found, grads, strict=False):
            parameter.grad = grad * (length / norm)
        return found

    ours, theirs = parameters(), parameters()
    norm = clip(ours, 1.0)
    assert torch.equal(norm.nan_to_num(), nn.utils.clip_grad_norm_(theirs, 1.0).nan_to_num())
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        assert one.grad.numpy().tobytes() == other.grad.numpy().tobytes()
    assert ours[2].grad is None

"""What is minimised with smoothing, mixing, l2_sp and clipping: against loops in plain PyTorch."""

import logging

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.transforms import v2

import finetune
from conftest import SMALL, composed, facts_of, series
from finetune import build, checkpoint
from finetune.data.sampler import epoch_order, stable_hash
from finetune.fit import fit

LR = 0.01  # with 0.05 a rounding is a hundredth of the loss after ten steps
# pretrained, every image as it is, at one lr
RUN = (
    *(override for override in SMALL if not override.startswith(("augment", "model.weights"))),
    "augment=none", "optimizer=sgd", f"optimizer.lr={LR}", "schedule=constant", "logger=csv",
)  # fmt: skip


@pytest.fixture
def run_with(tmp_path):
    """run_with("mixup=0.4"): RUN with changes; returns its directory."""

    def run(*changes, name="run"):
        fit(composed(*RUN, *changes), tmp_path / name, list(changes), "as asked for")
        return tmp_path / name

    return run


class Loop:
    """The textbook's loop on the data of RUN, with what is asked for."""

    def __init__(self, smoothing=0.0, mixup=None, pull=0.0, decay=0.0, clip=None, accumulate=1):
        cfg = composed(*RUN)
        self.train = build.build_splits(cfg).train
        self.net = build.build_model(cfg, ("a", "b", "c"))
        self.start = [p.detach().clone() for p in self.net.backbone.parameters()]
        self.smoothing, self.mixup, self.pull, self.decay = smoothing, mixup, pull, decay
        self.clip, self.accumulate = clip, accumulate
        self.losses, self.accuracies, self.norms = [], [], []

    def loss(self, images, labels, seed):
        targets = nn.functional.one_hot(labels, 3).float()
        if self.mixup:
            transform = v2.MixUp(num_classes=3)
            kept = np.random.default_rng(seed).beta(self.mixup, self.mixup)
            transform.make_params = lambda _: {"lam": kept}
            images, targets = transform(images.float(), labels)
        logits = self.net(images)
        guesses = logits.argmax(1).tolist()
        self.accuracies.append(sum(float(t[g]) for t, g in zip(targets, guesses, strict=True))
                               / len(labels))  # fmt: skip
        smooth = (1 - self.smoothing) * targets + self.smoothing / 3
        return -(smooth * logits.log_softmax(1)).sum(1).mean()

    def run(self, epochs=2):
        # plain SGD with momentum, decay and pull as gradients, in place of a loss term
        parameters = list(self.net.parameters())
        momenta = [torch.zeros_like(p) for p in parameters]
        backbone = len(self.start)
        self.net.train()
        for epoch in range(epochs):
            order = epoch_order(len(self.train), 0, epoch)
            bounds = range(0, len(order), 4)
            for batch, first in enumerate(bounds):
                rows = [self.train[i] for i in order[first : first + 4]]
                images = torch.stack([image for image, _ in rows])
                labels = torch.tensor([label for _, label in rows])
                loss = self.loss(images, labels, stable_hash("mix", 0, 0, epoch, batch))
                (loss / self.accumulate).backward()
                away = [p.detach() - s for p, s in zip(parameters, self.start, strict=False)]
                penalty = self.pull / 2 * sum(float((a**2).sum()) for a in away)
                self.losses.append(loss.item() + penalty)
                if (batch + 1) % self.accumulate and batch + 1 < len(bounds):
                    continue
                since = batch % self.accumulate + 1
                with torch.no_grad():
                    for p, a in zip(parameters, away, strict=False):
                        p.grad += self.pull * a * since / self.accumulate
                if self.clip:
                    self.norms.append(float(nn.utils.clip_grad_norm_(parameters, self.clip)))
                with torch.no_grad():
                    for i, (p, m) in enumerate(zip(parameters, momenta, strict=True)):
                        decays = p.ndim > 1 and (i >= backbone or not self.pull)
                        m.mul_(0.9).add_(p.grad + self.decay * decays * p)
                        p -= LR * m
                        p.grad = None
        return self


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        (["task.label_smoothing=0.2"], {"smoothing": 0.2}),
        (["mixup=0.4"], {"mixup": 0.4}),
        (["l2_sp=0.3", "optimizer.weight_decay=0.1"], {"pull": 0.3, "decay": 0.1}),
        (["optimizer.weight_decay=0.1", "l2_sp=0", "mixup=0", "cutmix=0"], {"decay": 0.1}),
        (["trainer.gradient_clip_val=0.5"], {"clip": 0.5}),
        (
            ["task.label_smoothing=0.2", "mixup=0.4", "l2_sp=0.3", "optimizer.weight_decay=0.1",
             "trainer.gradient_clip_val=0.5", "trainer.accumulate_grad_batches=2", "ema=0.9"],
            {"smoothing": 0.2, "mixup": 0.4, "pull": 0.3, "decay": 0.1, "clip": 0.5,
             "accumulate": 2},
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)  # fmt: skip
def test_the_losses_are_those_of_a_plain_loop(run_with, changes, options):
    loop = Loop(**options).run()
    run = run_with(*changes)
    step = loop.accumulate  # a line per step: that of its last batch
    ends = [i for i in range(10) if (i % 5 + 1) % step == 0 or i % 5 == 4]
    # float32 sums in another order, over 10 steps
    tolerance = {"rel": 1e-4, "abs": 1e-4}
    assert series(run, "train/loss") == pytest.approx([loop.losses[i] for i in ends], **tolerance)
    expected = [loop.accuracies[i] for i in ends]
    assert series(run, "train/accuracy") == pytest.approx(expected, abs=1e-5)
    last = checkpoint.load(checkpoint.step_paths(run)[0])["state_dict"]
    for name, value in loop.net.state_dict().items():
        assert torch.allclose(last[f"model.{name}"], value, rtol=1e-3, atol=1e-4), name
    if loop.clip:
        assert max(loop.norms) > loop.clip  # it was needed


def test_val_loss_is_plain_cross_entropy_whatever_training_minimises(run_with):
    run = run_with("task.label_smoothing=0.5", "mixup=1.0", "cutmix=1.0", "l2_sp=1.0")
    model, transform, _ = finetune.load(run)
    splits, facts = build.build_splits(composed(*RUN)), facts_of(run)
    for split in ("val", "test"):
        images = getattr(splits, split)
        batch = torch.stack([transform(images[i][0]) for i in range(len(images))])
        with torch.no_grad():
            loss = nn.functional.cross_entropy(model(batch), torch.tensor(images.labels))
        assert facts[split][f"{split}/loss"] == pytest.approx(float(loss), rel=1e-5)


def test_the_pull_holds_what_trains_to_what_it_was_built_with(run_with):
    far = {}
    for strength in (0, 10):
        run = run_with(f"l2_sp={strength}", "optimizer.lr=0.01", name=f"run{strength}")
        saved = checkpoint.read(checkpoint.best_path(run)).state_dict
        start = build.build_model(composed(*RUN), ("a", "b", "c")).state_dict()
        names = [n for n in start if n.startswith("backbone.") and n.endswith(("weight", "bias"))]
        far[strength] = sum(float((saved[n] - start[n]).square().sum()) for n in names)
        pull = series(run, "train/l2_sp")
        assert len(pull) == (10 if strength else 0)
        assert all(value == 0 for value in pull[:1])
        assert all(value > 0 for value in pull[1:])
    assert far[10] < far[0] / 2


def test_a_pull_on_a_backbone_that_does_not_train_is_said_to_have_no_effect(run_with, caplog):
    with caplog.at_level(logging.WARNING):
        run_with("l2_sp=0.1", "strategy=linear_probe", "max_steps=1")
    assert "l2_sp=0.1 has no effect: the backbone does not train" in caplog.text

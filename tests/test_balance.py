"""Classes of unequal size: drawn equally, weighted, adjusted for; in training only."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from conftest import SMALL, plain
from finetune import build
from finetune.data.balance import class_weights, log_priors, warn_of_imbalance
from finetune.data.base import ImageArray, LabelledImages
from finetune.data.sampler import EpochBatches, balanced_order
from finetune.data.transforms import light
from finetune.datamodule import DataModule
from finetune.specs import InputSpec

COUNTS = (90, 9, 1)
LABELS = [0] * 60 + [2] + [1] * 9 + [0] * 30


def test_a_long_draw_has_every_class_and_within_it_every_image_equally_often():
    epochs = 600
    drawn = Counter(p for epoch in range(epochs) for p in balanced_order(LABELS, 0, epoch))
    by_class = Counter()
    for position, times in drawn.items():
        by_class[LABELS[position]] += times
    # 100 draws an epoch for 3 classes: 33 each, and one more for one of them
    third = epochs * 100 / 3
    assert all(abs(by_class[label] - third) < 3 * epochs**0.5 for label in range(3))
    for label, count in enumerate(COUNTS):
        times = [drawn[p] for p in range(100) if LABELS[p] == label]
        assert len(times) == count
        # five standard deviations of a binomial
        assert max(abs(t - third / count) for t in times) < 5 * (third / count) ** 0.5


def test_a_balanced_epoch_is_as_long_and_a_function_of_seed_and_epoch():
    order = balanced_order(LABELS, seed=1, epoch=2)
    counts = Counter(LABELS[p] for p in order)
    assert len(order) == 100
    assert sorted(counts.values()) == [33, 33, 34]
    torch.manual_seed(7)  # what was drawn before does not matter
    assert balanced_order(LABELS, 1, 2) == order
    assert balanced_order(LABELS, 1, 3) != order != balanced_order(LABELS, 2, 2)


def test_a_class_without_images_is_never_drawn():
    assert Counter(balanced_order([0, 5, 5, 5], 0, 0)).keys() <= {0, 1, 2, 3}
    assert balanced_order([0, 5, 5, 5], 0, 0).count(0) == 2


def test_ranks_and_a_resume_see_the_same_balanced_draws():
    whole = list(EpochBatches(100, 8, 5, True, labels=LABELS, where=lambda: (3, 0)))
    rest = list(EpochBatches(100, 8, 5, True, labels=LABELS, where=lambda: (3, 4)))
    assert rest == whole[4:]
    two = [
        list(EpochBatches(100, 4, 5, True, rank, 2, lambda: (3, 0), labels=LABELS))
        for rank in range(2)
    ]
    assert [set(batch) for batch in whole] == [{*a, *b} for a, b in zip(*two, strict=True)]
    drawn = [position for batch in whole for _, position, _ in batch]
    assert drawn == [*balanced_order(LABELS, 5, 3)]


def test_an_image_that_is_drawn_twice_in_an_epoch_is_augmented_anew():
    array = torch.arange(3 * 64 * 64).view(1, 3, 64, 64).repeat(9, 1, 1, 1).to(torch.uint8)
    train = LabelledImages.of(ImageArray(array), [0] * 8 + [1])
    splits = SimpleNamespace(train=train)
    module = DataModule(splits, light(InputSpec(32, 32)), lambda i: i, 9, balanced=True)
    images, order = module.first_training_images(9), balanced_order(train.labels, 0, 0)
    rare = [image for image, position in zip(images, order, strict=True) if position == 8]
    assert len(rare) in (4, 5)
    assert len({image.numpy().tobytes() for image in rare}) == len(rare)


def test_weights_are_the_inverse_frequencies():
    expected = compute_class_weight("balanced", classes=np.arange(3), y=np.array(LABELS))
    weights = class_weights(COUNTS)
    assert weights.tolist() == pytest.approx(expected.tolist())
    assert float(weights[LABELS].mean()) == pytest.approx(1)
    assert class_weights([3, 0, 1]).tolist() == pytest.approx([4 / 6, 0, 4 / 2])


def task_with(balance):
    cfg = plain(*SMALL, f"data.balance={balance}")
    splits = build.build_splits(cfg)
    model = build.build_model(cfg, splits.classes)
    budget = build.build_budget(cfg, len(splits.train))
    # as many images of each class as in COUNTS
    train = LabelledImages(splits.train.images, (0,) * 100, tuple(LABELS))
    return build.build_task(cfg, model, budget, train)


LOGITS = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(40) % 3


def test_the_weighted_loss_is_that_of_torch():
    expected = nn.CrossEntropyLoss(torch.tensor([100 / 270, 100 / 27, 100 / 3]))(LOGITS, TARGETS)
    assert torch.allclose(task_with("weights").loss(LOGITS, TARGETS), expected)


def test_the_adjusted_loss_is_the_closed_form():
    # Menon et al. 2021: -log(p_y exp(f_y) / sum_k p_k exp(f_k))
    scaled = torch.tensor(COUNTS) / 100 * LOGITS.exp()
    expected = -(scaled[range(40), TARGETS] / scaled.sum(1)).log().mean()
    task = task_with("logit_adjust")
    assert torch.allclose(task.loss(LOGITS, TARGETS), expected)
    # the accuracy of train is that of the logits that predict
    accuracy = (LOGITS.argmax(1) == TARGETS).float().mean()
    assert task.train_values(LOGITS, TARGETS) == {"train/accuracy": accuracy}


def test_an_empty_class_leaves_the_adjusted_loss_finite():
    assert log_priors([3, 0, 1]).isfinite().all()


@pytest.mark.parametrize("balance", ["null", "none", "sampler"])
def test_else_the_loss_is_plain(balance):
    expected = nn.CrossEntropyLoss()(LOGITS, TARGETS)
    assert torch.equal(task_with(balance).loss(LOGITS, TARGETS), expected)


@pytest.mark.parametrize("balance", ["weights", "logit_adjust"])
def test_the_losses_of_val_and_test_are_plain(balance):
    task = task_with(balance)
    for metrics in (task.val_metrics, task.test_metrics):
        metrics.update(LOGITS, TARGETS)
        expected = float(nn.CrossEntropyLoss()(LOGITS, TARGETS))
        assert float(metrics.compute()[f"{metrics.split}/loss"]) == pytest.approx(expected)


def test_what_balances_is_not_part_of_the_weights():
    assert task_with("weights").state_dict().keys() == task_with("none").state_dict().keys()


def test_unequal_classes_are_warned_of_with_the_key(caplog):
    warn_of_imbalance((100, 10, 0), ("a", "b", "c"))  # 10 times is not more than 10 times
    assert not caplog.records
    warn_of_imbalance((110, 10, 0), ("a", "b", "c"))
    (record,) = caplog.records
    assert record.getMessage() == (
        "classes are unequal in train: 'a' has 110 images, 'b' 10. To give each the same weight: "
        "data.balance=sampler, weights or logit_adjust; to leave it: data.balance=none"
    )


@pytest.mark.parametrize(("balance", "warned"), [("null", True), ("none", False)])
def test_a_run_warns_unless_it_was_told_to_leave_it(train, monkeypatch, caplog, balance, warned):
    monkeypatch.setattr("finetune.data.balance.WARN_ABOVE", 0)
    train(f"data.balance={balance}", "max_steps=0")
    assert ("data.balance=sampler" in caplog.text) == warned


def test_a_balanced_run_draws_classes_equally_in_training_alone():
    cfg = plain(*SMALL, "data.balance=sampler")
    splits = build.build_splits(cfg)
    uneven = splits.train.subset([p for p, k in enumerate(splits.train.labels) if k < 2 or p < 3])
    splits = replace(splits, train=uneven)
    module = build.build_datamodule(cfg, splits, build.build_model(cfg, splits.classes))
    progress = SimpleNamespace(current=SimpleNamespace(ready=0))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    module.trainer = SimpleNamespace(
        current_epoch=0, global_rank=0, world_size=1, fit_loop=loop
    )  # fmt: skip
    drawn, val = (
        [int(label) for _, labels in loader for label in labels]
        for loader in (module.train_dataloader(), module.val_dataloader())
    )
    assert Counter(uneven.labels) == {0: 6, 1: 6, 2: 1}
    assert sorted(Counter(drawn).values()) == [4, 4, 5]
    assert val == [*splits.val.labels]

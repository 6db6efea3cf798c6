"""Mixup and cutmix: torchvision's are the oracle; the draws are functions of a seed."""

import pytest
import torch
from scipy import stats
from torch.nn import functional as F
from torchvision.transforms import v2

from conftest import SMALL, composed
from finetune import build
from finetune.data.mix import blend, cut_box, mix, paste_box, soft_targets
from finetune.data.sampler import stable_hash


def batch(size=4, height=10, width=16):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size, 3, height, width), generator=generator).to(torch.uint8)
    return images, torch.arange(size) % 3


class Drawn:
    """Stands for a distribution of which the draw is known."""

    def __init__(self, value):
        self.value = value

    def sample(self, _):
        return torch.tensor(self.value)


@pytest.mark.parametrize("kept", [0.0, 0.25, 0.7, 1.0])
def test_mixup_is_that_of_torchvision(kept):
    images, labels = batch()
    theirs = v2.MixUp(num_classes=3)
    theirs._dist = Drawn(kept)
    expected_images, expected_targets = theirs(images.float(), labels)
    ours, targets = blend(images, soft_targets(labels, 3), kept)
    assert torch.allclose(ours, expected_images, atol=1e-4)  # of 255: float32 keeps 7 digits
    assert torch.allclose(targets, expected_targets)


@pytest.mark.parametrize("kept", [0.0, 0.25, 0.7, 1.0])
@pytest.mark.parametrize("centre", [(0, 0), (5, 8), (9, 15), (2, 14)])
def test_cutmix_is_that_of_torchvision(kept, centre, monkeypatch):
    images, labels = batch()
    theirs = v2.CutMix(num_classes=3)
    theirs._dist = Drawn(kept)
    drawn = {16: centre[1], 10: centre[0]}  # by the length of the side
    monkeypatch.setattr(torch, "randint", lambda most, size: torch.tensor([drawn[most]]))
    expected_images, expected_targets = theirs(images, labels)
    box = cut_box(kept, centre, (10, 16))
    ours, targets = paste_box(images, soft_targets(labels, 3), box)
    assert ours.dtype == torch.uint8
    assert torch.equal(ours, expected_images)
    assert torch.allclose(targets, expected_targets)


def test_a_mixed_image_is_not_rounded():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    mixed, _ = blend(images, torch.eye(2), 0.3)
    assert mixed[:, 0, 0, 0].tolist() == [pytest.approx(178.5), pytest.approx(76.5)]


def test_the_model_takes_a_float_image_as_it_takes_its_uint8():
    model = build.build_model(composed(*SMALL), ("a", "b", "c")).eval()
    images = batch(height=8, width=8)[0]
    with torch.no_grad():
        assert torch.equal(model(images), model(images.float()))


def lambdas(mixup, cutmix, size=64, draws=300):
    """Of many seeds: what the first image keeps of itself, and whether a box was cut."""
    images, labels = torch.zeros(2, 3, size, size, dtype=torch.uint8), torch.tensor([0, 1])
    seeds = [stable_hash("mix", 0, 0, 0, batch) for batch in range(draws)]
    mixed = [mix(images, labels, 2, mixup, cutmix, seed) for seed in seeds]
    return [float(targets[0, 0]) for _, targets in mixed], [
        out.dtype == torch.uint8 for out, _ in mixed
    ]


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_lambda_is_of_the_beta_distribution(alpha):
    kept, cut = lambdas(mixup=alpha, cutmix=0.0)
    assert not any(cut)
    assert stats.kstest(kept, stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_cutmix_cuts_the_area_that_lambda_leaves():
    kept, cut = lambdas(mixup=0.0, cutmix=1.0)
    assert all(cut)
    # E of the area inside the image: 1 - E[(s - s^2 / 4)^2] with s^2 = 1 - lambda uniform in (0, 1)
    expected = 1 - (1 / 2 - 2 / 4 * 2 / 5 + 1 / 16 / 3)
    assert sum(kept) / 300 == pytest.approx(expected, abs=0.06)  # 4 standard errors


def test_with_both_each_batch_gets_one_of_them_by_a_fair_draw():
    _, cut = lambdas(mixup=0.4, cutmix=1.0)
    assert stats.binomtest(sum(cut), len(cut)).pvalue > 0.01


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0)])
def test_targets_are_shares_of_the_classes_that_are_seen(mixup, cutmix):
    images, labels = batch()
    for seed in range(20):
        _, targets = mix(images, labels, 3, mixup, cutmix, seed)
        assert torch.allclose(targets.sum(1), torch.ones(4))
        others = F.one_hot(labels, 3) + F.one_hot(labels.roll(1), 3) == 0
        assert (targets[others] == 0).all()


def test_several_labels_per_image_mix_likewise():
    images, _ = batch(size=2)
    labels = torch.tensor([[1, 1, 0], [0, 1, 1]])
    _, targets = mix(images, labels, 3, 0.4, 0.0, seed=3)
    kept = float(targets[0, 0])
    assert 0 < kept < 1
    expected = torch.tensor([[kept, 1, 1 - kept], [1 - kept, 1, kept]])
    assert torch.allclose(targets, expected)


def test_a_mix_is_a_function_of_the_seed_and_draws_nothing_else():
    images, labels = batch()
    before = torch.get_rng_state()
    first = [mix(images, labels, 3, 0.4, 1.0, seed) for seed in (1, 2)]
    again = [mix(images, labels, 3, 0.4, 1.0, seed) for seed in (2, 1)][::-1]
    assert torch.equal(torch.get_rng_state(), before)
    for (mine, my_targets), (other, its_targets) in zip(first, again, strict=True):
        assert torch.equal(mine, other)
        assert torch.equal(my_targets, its_targets)
    assert not torch.equal(first[0][1], first[1][1])

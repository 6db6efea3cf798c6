"""The closed form: scikit-learn's Ridge, leave-one-out by brute force, and its RidgeCV."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.linear_model import Ridge, RidgeCV

from finetune.ridge import GRID, softmax_scale, solve


def problem(num, width, num_classes, seed=0):
    """Features with a constant one and two that are equal; rows that are equal; one-hot targets."""
    random = np.random.default_rng(seed)
    features = random.normal(3, 1, (num, width)) * random.uniform(0.1, 5, width)
    features[:, 0] = 7
    features[:, 1] = features[:, 2]
    features[-1] = features[-2]
    return features, np.eye(num_classes)[np.arange(num) % num_classes]


SHAPES = pytest.mark.parametrize(
    ("num", "width"), [(60, 10), (20, 50), (31, 30), (30, 30), (4, 200)], ids=str
)


def solved(features, targets, penalties=None):
    penalties = None if penalties is None else torch.tensor(penalties, dtype=torch.double)
    return solve(torch.tensor(features), torch.tensor(targets), penalties)


@SHAPES
@pytest.mark.parametrize("penalty", [0.01, 1.0, 100.0])
def test_the_solution_is_that_of_scikit_learn(num, width, penalty):
    features, targets = problem(num, width, 3)
    ours = solved(features, targets, [penalty])
    theirs = Ridge(alpha=penalty, solver="svd").fit(features, targets)
    np.testing.assert_allclose(ours.weight, theirs.coef_, rtol=0, atol=1e-9)
    np.testing.assert_allclose(ours.bias, theirs.intercept_, rtol=0, atol=1e-9)
    assert ours.penalty == penalty


@SHAPES
@pytest.mark.parametrize("penalty", [0.01, 1.0, 100.0])
def test_predictions_are_those_of_fits_without_the_row(num, width, penalty):
    features, targets = problem(num, width, 3)
    expected = [
        Ridge(alpha=penalty, solver="svd")
        .fit(np.delete(features, i, 0), np.delete(targets, i, 0))
        .predict(features[i : i + 1])[0]
        for i in range(num)
    ]
    ours = solved(features, targets, [penalty])
    np.testing.assert_allclose(ours.predictions, expected, rtol=0, atol=1e-9)


@SHAPES
@pytest.mark.parametrize("seed", range(3))
def test_the_penalty_is_the_one_that_scikit_learns_leave_one_out_takes(num, width, seed):
    features, targets = problem(num, width, 3, seed)
    targets += features[:, 3:4] * [[0.1, 0.0, -0.1]]  # something to learn
    penalties = np.logspace(-2, 4, 13)
    theirs = RidgeCV(penalties).fit(features, targets)
    ours = solved(features, targets, penalties)
    assert ours.penalty == theirs.alpha_
    np.testing.assert_allclose(ours.weight, theirs.coef_, rtol=0, atol=1e-9)


def test_several_labels_a_row_are_targets_too():
    features, _ = problem(40, 12, 3)
    targets = (features[:, 3:7] > 5).astype(float)
    ours = solved(features, targets, [2.0])
    theirs = Ridge(alpha=2.0).fit(features, targets)
    np.testing.assert_allclose(ours.weight, theirs.coef_, rtol=0, atol=1e-9)


def test_the_penalties_that_are_tried_grow_with_the_features():
    features, targets = problem(30, 8, 3)
    centred = features - features.mean(0)
    largest = np.linalg.eigvalsh(centred.T @ centred).max()
    shares = [solved(features * scale, targets).penalty / largest / scale**2 for scale in (1, 100)]
    assert shares[0] == pytest.approx(shares[1], rel=1e-6)
    assert min(abs(np.log(shares[0]) - np.log(GRID))) < 1e-6


@pytest.mark.parametrize("num", [3, 12])
def test_features_that_say_nothing_give_the_mean_of_the_targets(num):
    targets = np.eye(3)[np.arange(num) % 3]
    ours = solved(np.full((num, 5), 2.0), targets)
    assert torch.equal(ours.weight, torch.zeros(3, 5, dtype=torch.double))
    np.testing.assert_allclose(ours.bias, 1 / 3)


@pytest.mark.parametrize("noise", [0.2, 1.0])
def test_the_scale_has_the_least_cross_entropy(noise):
    random = np.random.default_rng(0)
    targets = np.eye(4)[np.arange(200) % 4]
    predictions = 0.25 + 0.3 * (targets - 0.25) + random.normal(0, noise * 0.2, (200, 4))
    smoothed = (200 * targets + 1) / 204

    def cross_entropy(log_scale):
        logits = 10**log_scale * predictions
        return (np.log(np.exp(logits).sum(1)) - (smoothed * logits).sum(1)).mean()

    best = minimize_scalar(
        cross_entropy, bounds=(0, 2.5), method="bounded", options={"xatol": 1e-8}
    )
    ours = softmax_scale(torch.tensor(predictions), torch.tensor(targets))
    assert ours == pytest.approx(10**best.x, rel=1e-4)
    assert ours > 2


def test_the_scale_stays_finite_where_every_prediction_is_right():
    targets = torch.eye(3).repeat(6, 1)
    scale = softmax_scale(targets.double(), targets)
    # log odds of 19 to 1, which is what 18 right ones of 18 and one more of each class say
    assert scale == pytest.approx(np.log(19), rel=1e-4)
    wrong = softmax_scale(1 - targets.double(), targets)
    assert wrong == 1.0

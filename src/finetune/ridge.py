"""Ridge regression in closed form: a linear head, its penalty, and how sure it may be."""

from typing import NamedTuple

import torch
from torch import Tensor

# penalties that are tried, as shares of the Gram matrix's largest eigenvalue
GRID = tuple(10 ** (exponent / 2) for exponent in range(-16, 3))


class Ridge(NamedTuple):
    """features @ weight.T + bias. predictions: (N, K), each from a fit without its own row."""

    weight: Tensor  # (K, D)
    bias: Tensor  # (K,)
    penalty: float
    predictions: Tensor


def solve(features: Tensor, targets: Tensor, penalties: Tensor | None = None) -> Ridge:
    """Least squares with a penalty on the weights, not on the intercept, in float64.

    features: (N, D), N >= 2. targets: (N, K), any values: one-hot, several ones a row, regression.
    penalties: (L,) above 0; None for GRID. The one with the least squared leave-one-out error is
    taken. One eigendecomposition of the smaller Gram matrix, N x N or D x D, serves them all.
    Source: Hastie, Tibshirani & Friedman 2009, 7.10 and 18.3.5.
    """
    x, y = features.to(torch.float64, copy=True), targets.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    x -= x_mean
    y = y - y_mean
    num = len(x)
    wide = x.shape[1] >= num
    gram = x @ x.T if wide else x.T @ x
    if wide:  # the constant vector, which the intercept has taken, is set apart and left out
        gram += 2 * gram.norm().clamp(min=1) / num
    eigenvalues, vectors = torch.linalg.eigh(gram)
    if wide:
        eigenvalues, vectors = eigenvalues[:-1], vectors[:, :-1]
    eigenvalues = eigenvalues.clamp(min=0)  # rounding gives tiny negative ones
    if penalties is None:
        largest = eigenvalues.max().item() or 1.0  # 0 where every feature is constant
        penalties = largest * torch.tensor(GRID)
    penalties = penalties.to(x)
    inverse = 1 / (eigenvalues[:, None] + penalties)  # (R, L)
    # Residuals are (whole + outer factor outer') y, their leave-one-out ones are divided by the
    # diagonal. In the wide case 1 - s / (s + penalty) would cancel out all of the digits.
    if wide:
        outer, factor, whole = vectors, penalties * inverse, 0
    else:
        outer, factor, whole = x @ vectors, -inverse, 1
    squares = torch.cat([rows.square() @ factor for rows in outer.split(4096)])
    diagonal = (whole * (1 - 1 / num) + squares).clamp(min=1e-12)
    along = outer.T @ y  # (R, K)

    def left_out(i: int) -> Tensor:
        """Residuals (N, K) of fits without the row, with penalty i."""
        residuals: Tensor = whole * y + outer @ (factor[:, i, None] * along)
        return residuals / diagonal[:, i, None]

    errors = [left_out(i).square().mean().item() for i in range(len(penalties))]
    best = min(range(len(errors)), key=errors.__getitem__)
    weight = (x.T @ outer if wide else vectors) @ (inverse[:, best, None] * along)
    predictions = y + y_mean - left_out(best)
    return Ridge(weight.T, y_mean - x_mean @ weight, float(penalties[best]), predictions)


def softmax_scale(predictions: Tensor, targets: Tensor) -> float:
    """The factor, 1 to 10,000, that makes the softmax of predictions fit one-hot targets best.

    It minimises the cross-entropy, which is convex in it: bisection of the slope. Regression on
    0 and 1 gives outputs near [0, 1], whose own softmax is nearly uniform. predictions, targets:
    (N, K). Targets count one image of each class more than there are, which keeps the factor
    finite where every prediction is right (Platt 1999, Probabilistic outputs for SVMs).
    """
    num, num_classes = targets.shape
    smoothed = (num * targets.double() + 1) / (num + num_classes)
    low, high = 0.0, 4.0  # of the logarithm
    for _ in range(20):
        middle = (low + high) / 2
        surplus = (10**middle * predictions).softmax(1) - smoothed
        if (surplus * predictions).sum() > 0:
            high = middle
        else:
            low = middle
    return float(10**low)

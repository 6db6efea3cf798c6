"""Multi-label classification: any number of labels per image, a yes or no for each class."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import (
    MultilabelAveragePrecision,
    MultilabelF1Score,
    MultilabelStatScores,
)

from finetune.tasks.classification import Classification


class Multilabel(Classification):
    """Logs train/loss per step; val/* and test/* over the whole split. targets: 0 or 1, (B, K)."""

    task_name = "multilabel"
    metric_names = ("map", "f1", "loss")
    per_class_metric = "average_precision"
    balances = ("none",)
    multilabel = True

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Binary cross-entropy, mean over images and classes."""
        return F.binary_cross_entropy_with_logits(logits, targets)

    def train_values(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """None: average precision says little about one batch."""
        return {}

    def split_metrics(self, split: str) -> "MultilabelMetrics":
        """All that is measured on one split."""
        return MultilabelMetrics(split, len(self.model.classes))


class MultilabelMetrics(nn.Module):
    """map: mean of the average precision of the classes; f1: macro, at 0.5; over all ranks.

    A class without an image in the split has no average precision and is left out of the mean.
    """

    def __init__(self, split: str, num_classes: int) -> None:
        super().__init__()
        self.split = split
        self.precision = MultilabelAveragePrecision(num_classes, average="none")
        self.counts = MultilabelStatScores(num_classes, average="none")
        self.f1 = MultilabelF1Score(num_classes, threshold=0.5, average="macro")
        self.loss = MeanMetric()  # weighted by images

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch: logits (B, K), targets (B, K)."""
        logits = logits.float()
        self.loss.update(F.binary_cross_entropy_with_logits(logits, targets), weight=len(targets))
        # not logits: torchmetrics would guess from each batch which of the two it got
        probabilities, labels = logits.sigmoid(), targets.int()
        for metric in (self.precision, self.counts, self.f1):
            metric.update(probabilities, labels)

    def compute(self) -> dict[str, Tensor]:
        """split/name: value, of what was added since the last reset."""
        values = {
            "loss": self.loss.compute(),
            "map": self._average_precision().nanmean(),
            "f1": self.f1.compute(),
        }
        return {f"{self.split}/{name}": value for name, value in values.items()}

    def per_class(self) -> list[float | None]:
        """Average precision; None for a class without images."""
        values: list[float] = self._average_precision().tolist()
        return [None if value != value else value for value in values]

    def confusion_counts(self) -> None:
        """None: labels that go together cannot be confused."""

    def reset(self) -> None:
        """Forget what was added."""
        for metric in (self.loss, self.precision, self.counts, self.f1):
            metric.reset()

    def _average_precision(self) -> Tensor:
        """Of each class, (K,); NaN for one without images."""
        with warnings.catch_warnings():
            # those are the NaNs here
            warnings.filterwarnings("ignore", "No positive samples found in target")
            values: Tensor = self.precision.compute()
        support = self.counts.compute()[:, 4]
        return torch.where(support > 0, values, torch.nan)

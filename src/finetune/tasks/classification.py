"""Classification: one label per image, cross-entropy."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from finetune.datamodule import Batch
from finetune.metrics import classification_metrics
from finetune.tasks.base import Task


class Classification(Task):
    """Logs train/loss and train/accuracy per step; val/* and test/* over the whole split."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        num_classes = len(self.model.classes)
        metrics = classification_metrics(num_classes)
        splits = ("val", "test")
        self.metrics = torch.nn.ModuleDict({s: metrics.clone(prefix=f"{s}/") for s in splits})
        # weighted by images, so that uneven batches and ranks give the mean over the split
        self.losses = torch.nn.ModuleDict({s: MeanMetric() for s in splits})
        self.confusions = torch.nn.ModuleDict(
            {s: MulticlassConfusionMatrix(num_classes) for s in splits}
        )
        self.confusion: Tensor | None = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of a batch: mean over its images."""
        images, labels = batch
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels)
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            accuracy = (logits.detach().argmax(1) == labels).float().mean()
            self.log_dict({"train/loss": loss.detach(), "train/accuracy": accuracy})
            self.log_dict(self.learning_rates())
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the metrics of val."""
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the metrics of test."""
        self._evaluate("test", batch)

    def on_validation_epoch_end(self) -> None:
        """Log val/*."""
        self._log_split("val")

    def on_test_epoch_end(self) -> None:
        """Log test/*."""
        self._log_split("test")

    def _evaluate(self, split: str, batch: Batch) -> None:
        images, labels = batch
        logits = self.model(images).float()
        self.losses[split].update(F.cross_entropy(logits, labels), weight=len(labels))
        self.metrics[split].update(logits, labels)
        self.confusions[split].update(logits, labels)

    def _log_split(self, split: str) -> None:
        values = {f"{split}/loss": self.losses[split].compute(), **self.metrics[split].compute()}
        self.confusion = self.confusions[split].compute()
        for metric in (self.losses, self.metrics, self.confusions):
            metric[split].reset()
        # computed over all ranks already: rank 0's value is everybody's
        self.log_dict(values, rank_zero_only=False, sync_dist=False)


def per_class_accuracy(confusion: Tensor) -> list[float | None]:
    """Diagonal over row sums of (K, K) counts, rows the labels; None for a class without images."""
    counts = confusion.sum(1).tolist()
    hits = confusion.diagonal().tolist()
    return [hit / count if count else None for hit, count in zip(hits, counts, strict=True)]

"""Classification: one label per image, cross-entropy."""

from typing import Any

import torch.nn.functional as F
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
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
        self.val_metrics = SplitMetrics("val", num_classes)
        self.test_metrics = SplitMetrics("test", num_classes)
        self.metric_names = ("loss", *self.val_metrics.metrics)
        self.last_confusion = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of a batch: mean over its images."""
        images, labels = batch
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels)
        if self.logs_this_step(batch_idx):
            accuracy = (logits.detach().argmax(1) == labels).float().mean()
            values = {"train/loss": loss.detach(), "train/accuracy": accuracy}
            self.log_step(values | self.learning_rates(), self.global_step)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the metrics of val."""
        self.val_metrics.update(self.model(batch[0]), batch[1])

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the metrics of test."""
        self.test_metrics.update(self.model(batch[0]), batch[1])

    def on_validation_epoch_end(self) -> None:
        """Log val/*."""
        self._log_split(self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Log test/*."""
        self._log_split(self.test_metrics)

    def _log_split(self, metrics: "SplitMetrics") -> None:
        # computed over all ranks already: the value of one is everybody's
        values = metrics.compute()
        self.log_dict(values, logger=False)  # for monitor; and to the loggers:
        # at the last step done; after training a step later, which a resume logs again
        self.log_step(values, self.global_step - (self.trainer.state.fn == TrainerFn.FITTING))
        self.last_confusion = metrics.confusion.compute().cpu()
        metrics.reset()


class SplitMetrics(nn.Module):
    """All that is measured on one split, over all of its images and ranks."""

    def __init__(self, split: str, num_classes: int) -> None:
        super().__init__()
        self.split = split
        self.metrics = classification_metrics(num_classes)
        # weighted by images, so that uneven batches and ranks give the mean over the split
        self.loss = MeanMetric()
        self.confusion = MulticlassConfusionMatrix(num_classes)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits (B, K), labels (B,)."""
        logits = logits.float()
        self.loss.update(F.cross_entropy(logits, labels), weight=len(labels))
        self.metrics.update(logits, labels)
        self.confusion.update(logits, labels)

    def compute(self) -> dict[str, Tensor]:
        """split/name: value, of what was added since the last reset."""
        values = {"loss": self.loss.compute(), **self.metrics.compute()}
        return {f"{self.split}/{name}": value for name, value in values.items()}

    def reset(self) -> None:
        """Forget what was added."""
        for metric in (self.loss, self.metrics, self.confusion):
            metric.reset()


def per_class_accuracy(confusion: Tensor) -> list[float | None]:
    """Diagonal over row sums of (K, K) counts, rows the labels; None for a class without images."""
    counts = confusion.sum(1).tolist()
    hits = confusion.diagonal().tolist()
    return [hit / count if count else None for hit, count in zip(hits, counts, strict=True)]

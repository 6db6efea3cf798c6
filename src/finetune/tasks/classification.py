"""Classification: one label per image, cross-entropy."""

from collections.abc import Sequence
from typing import Any, ClassVar, get_args

import torch.nn.functional as F
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from finetune.data.balance import Balance, class_weights, log_priors
from finetune.datamodule import Given
from finetune.metrics import classification_metrics
from finetune.tasks.base import Task


class Classification(Task):
    """Logs train/* per step; val/* and test/*, which know nothing of mixing, over the whole split.

    label_smoothing: share of the target that is spread over all classes, in training alone; None
    for 0.0. Source: Szegedy et al. 2016. balance: of the training loss. class_counts: images of
    train by class, (K,).
    """

    task_name = "classification"
    metric_names: ClassVar[tuple[str, ...]] = ("accuracy", "f1", "top5", "loss", "ece")
    per_class_metric = "accuracy"
    balances: ClassVar[tuple[str, ...]] = get_args(Balance)
    multilabel = False

    class_weights: Tensor | None
    log_priors: Tensor | None

    def __init__(
        self,
        *args: Any,
        label_smoothing: float | None = None,
        balance: Balance | None = None,
        class_counts: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.label_smoothing = label_smoothing or 0.0
        weights = class_weights(class_counts) if balance == "weights" else None
        priors = log_priors(class_counts) if balance == "logit_adjust" else None
        self.register_buffer("class_weights", weights, persistent=False)
        self.register_buffer("log_priors", priors, persistent=False)
        self.val_metrics = self.split_metrics("val")
        self.test_metrics = self.split_metrics("test")
        self.last_confusion, self.last_per_class = None, []

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of a training batch: logits (B, K), classes (B,) or soft targets (B, K).

        With class weights, the mean is weighted too, as torch's CrossEntropyLoss has it.
        """
        logits = logits.float()
        if self.log_priors is not None:
            logits = logits + self.log_priors
        return F.cross_entropy(
            logits, targets, weight=self.class_weights, label_smoothing=self.label_smoothing
        )

    def train_values(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Accuracy of a training batch; a guess in a mixed image counts by its class's weight."""
        guesses = logits.argmax(1)
        hits = (guesses == targets) if targets.ndim == 1 else targets.gather(1, guesses[:, None])
        return {"train/accuracy": hits.float().mean()}

    def split_metrics(self, split: str) -> Any:
        """All that is measured on one split."""
        return SplitMetrics(split, len(self.model.classes))

    def training_step(self, batch: Given, batch_idx: int) -> Tensor:
        """What is minimised: the loss of a batch, and the pull of l2_sp."""
        images, targets = self.mixed(batch, batch_idx)
        logits = self.model(images)
        loss = self.loss(logits, targets)
        values: dict[str, Tensor | float] = {}
        if self.l2_sp:
            pull = self.pull_to_start()
            loss, values["train/l2_sp"] = loss + pull, pull.detach()
        if self.logs_this_step(batch_idx):
            values |= {"train/loss": loss.detach(), **self.learning_rates()}
            self.log_step(values | self.train_values(logits.detach(), targets), self.global_step)
        return loss

    def validation_step(self, batch: Given, batch_idx: int) -> None:
        """Update the metrics of val."""
        self.val_metrics.update(self.model(batch[0]), batch[1])

    def test_step(self, batch: Given, batch_idx: int) -> None:
        """Update the metrics of test."""
        self.test_metrics.update(self.model(batch[0]), batch[1])

    def on_validation_epoch_end(self) -> None:
        """Log val/*."""
        self._log_split(self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Log test/*."""
        self._log_split(self.test_metrics)

    def _log_split(self, metrics: Any) -> None:
        # computed over all ranks already: the value of one is everybody's
        values = metrics.compute()
        self.log_dict(values, logger=False)  # for monitor; and to the loggers:
        # at the last step done; after training a step later, which a resume logs again
        self.log_step(values, self.global_step - (self.trainer.state.fn == TrainerFn.FITTING))
        self.hand_over_logs()
        self.last_confusion = metrics.confusion_counts()
        self.last_per_class = metrics.per_class()
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

    def confusion_counts(self) -> Tensor:
        """(K, K), rows the labels."""
        return self.confusion.compute().cpu()

    def per_class(self) -> list[float | None]:
        """Accuracy; None for a class without images."""
        return per_class_accuracy(self.confusion_counts())

    def reset(self) -> None:
        """Forget what was added."""
        for metric in (self.loss, self.metrics, self.confusion):
            metric.reset()


def per_class_accuracy(confusion: Tensor) -> list[float | None]:
    """Diagonal over row sums of (K, K) counts, rows the labels; None for a class without images."""
    counts = confusion.sum(1).tolist()
    hits = confusion.diagonal().tolist()
    return [hit / count if count else None for hit, count in zip(hits, counts, strict=True)]

"""What TensorBoard shows beside the curves."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from finetune.callbacks.checkpoints import BestCheckpoint
from finetune.datamodule import DataModule
from finetune.loggers import TensorBoard


class Pictures(Callback):
    """What a person wants to see in TensorBoard first: training images as the model gets them."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show 32 training images as augment made them, before mixup and cutmix."""
        writer = tensorboard(trainer)
        if writer is None or trainer.global_step > 0:
            return
        from torchvision.utils import make_grid

        datamodule = trainer.datamodule  # type: ignore[attr-defined] # not in its annotations
        assert isinstance(datamodule, DataModule)
        images = datamodule.first_training_images(32)
        if images.shape[-1] < 64:  # a browser blurs what it enlarges itself
            images = images.repeat_interleave(4, -1).repeat_interleave(4, -2)
        writer.experiment.add_image("train/augmented", make_grid(images, nrow=8), 0)


def tensorboard(trainer: L.Trainer) -> TensorBoard | None:
    """The TensorBoard logger of this rank, if there is one."""
    if not trainer.is_global_zero:
        return None
    return next((logger for logger in trainer.loggers if isinstance(logger, TensorBoard)), None)


def show_confusion(trainer: L.Trainer, best: BestCheckpoint, classes: tuple[str, ...]) -> None:
    """Draw the confusion matrix of val, at the best, in TensorBoard."""
    writer = tensorboard(trainer)
    if writer is None or best.confusion is None:
        return
    figure = confusion_figure(best.confusion, classes)
    writer.experiment.add_figure("val/confusion_matrix", figure, best.best["step"])


def confusion_figure(confusion: Tensor, classes: tuple[str, ...]) -> Any:
    """A matplotlib figure of (K, K) counts, rows the labels; shares of a row as colour."""
    from matplotlib.figure import Figure  # late: takes half a second; no pyplot, so no window

    num = len(classes)
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    size = min(20.0, 3.0 + 0.35 * num)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0.0, vmax=1.0)
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    if num <= 60:
        axes.set_xticks(range(num), classes, rotation=90)
        axes.set_yticks(range(num), classes)
    if num <= 20:
        for row in range(num):
            for column in range(num):
                if count := int(confusion[row, column]):
                    colour = "white" if shares[row, column] > 0.5 else "black"
                    axes.text(column, row, str(count), ha="center", va="center", color=colour)
    return figure

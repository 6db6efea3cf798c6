"""The moving average of the weights: what is validated and kept, while training goes on without."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from finetune.tasks.base import Task


def decay_at(update: int, decay: float) -> float:
    """Decay of an update, counted from 1: a young average does not cling to the start.

    Source: TensorFlow's ExponentialMovingAverage(num_updates).
    """
    return min(decay, (1 + update) / (10 + update))


class EMA(Callback):
    """Averages the model's state after every step, and stands in for it in validations.

    Floats are averaged, BatchNorm's statistics too; counts are copied. Place it behind
    BestCheckpoint, which writes what is validated, and before StepCheckpoints, which writes both.
    Lightning's WeightAveraging takes its average out again before on_validation_end.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, Tensor] = {}  # while it stands in: the weights in training
        self.stands_in = False
        self.step = 0  # of the last update

    def state_dict(self) -> dict[str, Any]:
        """For a resume."""
        return {"average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a resume."""
        self.average = state_dict["average"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin with the weights as they are, or go on with those of a resume."""
        state = model_state(pl_module)
        kept = self.average or state
        self.average = {name: kept[name].to(state[name].device, copy=True) for name in state}
        self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Update, if the batch ended a step."""
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        state = model_state(pl_module)
        floats = [name for name, value in state.items() if value.is_floating_point()]
        update = get_ema_multi_avg_fn(decay_at(self.step, self.decay))
        update([self.average[name] for name in floats], [state[name] for name in floats], None)
        for name in state.keys() - set(floats):
            self.average[name].copy_(state[name])

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the average in. Ranks differ in BatchNorm's statistics: those of rank 0 count."""
        if not self.average:  # nothing was trained
            return
        if trainer.world_size > 1:
            for value in self.average.values():
                torch.distributed.broadcast(value, 0)
        self._swap(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the average out again; BestCheckpoint has it."""
        if self.stands_in:
            self._swap(pl_module)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Take the average out of a validation that was stopped."""
        self.on_validation_end(trainer, pl_module)

    def _swap(self, task: L.LightningModule) -> None:
        # values, not tensors: the optimizer and DDP hold on to those
        for name, value in model_state(task).items():
            other = value.clone()
            value.copy_(self.average[name])
            self.average[name].copy_(other)
        self.stands_in = not self.stands_in


def model_state(task: L.LightningModule) -> dict[str, Tensor]:
    """The tensors of a task's model by name, detached; writing to them writes to the model."""
    assert isinstance(task, Task)
    return task.model.state_dict()

"""What every task shares: freezing, parameter groups, the lr of each step, reseeding."""

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from finetune.data.sampler import stable_hash
from finetune.model import Classifier
from finetune.param_groups import param_groups
from finetune.strategies import Strategy

OptimizerFactory = Callable[[list[dict[str, Any]]], Optimizer]
Schedule = Callable[[int, int], float]


class Task(L.LightningModule):
    """Trains a model under a strategy: lr = base * schedule(step) * lr_scale(layer, epoch).

    A layer whose lr_scale is 0.0 is in eval mode and does not move, bit for bit. All of it is a
    function of step and epoch: a resume restores nothing but the counters.
    optimizer: called with the parameter groups; its own lr is the base lr.
    schedule: factor on the lr from (step, total_steps).
    """

    last_confusion: Tensor | None  # (K, K) counts of the last evaluation, rows are labels
    metric_names: tuple[str, ...]  # what val/ and test/ are measured by

    def __init__(
        self,
        model: Classifier,
        strategy: Strategy,
        optimizer: OptimizerFactory,
        schedule: Schedule,
        weight_decay: float,
        epochs: int,
        total_steps: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.strategy_ = strategy  # the name strategy is Lightning's, on the trainer
        self.make_optimizer, self.schedule = optimizer, schedule
        self.weight_decay, self.epochs, self.total_steps = weight_decay, epochs, total_steps
        self.seed = seed
        self._mode_epoch = -1
        self._frozen_for_now: list[nn.Parameter] = []

    def lr_scale(self, layer: int, epoch: int) -> float:
        """The strategy's factor for a layer of this model."""
        return self.strategy_.lr_scale(layer, self.model.depth, epoch)

    def freeze_what_never_trains(self) -> None:
        """Take layers that no epoch trains out of autograd; before DDP wraps the model."""
        for layer, parameters in enumerate(self.model.parameters_by_layer()):
            trains = any(self.lr_scale(layer, epoch) > 0 for epoch in range(max(1, self.epochs)))
            for parameter in parameters:
                parameter.requires_grad_(trains)

    def setup(self, stage: str) -> None:
        """Freeze before the strategy wraps the model."""
        self.freeze_what_never_trains()

    def configure_optimizers(self) -> Optimizer:
        """One group per (layer, decays or not), frozen layers included, from step 0 on."""
        groups = param_groups(self.model, self.weight_decay)
        optimizer = self.make_optimizer(groups)
        self.base_lr = float(optimizer.defaults["lr"])
        return optimizer

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set modes, lr and random state of this step, each from the counters alone."""
        epoch, step = self.current_epoch, self.global_step
        # dropout and stochastic depth: a run that was resumed draws what the other drew
        torch.manual_seed(stable_hash("step", self.seed, self.global_rank, epoch, batch_idx))
        if epoch != self._mode_epoch:
            self._set_modes(epoch)
        factor = self.schedule(step, self.total_steps)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.base_lr * factor * self.lr_scale(group["layer"], epoch)

    def _set_modes(self, epoch: int) -> None:
        """Put frozen layers in eval mode: their BatchNorm keeps the pretrained statistics."""
        self._mode_epoch = epoch
        self._frozen_for_now = []
        layers = zip(self.model.modules_by_layer(), self.model.parameters_by_layer(), strict=True)
        for layer, (modules, parameters) in enumerate(layers):
            trains = self.lr_scale(layer, epoch) > 0
            for module in modules:
                module.train(trains)
            if not trains:
                self._frozen_for_now += [p for p in parameters if p.requires_grad]

    def on_after_backward(self) -> None:
        """Drop the gradients of layers that are frozen now and train later."""
        for parameter in self._frozen_for_now:
            parameter.grad = None

    def logs_this_step(self, batch_idx: int) -> bool:
        """Whether the loggers get the step that this batch ends, if it ends one."""
        trainer: Any = self.trainer  # log_every_n_steps is not in its annotations
        batches = batch_idx + 1
        last = batches == trainer.num_training_batches
        steps = last or batches % trainer.accumulate_grad_batches == 0
        return bool(steps and (self.global_step + 1) % trainer.log_every_n_steps == 0)

    def log_step(self, values: Mapping[str, Tensor | float], step: int) -> None:
        """Hand values to the loggers at once.

        Lightning's own log does so after on_train_batch_end, when the checkpoint of this step may
        be written already: a run stopped there would lose the point.
        """
        plain = {name: float(value) for name, value in values.items()}
        for logger in self.trainer.loggers:
            logger.log_metrics(plain, step)

    def learning_rates(self) -> dict[str, float]:
        """lr/<group>: what the step in progress uses."""
        groups = self.trainer.optimizers[0].param_groups
        return {f"lr/{group['name']}": group["lr"] for group in groups}


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Parameters that train, and all of them."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)

"""A run whose loss or gradient is not finite ends, and none of it is kept."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from finetune.datamodule import Batch
from finetune.errors import NotFinite, TrainingError
from finetune.tasks.base import Task, loss_scaler


class FiniteGuard(Callback):
    """Stops a run whose loss or gradient is not finite, before any of it is in a checkpoint.

    What each step gave stays on a GPU, and is looked at before each checkpoint and validation, and
    every n steps; so are all that trains, and its optimizer's state. What fp16's scaler skips is no
    failure, but a scale below 1 is.
    advice: what to type to see more.
    """

    def __init__(self, advice: str, every_n_steps: int = 50) -> None:
        self.advice, self.every_n_steps = advice, every_n_steps
        self.noted: list[tuple[int, Tensor]] = []  # steps, from 1; loss and gradient, (2,)
        self.loss: Tensor | None = None  # (), of the last step
        self.lowest: Tensor | None = None  # (), total of a gradient of the step in progress
        self.looked_at = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What a resume starts from was looked at."""
        self.looked_at = trainer.global_step

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        """Sum up the gradient of the lowest layer that trains, unless the task measures all of it.

        What is not finite flows down to it; to read all gradients would take a percent of the time.
        """
        assert isinstance(pl_module, Task)
        if loss_scaler(trainer) or pl_module.measures_norm():
            return
        for group in optimizer.param_groups:  # from the stem to the head
            if grads := [p.grad for p in group["params"] if p.grad is not None]:
                self.lowest = total(grads)
                return

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Keep the step if its loss or gradient is not finite; look every n steps."""
        self.loss = loss = outputs["loss"].detach()
        norm, pl_module.gradient_norm = pl_module.gradient_norm, None
        if norm is None or loss_scaler(trainer):
            norm = self.lowest
        self.lowest = None
        norm = loss if norm is None else norm.to(loss.device)
        if loss.device.type != "cpu" or not math.isfinite(loss + norm):  # a GPU is not waited for
            both = torch.stack([loss.float(), norm.float()])
            self.noted.append((max(1, trainer.global_step), both))
        if trainer.global_step - self.looked_at >= self.every_n_steps:
            self.look(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look before a best checkpoint can be written."""
        self.look(trainer)

    def look(self, trainer: L.Trainer) -> None:
        """Raise NotFinite, on all ranks, if a step of one of them was not."""
        found = torch.tensor(self.first_bad(trainer), dtype=torch.float64)
        self.looked_at = trainer.global_step
        ranks = [found]
        if trainer.world_size > 1:
            found = found.to(trainer.strategy.root_device)
            ranks = [torch.empty_like(found) for _ in range(trainer.world_size)]
            torch.distributed.all_gather(ranks, found)
        if bad := [values.tolist() for values in ranks if values[0]]:
            assert isinstance(trainer.lightning_module, Task)
            trainer.lightning_module.hand_over_logs()  # the curves show how it came
            step, since, loss = min(bad)
            where = f"step {step:.0f}" if since == step else f"a step of {since:.0f} to {step:.0f}"
            what = "gradient" if math.isfinite(loss) else "loss"
            raise NotFinite(
                f"{where}: the {what} is not finite (loss {loss:.4g}). No checkpoint holds it. "
                f"{self.advice} To train without it, start anew with a smaller optimizer.lr, "
                "trainer.gradient_clip_val=1, or trainer.precision=32-true",
                int(step),
                loss,
            )
        scaler = loss_scaler(trainer)
        if scaler and scaler.get_scale() < 1:
            raise TrainingError(
                f"step {trainer.global_step}: trainer.precision=16-mixed overflows however small "
                "its scale; type trainer.precision=bf16-mixed or 32-true"
            )

    def first_bad(self, trainer: L.Trainer) -> tuple[float, float, float]:
        """The first step that was not finite, 0.0 for none, since when it may be so, and the loss.

        Forgets what was noted.
        """
        noted, self.noted = self.noted, []
        values = torch.stack([both for _, both in noted]).tolist() if noted else []
        for (step, _), (loss, norm) in zip(noted, values, strict=True):
            if not math.isfinite(loss + norm):
                return step, step, loss
        if self.loss is not None and not all_finite(trainer.optimizers):
            return trainer.global_step, self.looked_at + 1, float(self.loss)
        return 0.0, 0.0, 0.0


def all_finite(optimizers: Iterable[Optimizer]) -> bool:
    """Whether all that trains is finite, and what the optimizers keep of it."""
    tensors = [
        tensor.detach()
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
        for tensor in (parameter, *optimizer.state.get(parameter, {}).values())
        if isinstance(tensor, Tensor) and tensor.is_floating_point()
        if tensor.device == parameter.device  # Adam counts its steps on the host
    ]
    return not tensors or math.isfinite(total(tensors))


def total(tensors: Sequence[Tensor]) -> Tensor:
    """A number, (), that is not finite if one of theirs is not."""
    if tensors[0].device.type == "cpu":  # a sum is read faster, norms are fewer kernels
        totals = [tensor.sum(dtype=torch.float32) for tensor in tensors]
    else:
        totals = [*torch._foreach_norm([*tensors], dtype=torch.float32)]
    return torch.stack(totals).sum()

"""A run whose loss or gradient is not finite ends, and none of it is kept."""

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from finetune.datamodule import Batch
from finetune.errors import NotFinite, TrainingError
from finetune.tasks.base import Task, loss_scaler


class FiniteGuard(Callback):
    """Stops a run whose loss or gradient is not finite, before any of it is in a checkpoint.

    What each step gave stays on a GPU, and is looked at before each checkpoint and validation, and
    every n steps. What fp16's scaler skips is no failure, but a scale below 1 is.
    advice: what to type to see more.
    """

    def __init__(self, advice: str, every_n_steps: int = 50) -> None:
        self.advice, self.every_n_steps = advice, every_n_steps
        self.noted: list[tuple[int, Tensor]] = []  # steps, from 1; loss and gradient, (2,)
        self.total: Tensor | None = None  # (), of this step's gradient: not finite if a part is not
        self.looked_at = 0

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        """Sum up the gradient, unless the task is about to measure its norm."""
        assert isinstance(pl_module, Task)
        if loss_scaler(trainer) or pl_module.measures_norm():
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if grads := [p.grad for p in parameters if p.grad is not None]:
            if grads[0].device.type == "cpu":  # a sum is read faster, norms are fewer kernels
                totals = [grad.sum(dtype=torch.float32) for grad in grads]
            else:
                totals = [*torch._foreach_norm(grads)]
            self.total = torch.stack(totals).sum()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Keep the step if its loss or gradient is not finite; look every n steps."""
        loss = outputs["loss"].detach()
        norm, pl_module.gradient_norm = pl_module.gradient_norm, None
        if norm is None or loss_scaler(trainer):
            norm = self.total
        self.total = None
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
        self.looked_at = trainer.global_step
        found = torch.tensor(self.first_bad(), dtype=torch.float64)
        ranks = [found]
        if trainer.world_size > 1:
            found = found.to(trainer.strategy.root_device)
            ranks = [torch.empty_like(found) for _ in range(trainer.world_size)]
            torch.distributed.all_gather(ranks, found)
        if bad := [
            (int(step), float(loss)) for step, loss in map(torch.Tensor.tolist, ranks) if step
        ]:
            assert isinstance(trainer.lightning_module, Task)
            trainer.lightning_module.hand_over_logs()  # the curves show how it came
            step, loss = min(bad, key=lambda where: where[0])
            what = "gradient" if math.isfinite(loss) else "loss"
            raise NotFinite(
                f"step {step:.0f}: the {what} is not finite (loss {loss:.4g}). No checkpoint holds "
                f"it. {self.advice} To train without it, start anew with a smaller optimizer.lr, "
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

    def first_bad(self) -> tuple[float, float]:
        """The first step noted that is not finite, 0.0 for none, and its loss; forgets them."""
        noted, self.noted = self.noted, []
        if noted:
            values = torch.stack([both for _, both in noted]).tolist()
            for (step, _), (loss, norm) in zip(noted, values, strict=True):
                if not math.isfinite(loss + norm):
                    return float(step), loss
        return 0.0, 0.0

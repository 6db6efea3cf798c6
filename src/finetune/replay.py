"""debug=replay: repeats the step that was not finite, and says which operation it comes from."""

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from finetune import build
from finetune.callbacks.guard import FiniteGuard
from finetune.errors import NotFinite, TrainingError
from finetune.tasks.base import Task

log = logging.getLogger(__name__)

ANOMALY = "returned nan values"  # in what torch's anomaly detection raises


class Watch(Callback):
    """Keeps the first module that made something not finite of what was, and the step."""

    def __init__(self, until: int) -> None:
        self.until, self.found = until, ""
        self._hooks: list[Any] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at what every module makes."""
        assert isinstance(pl_module, Task)
        for name, module in pl_module.model.named_modules():
            if name:
                self._hooks.append(module.register_forward_hook(self._looks_at(name)))

    def _looks_at(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not self.found and all(map(finite, inputs)) and not finite(output):
                kind = type(module).__name__
                weights = [n for n, p in module.named_parameters(recurse=False) if not finite(p)]
                why = f" with {' and '.join(weights)} not finite" if weights else ""
                self.found = f"{name} ({kind}) is the first whose output is not finite{why}"

        return hook

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        """Name parameters whose gradient is not finite."""
        assert isinstance(pl_module, Task)
        parameters = pl_module.model.named_parameters()
        bad = [name for name, p in parameters if p.grad is not None and not finite(p.grad)]
        if bad and not self.found:
            more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
            self.found = f"the gradients of {', '.join(bad[:5])}{more} are not finite"

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        """Stop after the step."""
        trainer.should_stop = trainer.global_step >= self.until

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look no more."""
        for hook in self._hooks:
            hook.remove()


def finite(value: Any) -> bool:
    """Whether a tensor holds finite numbers alone; what is no tensor counts as finite."""
    return not isinstance(value, Tensor) or bool(torch.isfinite(value).all())


def replay(
    cfg: DictConfig,
    task: Task,
    datamodule: L.LightningDataModule,
    budget: build.Budget,
    resume_from: Path | None,
    until: int,
) -> None:
    """Train from a step checkpoint to a step, with anomaly detection; nothing is written.

    Raises TrainingError that names where it comes from.
    """
    watch, guard = Watch(until), FiniteGuard("", every_n_steps=1)
    cfg = cfg.copy()
    OmegaConf.update(cfg, "trainer.detect_anomaly", True, force_add=True)
    OmegaConf.update(cfg, "trainer.profiler", None, force_add=True)
    trainer = build.build_trainer(cfg, Path(), budget, [guard, watch], [])
    log.info("repeating the steps up to %d, with anomaly detection; nothing is written", until)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            trainer.fit(task, datamodule, ckpt_path=resume_from, weights_only=True)
        except NotFinite as error:
            found = watch.found or "every module is finite, and what the loss makes of it is not"
            raise TrainingError(
                f"step {error.step} again: {found} (loss {error.loss:.4g})"
            ) from error
        except RuntimeError as error:
            if ANOMALY not in str(error):
                raise
            lines = [str(w.message) for w in told if "Traceback of forward" in str(w.message)]
            call = " ".join(lines).partition("(Triggered internally")[0].rstrip()
            raise TrainingError(
                f"step {trainer.global_step + 1} again: {watch.found or f'{error} {call}'}"
            ) from error
    log.info("step %d is finite when it is repeated", until)

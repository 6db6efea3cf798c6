"""Checkpoints that are whole or not there: the best by val, and states to resume from."""

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from finetune import checkpoint
from finetune.callbacks.guard import FiniteGuard
from finetune.checkpoint import load, num_bytes, save
from finetune.datamodule import Batch
from finetune.errors import CheckpointError, ConfigError, Interrupted
from finetune.files import readable
from finetune.model import Classifier
from finetune.tasks.base import Task

log = logging.getLogger(__name__)


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, written whole or not at all, and read as data only.

    A save that fails is told, and kept in failed until the next: what was written before stays, and
    a disk may have room again by then.
    """

    failed: OSError | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write beside path, then rename."""
        needed = num_bytes(checkpoint)
        self.failed = tell_failure(lambda: save(Path(path), checkpoint), Path(path), needed)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read to the CPU, with weights_only=True whatever is asked for."""
        return load(Path(path))


def tell_failure(write: Callable[[], None], path: Path, needed: int) -> OSError | None:
    """Write; if that fails, as on a full disk, warn, and give the error.

    needed: bytes. Where they are not free nothing is begun: the curves need what room is left.
    """
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    try:
        if 0 < free < needed:  # some volumes say 0 whatever is free
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write()
    except OSError as error:
        log.warning(
            "%s could not be written: %s (it needs about %s, and %s are free on this disk). The "
            "run goes on; what was written before stays, and the next save is tried",
            path, error.strerror or error, readable(needed), readable(free),
        )  # fmt: skip
        return error
    return None


class Pace:
    """How often checkpoints are written by themselves: each time, or within a share of the time.

    share: of the time that has passed, for all writing so far and the next; None: each time.
    expected: seconds that the first is taken to need.
    """

    def __init__(self, share: float | None = None, expected: float = 0.0) -> None:
        self.share, self.expected = share, expected
        self.began, self.spent = time.monotonic(), 0.0

    def allows(self, trainer: L.Trainer) -> bool:
        """Whether it is time for one; rank 0, which writes, decides for all."""
        if self.share is None:
            return True
        passed = time.monotonic() - self.began
        return bool(trainer.strategy.broadcast(self.spent + self.expected <= self.share * passed))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Count what is spent inside; the next is taken to need as much."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.expected = time.monotonic() - began
            self.spent += self.expected


def refuse_lost_end(trainer: L.Trainer, best: "BestCheckpoint") -> None:
    """Raise CheckpointError after the training if the best or the last state is not on the disk."""
    best.publish(trainer)
    io = trainer.strategy.checkpoint_io
    last = io.failed if isinstance(io, WholeCheckpointIO) else None
    failed = trainer.strategy.broadcast([str(error) for error in (best.failed, last) if error])
    if failed:
        raise CheckpointError(
            f"the last checkpoint could not be written: {'; '.join(failed)}. Make room, then go on "
            "with resume="
        )


def lower_is_better(monitor: str) -> bool:
    """Whether a metric of this name is minimised."""
    return monitor.rsplit("/", 1)[-1] in ("loss", "ece")


class BestCheckpoint(Callback):
    """Writes best.ckpt when the monitored metric of val is better than ever before.

    best, confusion and per_class are those of the file. pending: a better one that is not in it:
    the next state for a resume is written after it, where pace spares time; or a full disk kept it
    out, and it is tried again at each validation.
    """

    def __init__(self, run: Path, monitor: str, pace: Pace) -> None:
        self.path, self.monitor, self.pace = checkpoint.best_path(run), monitor, pace
        self.best: dict[str, Any] = {}
        self.confusion: Tensor | None = None  # of val, at the best; rows are labels
        self.per_class: list[float | None] = []  # likewise
        self.epoch, self.validated_step = 0, -1
        self.pending: Best | None = None
        self.failed: OSError | None = None  # the last save, on rank 0

    def state_dict(self) -> dict[str, Any]:
        """For a resume."""
        return {
            "best": self.best,
            "confusion": self.confusion,
            "per_class": self.per_class,
            "epoch": self.epoch,
            "validated_step": self.validated_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a resume."""
        self.best, self.confusion = state_dict["best"], state_dict["confusion"]
        self.per_class = state_dict["per_class"]
        self.epoch, self.validated_step = state_dict["epoch"], state_dict["validated_step"]

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the epoch: after training, Lightning's counter is one ahead."""
        self.epoch = trainer.current_epoch

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare, and keep or write what is better. All ranks hold the same metric and agree."""
        assert isinstance(pl_module, Task)
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if self.monitor not in metrics:
            known = ", ".join(sorted(metrics))
            raise ConfigError(f"monitor: no metric '{self.monitor}'; there are {known}")
        self.validated_step = trainer.global_step
        value, sign = metrics[self.monitor], -1.0 if lower_is_better(self.monitor) else 1.0
        log.info(
            "epoch %d, step %d: %s",
            self.epoch,
            trainer.global_step,
            ", ".join(f"{k} {metrics[k]:.4f}" for k in dict.fromkeys((self.monitor, "val/loss"))),
        )
        before = self.pending.facts if self.pending else self.best
        # a NaN is never better; the first value is, whatever it is
        if not before or sign * value > sign * before["value"]:
            facts = {
                "epoch": self.epoch,
                "step": trainer.global_step,
                "monitor": self.monitor,
                "value": value,
                "metrics": metrics,
                "task": pl_module.task_name,
            }
            # every rank takes part: under FSDP each holds a part of the weights
            state = trainer.strategy.lightning_module_state_dict()
            if not trainer.is_global_zero:
                state = {}
            task = pl_module
            self.pending = Best(facts, state, task.model, task.last_confusion, task.last_per_class)
            if self.pace.share is not None:
                self.pending.keep()
        if self.pace.share is None:
            self.publish(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Write what is pending where it would be lost: what was stopped, a resume repeats.

        Of several ranks the others are elsewhere, and this one is not waited for.
        """
        stopped = isinstance(exception, Interrupted)
        if self.pending and not stopped and trainer.world_size == 1:
            with suppress(Exception):  # the first error is the one to be told
                self._write(self.pending)

    def publish(self, trainer: L.Trainer) -> None:
        """Write what is pending; every rank may read it next."""
        if (best := self.pending) is None:
            return
        if trainer.is_global_zero:
            self._write(best)
        if trainer.strategy.broadcast(self.failed is None):
            self.best, self.confusion, self.per_class = best.facts, best.confusion, best.per_class
            self.pending = None
        else:
            best.keep()

    def _write(self, best: "Best") -> None:
        self.failed = tell_failure(
            lambda: write_best(self.path, best.model, best.state, best.facts),
            self.path,
            num_bytes(best.state),
        )


@dataclass
class Best:
    """What goes into best.ckpt. facts: as in run.json, and the metrics. state: on rank 0."""

    facts: dict[str, Any]
    state: dict[str, Tensor]
    model: Classifier
    confusion: Tensor | None
    per_class: list[float | None]
    kept: bool = False

    def keep(self) -> None:
        """Hold a copy of the weights, as the training goes on in the same tensors."""
        if self.kept:
            return
        frozen = {p.data_ptr() for p in self.model.parameters() if not p.requires_grad}
        self.state = {
            name: value if value.data_ptr() in frozen else value.detach().to("cpu", copy=True)
            for name, value in self.state.items()
        }
        self.kept = True


def write_best(
    path: Path, model: Classifier, state: dict[str, Tensor], best: dict[str, Any]
) -> None:
    """Write best.ckpt. state: of the task, whose model's names start with 'model.'."""
    names = [name for name in state if name.startswith("model.")]
    weights = {name.removeprefix("model."): state[name].cpu() for name in names}
    checkpoint.write(
        path,
        checkpoint.Checkpoint(
            state_dict=weights,
            classes=model.classes,
            input_spec=model.input_spec,
            backbone=dict(model.backbone.recipe),
            head=dict(model.head.recipe),
            **{k: best[k] for k in ("epoch", "step", "monitor", "value", "task")},
        ),
    )


class StepCheckpoints(Callback):
    """step-N.ckpt for a resume, after best.ckpt: every n steps and after a validated epoch.

    The newest two stay. best: whose pace is that of those that nobody asked for; that of the last
    epoch is always written. prepare: what must be known of a run before it can be resumed.
    """

    def __init__(
        self,
        run: Path,
        every_n_steps: int,
        guard: FiniteGuard,
        best: BestCheckpoint,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self.run, self.every_n_steps, self.guard = run, every_n_steps, guard
        self.best, self.pace, self.prepare = best, best.pace, prepare
        self.saved_step = -1

    def save(self, trainer: L.Trainer) -> None:
        """Write the state of this step, and remove all but the newest two."""
        self.guard.look(trainer)
        self.prepare()
        self.saved_step = trainer.global_step
        with self.pace.writing():
            self.best.publish(trainer)  # or a resume from here would not know of it
            for logger in trainer.loggers:
                logger.save()  # flushed first: the curves reach as far as what a resume starts from
            path = checkpoint.step_path(self.run, trainer.global_step)
            trainer.save_checkpoint(path)
            if trainer.is_global_zero and path.exists():
                for path in checkpoint.step_paths(self.run)[2:]:
                    path.unlink()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Save in the middle of an epoch, at an optimizer step."""
        step = trainer.global_step
        due = step % self.every_n_steps == 0 and step != self.saved_step
        if due and may_save_here(trainer, batch_idx) and self.pace.allows(trainer):
            self.save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save after the validation, or when the steps are due; in the last epoch in any case."""
        due = trainer.global_step - self.saved_step >= self.every_n_steps
        last = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        if (due or validates_this_epoch(trainer)) and (last or self.pace.allows(trainer)):
            self.save(trainer)


def validates_this_epoch(trainer: L.Trainer) -> bool:
    """Whether the epoch in progress is one of those with a validation."""
    return (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0


def may_save_here(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether a resume from after this batch goes on as the run would have.

    Not in the middle of an accumulation, nor where a validation or the epoch's end is still due.
    """
    batches = batch_idx + 1
    due = validates_this_epoch(trainer) and batches % (trainer.val_check_batch or 1) == 0
    last = batches >= trainer.num_training_batches or trainer.should_stop
    return not (due or last) and batches % trainer.accumulate_grad_batches == 0

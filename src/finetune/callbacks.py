"""What Lightning does not already have: whole checkpoints, clean stops, honest rates, pictures."""

import errno
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from finetune import checkpoint, signals
from finetune.checkpoint import load, num_bytes, save
from finetune.datamodule import Batch, DataModule
from finetune.errors import CheckpointError, ConfigError, Interrupted, NotFinite, TrainingError
from finetune.files import readable
from finetune.loggers import TensorBoard
from finetune.model import Classifier
from finetune.tasks.base import Task

log = logging.getLogger(__name__)

MUCH_WAITING = 0.1  # of the time: below it nothing is won by reading faster


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


class MaxSteps(Callback):
    """Ends the training at a step, with a validation. Stands before StepCheckpoints."""

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Train no more, if a resume is there already."""
        trainer.should_stop = trainer.global_step >= self.max_steps

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Stop after this batch."""
        if trainer.global_step >= self.max_steps:
            trainer.should_stop = True


class EarlyStop(EarlyStopping):
    """Stops after patience validations without a better one, also across a resume."""

    def __init__(self, monitor: str, patience: int) -> None:
        super().__init__(
            monitor,
            patience=patience,
            mode="min" if lower_is_better(monitor) else "max",
            check_finite=False,
            check_on_train_epoch_end=False,  # that would count after the checkpoint is written
            verbose=False,
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop again at once, if that was decided before a resume."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True


class FiniteGuard(Callback):
    """Stops a run whose loss or gradient is not finite, before any of it is in a checkpoint.

    The first bad step is kept on the device, and looked at before each checkpoint and validation,
    and every n steps. What fp16's scaler skips is no failure, but a scale below 1 is.
    advice: what to type to see more.
    """

    def __init__(self, advice: str, every_n_steps: int = 50) -> None:
        self.advice, self.every_n_steps = advice, every_n_steps
        self.first_bad: Tensor | None = None  # (2,): the step, from 1, or 0 for none; its loss
        self.norm: Tensor | None = None  # (), of this step's gradient: not finite if a part is not
        self.looked_at = 0

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        """Sum up the gradient, unless the task is about to measure its norm."""
        assert isinstance(pl_module, Task)
        if getattr(trainer.precision_plugin, "scaler", None) or pl_module.measures_norm():
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if grads := [p.grad for p in parameters if p.grad is not None]:
            self.norm = torch.stack(torch._foreach_norm(grads)).sum()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Keep the step if its loss or gradient is not finite; look every n steps."""
        loss = outputs["loss"].detach()
        norm, pl_module.gradient_norm = pl_module.gradient_norm, None
        if norm is None or getattr(trainer.precision_plugin, "scaler", None) is not None:
            norm = self.norm
        self.norm = None
        self._note(loss, loss if norm is None else loss + norm.to(loss.device), trainer.global_step)
        if trainer.global_step - self.looked_at >= self.every_n_steps:
            self.look(trainer)

    def _note(self, loss: Tensor, total: Tensor, step: int) -> None:
        if loss.device.type == "cpu" and math.isfinite(total):
            return  # a GPU would be waited for
        here = torch.stack([torch.full_like(loss, max(1, step)), loss]).float()
        if self.first_bad is None:
            self.first_bad = torch.zeros_like(here)
        bad = ~torch.isfinite(total) & (self.first_bad[0] == 0)
        self.first_bad = torch.where(bad, here, self.first_bad)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look before a best checkpoint can be written."""
        self.look(trainer)

    def look(self, trainer: L.Trainer) -> None:
        """Raise NotFinite, on all ranks, if a step of one of them was not."""
        self.looked_at = trainer.global_step
        found = torch.zeros(2) if self.first_bad is None else self.first_bad
        found = found.to(trainer.strategy.root_device)
        ranks = [found]
        if trainer.world_size > 1:
            ranks = [torch.empty_like(found) for _ in range(trainer.world_size)]
            torch.distributed.all_gather(ranks, found)
        if bad := [
            (int(step), float(loss)) for step, loss in map(torch.Tensor.tolist, ranks) if step
        ]:
            step, loss = min(bad, key=lambda where: where[0])
            what = "gradient" if math.isfinite(loss) else "loss"
            raise NotFinite(
                f"step {step:.0f}: the {what} is not finite (loss {loss:.4g}). No checkpoint holds "
                f"it. {self.advice} To train without it, start anew with a smaller optimizer.lr, "
                "trainer.gradient_clip_val=1, or trainer.precision=32-true",
                int(step),
                loss,
            )
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and scaler.get_scale() < 1:
            raise TrainingError(
                f"step {trainer.global_step}: trainer.precision=16-mixed overflows however small "
                "its scale; type trainer.precision=bf16-mixed or 32-true"
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


class StopSignals(Callback):
    """SIGINT, SIGTERM and SIGUSR1 stop a run after the batch, with a checkpoint; twice: at once.

    Ranks agree by the flag of the batch before. It is reduced on the CPU while the batch is
    computed, so that no device is waited for, and all of them leave after the same batch.
    """

    def __init__(self) -> None:
        self.steps: StepCheckpoints | None = None  # of a training
        self.received, self.received_at = 0, 0.0
        self.looping = False  # there is a batch to wait for
        self.agreed = 0  # the signal that all ranks know of
        self.leaving: Interrupted | None = None  # what was raised
        self.pid = os.getpid()
        self._group: Any = None  # of several ranks
        self._flag = torch.tensor(0)
        self._work: Any = None

    def installed(self) -> AbstractContextManager[None]:
        """Handle the signals inside; put back what was there before."""
        return signals.handled(self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self.pid:  # a worker of a DataLoader, forked a moment ago
            return
        now, first = time.monotonic(), not self.received
        if not first and now - self.received_at < signals.SAME:
            return
        self.received, self.received_at = signum, now
        if not (first and self.looping):
            self._leave(signum)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take Lightning's own handling out, and connect the ranks.

        It would broadcast on the device in its handler of SIGTERM, where no other rank takes part,
        and after every batch, and wait for that.
        """
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        loop = trainer.fit_loop.epoch_loop
        loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        if trainer.world_size > 1 and self._group is None:
            self._group = torch.distributed.new_group(backend="gloo")

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """From here on a stop waits for the batch."""
        self.looping = True

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Likewise."""
        self.looping = True

    def on_test_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Likewise."""
        self.looping = True

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """From here on there is no batch to wait for."""
        self._leave_loop()

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Likewise, if it was no part of the training."""
        if trainer.state.fn != TrainerFn.FITTING:
            self._leave_loop()

    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Likewise."""
        self._leave_loop()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Likewise."""
        self.looping = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Stop if any rank was asked to, as soon as a checkpoint can be written.

        Where a validation is due, which may take long, the resume starts from the one before.
        """
        if not self._asked():
            return
        last = trainer.should_stop or batch_idx + 1 >= trainer.num_training_batches
        validation_due = last and (trainer.should_stop or validates_this_epoch(trainer))
        if may_save_here(trainer, batch_idx):
            self._save(trainer)
        elif self.steps and not validation_due:
            return  # to the end of the accumulation, or of the epoch
        self._leave(self.agreed, together=True)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Stop if that was known at the last batch."""
        if self.agreed:
            self._save(trainer)
            self._leave(self.agreed, together=True)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop a validation too; the resume repeats it."""
        if self._asked():
            self._leave(self.agreed, together=True)

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Likewise."""
        if self._asked():
            self._leave(self.agreed, together=True)

    def _save(self, trainer: L.Trainer) -> None:
        if self.steps and self.steps.saved_step != trainer.global_step:
            self.steps.save(trainer)

    def _asked(self) -> int:
        """The signal that all ranks know of, 0 for none; every rank asks after each batch."""
        if self._group is None:
            self.agreed = self.received
        elif not self.agreed:
            self._agree()
            self._flag = torch.tensor(self.received)
            self._work = torch.distributed.all_reduce(
                self._flag, torch.distributed.ReduceOp.MAX, self._group, async_op=True
            )
        return self.agreed

    def _agree(self) -> None:
        """Wait for the flag that is on its way: since the batch before."""
        if self._work is not None:
            self._work.wait()
            self.agreed = int(self._flag)

    def _leave(self, signum: int, together: bool = False) -> NoReturn:
        self.leaving = Interrupted(signum, together)
        raise self.leaving

    def _leave_loop(self) -> None:
        self.looping = False
        if not self._asked() and self._group is not None:
            self._agree()
        if self.agreed:
            self._leave(self.agreed, together=True)


class Throughput(Callback):
    """Training images per second: the first 20 steps and validation left out."""

    SKIP = 20

    def __init__(self) -> None:
        self.images, self.seconds, self.steps = 0, 0.0, 0
        self.waited = 0.0  # seconds of these, for data
        self.first_step_at: float | None = None
        self._last: float | None = None
        self._waited_before = 0.0
        self._logged = -1

    @property
    def images_per_second(self) -> float | None:
        """Over the run so far, all devices together; None before step 21."""
        return self.images / self.seconds if self.seconds > 0 else None

    @property
    def data_wait(self) -> float | None:
        """Share of the time in which this device waits for data; None before step 21."""
        return self.waited / self.seconds if self.seconds > 0 else None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Begin the clock anew: what was between the epochs is not training."""
        self._last, self._waited_before = time.perf_counter(), waited(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count from the end of the batch before: waiting for data is part of it."""
        now = time.perf_counter()
        self.steps += 1
        if self.first_step_at is None:
            self.first_step_at = time.time()
        if self._last is not None and self.steps > self.SKIP:
            self.images += len(batch[1]) * trainer.world_size
            self.seconds += now - self._last
            self.waited += waited(trainer) - self._waited_before
        self._last, self._waited_before = now, waited(trainer)
        step = trainer.global_step - 1  # the one that this batch ended
        logged = step != self._logged and (step + 1) % trainer.log_every_n_steps == 0  # type: ignore[attr-defined] # not in its annotations
        if self.images_per_second and logged:
            self._logged = step
            pl_module.log_step({"time/images_per_second": self.images_per_second}, step)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Stop the clock."""
        self._last = None


class Trace(Callback):
    """Records a few steps, after the first skip, to run/profile/rank0.pt.trace.json."""

    STEPS = 5

    def __init__(self, run: Path, skip: int) -> None:
        self.folder, self.skip = run / "profile", skip
        self.batches = 0
        self.profiler: torch.profiler.profile | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Begin once skip batches are over."""
        if self.batches == self.skip:
            self.profiler = torch.profiler.profile(acc_events=True)
            self.profiler.start()
        self.batches += 1

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Write once the steps are recorded."""
        if self.batches == self.skip + self.STEPS:
            self.write(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write what there is of a training of fewer steps."""
        self.write(trainer)

    def write(self, trainer: L.Trainer) -> None:
        """End the recording, if there is one."""
        if self.profiler is None:
            return
        self.profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        # the ending by which TensorBoard knows it
        path = self.folder / f"rank{trainer.global_rank}.pt.trace.json"
        self.profiler.export_chrome_trace(str(path))
        self.profiler = None
        log.info("trace: %s; open it in ui.perfetto.dev, or in TensorBoard's profiler", path)


def waited(trainer: L.Trainer) -> float:
    """Seconds that the training has waited for data so far; 0.0 if its loader does not tell."""
    return float(getattr(trainer.train_dataloader, "waited", 0.0))


def verdict(data_wait: float, num_workers: int, cores: int, in_memory: bool = False) -> str:
    """What a run spent its time on, and what to type if that was waiting.

    data_wait: share of the time. num_workers: processes that read images. cores: of this device.
    in_memory: images are transformed faster than workers could send them.
    """
    if data_wait < MUCH_WAITING:
        return f"compute-bound: {data_wait:.0%} of the time waits for data"
    more = min(8, cores - 1)
    remedy = (
        f"try num_workers={more}"
        if num_workers < more and not in_memory
        else "a lighter augment= would help"
        if in_memory
        else "smaller image files, data.cache=disk or a lighter augment= would help"
    )
    return f"input-bound: {data_wait:.0%} of the time waits for data; {remedy}"


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

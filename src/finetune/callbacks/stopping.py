"""What ends a training before its last epoch: a number of steps, patience, a signal."""

import os
import time
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.trainer.states import TrainerFn

from finetune import signals
from finetune.callbacks.checkpoints import (
    StepCheckpoints,
    lower_is_better,
    may_save_here,
    validates_this_epoch,
)
from finetune.datamodule import Batch
from finetune.errors import Interrupted


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

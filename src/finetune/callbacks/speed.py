"""How fast a run trains, and what it waits for."""

import logging
import os
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import PassThroughProfiler

from finetune.datamodule import Batch
from finetune.machine import USEFUL_WORKERS

log = logging.getLogger(__name__)

MUCH_WAITING = 0.1  # of the time: below it nothing is won by reading faster


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
        self.steps += 1
        if self.steps == self.SKIP and pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)  # what it still has to do is of those
        now = time.perf_counter()
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
        self._stop(pl_module.device)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Stop the clock, if no validation did."""
        self._stop(pl_module.device)

    def _stop(self, device: torch.device) -> None:
        """Once a GPU has done the steps that were asked of it: they are counted."""
        if self._last is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
            if self.steps > self.SKIP:
                self.seconds += time.perf_counter() - self._last
        self._last = None


class Unprofiled(PassThroughProfiler):
    """Enters nothing around a hook, where Lightning's own begins a generator, 60 times a step."""

    NOTHING = nullcontext()

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override] # it is entered, no more
        """The same for every action."""
        return self.NOTHING


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
            os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # else a CPU reports that it is no GPU
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

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Write what there is of one that was stopped."""
        try:
            self.write(trainer)
        except (OSError, RuntimeError) as error:  # what stopped it is what counts
            log.warning("no trace: %s", error)

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


def verdict(
    data_wait: float,
    num_workers: int,
    cores: int,
    in_memory: bool = False,
    augmented: bool = True,
    crops_on_cpu: bool = False,
) -> str:
    """What a run spent its time on, and what to type if that was waiting.

    data_wait: share of the time. num_workers: processes that read images. cores: of this device.
    in_memory: images are transformed faster than workers could send them. augmented: at random.
    crops_on_cpu: because somebody asked for data.cache=device.
    """
    if data_wait < MUCH_WAITING:
        return f"compute-bound: {data_wait:.0%} of the time waits for data"
    said = f"input-bound: {data_wait:.0%} of the time waits for data"
    more = min(USEFUL_WORKERS, cores - 1)
    if crops_on_cpu:
        return f"{said}; try data.cache=ram"
    if num_workers < more and not in_memory:
        return f"{said}; try num_workers={more}"
    of_files = [] if in_memory else ["smaller image files", "data.cache=disk"]
    if helps := of_files + ["a lighter augment="] * augmented:
        return f"{said}; {' or '.join(helps)} would help"
    return said

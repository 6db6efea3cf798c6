"""What bench.py cannot read in run.json: runs of train.py with a clock in them, or with less.

python tests/bench_ours.py NAME '{"argument": value}': a function below; its last line is JSON.
"""

import csv
import ctypes
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from finetune.machine import (
    collect_from_now_on,
    collect_later,
    keep_freed_memory,
    let_threads_sleep,
)

collect_later()  # as train.py does, before torch
let_threads_sleep()
keep_freed_memory()

import lightning as L  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402

import finetune.data.image_folder  # noqa: E402, F401  its own memory is not that of an index
from bench_turns import Teller  # noqa: E402
from finetune import build, datamodule, fit, train  # noqa: E402
from finetune.callbacks import checkpoints  # noqa: E402
from finetune.overrides import compose_jobs  # noqa: E402


class Clock(Callback):
    """Seconds of the epochs, of their validations, and of the forward passes in these.

    Called before the other callbacks: what best.ckpt takes at the end of a validation is measured
    beside it.
    """

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.validation = self.forward = self.best = 0.0
        self._epoch_began = self._validation_began = self._forward_began = 0.0
        self._validating = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.model.register_forward_pre_hook(self._start_forward)
        pl_module.model.register_forward_hook(self._stop_forward)

    def on_train_epoch_start(self, *args: object) -> None:
        self._epoch_began = time.perf_counter()

    def on_train_epoch_end(self, *args: object) -> None:
        self.epochs.append(time.perf_counter() - self._epoch_began)

    def on_validation_start(self, *args: object) -> None:
        self._validation_began, self._validating = time.perf_counter(), True

    def on_validation_end(self, *args: object) -> None:
        self.validation += time.perf_counter() - self._validation_began
        self._validating = False

    def _start_forward(self, *args: object) -> None:
        self._forward_began = time.perf_counter()

    def _stop_forward(self, *args: object) -> None:
        if self._validating:
            self.forward += time.perf_counter() - self._forward_began


def clocked(arguments: Sequence[str]) -> dict[str, object]:
    """train.py with a clock: seconds of the training alone, and of its parts."""
    clock, seconds = Clock(), []
    build_trainer, fit_as_ever = build.build_trainer, L.Trainer.fit
    write_best = checkpoints.write_best

    def with_clock(cfg, run, budget, others, loggers):
        added = [clock] if loggers else []  # else it is the trainer that tests
        return build_trainer(cfg, run, budget, [*added, *others], loggers)

    def timed(self, *args, **kwargs):
        began = time.perf_counter()
        fit_as_ever(self, *args, **kwargs)
        seconds.append(time.perf_counter() - began)

    def timed_best(*args):
        began = time.perf_counter()
        write_best(*args)
        clock.best += time.perf_counter() - began

    build.build_trainer, L.Trainer.fit, checkpoints.write_best = with_clock, timed, timed_best
    sys.argv = ["train.py", *arguments]
    try:
        train.main()
    except SystemExit as stop:
        if stop.code:
            raise
    (run,) = (word.partition("=")[2] for word in arguments if word.startswith("hydra.run.dir="))
    return {
        "seconds": sum(seconds),
        "epochs": clock.epochs,
        "validation": clock.validation,
        "forward": clock.forward,
        "best": clock.best,
        "accuracy": last_of(Path(run, "metrics.csv"), "val/accuracy"),
    }


def last_of(metrics: Path, name: str) -> float:
    """What a run measured last of one metric."""
    with metrics.open(newline="") as file:
        return [float(r["value"]) for r in csv.DictReader(file) if r["metric"] == name][-1]


# a worker of ours leaves the group, to outlive a Ctrl-C; here it stands still with the others
datamodule.leave_group = lambda worker: None


class Steps(Callback):
    """Tells of each step, as bench_plain.py does."""

    def __init__(self) -> None:
        self.tell = Teller()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.tell(len(batch[1]))


def stepping(arguments: Sequence[str]) -> None:
    """train.py, until it is killed; it tells of its steps."""
    build_trainer = build.build_trainer

    def telling(cfg, run, budget, others, loggers):
        return build_trainer(cfg, run, budget, [*others, Steps()], loggers)

    build.build_trainer = telling
    sys.argv = ["train.py", *arguments]
    train.main()


def bare(arguments: Sequence[str], run: str) -> None:
    """The same without loggers, progress bar, guards and checkpoints."""
    collect_from_now_on()
    (cfg,) = compose_jobs("train", [*arguments])
    fit.quiet_libraries()
    parts = fit.prepare(cfg, "", Path(run))
    trainer = build.build_trainer(parts.cfg, Path(run), parts.budget, [Steps()], loggers=[])
    trainer.fit(parts.task, parts.datamodule)


def index(arguments: Sequence[str]) -> dict[str, float]:
    """Read what lies in a folder: seconds, and bytes of memory that stay and that were needed."""
    collect_from_now_on()
    (cfg,) = compose_jobs("train", [*arguments])
    before, peak = resident(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    began = time.perf_counter()
    splits = build.build_splits(cfg)
    seconds = time.perf_counter() - began
    held, most = resident() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    files = sum(len(split or ()) for split in (splits.train, splits.val, splits.test))
    return {"seconds": seconds, "files": files, "held": held, "peak": most - peak}


def resident() -> int:
    """Bytes of this process that are in memory."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))))

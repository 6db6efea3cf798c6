"""From a command line to a job and an exit code: the one place that prints a user's mistakes."""

import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from finetune import ranks, signals, slurm
from finetune.errors import ConfigError, FinetuneError, Interrupted
from finetune.machine import (
    collect_from_now_on,
    collect_later,
    keep_freed_memory,
    let_threads_sleep,
)
from finetune.overrides import (
    asks_for_config,
    asks_for_information,
    compose_jobs,
    help_asked_for,
    parse_yaml_in_c,
    prepared,
    signs_quoted,
)
from finetune.record import Record, is_finished
from finetune.typed import to_type

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One job of this process and what became of it. error: None if it is done."""

    overrides: tuple[str, ...]
    run: Path
    error: str | None


jobs_done: list[Job] = []
sweep: Path | None = None  # the directory of the sweep that this process runs


def command(name: str, task: Callable[[], None]) -> NoReturn:
    """Run a command and exit: 0 done, 1 a user's mistake or a failed job, 128 + n after a signal.

    name: of the YAML in conf/. task: a function under @hydra.main, which reads sys.argv.
    """
    collect_later()
    let_threads_sleep()
    keep_freed_memory()
    parse_yaml_in_c()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra prints what it catches, and exits, itself
    with signals.handled(signals.at_once):
        try:
            run_command(name, task)
        except Interrupted as stop:
            leave(stop, None if sweep is None else f"-m {to_type('sweep.resume', str(sweep))}")
    if len(jobs_done) > 1:
        print_sweep(jobs_done)
    sys.exit(1 if any(job.error for job in jobs_done) else 0)


def run_command(name: str, task: Callable[[], None]) -> None:
    """The same; exits by itself only after a mistake, or what is no job."""
    try:
        sys.argv[1:] = prepared(name, signs_quoted(sys.argv[1:]))
        if text := help_asked_for(name, sys.argv[1:]):
            print(text)
            sys.exit(0)
        if not asks_for_information(sys.argv[1:]):
            jobs = compose_jobs(name, sys.argv[1:])
            if not asks_for_config(sys.argv[1:]):
                if any(map(starts_ranks, jobs)):
                    ranks.start_server()  # it imports what they run beside this process
                from finetune.check import check_all  # late: from here on torch is imported

                check_all(jobs)
                if any(job.get("launcher") for job in jobs):
                    slurm.refuse_missing()  # once, and not for each job of a sweep
        task()
    except FinetuneError as error:
        fail(error)
    except (HydraException, OmegaConfBaseException) as error:
        fail(ConfigError(str(error)))
    except BrokenPipeError:  # of --help | head
        os._exit(128 + 13)  # as SIGPIPE would have it; flushing would fail again
    except OSError as error:  # Hydra makes the run directory
        key = "hydra.sweep.dir" if {"-m", "--multirun"} & {*sys.argv} else "hydra.run.dir"
        fail(ConfigError(f"{key}: {error.filename} cannot be written: {error.strerror}"))


def starts_ranks(cfg: DictConfig) -> bool:
    """Whether a job starts several ranks here, as far as it can be told without torch."""
    devices = OmegaConf.select(cfg, "trainer.devices")
    num = len(devices) if isinstance(devices, ListConfig) else devices
    elsewhere = cfg.get("launcher") or ranks.started_outside() > 1
    return str(num).isdigit() and int(num) > 1 and not elsewhere


def print_sweep(jobs: Sequence[Job]) -> None:
    """A row per job of a sweep: what was chosen and what came out; then what failed, and where."""
    from rich.console import Console
    from rich.table import Table

    # to a queue: they may have begun, but are not done
    submitted = [job for job in jobs if job.error is None and not is_finished(job.run)]
    table = Table("job", "overrides", "best val", "test")
    for number, job in enumerate(jobs):
        cells = ["failed", ""]
        if job in submitted:
            cells = ["submitted", ""]
        elif job.error is None:
            facts = Record.read(job.run).facts
            best, test = facts["best"], facts["test"]
            name = best["monitor"].replace("val/", "test/", 1)
            cells = [f"{best['value']:.4f}", f"{test[name]:.4f}" if name in test else "-"]
        table.add_row(str(number), " ".join(job.overrides), *cells)
    Console().print(table)
    failed = [job for job in jobs if job.error]
    folder = shown_path(jobs[0].run.parent)
    done = len(jobs) - len(failed) - len(submitted)
    queued = f", {len(submitted)} submitted" if submitted else ""
    print(f"{done} of {len(jobs)} jobs done{queued}: {folder}/<job>")
    for job in failed:
        print(f"failed: {' '.join(job.overrides)}\n  {job.error}", file=sys.stderr)


def shown_path(path: Path) -> str:
    """As short as it can be typed: relative to here, if it lies below."""
    return str(path.relative_to(Path.cwd()) if Path.cwd() in path.parents else path)


def guarded(
    overrides: Sequence[str], run: Path, job: Callable[[], None], go_on: str | None = None
) -> None:
    """Run one job; a failure is told and remembered, so that a sweep goes on.

    go_on: what is typed after a stop, if there is anything.
    """
    collect_from_now_on()
    problem = None
    try:
        job()
    except Interrupted as stop:
        leave(stop, go_on)
    except FinetuneError as error:
        problem = str(error)
        log.error("error: %s", error)
    except Exception as error:  # our bug or the machine's trouble: the traceback is wanted
        problem = f"{type(error).__name__}: {error}"
        log.error("%s", traceback.format_exc())
    jobs_done.append(Job(tuple(overrides), run, problem))


def leave(stop: Interrupted, go_on: str | None) -> NoReturn:
    """Say what stopped the command and how to go on, and exit with 128 + the number."""
    signals.ignore()
    how = "" if go_on is None else f". To go on: python train.py {go_on}"
    log.warning("stopped by %s%s", stop, how)
    signals.exit_now(128 + stop.signum)


def fail(error: FinetuneError) -> NoReturn:
    """Print one message and exit with 1."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)


class ConsoleHandler(logging.Handler):
    """Errors to stderr, the rest to stdout, as they are then: a progress bar wraps them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        prefix = "warning: " if record.levelno == logging.WARNING else ""
        stream = sys.stderr if record.levelno >= logging.ERROR else sys.stdout
        # a path may hold bytes that are no UTF-8
        text = self.format(record).encode("utf-8", "backslashreplace").decode()
        print(f"{prefix}{text}", file=stream, flush=True)

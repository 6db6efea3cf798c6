"""From a command line to a job and an exit code: the one place that prints a user's mistakes."""

import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from finetune.errors import FinetuneError
from finetune.overrides import asks_for_information, compose_jobs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One job of this process and what became of it. error: None if it is done."""

    overrides: tuple[str, ...]
    run: Path
    error: str | None


jobs_done: list[Job] = []


def command(name: str, task: Callable[[], None]) -> NoReturn:
    """Run a command and exit: 0 done, 1 a user's mistake or a failed job, 130 for Ctrl-C.

    name: of the YAML in conf/. task: a function under @hydra.main, which reads sys.argv.
    """
    try:
        if not asks_for_information(sys.argv[1:]):
            jobs = compose_jobs(name, sys.argv[1:])
            from finetune.check import check_all  # late: from here on torch is imported

            check_all(jobs)
        task()
    except FinetuneError as error:
        fail(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    failed = [job for job in jobs_done if job.error]
    if len(jobs_done) > 1:
        print(f"{len(jobs_done) - len(failed)} of {len(jobs_done)} jobs done")
        for job in failed:
            print(f"failed: {' '.join(job.overrides)}\n  {job.error}\n  {job.run}", file=sys.stderr)
    sys.exit(1 if failed else 0)


def guarded(overrides: Sequence[str], run: Path, job: Callable[[], None]) -> None:
    """Run one job; a failure is told and remembered, so that a sweep goes on."""
    from finetune.callbacks import Interrupted  # late: imports torch

    problem = None
    try:
        job()
    except Interrupted as stop:
        sys.exit(128 + stop.signum)
    except FinetuneError as error:
        problem = str(error)
        log.error("error: %s", error)
    except Exception as error:  # our bug or the machine's trouble: the traceback is wanted
        problem = f"{type(error).__name__}: {error}"
        log.error("%s", traceback.format_exc())
    jobs_done.append(Job(tuple(overrides), run, problem))


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
        print(f"{prefix}{self.format(record)}", file=stream, flush=True)

"""SIGINT, SIGTERM and SIGUSR1 ask for a stop: how they are taken for a while, and put back."""

import logging
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from finetune.errors import Interrupted

# Windows has no SIGUSR1
STOPS = tuple(getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, n))

# seconds in which a second one is the first once more: a terminal and a launcher both send it, and
# so do make, timeout, torchrun and srun
SAME = 0.5

Handler = Callable[[int, FrameType | None], None]


@contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """Give the signals to a handler inside; put back what was there before."""
    before = {signum: signal.signal(signum, handler) for signum in STOPS}
    try:
        yield
    finally:
        for signum, former in before.items():
            signal.signal(signum, former)


def at_once(signum: int, frame: FrameType | None) -> None:
    """A handler where there is nothing to wait for."""
    raise Interrupted(signum)


def ignore() -> None:
    """Let a process that ends anyway end in peace."""
    for signum in STOPS:
        signal.signal(signum, signal.SIG_IGN)


def block() -> None:
    """Keep the signals back, here and in processes that are started, until unblock()."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)


def unblock() -> None:
    """Take what was kept back, and what comes."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def exit_now(code: int) -> NoReturn:
    """Exit with all that was said, but without taking torch down piece by piece, for seconds."""
    for worker in multiprocessing.active_children():
        worker.terminate()
    folder = multiprocessing.current_process()._config.get("tempdir")  # type: ignore[attr-defined] # private
    if folder and multiprocessing.parent_process() is None:  # a child's is its parent's
        shutil.rmtree(folder, ignore_errors=True)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it, or it is closed
            stream.flush()
    os._exit(code)

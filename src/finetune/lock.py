"""One process per run directory, by a lock of the kernel: it ends with the process, however."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finetune.errors import CheckpointError, ConfigError
from finetune.record import Record

log = logging.getLogger(__name__)

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run directory, which is made if need be.

    Raises ConfigError with the host and pid of the process that holds it already, as they stand in
    run.json.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        # not inherited: neither a program that is started nor a worker of a DataLoader holds it on
        held = [] if fcntl is None else [os.open(run, os.O_RDONLY | os.O_CLOEXEC)]
    except OSError as error:
        raise ConfigError(f"hydra.run.dir: {run} cannot be written: {error}") from error
    if held:
        os.register_at_fork(after_in_child=lambda: _close(held))
    try:
        try:
            for descriptor in held:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = None
            with suppress(CheckpointError):
                holder = Record.read(run).facts.get("process")
            raise ConfigError(
                f"{run} is in use by {holder or 'another process'}. Wait for its end, or stop it"
            ) from error
        except OSError as error:  # some network volumes
            log.warning("%s cannot be locked against a second process: %s", run, error.strerror)
        yield
    finally:
        _close(held)


def this_process() -> str:
    """Such as process 123 on myhost."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def _close(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())

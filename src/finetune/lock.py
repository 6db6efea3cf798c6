"""One process per run directory, by a lock of the kernel: it ends with the process, however."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run directory, which is made if need be.

    Raises ConfigError with the host and pid of the process that holds it already.
    """
    if fcntl is None:
        yield
        return
    try:
        run.mkdir(parents=True, exist_ok=True)
        # not inherited: neither a program that is started nor a worker of a DataLoader holds it on
        descriptor = os.open(run / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"hydra.run.dir: {run} cannot be written: {error}") from error
    here = [descriptor]
    os.register_at_fork(after_in_child=lambda: _close(here))
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 300, 0).decode(errors="replace").strip()
            raise ConfigError(
                f"{run} is in use by {holder or 'another process'}. Wait for its end, or stop it"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        _close(here)


def _close(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())

"""The processes of one run: how one that has ended ends the others, and dies with its launcher."""

import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess, SpawnProcess
from types import FrameType
from typing import Literal

from finetune import signals

# seconds that the other ranks have to end by themselves, once one has ended
AFTER_A_STOP = 60.0  # together: the first may still be writing
AFTER_A_FAILURE = 5.0  # they see a broken connection at once, or never
AT_ONCE = 1.0


@dataclass(frozen=True)
class End:
    """How a rank ended before its work was done. said: to the user. error: for run.json."""

    rank: int
    status: Literal["stopped", "failed", "killed"]
    signum: int = 0
    together: bool = False
    said: str = ""
    error: str = ""


@dataclass(frozen=True)
class Rank:
    """A process, and the pipe through which it tells its End."""

    number: int
    process: SpawnProcess | ForkServerProcess
    pipe: Connection

    def end(self) -> End | None:
        """Of a process that has ended; None if its work is done."""
        self.process.join()
        with suppress(EOFError, OSError):  # it said nothing
            if self.pipe.poll():
                end: End = self.pipe.recv()
                return end
        code = self.process.exitcode or 0
        if code == 0:
            return None
        how = f"ended with exit code {code}"
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            if -code == getattr(signal, "SIGKILL", 9):
                how += ", perhaps for want of memory: type a smaller batch_size or num_workers"
        how = f"rank {self.number} {how}"
        return End(self.number, "killed", said=how, error=how)


def started_outside() -> int:
    """How many ranks torchrun or SLURM started, this one among them; 1 where neither did."""
    return int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))


def start_server() -> str:
    """Have a process import what ranks run, of which they are then forked: once, and not in each.

    The jobs of a sweep share it; it ends with this process. Gives the start method of
    multiprocessing for ranks: where nothing can be forked so, each of them is spawned.
    """
    # for good, in it: what ends it would leave ranks of which nobody could tell how they ended
    signals.block()
    try:
        resource_tracker.ensure_running()  # which would die of a SIGUSR1 to the group otherwise
        signals.block()  # it let some pass
        if not sys.platform.startswith("linux"):
            return "spawn"
        forkserver.set_forkserver_preload(["finetune.launch"])
        forkserver.ensure_running()
        return "forkserver"
    except OSError:  # a TMPDIR that is too long for a socket, or cannot be written
        return "spawn"
    finally:
        signals.unblock()


class Ranks:
    """The processes of one run. received: the signal that this process got and gave to them."""

    def __init__(self) -> None:
        self.running: list[Rank] = []
        self.received, self.received_at = 0, 0.0
        self.deadline = float("inf")  # of time.monotonic(): what runs then is killed

    def receive(self, signum: int, frame: FrameType | None) -> None:
        """Forward a signal; after a second one nobody is waited for."""
        now = time.monotonic()
        if self.received and now - self.received_at < signals.SAME:
            return
        if self.received:
            self.deadline = min(self.deadline, now + AT_ONCE)
        self.received, self.received_at = signum, now
        self.forward(signum)

    def forward(self, signum: int) -> None:
        """Send a signal to all ranks that run."""
        for rank in self.running:
            with suppress(ProcessLookupError):
                os.kill(rank.process.pid or 0, signum)

    def wait(self) -> End | None:
        """The first End that is not good, when all have ended; None if all work is done."""
        first: End | None = None
        while self.running:
            # not for long: a signal does not end the wait, but may set the deadline
            sentinels = [rank.process.sentinel for rank in self.running]
            connection.wait(sentinels, min(0.2, max(0.0, self.deadline - time.monotonic())))
            if time.monotonic() > self.deadline:
                self.kill()
            ended = [rank for rank in self.running if not rank.process.is_alive()]
            self.running = [rank for rank in self.running if rank not in ended]
            ends = [end for rank in ended if (end := rank.end()) is not None]
            if first is None and ends:
                # one that was killed takes others along
                first = min(ends, key=lambda end: end.status != "killed")
                self._end_others(first)
        return first

    def _end_others(self, end: End) -> None:
        """See to it that the other ranks do not wait for one that has ended."""
        if end.status == "stopped" and not end.together:
            self.forward(end.signum)
        patience = AFTER_A_STOP if end.together else AFTER_A_FAILURE
        self.deadline = min(self.deadline, time.monotonic() + patience)

    def kill(self) -> None:
        """End at once what still runs."""
        for rank in self.running:
            rank.process.kill()
        for rank in self.running:
            rank.process.join()


def die_with_launcher(pipe: Connection) -> None:
    """End this process when the other end of the pipe is closed: nobody would collect it."""
    with suppress(OSError, EOFError):
        pipe.recv()  # nothing is ever sent this way
    os._exit(1)

"""Processes that take turns: where the machine is slow for a while, all of them are.

Each is a process that tells of its steps and stands still, workers and all, while another trains.
"""

import os
import pty
import select
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

SKIP = 20  # steps that are left out, as in images_per_second of run.json
MOST_SKIPPED = 15.0  # seconds, where 20 steps take longer
SILENCE = 300.0  # seconds without a step: it hangs
AHEAD = 3  # steps that are asked of a GPU before the first of them is waited for
SIZE = 8  # bytes that tell of a step
CHANNEL = "BENCH_STEPS"  # the file descriptor that they are written to


def tell_step(images: int) -> None:
    """Say, in a training, that a step of so many images is over."""
    os.write(int(os.environ[CHANNEL]), images.to_bytes(SIZE, "little"))


class Teller:
    """Says of each step that it is over: on a GPU once it is computed, and a few steps are asked.

    To wait for each would let the GPU wait for the next one; unlimited, what is asked of it would
    be computed in the other's turn.
    """

    def __init__(self) -> None:
        self._asked: deque[tuple[Any, int]] = deque()  # events and images

    def __call__(self, images: int) -> None:
        """After a step of so many images."""
        import torch  # here: to count the steps of a process takes none

        if not torch.cuda.is_initialized():
            tell_step(images)
            return
        event = torch.cuda.Event()
        event.record()
        self._asked.append((event, images))
        if len(self._asked) > AHEAD:
            event, images = self._asked.popleft()
            event.synchronize()
            tell_step(images)


class Training:
    """A process that calls tell_step after each step, and stands still until its turn.

    terminal: it is shown one, as a person's is. Raises RuntimeError where the process ends before
    it is killed.
    """

    def __init__(
        self,
        words: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        said: Path,
        terminal: bool = False,
    ) -> None:
        self.words, self.said = words, said
        self._steps, theirs = os.pipe()
        self._reader: threading.Thread | None = None
        if terminal:
            screen, output = pty.openpty()
            self._reader = threading.Thread(target=copy, args=(screen, said), daemon=True)
            environment = {**environment, "TERM": "xterm-256color", "COLUMNS": "120"}
        else:
            output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.process = subprocess.Popen(
            words, cwd=folder, env={**environment, CHANNEL: str(theirs)}, pass_fds=[theirs],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        os.close(output)
        if self._reader:
            self._reader.start()
        self._stop()

    def warm_up(self) -> None:
        """Train until the first steps are over."""
        self._go_on()
        self._next_step()
        began, steps = time.monotonic(), 1
        while steps < SKIP and time.monotonic() - began < MOST_SKIPPED:
            self._next_step()
            steps += 1
        self._stop()

    def turn(self, seconds: float) -> tuple[int, float]:
        """Train for at least so long, to the end of a step: images, and seconds it took."""
        images, began = 0, time.perf_counter()
        self._go_on()
        while time.perf_counter() - began < seconds:
            images += self._next_step()
        took = time.perf_counter() - began
        self._stop()
        return images, took

    def start(self, seconds: float) -> tuple[bool, float]:
        """Start up, at most for so long: whether a step is over, and seconds it took."""
        began = time.perf_counter()
        self._go_on()
        if stepped := self._waits_to_tell(seconds):
            self._next_step()
        took = time.perf_counter() - began
        self._stop()
        return stepped, took

    def _go_on(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def _stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def _waits_to_tell(self, seconds: float) -> bool:
        return bool(select.select([self._steps], [], [], seconds)[0])

    def _next_step(self) -> int:
        ready = self._waits_to_tell(SILENCE)
        told = os.read(self._steps, SIZE) if ready else b""
        if not told:
            why = "it ended" if ready else f"no step for {SILENCE:.0f} s"
            if ready and self._reader:
                self._reader.join(timeout=5)
            raise RuntimeError(f"{' '.join(self.words)}: {why}: {self.said.read_text()[-1500:]}")
        return int.from_bytes(told, "little")

    def end(self) -> None:
        """Kill it and its workers."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._steps)


def copy(screen: int, said: Path) -> None:
    """What goes to a terminal, into a file."""
    with said.open("wb", buffering=0) as file, suppress(OSError):  # the other end was closed
        while part := os.read(screen, 65536):
            file.write(part)
    os.close(screen)


def take_turns(
    trainings: Mapping[str, Training], rounds: int, seconds: float, turn: float, images: int = 0
) -> dict[str, list[float]]:
    """Images per second of each in each round, A B A B.

    turn: seconds of one, at least. seconds, images: of each training in a round, at least.
    """
    found: dict[str, list[float]] = {name: [] for name in trainings}
    for _ in range(rounds):
        seen, spent = dict.fromkeys(trainings, 0), dict.fromkeys(trainings, 0.0)
        while min(spent.values()) < seconds or min(seen.values()) < images:
            for name, training in trainings.items():
                more, took = training.turn(turn)
                seen[name] += more
                spent[name] += took
        for name in trainings:
            found[name].append(seen[name] / spent[name])
    return found


def start_by_turns(trainings: Mapping[str, Training], turn: float) -> dict[str, float]:
    """Seconds from the start of each process to its first step.

    turn: seconds of one, at most.
    """
    spent, starting = dict.fromkeys(trainings, 0.0), set(trainings)
    while starting:
        for name in sorted(starting):
            stepped, took = trainings[name].start(turn)
            spent[name] += took
            if stepped:
                starting.remove(name)
    return spent

"""Signals at real processes: each stops a run in time and in order, and the resume ends the same.

python tests/torture_signals.py prints a table of all cases; a test runs a few of them.
"""

import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import checkpoint
from finetune.record import Record

ROOT = Path(__file__).parents[1]
# 160 steps of 2 epochs; with two ranks 80
RUN = (
    *("data=fake", "data.num_classes=3", "data.num_images=540", "data.image_size=8"),
    *("model=tiny", "model.weights=null", "trainer.accelerator=cpu", "trainer.log_every_n_steps=1"),
    *("batch_size=4", "epochs=2", "recipe=none", "augment=light", "logger=csv"),
    *("trainer.strategy=auto", "checkpoint.every_n_steps=1000"),
)

# train.py that tells where it is, and stays there for a while
ENTRY = """
import functools, os, time
from pathlib import Path
from finetune import fit
from finetune.tasks.classification import Classification

def slow(where, function):
    @functools.wraps(function)
    def slowed(*args, **kwargs):
        if where == os.environ["WHEN"]:
            Path(os.environ["MARK"] + os.environ.get("RANK", "0")).touch()
            time.sleep(float(os.environ["PAUSE"]))
        return function(*args, **kwargs)
    return slowed

fit.prepare = slow("start", fit.prepare)
Classification.training_step = slow("training", Classification.training_step)
Classification.validation_step = slow("validation", Classification.validation_step)
Classification.test_step = slow("test", Classification.test_step)

if __name__ == "__main__":
    from finetune.train import main
    main()
"""
PAUSES = {"start": 5.0, "training": 0.02, "validation": 0.05, "test": 0.05}


@dataclass(frozen=True)
class Case:
    """target: main, group or rank, the last one. twice: a second one after 0.8 s, in slow steps."""

    ranks: int
    signum: signal.Signals
    target: str
    when: str = "training"
    workers: int = 0
    twice: bool = False

    @property
    def expected(self) -> dict[str, Any]:
        """What run_case gives, but for the seconds."""
        killed = self.signum == signal.SIGKILL
        code, status = 128 + self.signum, "interrupted"
        if killed:
            code, status = (1, "failed") if self.target == "rank" else (-9, "running")
        found = {
            "exit": code, "status": status, "told": 0 if killed else 1, "traceback": False,
            "left": 0, "temporary": 0, "resumed_equal": True,
        }  # fmt: skip
        if killed and self.target != "rank":
            del found["temporary"]  # nobody is there to remove it
        return found


def signal_cases() -> list[Case]:
    """Every signal at every target at every time, and what no handler takes."""
    stops = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    whens = ("training", "start", "validation", "test")
    cases = [
        Case(ranks, stop, target, when, workers=int(target == "group"))
        for ranks in (1, 2)
        for when in whens
        for stop in stops
        for target in ("main", "group", "rank")[: ranks + 1]
    ]
    kills = [Case(2, signal.SIGKILL, target, when) for target in ("main", "rank") for when in whens]
    return [*cases, *kills, *(Case(n, signal.SIGINT, "group", twice=True) for n in (1, 2))]


def run_case(case: Case, folder: Path, resume: bool = True) -> dict[str, Any]:
    """Start, signal, wait, resume; the uninterrupted run in folder is made where it is missing."""
    name = "-".join(map(str, (case.ranks, case.signum.name, case.target, case.when, case.twice)))
    run = folder / name
    (folder / "entry.py").write_text(ENTRY)
    mark = folder / f"{name}.mark"
    more = {"WHEN": case.when, "MARK": str(mark)}
    more["PAUSE"] = "6" if case.twice else str(PAUSES[case.when])
    arguments = [*arguments_of(case.ranks), f"num_workers={case.workers}"]
    with (
        (folder / f"{name}.log").open("w+") as said,
        tempfile.TemporaryDirectory() as temporary,  # not in folder: the path of a socket is short
    ):
        more["TMPDIR"] = temporary
        process = subprocess.Popen(
            [sys.executable, str(folder / "entry.py"), *arguments, f"hydra.run.dir={run}"],
            env=environment() | more, stdout=said, stderr=said, cwd=folder, start_new_session=True,
        )  # fmt: skip
        marks = [Path(f"{mark}{rank}") for rank in range(case.ranks)]
        wait_until(lambda: all(m.exists() for m in marks) or process.poll() is not None, 240)
        time.sleep(0 if case.when == "test" else 0.5)  # into the middle of it
        ranks = ranks_of(process.pid)
        began = time.monotonic()
        send(case, process.pid, ranks)
        if case.twice:
            time.sleep(0.8)
            began = time.monotonic()
            send(case, process.pid, ranks)
        code = process.wait(timeout=120)
        seconds = time.monotonic() - began
        wait_until(lambda: not any(map(alive, ranks)), 5)
        text = Path(said.name).read_text()
        kept = [*Path(temporary).iterdir()]
    found: dict[str, Any] = {
        "exit": code,
        "seconds": round(seconds, 2),
        "status": Record.read(run).facts["status"],
        "told": text.count("To go on: python train.py resume="),
        "traceback": "Traceback" in text,
        "left": sum(map(alive, ranks)),
        "temporary": len(kept),
    }
    if resume:
        whole = folder / f"whole-{case.ranks}"
        if not whole.exists():
            train(*arguments_of(case.ranks), f"hydra.run.dir={whole}", cwd=folder)
        train(f"resume={run}", cwd=folder)
        found["resumed_equal"] = what_is_left(run) == what_is_left(whole)
    return found


def arguments_of(ranks: int) -> list[str]:
    """Of an uninterrupted run."""
    several = [] if ranks == 1 else [f"trainer.devices={ranks}", "trainer.strategy=ddp"]
    return [*RUN, *several]


def environment() -> dict[str, str]:
    """One thread each, and this source."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}


def train(*arguments: str, cwd: Path) -> None:
    """Run train.py to its end."""
    subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        env=environment(), cwd=cwd, check=True, capture_output=True, timeout=300,
    )  # fmt: skip


def send(case: Case, main: int, ranks: list[int]) -> None:
    """Send the signal of a case to its target."""
    if case.target == "group":
        os.killpg(main, case.signum)
    else:
        os.kill(main if case.target == "main" else ranks[-1], case.signum)


def ranks_of(main: int) -> list[int]:
    """Process ids of the ranks of a launcher, in order: forked of the server that it started."""
    found: dict[int, tuple[int, bytes]] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            found[int(folder.name)] = parent, (folder / "cmdline").read_bytes()
    servers = {
        p for p, (parent, command) in found.items() if parent == main and b"forkserver" in command
    }
    return sorted(p for p, (parent, _) in found.items() if parent in servers)


def alive(process: int) -> bool:
    """Whether a process runs; one that nobody has collected does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait, but no longer than so."""
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)


def what_is_left(run: Path) -> list[Any]:
    """Weights, optimizer, counters and curves of a run, as plain values."""
    best = checkpoint.load(checkpoint.best_path(run))
    last = checkpoint.load(checkpoint.step_paths(run)[0])
    with (run / "metrics.csv").open(newline="") as file:
        rows = sorted(tuple(row.values()) for row in csv.DictReader(file))
    states = [best["state_dict"], last["state_dict"], last["optimizer_states"], last["global_step"]]
    return [*map(plain, states), [row for row in rows if not row[1].startswith("time/")]]


def plain(value: Any) -> Any:
    """Tensors as lists of numbers, in all of a nested structure."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def table(cases: list[Case]) -> Iterator[str]:
    """A line per case, and whether it is as it should be."""
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            found = run_case(case, Path(folder))
            wrong = {key for key, value in case.expected.items() if found[key] != value}
            verdict = "ok" if not wrong else f"WRONG: {', '.join(sorted(wrong))}"
            yield f"{case} {found} {verdict}"


if __name__ == "__main__":
    for line in table(signal_cases()):
        print(line, flush=True)

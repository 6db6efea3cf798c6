"""What a run survives, tried at random moments with real processes: make torture N=50.

python tests/torture.py N [kills ranks signals damaged disk data hostile]: a table, and exit code 1
if anything is not as it should be. Runs are forked from this process, since imports take longer
than they do.
"""

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import SMALL, assert_same_end, facts_of
from finetune import checkpoint, fit, launch, train  # noqa: F401  imported before the forks
from finetune.errors import CheckpointError
from torture_signals import run_case, signal_cases

TESTS = Path(__file__).parent
# 20 steps of 4 epochs, a checkpoint every second one
RUN = (*SMALL, "epochs=4", "checkpoint.every_n_steps=2", "logger=tensorboard")
HOWS = (
    ("augment=strong", "schedule=one_cycle", "checkpoint.every_n_steps=1"),
    (
        "augment=randaugment",
        "mixup=0.4",
        "cutmix=1",
        "ema=0.9",
        "head.dropout=0.3",
        "checkpoint.every_n_steps=null",
    ),
    ("trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=0.5", "l2_sp=0.1"),
    (
        "trainer.val_check_interval=2",
        "optimizer=adamw",
        "monitor=val/loss",
        "checkpoint.every_n_steps=null",
    ),
    ("strategy=linear_probe", "head.init=ridge", "checkpoint.every_n_steps=null"),
    ("strategy=lp_ft", "strategy@strategy.then=layer_decay", "augment=strong"),
    ("strategy=gradual_unfreeze", "ema=0.9"),
    ("strategy=head_lr", "freeze_until=1", "data.balance=sampler", "checkpoint.every_n_steps=3"),
    ("strategy=layer_decay", "optimizer=adamw", "trainer.precision=bf16-mixed"),
)
RANKS = ("trainer.devices=2", "trainer.strategy=ddp", "mixup=0.4", "ema=0.9", "augment=strong")
SHOWN = 200  # characters of a failure


@dataclass
class Row:
    """A line of the table. problems: what was not as it should be, and where it lies."""

    what: str
    tried: str
    good: int
    of: int
    problems: list[str]


class Place:
    """A folder with the uninterrupted runs, each made once."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.seconds: dict[Path, float] = {}
        self._count = 0

    def whole(self, how: tuple[str, ...]) -> Path:
        """The run as it is without interruption."""
        run = self.folder / f"whole-{abs(hash(how))}"
        if run not in self.seconds:
            began = time.monotonic()
            code = wait(start([*RUN, *how, f"hydra.run.dir={run}"], log_of(run)))
            assert code == 0, log_of(run).read_text()
            self.seconds[run] = time.monotonic() - began
        return run

    def new(self, name: str) -> Path:
        """A folder that is not there yet."""
        self._count += 1
        return self.folder / f"{name}-{self._count}"


def start(arguments: list[str], log: Path) -> int:
    """Fork train.py with these arguments, in a process group of its own; its process id."""
    sys.stdout.flush()
    if process := os.fork():
        return process
    code = 99
    try:
        os.setsid()
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.argv = ["train.py", *arguments]
        train.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(process: int) -> int:
    """Its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def log_of(run: Path) -> Path:
    """Where all that is said of a run goes."""
    return run.with_name(f"{run.name}.log")


def killed_within(process: int, seconds: float) -> int | None:
    """Kill its whole group by then; None, or the exit code if it was faster."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(process, signal.SIGKILL)
    wait(process)
    return None


def problem_of(run: Path, whole: Path) -> str | None:
    """What of a run is not as in the uninterrupted one; None if all of it is."""
    try:
        assert_same_end(run, whole)
        assert points_of(run) == points_of(whole), "points in TensorBoard"
    except (AssertionError, CheckpointError, OSError, KeyError, IndexError) as error:
        return f"{run}: {str(error)[:SHOWN] or type(error).__name__}"
    return None


def points_of(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar that TensorBoard shows of a run, but the clock's."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("time/")]
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags}


def kills(place: Place, runs: int, each: int, how_of: Callable[[int], tuple[str, ...]]) -> Row:
    """SIGKILL to the group at random moments, and resume with another number of workers."""
    problems, killed = [], 0
    for number in range(runs):
        how = how_of(number)
        whole, run = place.whole(how), place.new("killed")
        arguments = [*RUN, *how, f"hydra.run.dir={run}"]
        for left in range(each, -1, -1):
            seconds = place.random.uniform(0.1, 0.9 * place.seconds[whole]) if left else 600.0
            workers = place.random.choice((0, 0, 1, 2, 3))
            code = killed_within(
                start([*arguments, f"num_workers={workers}"], log_of(run)), seconds
            )
            killed += code is None
            if code is not None:
                break
            if (run / ".hydra" / "overrides.yaml").exists():  # or it was killed before it began
                arguments = [f"resume={run}"]
        problem = f"{run}: exit code {code}" if code else problem_of(run, whole)
        problems += [problem] if problem else []
    name = "SIGKILL of two ranks" if how_of(0) == RANKS else "SIGKILL, then resume"
    return Row(name, f"{runs} runs, {killed} kills", runs - len(problems), runs, problems)


def damaged(place: Place, times: int) -> Row:
    """The newest step checkpoint is damaged: the one before it is taken, and it is said."""
    how = HOWS[1]
    whole, problems = place.whole(how), []
    for _ in range(times):
        run = shutil.copytree(whole, place.new("damaged"))
        path = checkpoint.step_paths(run)[0]
        content = bytearray(path.read_bytes())
        at = place.random.randrange(len(content))
        kind = place.random.choice(("bit", "cut", "zeros", "empty"))
        if kind == "bit":
            content[at] ^= 1 << place.random.randrange(8)
        elif kind == "zeros":
            content[at : at + 4096] = bytes(len(content[at : at + 4096]))
        path.write_bytes(content[: {"cut": at, "empty": 0}.get(kind, len(content))])
        harmless = same_content(path, checkpoint.step_path(whole, int(path.stem[5:])))
        (run / "run.json").write_text(
            (run / "run.json").read_text().replace('"finished"', '"interrupted"', 1)
        )
        code = wait(start([f"resume={run}"], log_of(run)))
        problem = f"{run}: exit code {code}" if code else problem_of(run, whole)
        if not harmless and "is passed over" not in log_of(run).read_text():
            problem = f"{run}: {kind} at {at} of {path.name} was not noticed"
        problems += [problem] if problem else []
        shutil.rmtree(run) if not problem else None
    return Row("damaged checkpoint", f"{times} files", times - len(problems), times, problems)


def same_content(path: Path, other: Path) -> bool:
    """Whether a damage is in the padding between the records, where it changes nothing."""
    from conftest import same

    try:
        return same(checkpoint.load(path), checkpoint.load(other))
    except CheckpointError:
        return False


def full_disk(place: Place, times: int) -> Row:
    """A small disk is filled at a random moment, and has room again after the first warning."""
    how, problems, failed = HOWS[1], [], 0
    whole, disk = place.whole(how), place.new("disk")
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        return Row("full disk", "skipped: only root may mount a tmpfs", 0, 0, [])
    try:
        for number in range(times):
            run, log = disk / f"run-{number}", place.new("disk.log")
            process = start([*RUN, *how, f"hydra.run.dir={run}"], log)
            time.sleep(place.random.uniform(0.3, 0.9) * place.seconds[whole])
            filler = disk / "filler"
            with suppress(OSError), filler.open("wb", buffering=0) as file:  # the run writes too
                file.write(bytes(max(0, shutil.disk_usage(disk).free - 300_000)))
            until = time.monotonic() + place.random.uniform(0.2, 2.0)
            while time.monotonic() < until and "could not be written" not in log.read_text():
                time.sleep(0.02)
            torn = [path for path in run.rglob("*.ckpt") if not readable(path)]
            filler.unlink()
            code = wait(process)
            if code == 1:  # a row of metrics.csv, or the last checkpoint, had no room
                failed += 1
                code = wait(start([f"resume={run}"], log))
            problem = f"{log}: exit code {code}" if code else problem_of(run, whole)
            if torn:
                problem = f"{log}: {torn[0]} is torn"
            problems += [problem] if problem else []
            shutil.rmtree(run)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    tried = f"{times} runs, {failed} ended with 1 and were resumed"
    return Row("full disk", tried, times - len(problems), times, problems)


def readable(path: Path) -> bool:
    """Whether a checkpoint is whole; one that is replaced meanwhile is looked at again."""
    try:
        checkpoint.load(path)
    except CheckpointError:
        return not path.exists() or facts_of(path.parents[1])["status"] == "finished"
    return True


def signals(place: Place, times: int) -> Row:
    """SIGTERM, SIGINT and SIGUSR1 to the main process, the group, or one rank; and SIGKILL."""
    cases = signal_cases()
    chosen = cases if times >= len(cases) else place.random.sample(cases, times)
    problems, seconds = [], []
    for case in chosen:
        found = run_case(case, place.folder)
        wrong = [f"{k}={found[k]}, not {v}" for k, v in case.expected.items() if found[k] != v]
        problems += [f"{case}: {', '.join(wrong)}"] if wrong else []
        if case.when == "training" and not case.twice and case.signum != signal.SIGKILL:
            seconds.append(found["seconds"])
    median = f", median {sorted(seconds)[len(seconds) // 2]:.2f} s" if seconds else ""
    tried = f"{len(chosen)} of {len(cases)} cases{median}"
    return Row("signals", tried, len(chosen) - len(problems), len(chosen), problems)


def tested(what: str, *arguments: str) -> Row:
    """A row of the tests that try every case already."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", *arguments],
        cwd=TESTS.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    problems = [line[:SHOWN] for line in lines if line.startswith(("FAILED", "ERROR"))]
    counts = dict(reversed(pair.split()[:2]) for pair in lines[-1].split(" in ")[0].split(", "))
    passed = int(counts.get("passed", 0))
    skipped = f", {counts['skipped']} not on this system" if "skipped" in counts else ""
    return Row(
        what, f"{passed + len(problems)} cases{skipped}", passed, passed + len(problems), problems
    )


def rows(place: Place, times: int, chosen: list[str]) -> Iterator[Row]:
    """The lines of the table, as they are found."""
    scan = ("tests/test_data_scan.py", "-k", "every_kind_of_data")
    makers: dict[str, Callable[[], Row]] = {
        "kills": lambda: kills(place, times, 3 + times // 25, lambda n: HOWS[n % len(HOWS)]),
        "ranks": lambda: kills(place, max(1, times // 10), 2 + times // 50, lambda n: RANKS),
        "signals": lambda: signals(place, times),
        "damaged": lambda: damaged(place, times),
        "disk": lambda: full_disk(place, max(1, times // 5)),
        "data": lambda: tested("bad data", *scan),
        "hostile": lambda: tested("files that would bite", "tests/test_hostile.py"),
    }
    for name in chosen or makers:
        yield makers[name]()


def main() -> None:
    """Try it all, print the table; what failed is kept."""
    times, chosen = int(sys.argv[1]), sys.argv[2:]
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # of points that a resume replaced
    seed = int(os.environ.get("SEED", time.time()))
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    place = Place(folder, seed)
    console, table = Console(width=110), Table("what", "tried", "as it should be")
    problems = []
    for row in rows(place, times, chosen):
        print(f"{row.what}: {row.good} of {row.of} ({row.tried})", flush=True)
        table.add_row(row.what, row.tried, f"{row.good} of {row.of}")
        problems += row.problems
    console.print(table)
    print(f"SEED={seed}")
    print("\n".join(problems))
    if problems:
        print(f"kept: {folder}")
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()

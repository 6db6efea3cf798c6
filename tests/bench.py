"""How fast it is, next to what the machine allows and to a plain loop: make bench.

python tests/bench.py [ROW...] [--quick] [--out FILE]: prints each row as soon as it is measured,
and a table. All rows together are written to docs/benchmark.md; some of them, or a --quick round
(a minute or three, to see that it works), only to the FILE that is named.

Each thing is measured in a process of its own, in turn with what it is held against, A B A B:
trainings take turns of a second, see bench_turns.py. A row is the median over the rounds, of ratios
within a round, and the range from the least to the largest. The first 20 steps of a training are
left out.
"""

import argparse
import copy
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench_images import CLASSES, paths, unpack_cifar, write_files, write_images
from bench_turns import Training, start_by_turns, take_turns
from finetune.machine import total_memory, usable_cores

TESTS = Path(__file__).parent
ROOT = TESTS.parent
FILE = ROOT / "docs" / "benchmark.md"
EVERYTHING = ("recipe=textbook", "strategy=full")
SHARED = "FINETUNE_SHARED_DATA"  # a folder that may hold cifar10.tar.xz
SETTINGS = ("OMP_", "GOMP_", "KMP_", "MKL_", "MALLOC_", "THP_")  # of threads and memory
# those of finetune.machine, as a process is given them from outside
OURS = {
    "GOMP_SPINCOUNT": "1000",
    "KMP_BLOCKTIME": "0",
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}
# what nobody can avoid, told of as a step is
IMPORTS = "import torch, torchvision, lightning, sys; sys.path.append('tests'); "
IMPORTS += "import bench_turns; bench_turns.tell_step(1)"
MANY = 100_000  # files of which the time per epoch is measured

# What a row holds ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """bound: of the median. unit: x for a ratio, %, s, bytes."""

    sign: str
    bound: float
    unit: str

    def __str__(self) -> str:
        return f"{self.sign} {shown(self.bound, self.unit)}"

    def met(self, value: float) -> bool:
        """Whether it is reached."""
        return value >= self.bound if self.sign == "≥" else value <= self.bound


@dataclass(frozen=True)
class Row:
    """A line of the table. values: one per round, or none. note: how, or why not."""

    work: str
    against: str
    goal: Goal
    values: Sequence[float]
    note: str = ""
    failed: bool = False

    @property
    def median(self) -> float:
        """Over the rounds."""
        return statistics.median(self.values)

    @property
    def verdict(self) -> str:
        """met, missed, skipped or failed."""
        if not self.values:
            return "failed" if self.failed else "skipped"
        return "met" if self.goal.met(self.median) else "missed"

    def cells(self) -> list[str]:
        """Of the table."""
        found, spread = "–", "–"
        if self.values:
            unit = self.goal.unit
            found = shown(self.median, unit)
            spread = "one round" if len(self.values) == 1 else range_of(self.values, unit)
        return [self.work, self.against, str(self.goal), found, spread, self.verdict, self.note]


HEADER = ("work", "measured against", "goal", "found", "least to largest", "verdict", "how")


def shown(value: float, unit: str) -> str:
    """Such as 0.97, 15.2, 1.8 %, 0.85 s, 183 bytes."""
    digits = 0 if abs(value) >= 100 or unit == "bytes" else 1 if abs(value) >= 10 else 2
    number = f"{value:,.{digits}f}"
    number = number.rstrip("0").rstrip(".") if "." in number else number
    return number if unit == "x" else f"{number} {unit}"


def range_of(values: Sequence[float], unit: str) -> str:
    """From the least to the largest."""
    return f"{shown(min(values), unit)} to {shown(max(values), unit)}"


def ratios(these: Sequence[float], those: Sequence[float]) -> list[float]:
    """Within each round."""
    return [a / b for a, b in zip(these, those, strict=True)]


def differences(these: Sequence[float], those: Sequence[float]) -> list[float]:
    """Within each round."""
    return [a - b for a, b in zip(these, those, strict=True)]


def rates(name: str, values: Sequence[float]) -> str:
    """Such as: ours 151 images/s."""
    return f"{name} {shown(statistics.median(values), 'x')}"


def line_through(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Slope and constant of the line with the least relative error."""
    slope, constant = np.polyfit(np.array(xs, float), np.array(ys, float), 1, w=1 / np.array(ys))
    return float(slope), float(constant)


def slopes(xs: Sequence[float], ys: Sequence[float]) -> list[float]:
    """From each point to the next."""
    return (np.diff(ys) / np.diff(xs)).tolist()


def markdown(rows: Sequence[Row], facts: Mapping[str, str]) -> str:
    """docs/benchmark.md. facts: of the machine and the run, by name."""
    lines = [
        "# How fast it is",
        "",
        "Written by `make bench`, which measures it again; do not edit.",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
        "Each thing is measured in a process of its own, in turn with what it is held against, A B",
        "A B; trainings take turns of a second. A row is the median over the rounds of the ratio",
        "within a round, and its range. The first 20 steps of a training are left out.",
        "`recipe=textbook strategy=full augment=light`,",
        f"batches of {Size.batch} ({Size.large_batch} at 224 px), as many threads as cores, unless",
        "a row says otherwise. The limit is forward, backward and step on a batch at hand. The",
        "plain loop is that of the tutorials: ImageFolder, PIL transforms, DataLoader. Code:",
        "`tests/bench.py`.",
        "",
        f"| {' | '.join(HEADER)} |",
        f"|{'---|' * len(HEADER)}",
        *(f"| {' | '.join(row.cells())} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


# What is measured, and how long -------------------------------------------------------------------


@dataclass
class Size:
    """How much is measured. seconds: of each training in a round. large_batch: at 224 px.

    pixels: of the images that are trained on. workers: of the plain loop, whose best counts.
    """

    rounds: int = 3
    seconds: float = 10.0
    turn: float = 1.0  # seconds
    batch: int = 64
    large_batch: int = 32
    pixels: tuple[int, ...] = (64, 32)
    workers: tuple[int, ...] = (0, 1, 2)
    frozen: tuple[int, ...] = (2, 4)  # layers
    seeds: int = 5  # of the heads of a probe
    images: int = 5000
    large_images: int = 600
    gpu_images: int = 12_800
    watched: int = 200  # steps of a round, in which one checkpoint falls
    starts: int = 7
    slice: float = 0.25  # seconds, of processes that start
    files: int = 1_000_000
    epoch_sizes: tuple[int, ...] = (1000, 10_000, 30_000, MANY)


QUICK = Size(
    rounds=1,
    seconds=1.0,
    turn=0.3,
    batch=8,
    large_batch=4,
    images=300,
    large_images=64,
    gpu_images=256,
    pixels=(32,),
    workers=(0, 2),
    frozen=(2,),
    seeds=1,
    watched=10,
    starts=1,
    files=20_000,
    epoch_sizes=(200, 1000, 2000),
)


Side = Callable[[], Training]


class Place:
    """A folder for all that is made, and the processes that measure."""

    def __init__(self, folder: Path, size: Size) -> None:
        self.folder, self.size = folder, size
        self.cores, self.on_gpu = usable_cores(), False
        self._count = 0

    def for_gpu(self) -> "Place":
        """The same for what a GPU computes, in a folder of its own."""
        other = copy.copy(self)
        other.folder, other.on_gpu = self.new("gpu"), True
        other.folder.mkdir()
        # steps that one has asked for are computed in the turn of the other
        other.size = replace(self.size, turn=3 * self.size.turn)
        return other

    def new(self, name: str) -> Path:
        """A path that is not there yet."""
        self._count += 1
        return self.folder / f"{name}-{self._count}"

    def environment(self, cache: Path | None = None) -> dict[str, str]:
        """As many threads as cores, whatever is set outside, and a cache of our own."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(SETTINGS)}
        cache = cache or self.folder / "cache"
        ours = {"OMP_NUM_THREADS": str(self.cores), "FINETUNE_CACHE": str(cache)}
        # what a loop on the CPU is held against is there, too
        return kept | ours | ({} if self.on_gpu else {"CUDA_VISIBLE_DEVICES": ""})

    def run(self, *words: str, cache: Path | None = None, code: int = 0) -> str:
        """What a process printed. RuntimeError if it ends with another code."""
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=self.environment(cache), check=False,
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode != code:
            raise RuntimeError(f"{' '.join(words)}: {done.stdout[-1500:]}{done.stderr[-1500:]}")
        return done.stdout

    def call(self, script: str, name: str, cache: Path | None = None, **arguments: Any) -> Any:
        """A function of tests/bench_plain.py or bench_ours.py in a process of its own."""
        words = (f"tests/{script}.py", name, json.dumps(arguments))
        return json.loads(self.run(*words, cache=cache).splitlines()[-1])

    def limit(self, model: str, size: int, batch: int, as_ours: bool = False, **more: Any) -> Side:
        """Steps on a batch that is there. as_ours: with our threads, optimizer, and use of memory.

        more: of bench_plain.at_hand.
        """
        arguments = {"model": model, "size": size, "batch": batch, "classes": CLASSES}
        arguments |= {"fused": as_ours, "channels_last": as_ours, **more}
        return self.side("bench_plain", "limit", arguments, more=OURS if as_ours else {})

    def loops(self, root: Path, model: str, size: int, batch: int) -> dict[str, Side]:
        """The plain loop with each number of workers."""
        arguments = {"root": str(root), "model": model, "size": size, "batch": batch}
        return {
            f"{workers} workers": self.side("bench_plain", "loop", arguments | {"workers": workers})
            for workers in self.size.workers
        }

    def ours(self, *overrides: str, terminal: bool = False) -> Side:
        """train.py, for much longer than it is measured: validations are far between."""
        arguments = [*overrides, "epochs=25000", f"hydra.run.dir={self.new('run')}"]
        return self.side("bench_ours", "stepping", {"arguments": arguments}, terminal)

    def bare(self, *overrides: str) -> Side:
        """The same without all that watches over a run."""
        arguments = {"arguments": [*overrides, "epochs=25000"], "run": str(self.new("bare"))}
        return self.side("bench_ours", "bare", arguments)

    def side(
        self,
        script: str,
        name: str,
        arguments: Mapping[str, Any],
        terminal: bool = False,
        more: Mapping[str, str] | None = None,
    ) -> Side:
        """A function of tests/bench_plain.py or bench_ours.py that tells of its steps.

        more: of the environment.
        """
        words = [sys.executable, f"tests/{script}.py", name, json.dumps(arguments)]
        return self.process(words, terminal, more)

    def process(
        self, words: Sequence[str], terminal: bool = False, more: Mapping[str, str] | None = None
    ) -> Side:
        """A command that tells of its steps. more: of the environment."""
        environment = self.environment() | dict(more or {})
        return lambda: Training(words, ROOT, environment, self.new("said"), terminal)

    def in_turns(
        self, sides: Mapping[str, Side], images: int = 0, rounds: int | None = None
    ) -> dict[str, list[float]]:
        """Images per second of each side in each round, of at least so many images."""
        with begun(sides) as trainings:
            warm_up(trainings)
            return self._rates(trainings, rounds or self.size.rounds, images)

    def against_best(
        self, sides: Mapping[str, Side], others: Mapping[str, Side]
    ) -> tuple[dict[str, list[float]], str]:
        """The same of sides and of the one of others that is fastest in the first round; its name.

        It keeps the advantage that it had in this round.
        """
        with begun({**sides, **others}) as trainings:
            warm_up(trainings)
            first = self._rates(trainings, 1)
            best = max(others, key=lambda name: first[name][0])
            for name in others:
                if name != best:
                    trainings.pop(name).end()
            rest = self._rates(trainings, self.size.rounds - 1)
        return {name: first[name] + rest[name] for name in rest}, best

    def starts(self, *overrides: str) -> dict[str, list[float]]:
        """Seconds of the imports that nobody can avoid, and to train.py's first step."""
        found: dict[str, list[float]] = {"imports": [], "first step": []}
        for _ in range(self.size.starts):
            sides = {
                "imports": self.process([sys.executable, "-c", IMPORTS]),
                "first step": self.ours(*overrides),
            }
            with begun(sides) as trainings:
                for name, seconds in start_by_turns(trainings, self.size.slice).items():
                    found[name].append(tell(name, seconds, "s"))
        return found

    def _rates(
        self, trainings: Mapping[str, Training], rounds: int, images: int = 0
    ) -> dict[str, list[float]]:
        found = take_turns(trainings, rounds, self.size.seconds, self.size.turn, images)
        for name, values in found.items():
            for value in values:
                tell(name, value)
        return found

    def clocked(self, *overrides: str, cache: Path | None = None) -> Any:
        """Seconds within a run of train.py."""
        run = self.new("run")
        arguments = [*overrides, f"hydra.run.dir={run}"]
        found = self.call("bench_ours", "clocked", cache=cache, arguments=arguments)
        shutil.rmtree(run)
        return found

    # Images: each folder is made once ---------------------------------------------------------

    def archive(self) -> Path | None:
        """CIFAR-10 as JPEGs, if it is at hand."""
        path = Path(os.environ.get(SHARED, "")) / "cifar10.tar.xz"
        return path if SHARED in os.environ and path.is_file() else None

    def small(self) -> Path:
        """JPEGs of 32 x 32: those of CIFAR-10 if they are at hand."""
        root, num = self.folder / "small", self.size.images
        if not root.exists():
            counts = {"train": num, "val": num // 10}
            if archive := self.archive():
                unpack_cifar(archive, root, counts)
            else:
                write_images(root, counts, (32, 32))
        return root

    def large(self) -> Path:
        """JPEGs of 500 x 375, 60 to 100 kB each."""
        root, num = self.folder / "large", self.size.large_images
        if not root.exists():
            write_images(root, {"train": num, "val": max(20, num // 20)}, (500, 375))
        return root

    def large_many(self) -> Path:
        """As many of these as feed a GPU for a while: copies, of which no two are the same file."""
        root = self.folder / "large-many"
        if not root.exists():
            drawn = sorted(path.read_bytes() for path in self.large().glob("train/*/*.jpg"))
            counts = {"train": self.size.gpu_images, "val": self.size.gpu_images // 20}
            for number, (path, _) in enumerate(paths(root, counts)):
                path.write_bytes(drawn[number % len(drawn)] + number.to_bytes(4, "little"))
        return root

    def many(self, num: int) -> Path:
        """So many small files for training, a hundredth for val."""
        root = self.folder / f"many-{num}"
        if not root.exists():
            write_files(root, {"train": num, "val": max(CLASSES, num // 100)})
        return root


@contextmanager
def begun(sides: Mapping[str, Side]) -> Iterator[dict[str, Training]]:
    """A process of each side, that waits for its turn, until this ends."""
    trainings: dict[str, Training] = {}
    try:
        for name, begin in sides.items():
            trainings[name] = begin()
        yield trainings
    finally:
        for training in trainings.values():
            training.end()


def warm_up(trainings: Mapping[str, Training]) -> None:
    """The first steps of each."""
    for training in trainings.values():
        training.warm_up()


def tell(name: str, value: float, unit: str = "images/s") -> float:
    """Print a single figure as it is found; it is given back."""
    print(f"    {name}: {shown(value, unit)}", flush=True)
    return value


# The rows -----------------------------------------------------------------------------------------


def folder_of(root: Path, model: str, size: int, batch: int, augment: str = "light") -> list[str]:
    """Overrides for a model from scratch on a folder."""
    return [
        *EVERYTHING, f"augment={augment}", "data=image_folder", f"data.root={root}",
        f"model={model}", "model.weights=null", f"model.input_size={size}", f"batch_size={batch}",
    ]  # fmt: skip


def training(place: Place) -> Iterator[Row]:
    """Rows 1 and 2: next to the limit and to a plain loop."""
    root, model, batch = place.small(), "resnet18", place.size.batch
    for size in place.size.pixels:
        found, best = place.against_best(
            {
                "limit": place.limit(model, size, batch),
                "limit as ours": place.limit(model, size, batch, as_ours=True),
                "ours": place.ours(*folder_of(root, model, size, batch)),
            },
            place.loops(root, model, size, batch),
        )
        ours, work = rates("ours", found["ours"]), f"training, {model} {size} px, JPEGs, CPU"
        yield Row(
            work, "the limit", Goal("≥", 0.97, "x"), ratios(found["ours"], found["limit"]),
            f"images/s: {ours}, {rates('limit', found['limit'])}",
        )  # fmt: skip
        yield Row(
            work, "the limit with our memory and its order, threads and optimizer",
            Goal("≥", 0.97, "x"), ratios(found["ours"], found["limit as ours"]),
            f"images/s: {ours}, {rates('that limit', found['limit as ours'])}",
        )  # fmt: skip
        yield Row(
            work, "plain loop, best of 0, 1, 2 workers", Goal("≥", 1.08, "x"),
            ratios(found["ours"], found[best]),
            f"images/s: {ours}, {rates(f'loop with {best}', found[best])}",
        )  # fmt: skip


def busy(place: Place) -> Iterator[Row]:
    """Row 3: with another process that computes on two threads."""
    root, model, size, batch = place.small(), "resnet18", 64, place.size.batch
    loop = place.loops(root, model, size, batch)["2 workers"]
    with another_process(place):
        found = place.in_turns(
            {"ours": place.ours(*folder_of(root, model, size, batch)), "loop": loop}
        )
    yield Row(
        f"the same at {size} px, another process busy", "plain loop, its default of 2 workers",
        Goal("≥", 3, "x"), ratios(found["ours"], found["loop"]),
        f"images/s: {rates('ours', found['ours'])}, {rates('loop', found['loop'])}; the other "
        "multiplies matrices on 2 threads",
    )  # fmt: skip


@contextmanager
def another_process(place: Place) -> Iterator[None]:
    """One that computes on two threads, while this lasts."""
    words = [sys.executable, "tests/bench_plain.py", "spin", json.dumps({"threads": 2})]
    process = subprocess.Popen(words, cwd=ROOT, env=place.environment())
    try:
        yield
        if process.poll() is not None:
            raise RuntimeError("the process that should be busy ended")
    finally:
        process.kill()
        process.wait()


def photos(place: Place) -> Iterator[Row]:
    """Row 4: where decoding is a part of the work."""
    root, model, size, batch = place.large(), "mobilenet_v3_small", 224, place.size.large_batch
    overrides = folder_of(root, model, size, batch)
    found, best = place.against_best(
        {
            "ours": place.ours(*overrides),
            "decoding": place.ours(*overrides, "data.cache=none"),
        },
        place.loops(root, model, size, batch),
    )
    for name, how in (
        ("ours", ", once decoded: data.cache=auto does so before the first step"),
        ("decoding", ", with data.cache=none"),
    ):
        yield Row(
            f"training, {model} {size} px, JPEGs of 500 × 375, CPU{how}",
            "plain loop, best of 0, 1, 2 workers", Goal("≥", 1.15, "x"),
            ratios(found[name], found[best]),
            f"images/s: {rates('ours', found[name])}, {rates(f'loop with {best}', found[best])}",
        )  # fmt: skip


def probe(place: Place) -> Iterator[Row]:
    """Row 5: a linear probe, cold and again."""
    root, model, size, epochs = place.small(), "resnet18", 64, 20
    weights = place.folder / "resnet18.pt"
    place.call("bench_plain", "weights", path=str(weights), model=model)
    timed = 2 if place.size.rounds > 1 else 1
    overrides = [
        "recipe=textbook", "strategy=linear_probe", "augment=none", f"epochs={epochs}",
        "data=image_folder", f"data.root={root}", f"model={model}", f"model.weights={weights}",
        f"model.input_size={size}", f"batch_size={place.size.batch}",
    ]  # fmt: skip
    cold, warm, apart = [], [], []
    for _ in range(max(1, place.size.rounds - 1)):
        plain = place.call(
            "bench_plain", "probe", root=str(root), model=model, weights=str(weights), size=size,
            batch=place.size.batch, epochs=epochs, timed=timed, seeds=place.size.seeds,
        )  # fmt: skip
        tell("plain loop", plain["seconds"], "s")
        cache = place.new("cache")
        first = place.clocked(*overrides, cache=cache)
        cold.append(plain["seconds"] / tell("ours, cold", first["seconds"], "s"))
        runs = [
            place.clocked(*overrides, f"seed={seed}", cache=cache)
            for seed in range(place.size.seeds)
        ]
        warm += [plain["seconds"] / tell("ours, again", run["seconds"], "s") for run in runs]
        ours = statistics.mean(run["accuracy"] for run in runs)
        theirs = statistics.mean(plain["accuracies"])
        apart.append(100 * abs(ours - theirs))
    work = f"linear probe, {epochs} epochs, {model} {size} px, {place.size.images:,} images"
    loop = "plain loop with a frozen backbone"
    told = (
        f"start-up left out; loop: {timed} epochs measured, {shown(plain['seconds'], 's')} for all"
    )
    yield Row(f"{work}, augment=none, cold cache", loop, Goal("≥", 15, "x"), cold, told)
    yield Row("the same, a second run", loop, Goal("≥", 100, "x"), warm, "start-up left out")
    yield Row(
        "the same, accuracy on val", "that loop's, same weights", Goal("≤", 2, "points"),
        apart, f"means of {len(runs)} heads: {100 * ours:.1f} and {100 * theirs:.1f} %",
    )  # fmt: skip


def prefix(place: Place) -> Iterator[Row]:
    """Row 6: the first layers frozen, with and without what is kept of them."""
    root, model, size, batch = place.small(), "resnet18", 64, place.size.batch
    for layers in place.size.frozen:
        frozen = place.call(
            "bench_plain", "frozen", model=model, size=size, batch=batch, classes=CLASSES,
            layers=layers, seconds=place.size.seconds,
        )["share"]  # fmt: skip
        overrides = [
            *folder_of(root, model, size, batch, augment="none"),
            f"freeze_until={layers}", "data.fraction=0.2",
        ]  # fmt: skip
        found = place.in_turns(
            {
                "kept": place.ours(*overrides),
                "not kept": place.ours(*overrides, "features.cache=none"),
            }
        )
        faster = ratios(found["kept"], found["not kept"])
        yield Row(
            f"freeze_until={layers}, {model} {size} px, augment=none",
            "features.cache=none, as far as the frozen share allows", Goal("≥", 0.9, "x"),
            [(1 - frozen) * ratio for ratio in faster],
            f"{frozen:.0%} of a step is frozen: at most {shown(1 / (1 - frozen), 'x')} times "
            f"faster, found {shown(statistics.median(faster), 'x')}; the epoch that computes it "
            "left out",
        )  # fmt: skip


def commands(place: Place) -> Iterator[Row]:
    """Row 7: what needs no torch."""
    for work, code, words in (
        ("`python train.py --help`", 0, ("--help",)),
        ("a typo's error, `optimiser.lr=1`", 1, ("optimiser.lr=1",)),
    ):
        values = []
        for _ in range(place.size.starts):
            began = time.perf_counter()
            place.run("train.py", *words, code=code)
            values.append(tell(work, time.perf_counter() - began, "s"))
        yield Row(work, "–", Goal("≤", 1, "s"), values, f"{len(values)} starts")


def first_step(place: Place) -> Iterator[Row]:
    """Row 8: until the embedded default trains."""
    found = place.starts("data=digits")
    yield Row(
        "process start to first step, digits", "import of torch, torchvision, lightning",
        Goal("≤", 1.5, "s"), differences(found["first step"], found["imports"]), starting(found),
    )  # fmt: skip


def starting(found: Mapping[str, Sequence[float]]) -> str:
    """How long both take."""
    seconds = (f"{name} {shown(statistics.median(values), 's')}" for name, values in found.items())
    return f"{', '.join(seconds)}; in turns of a quarter of a second"


def validation(place: Place) -> Iterator[Row]:
    """Row 9: what validation takes beside the forward pass."""
    overrides = [*folder_of(place.small(), "resnet18", 64, place.size.batch), "epochs=1"]
    values, files = [], []
    for _ in range(max(1, place.size.rounds - 1)):
        run = place.clocked(*overrides)
        beyond, whole = run["validation"] - run["forward"], sum(run["epochs"])
        values.append(tell("beyond", 100 * beyond / whole, "%"))
        files.append(100 * run["best"] / whole)
    yield Row(
        "validation and metrics, resnet18 64 px, val a tenth of train",
        "share of an epoch's time beyond the forward pass", Goal("≤", 2, "%"), values,
        f"reading val's images included; best.ckpt takes {statistics.median(files):.1f} % more",
    )  # fmt: skip


def extras(place: Place) -> Iterator[Row]:
    """Row 10: all that watches over a run."""
    steps, batch = place.size.watched, place.size.batch
    overrides = folder_of(place.small(), "resnet18", 32, batch)
    watched = [*overrides, f"checkpoint.every_n_steps={steps}"]
    on, off = [], []
    # anew: two that do the same are 2 % apart or more; and by turns the first, which is faster
    for number in range(2 * place.size.rounds):
        sides = {
            "all of them": place.ours(*watched, terminal=True),
            "none of them": place.bare(*overrides),
        }
        if number % 2:
            sides = dict(reversed(sides.items()))
        found = place.in_turns(sides, steps * batch, rounds=1)
        on += found["all of them"]
        off += found["none of them"]
    yield Row(
        "TensorBoard, progress bar, guards, a checkpoint every 200 steps", "all of them off",
        Goal("≤", 2, "%"), [100 * (ratio - 1) for ratio in ratios(off, on)],
        f"resnet18 32 px, rounds of {steps} steps; images/s: {rates('on', on)}, "
        f"{rates('off', off)}",
    )  # fmt: skip


def files(place: Place) -> Iterator[Row]:
    """Row 11: a folder of a million files."""
    num, root = place.size.files, place.many(place.size.files)
    arguments = ["data=image_folder", f"data.root={root}"]
    cold = place.call("bench_ours", "index", arguments=arguments)
    tell("first look", cold["seconds"], "s")
    values = []
    for _ in range(2):
        warm = place.call("bench_ours", "index", arguments=arguments)
        values.append(tell("memory per file", warm["held"] / warm["files"], "bytes"))
    work = f"lazily read folder of {num:,} files"
    yield Row(
        f"{work}: memory", "per file", Goal("≤", 200, "bytes"), values,
        f"at most {shown(warm['peak'] / warm['files'], 'bytes')} meanwhile",
    )  # fmt: skip
    training = [*arguments, "model=tiny", "model.weights=null", "max_steps=1", "num_workers=0"]
    training += ["+trainer.limit_val_batches=1", "recipe=textbook"]
    found = place.starts(*training)
    yield Row(
        f"{work}: second start", "first step above the imports", Goal("≤", 5, "s"),
        differences(found["first step"], found["imports"]),
        f"{starting(found)}; the first start reads all images: {shown(cold['seconds'], 's')}",
    )  # fmt: skip


def epochs(place: Place) -> Iterator[Row]:
    """Row 12: from a thousand to a hundred thousand images."""
    sizes = place.size.epoch_sizes
    root = place.many(sizes[-1])
    overrides = [*folder_of(root, "tiny", 8, place.size.batch), "num_workers=0"]
    # each reads as many images as the largest has, so that what an epoch takes once is in all rates
    found = place.in_turns(
        {
            f"{size:,} images": place.ours(*overrides, f"data.fraction={size / sizes[-1]}")
            for size in sizes
        },
        images=sizes[-1], rounds=1,
    )  # fmt: skip
    seconds = [size / rate for size, (rate,) in zip(sizes, found.values(), strict=True)]
    each = slopes(sizes, seconds)
    slope, constant = line_through(sizes, seconds)
    work = f"time per epoch, {sizes[0]:,} to {sizes[-1]:,} images"
    told = ", ".join(shown(1e6 * value, "x") for value in each)
    yield Row(
        work, "slopes between sizes: largest less least, of the fit's", Goal("≤", 5, "%"),
        [100 * (max(each) - min(each)) / slope],
        f"files of 32 × 32, model=tiny; µs per image more: {told}; validations are hundreds of "
        "epochs apart",
    )  # fmt: skip
    yield Row(
        work, "constant of a linear fit", Goal("≤", 2, "s"), [abs(constant)],
        f"{shown(1e6 * slope, 'x')} µs per image",
    )  # fmt: skip


@dataclass(frozen=True)
class GpuCase:
    """What is held against a batch that is on the device. goal: a ratio."""

    work: str
    goal: float
    overrides: Callable[[], Sequence[str]]

    def row(self, values: Sequence[float], note: str) -> Row:
        """Of the table."""
        against = "a batch that is on the device"
        return Row(f"GPU: {self.work}", against, Goal("≥", self.goal, "x"), values, note)


def gpu(place: Place) -> Iterator[Row]:
    """Rows 13 and 14: the same next to a batch that is on the device, compiled alike."""
    place = place.for_gpu()
    name = place.call("bench_plain", "device")["gpu"]
    graphs = "compile=reduce-overhead"
    fast = ("trainer.precision=bf16-mixed", graphs)
    small = ("data=fake", "data.num_images=51200", "data.image_size=32")
    compiled = {"bf16": True, "compiled": "reduce-overhead"}
    groups: list[tuple[tuple[str, int, int], dict[str, Any], list[GpuCase]]] = [
        (
            ("resnet50", 224, 128), compiled,
            [
                GpuCase(
                    "resnet50 224 px bf16, channels_last, CUDA graphs, from memory", 0.95,
                    lambda: ("data=fake", "data.num_images=12800", "data.image_size=256", *fast),
                ),
                GpuCase(
                    "the same, JPEGs of 500 × 375", 0.9,
                    lambda: ("data=image_folder", f"data.root={place.large_many()}", *fast),
                ),
            ],
        ),
        (
            ("resnet18", 224, 512), compiled,
            [
                GpuCase(
                    "resnet18 224 px bf16, channels_last, CUDA graphs, 30,720 images of 32 px",
                    0.95, lambda: (*small, *fast),
                )
            ],
        ),
        (
            ("resnet18", 32, 512), {},
            [
                GpuCase(
                    "resnet18 32 px, not compiled: a step takes as long to ask for", 0.95,
                    lambda: (*small, "model.input_size=32"),
                )
            ],
        ),
    ]  # fmt: skip
    for (model, size, batch), more, cases in groups:
        if name is None:
            yield from (case.row([], "no GPU here") for case in cases)
            continue
        more |= {"channels_last": True, "fused": True}
        sides = {"limit": place.limit(model, size, batch, **more)}
        common = (*EVERYTHING, "augment=light", f"model={model}", "model.weights=null")
        for case in cases:
            sides[case.work] = place.ours(*common, f"batch_size={batch}", *case.overrides())
        found = place.in_turns(sides)
        for case in cases:
            values = found[case.work]
            yield case.row(
                ratios(values, found["limit"]),
                f"{name}, {place.cores} cores; batches of {batch}; images/s: "
                f"{rates('ours', values)}, {rates('limit', found['limit'])}",
            )


ROWS: dict[str, Callable[[Place], Iterator[Row]]] = {
    "training": training,
    "busy": busy,
    "photos": photos,
    "probe": probe,
    "prefix": prefix,
    "commands": commands,
    "first_step": first_step,
    "validation": validation,
    "extras": extras,
    "files": files,
    "epochs": epochs,
    "gpu": gpu,
}


def measured(name: str, place: Place) -> Iterator[Row]:
    """The rows of a section; one that says so, if it fails on the way."""
    try:
        yield from ROWS[name](place)
    except Exception as error:
        traceback.print_exc()
        why = f"{type(error).__name__}, see what was printed"
        yield Row(name, "–", Goal("≥", math.nan, "x"), [], why, failed=True)


def facts_of(place: Place, command: str, minutes: float, load: float) -> dict[str, str]:
    """Machine, versions, date and command."""
    memory = total_memory()
    packages = ("torch", "torchvision", "lightning", "pillow")
    return {
        "command": f"`{command}`, {minutes:.0f} minutes",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{processor()}, {place.cores} cores, {(memory or 0) / 2**30:.0f} GiB; load "
        f"before: {load:.1f}",
        "versions": ", ".join(
            [f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in packages)]
        ),
        "commit": commit(),
        "images": "CIFAR-10's at 32 × 32, drawn ones else" if place.archive() else "drawn",
    }


def processor() -> str:
    """Its name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """Of this checkout, and whether it was changed since."""
    words = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "no git"


def main() -> None:
    """Measure, print the table, and write it if it is whole."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all")
    parser.add_argument("--quick", action="store_true", help="see that it works; no figures")
    parser.add_argument("--out", type=Path, help="write the table there")
    asked = parser.parse_args()
    if unknown := [name for name in asked.rows if name not in ROWS]:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    whole = not asked.rows and not asked.quick
    out = asked.out or (FILE if whole else None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was made is removed
    began, load, rows = time.monotonic(), os.getloadavg()[0], []
    console, table = Console(width=160), Table(*HEADER)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        place = Place(Path(folder), QUICK if asked.quick else Size())
        for name in asked.rows or ROWS:
            print(name, flush=True)
            for row in measured(name, place):
                rows.append(row)
                work, against, goal, found, spread, verdict, note = row.cells()
                print(f"  {work}, {against}: {found} ({spread}), goal {goal}: {verdict}; {note}")
                table.add_row(*row.cells())
    console.print(table)
    if out and not any(row.failed for row in rows):
        minutes = (time.monotonic() - began) / 60
        command = " ".join(["make bench", *([f'ARGS="{" ".join(sys.argv[1:])}"'] * (not whole))])
        out.write_text(markdown(rows, facts_of(place, command, minutes, load)), encoding="utf-8")
        print(f"written: {out}")
    sys.exit(1 if any(row.failed for row in rows) else 0)


if __name__ == "__main__":
    main()

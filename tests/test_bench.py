"""What make bench computes from its figures, and a round of its cheapest rows."""

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from io import BytesIO
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from finetune.check import check_all
from finetune.overrides import CONF, compose_jobs

pytest.importorskip("pty")  # not on Windows, as make

import bench
import bench_images
from bench import Goal, Row
from bench_turns import Training, start_by_turns, take_turns


def row(*values, sign="≥", bound=2.0, unit="x", **more):
    return Row("work", "that", Goal(sign, bound, unit), values, "so", **more)


@pytest.mark.parametrize(
    ("sign", "value", "verdict"),
    [("≥", 1.99, "missed"), ("≥", 2.0, "met"), ("≤", 2.0, "met"), ("≤", 2.01, "missed")],
)
def test_the_median_is_held_against_the_goal(sign, value, verdict):
    assert row(0.0, value, 9.0, sign=sign).verdict == verdict


def test_a_row_that_was_not_measured_claims_nothing():
    assert row().verdict == "skipped"
    assert row(failed=True).verdict == "failed"
    assert row().cells()[3:6] == ["–", "–", "skipped"]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.9712, "x", "0.97"),
        (15.25, "x", "15.2"),
        (1234.5, "x", "1,234"),
        (2.0, "%", "2 %"),
        (0.854, "s", "0.85 s"),
        (1830.4, "bytes", "1,830 bytes"),
    ],
)
def test_figures_show_what_they_are_worth(value, unit, text):
    assert bench.shown(value, unit) == text


def test_ratios_are_taken_within_a_round():
    # twice as fast in each round, whatever else the machine did meanwhile
    assert bench.ratios([200.0, 20.0, 60.0], [100.0, 10.0, 30.0]) == [2.0, 2.0, 2.0]
    with pytest.raises(ValueError, match="zip"):
        bench.ratios([1.0], [])


STEPS = """
import sys, time
sys.path.insert(0, "tests")
from bench_turns import tell_step
while True:
    until = time.process_time() + {seconds}
    while time.process_time() < until:
        pass
    tell_step({images})
"""


def trains(place, **step):
    return lambda: Training(
        [sys.executable, "-c", STEPS.format(**step)], CONF.parent, os.environ, place / "said"
    )


def test_trainings_take_turns_and_the_rate_is_that_of_the_turns(tmp_path):
    sides = {
        "ours": trains(tmp_path, seconds=0.01, images=8),
        "loop": trains(tmp_path, seconds=0.02, images=4),
    }
    with bench.begun(sides) as trainings:
        bench.warm_up(trainings)
        found = take_turns(trainings, rounds=2, seconds=0.2, turn=0.05)
        processes = [training.process for training in trainings.values()]
    assert all(2.5 < ratio < 6 for ratio in bench.ratios(found["ours"], found["loop"]))
    assert len(found["ours"]) == 2
    assert 100 < found["loop"][0] < 200  # not half of it: the other's turns do not count
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2


def test_a_training_stands_still_between_its_turns(tmp_path):
    with bench.begun({"ours": trains(tmp_path, seconds=0.001, images=1)}) as trainings:
        trainings["ours"].turn(0.1)
        time.sleep(0.5)
        assert trainings["ours"].turn(0.0)[0] < 20


def test_a_training_that_ends_is_told_with_what_it_said(tmp_path):
    words = [sys.executable, "-c", "print('no such folder')"]
    side = partial(Training, words, tmp_path, os.environ, tmp_path / "said")
    with (
        bench.begun({"ours": side}) as trainings,
        pytest.raises(RuntimeError, match="it ended: no such folder"),
    ):
        bench.warm_up(trainings)


def test_a_training_may_have_a_terminal(tmp_path):
    words = [sys.executable, "-c", "import sys; print('seen' if sys.stdout.isatty() else 'blind')"]
    side = partial(Training, words, tmp_path, os.environ, tmp_path / "said", terminal=True)
    with (
        bench.begun({"ours": side}) as trainings,
        pytest.raises(RuntimeError, match="it ended: seen"),
    ):
        bench.warm_up(trainings)


def test_starts_take_turns_and_each_is_as_long_as_it_is_alone(tmp_path):
    sides = {
        "imports": trains(tmp_path, seconds=0.3, images=1),
        "ours": trains(tmp_path, seconds=0.9, images=1),
    }
    with bench.begun(sides) as trainings:
        found = start_by_turns(trainings, turn=0.05)
    assert 0.3 < found["imports"] < 0.9 < found["ours"] < 1.5


def test_the_best_other_is_that_of_the_first_round(tmp_path, monkeypatch):
    rates = {"ours": iter([5, 5, 5]), "0 workers": iter([2, 1, 3]), "2 workers": iter([1])}
    ended = []

    def rounds(self, trainings, rounds, images=0):
        return {name: [next(rates[name]) for _ in range(rounds)] for name in trainings}

    def side(name):
        return lambda: SimpleNamespace(end=lambda: ended.append(name), warm_up=lambda: None)

    monkeypatch.setattr(bench.Place, "_rates", rounds)
    place = bench.Place(tmp_path, replace(bench.QUICK, rounds=3))
    others = {name: side(name) for name in ("0 workers", "2 workers")}
    found, best = place.against_best({"ours": side("ours")}, others)
    assert best == "0 workers"
    assert found == {"ours": [5, 5, 5], "0 workers": [2, 1, 3]}
    assert ended == ["2 workers", "ours", "0 workers"]


def test_the_time_per_epoch_is_split_into_slope_and_constant():
    sizes = [1000, 20_000, 100_000]
    seconds = [0.5 + 2e-4 * size for size in sizes]
    assert bench.line_through(sizes, seconds) == pytest.approx((2e-4, 0.5))
    assert bench.slopes(sizes, seconds) == pytest.approx([2e-4, 2e-4])


def test_the_file_holds_every_row_and_where_it_was_measured():
    rows = [row(1.5, 2.5, 4.0), row()]
    text = bench.markdown(rows, {"machine": "a fast one"})
    assert "- machine: a fast one" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.count("|") for line in lines] == [len(bench.HEADER) + 1] * 4
    assert "| ≥ 2 | 2.5 | 1.5 to 4 | met | so |" in lines[2]


def test_drawn_photos_are_as_large_as_real_ones():
    image = bench_images.noise_image(np.random.default_rng(0), (500, 375), label=3)
    content = bench_images.jpeg(image)
    assert 60_000 < len(content) < 100_000
    assert Image.open(BytesIO(content)).size == (500, 375)


def test_small_files_are_many_and_all_of_them_differ(tmp_path):
    bench_images.write_files(tmp_path, {"train": 40, "val": 20})
    found = [path.read_bytes() for path in tmp_path.rglob("*.jpg")]
    assert len(set(found)) == 60


def test_an_unknown_row_is_refused_with_those_that_there_are():
    done = subprocess.run(
        [sys.executable, "tests/bench.py", "speed"],
        cwd=CONF.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no row speed; there are training, busy" in done.stderr


class Paper(bench.Place):
    """Measures nothing, and keeps what it would have run."""

    asked: ClassVar[list] = []
    figures: ClassVar[dict] = {
        "seconds": 9.0, "accuracy": 0.5, "accuracies": [0.5],
        "share": 0.3, "held": 1e6,
        "peak": 1e6, "files": 1000, "gpu": "one", "epochs": [1.0, 1.0], "validation": 0.1,
        "forward": 0.1, "best": 0.1,
    }  # fmt: skip

    def run(self, *words, **options):
        return "8.0"

    def call(self, script, name, cache=None, **arguments):
        self.asked.append(arguments.get("arguments", []))
        return self.figures

    def side(self, script, name, arguments, terminal=False, more=None):
        self.asked.append(arguments.get("arguments", []))
        return self.process([])

    def process(self, words, terminal=False, more=None):
        return lambda: SimpleNamespace(end=lambda: None, warm_up=lambda: None)

    def _rates(self, trainings, rounds, images=0):
        return {name: [100.0] * rounds for name in trainings}

    def clocked(self, *overrides, cache=None):
        self.asked.append([*overrides])
        return self.figures


@pytest.mark.slow
def test_every_row_asks_for_runs_that_can_be_made(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "another_process", nullcontext)
    monkeypatch.setattr(bench, "line_through", lambda xs, ys: (1.0, 1.0))
    monkeypatch.setattr(bench, "start_by_turns", lambda sides, turn: dict.fromkeys(sides, 1.0))
    size = replace(bench.QUICK, rounds=2, images=60, large_images=10, files=20)
    (tmp_path / "resnet18.pt").touch()  # the weights of the probe
    place = Paper(tmp_path, replace(size, pixels=(64, 32), epoch_sizes=(20, 40)))
    for name in bench.ROWS:
        assert all(row.verdict in ("met", "missed") for row in bench.ROWS[name](place)), name
    asked = {tuple(words) for words in place.asked if words}
    assert len(asked) > 15
    check_all([job for words in asked for job in compose_jobs("train", words)])


@pytest.mark.slow
def test_the_cheapest_rows_can_be_measured(tmp_path):
    out = tmp_path / "benchmark.md"
    done = subprocess.run(
        [sys.executable, "tests/bench.py", "commands", "gpu", "--quick", "--out", out],
        cwd=CONF.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in out.read_text().splitlines()[-6:]]
    assert [cells[0].split(",")[0] for cells in rows] == [
        "| `python train.py --help`", "| a typo's error",
        "| GPU: resnet50 224 px bf16", "| GPU: the same", "| GPU: resnet18 224 px bf16",
        "| GPU: resnet18 32 px",
    ]  # fmt: skip
    assert all(cells[5] in ("met", "missed", "skipped") for cells in rows)


@pytest.mark.slow
def test_both_sides_of_a_row_tell_of_their_steps(tmp_path):
    root = tmp_path / "images"
    bench_images.write_images(root, {"train": 40, "val": 20}, (32, 32))
    place = bench.Place(tmp_path, replace(bench.QUICK, seconds=0.2, turn=0.1, workers=(0, 2)))
    ours = bench.folder_of(root, "resnet18", 32, 8)
    found, best = place.against_best(
        {
            "limit": place.limit("resnet18", 32, 8),
            "ours": place.ours(*ours, terminal=True),
            "bare": place.bare(*ours),
        },
        place.loops(root, "resnet18", 32, 8),
    )
    assert set(found) == {"limit", "ours", "bare", best}
    assert all(rate > 0 for rates in found.values() for rate in rates)

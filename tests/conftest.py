"""What several tests need: a run in this process, and a command line in this process."""

import atexit
import csv
import importlib
import io
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image

from finetune import cli, resolve, signals
from finetune.overrides import CONF

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: its threads spin where cores are few

# what tests compute is found by other tests of this session, and by nobody else
os.environ["FINETUNE_CACHE"] = tempfile.mkdtemp(prefix="finetune-")
atexit.register(shutil.rmtree, os.environ["FINETUNE_CACHE"], ignore_errors=True)


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs but from the tests that need one, -m gpu: the others expect what a CPU gives."""
    chosen = config.getoption("markexpr")
    if "gpu" not in chosen or "not gpu" in chosen:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


# 18 training images, 6 of val and 6 of test, at 8 x 8: a step takes milliseconds
SMALL = (
    "data=fake",
    "data.num_classes=3",
    "data.num_images=30",
    "data.image_size=8",
    "model=tiny",
    "model.weights=null",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "augment.scale=[0.5,1.0]",
    "batch_size=4",
    "epochs=2",
    "recipe=none",
    "checkpoint.every_n_steps=200",  # and at each validation: not as the clock wants it
)


def composed(*overrides: str, command: str = "train") -> DictConfig:
    """The config that a command gets from conf/."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(command, list(overrides))


def plain(*overrides: str) -> DictConfig:
    """The same for training, with plain values where a recipe would choose."""
    cfg = composed(*overrides)
    resolve.fill_plainly(cfg)
    return cfg


def metrics_of(run: Path) -> list[tuple[int, str, float]]:
    """The rows of metrics.csv."""
    with (run / "metrics.csv").open(newline="") as file:
        return [(int(r["step"]), r["metric"], float(r["value"])) for r in csv.DictReader(file)]


def series(run: Path, metric: str) -> list[float]:
    """The values of one metric, in the order of the file."""
    return [value for _, name, value in metrics_of(run) if name == metric]


def facts_of(run: Path) -> dict[str, Any]:
    """run.json."""
    return json.loads((run / "run.json").read_text())


def write_photos(root: Path, **counts: int) -> Path:
    """root/<split>/<class>/<i>.png for 3 classes: noise around a colour of the class.

    counts: images per class by split; train=6, val=3, test=3 if none are given.
    """
    generator = np.random.default_rng(0)
    for split, count in (counts or {"train": 6, "val": 3, "test": 3}).items():
        for label, name in enumerate(("ant", "bee", "cat")):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = generator.integers(0, 80, (12, 10, 3), np.uint8)
                pixels[..., label] += 150
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@dataclass
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str


@contextmanager
def logging_kept() -> Iterator[None]:
    """Commands configure logging; put it back after, and close train.log."""
    root, lightning = logging.getLogger(), logging.getLogger("lightning.pytorch")
    handlers, levels = root.handlers[:], (root.level, lightning.level)
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    lightning.setLevel(levels[1])


@pytest.fixture(autouse=True)
def logging_as_before():
    """What one test's command did to logging is not seen by the next."""
    with logging_kept():
        yield


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """command("train", "data=fake", ...): the real entry point, in this process and tmp_path."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str) -> Done:
        module = importlib.import_module(f"finetune.{name}")
        program = "train.py" if name == "train" else f"finetune.{name}"
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        monkeypatch.setattr(cli, "jobs_done", [])
        monkeypatch.setattr(cli, "sweep", None)
        monkeypatch.setattr(cli, "collect_later", lambda: None)  # its garbage is no start's
        monkeypatch.setattr(signals, "exit_now", sys.exit)  # the tests' own process stays
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            module.main()
        said = capsys.readouterr()
        return Done(int(stop.value.code or 0), said.out, said.err)

    return run


def finish(folder: Path, *arguments: str) -> Path:
    """Train to the end by train.py's entry point, without the fixtures of one test."""
    silent = redirect_stdout(io.StringIO())
    with logging_kept(), pytest.MonkeyPatch.context() as patch, silent:
        patch.setattr(sys, "argv", ["train.py", *arguments, f"hydra.run.dir={folder}"])
        patch.setattr(cli, "jobs_done", [])
        patch.setattr(cli, "collect_later", lambda: None)
        with pytest.raises(SystemExit) as stop:
            importlib.import_module("finetune.train").main()
    assert not stop.value.code
    return folder


@pytest.fixture
def at_step(monkeypatch):
    """at_step(7, action): call action once, in the middle of this step."""

    from finetune.callbacks.checkpoints import StepCheckpoints

    def arrange(step, action):
        done = []

        def on_before_optimizer_step(self, trainer, task, optimizer):
            if trainer.global_step == step and not done:
                done.append(step)
                action()

        monkeypatch.setattr(
            StepCheckpoints, "on_before_optimizer_step", on_before_optimizer_step, raising=False
        )

    return arrange


def lose():
    """For at_step: the run ends as in a crash."""
    raise RuntimeError("the power is gone")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run on a folder of photos, in the folder photos beside it; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    root = write_photos(folder / "photos")
    arguments = [o for o in SMALL if not o.startswith(("data", "epochs"))]
    arguments += ["data=image_folder", f"data.root={root}", "epochs=3", "logger=csv"]
    return finish(folder / "run", *arguments, "data.cache=ram")


@pytest.fixture
def train(tmp_path):
    """train("epochs=1", ...): a small real run, composed from conf/; returns its directory."""
    from finetune.fit import fit

    def run(*overrides: str, name: str = "run") -> Path:
        folder = tmp_path / name
        fit(composed(*SMALL, "logger=csv", *overrides), folder, list(overrides), "as asked for")
        return folder

    return run


def same(a: Any, b: Any) -> bool:
    """Equal in all of a nested structure, tensors bit for bit."""
    import torch  # late: not every test needs it

    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_end(run: Path, uninterrupted: Path) -> None:
    """Weights, momentum, counters, curves and results: all that a run leaves, but the clock."""
    from finetune import checkpoint

    best, expected = (
        checkpoint.load(run / "checkpoints/best.ckpt"),
        checkpoint.load(uninterrupted / "checkpoints/best.ckpt"),
    )
    assert same(best, expected)
    ours, theirs = checkpoint.step_paths(run)[0], checkpoint.step_paths(uninterrupted)[0]
    assert ours.name == theirs.name
    last, expected = checkpoint.load(ours), checkpoint.load(theirs)
    for key in ("state_dict", "optimizer_states", "global_step", "epoch"):
        assert same(last[key], expected[key]), key
    assert same(last["callbacks"].get("EMA"), expected["callbacks"].get("EMA"))
    rows, theirs = (
        sorted(row for row in metrics_of(folder) if not row[1].startswith("time/"))
        for folder in (run, uninterrupted)
    )
    assert rows == theirs
    mine, other = facts_of(run), facts_of(uninterrupted)
    for key in ("status", "best", "val", "test", "data", "model", "per_class_accuracy"):
        assert mine[key] == other[key], key
    assert mine["status"] == "finished"


def layer_of(task: Any, name: str) -> int:
    """Layer of an entry of the state dict: head, or where the backbone's modules say."""
    for layer, modules in enumerate(task.model.layers):
        if any(name.startswith(f"backbone.net.{module}.") for module in modules):
            return layer
    assert name.startswith("head.")
    return task.model.depth

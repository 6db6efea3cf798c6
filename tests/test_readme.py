"""Everything that the README tells to type works as it is written there; only downloads are faked.

Commands, options and paths are read from the README itself. What is new there is run as well, or
fails here for being of no known kind.
"""

import functools
import inspect
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torchvision import models

from conftest import SMALL, facts_of, write_photos
from finetune import build, resolve
from finetune.callbacks.checkpoints import StepCheckpoints
from finetune.check import check_all
from finetune.overrides import CONF, compose_jobs
from finetune.strategies.full import Full
from test_data_torchvision import CASES

ROOT = CONF.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.S | re.M)
SPANS = list(dict.fromkeys(" ".join(span.split()) for span in re.findall(r"`([^`]+)`", PROSE)))
LINKS = re.findall(r"\]\(([^)]+)\)", PROSE)
RUN_FILES = [
    row.strip("| ").split(" | ", 1)
    for row in README.partition("## What is in a run directory")[2].partition("##")[0].splitlines()
    if row.startswith("| `")
]

OPTION = r"[a-z][\w.@]*=(?!True|False)[^\s,;]+"
GROUPS = [span for span in SPANS if re.fullmatch(rf"{OPTION}( {OPTION})*", span)]
KEYS = [span for span in SPANS if re.fullmatch(r"[a-z][\w.]*=", span)]
CALLS = [span for span in SPANS if re.fullmatch(r"\w+\([\w, ]*\)", span)]
PATHS = [
    span
    for span in SPANS
    if re.fullmatch(r"[^\s=]+", span)
    and ("/" in span or re.search(r"\.\w+$", span))
    and not any(span in file for file, _ in RUN_FILES)
    and "<" not in span
]


def commands():
    """Every command as its words, a comment's options each as a command more."""
    found = [shlex.split(s) for s in SPANS if " " in s and s not in GROUPS and s not in CALLS]
    for language, text in BLOCKS:
        if language == "bash":
            for line in filter(None, text.splitlines()):
                words = shlex.split(line, comments=True)
                comment = line.partition(" # ")[2]
                found += [words, *([*words, o] for o in re.findall(OPTION, comment))]
        elif language == "yaml":
            found.append(shlex.split(re.findall(r"^# .*, then: (.*)", text)[0]))
        elif language == "":  # for Windows
            for line in text.splitlines():
                program, *words = line.split()
                found.append([PureWindowsPath(program).name, *words])
    # photos stand for what the reader has
    filled = [[word.replace("=…", "=photos") for word in c if word != "…"] for c in found]
    return list({shlex.join(words): words for words in filled}.values())


COMMANDS = commands()
SWEEP = ["python", "train.py", "-m"]


def test_the_readme_was_read():
    """An empty list would pass every test below."""
    assert {language for language, _ in BLOCKS} == {"bash", "python", "yaml", ""}
    assert {words[0] for words in COMMANDS} >= {"make", "python", "pip", "tensorboard", "ls", "py"}
    assert min(len(COMMANDS) - 20, len(GROUPS) - 15, len(RUN_FILES) - 5, len(PATHS) - 8) > 0
    assert KEYS
    assert CALLS


@functools.cache
def new_weights(name):
    return models.get_model(name, weights=None).state_dict()


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """Stand-ins for downloads: weights are new, data sets are a few images in the real files."""
    owners = {
        member.url: name
        for name in models.list_models(module=models)
        for member in models.get_model_weights(name)
    }

    def timm_file(model, **_):
        import timm

        path = tmp_path / "model.safetensors"
        save_file(timm.create_model(model.partition("/")[2].partition(".")[0]).state_dict(), path)
        return str(path)

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setattr("finetune.backbones.torchvision.why_unreachable", lambda url: None)
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url",
        lambda url, **_: new_weights(owners[url]),
    )
    monkeypatch.setattr("finetune.backbones.timm.why_unreachable", lambda url: None)
    monkeypatch.setattr("finetune.backbones.timm._cached", lambda config: None)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda repo_id, **_: timm_file(repo_id))
    monkeypatch.setattr("torchvision.datasets.utils.check_md5", lambda path, md5: True)
    for name in {word for text in [*GROUPS, *map(shlex.join, COMMANDS)] for word in text.split()}:
        if (name := name.strip("'").rpartition("data=")[2]) in CASES:
            CASES[name][0](tmp_path / "datasets")
    for file in (tmp_path / "datasets" / "cifar-10-batches-py").glob("*_batch*"):
        content = pickle.loads(file.read_bytes())
        noise = np.random.default_rng(0).integers(0, 256, content["data"].shape, np.uint8)
        file.write_bytes(pickle.dumps(content | {"data": noise}))  # a network can train on it


CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

MY_PACKAGE = """
from torch import nn

class MyNet(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 9)
        )
"""


@pytest.fixture
def reader(command, downloads, trained, monkeypatch, tmp_path):
    """The folder of a reader who has all that the README speaks of, under the names it uses."""
    for file in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / file, tmp_path)
    write_photos(tmp_path / "photos")
    photos = sorted((tmp_path / "photos" / "train").rglob("*.png"))
    rows = [f"{path.relative_to(tmp_path)},{path.parent.name}" for path in photos]
    assert "path,label" in SPANS
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *rows]))
    rows = [f"{path.relative_to(tmp_path)},{path.parent.name}|cat" for path in photos]
    (tmp_path / "tags.csv").write_text("\n".join(["path,label", *rows]))
    for name in CIFAR10:
        shutil.copytree(photos[0].parent, tmp_path / "cifar10" / "train" / name)
    shutil.copytree(photos[0].parent, tmp_path / "FOLDER")
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "photo.jpg")
    shutil.copytree(trained, tmp_path / "RUN")
    (tmp_path / "my_package.py").write_text(MY_PACKAGE)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield tmp_path
    sys.modules.pop("my_package", None)


def shortened(arguments):
    """What is added to a command of train.py: one step, small images, in this process."""
    (cfg, *_) = compose_jobs("train", arguments)
    added = ["max_steps=1", "num_workers=0", "trainer.accelerator=cpu"]
    if cfg.model._target_.endswith(".torchvision"):
        added.append("model.input_size=32")
        added += ["+trainer.limit_val_batches=1", "+trainer.limit_test_batches=1"]
    if cfg.data.get("num_images"):
        added.append("data.num_images=520")  # 10 of each letter
    if (cfg.data.get("root") or "").startswith("/"):
        added.append("data.root=photos")
    return added


@pytest.fixture
def run(command, reader):
    """run(words): run a command as far as it can be without an installation."""

    def python(*words):
        if words[0] == "train.py":
            assert (ROOT / "train.py").is_file()
            name, arguments = "train", list(words[1:])
        else:
            assert words[0] == "-m"
            package, _, name = words[1].partition(".")
            assert package == "finetune"
            arguments = list(words[2:])
        resumes = any(word.startswith("resume=") for word in words)
        if resumes:
            stopped_run(command, reader / "RUN")
        elif "sweep.resume=SWEEP" in words:
            unfinished_sweep(command, reader / "SWEEP")
        elif name == "train" and "--help" not in words:
            own = ["--config-dir", "own"] if (reader / "own").exists() else []
            if "-m" in arguments:  # two values of each key tell as much as five
                arguments = [re.sub(r"^([\w.]+=[^\[,]+,[^,]+),.*", r"\1", a) for a in arguments]
            arguments = [*arguments, *shortened([*arguments, *own]), *own]
        done = command(name, *arguments)
        assert done.code == 0, done.err
        if name == "train" and "--help" not in words:
            runs = (
                [reader / "RUN"] if resumes else [p.parent for p in Path("logs").rglob("run.json")]
            )
            runs += [path.parent for path in Path("SWEEP").rglob("run.json")]
            assert {facts_of(path)["status"] for path in runs} == {"finished"}
        return done

    def make(*words):
        recipe = make_recipe(reader, *words)
        if words[0] == "train":
            assert recipe[-1].startswith(".venv/bin/python train.py")
            python(*shlex.split(recipe[-1])[1:])
        elif words[0] == "test":
            assert ".venv/bin/python -m pytest" in recipe[-1]

    def pip(*words):
        """Read what would be installed: it is this project, or in the lock."""
        install, *words = words
        assert install == "install"
        known = {"-e", "-r", "--require-hashes", "--no-deps", "--no-build-isolation"}
        for word in words:
            name, extras, version = re.fullmatch(r"([^\[=]+)(\[\w+\])?(==.*)?", word).groups()
            if name == ".":
                assert (extras or "").strip("[]") in {"", *PROJECT["optional-dependencies"]}
            elif version:
                assert f"\n{word} " in (ROOT / "requirements.lock").read_text()
            else:
                assert word in known or (ROOT / word).is_file(), word

    def uv(*words):
        assert {"uv", *words} <= {*shlex.split(" ".join(make_recipe(reader, "setup-cpu")))}

    def py(*words):
        assert words == ("-3.12", "-m", "venv", ".venv")
        assert PROJECT["requires-python"] == ">=3.11,<3.14"

    def ls(folder):
        assert list((ROOT / folder).glob("*.yaml"))

    def tensorboard(*words):
        assert command("train", *SMALL, "max_steps=1").code == 0
        done = subprocess.run(
            [sys.executable, "-m", "tensorboard.main", *words, "--inspect"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "val/accuracy" in done.stdout

    programs = {f.__name__: f for f in (python, make, pip, uv, py, ls, tensorboard)}

    def run(words):
        program, *words = words
        assert program in programs, f"test_readme.py does not know how to run {program}"
        return programs[program](*words)

    return run


def make_recipe(folder, *words, installed=True):
    """The lines that make would run."""
    (folder / ".venv").mkdir(exist_ok=True)
    if installed:
        (folder / ".venv" / "installed").touch()
    outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "ARGS")  # of a make that runs the tests
    done = subprocess.run(
        ["make", "-n", *words], cwd=folder, capture_output=True, text=True, check=True,
        env={name: value for name, value in os.environ.items() if name not in outer},
    )  # fmt: skip
    return done.stdout.splitlines()


def stopped_run(command, folder):
    """A run that a signal stopped after its second step, in place of the one in folder."""
    shutil.rmtree(folder)

    def stop(self, trainer, task, optimizer):
        if trainer.global_step == 2:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepCheckpoints, "on_before_optimizer_step", stop, raising=False)
        assert command("train", *SMALL, f"hydra.run.dir={folder.name}").code == 143


def unfinished_sweep(command, folder):
    """A sweep whose second job is missing."""
    assert command("train", "-m", *SMALL, "seed=0,1", f"hydra.sweep.dir={folder.name}").code == 0
    shutil.rmtree(folder / "1")


@pytest.mark.parametrize(
    "words",
    [
        # a sweep is several runs
        pytest.param(words, marks=[pytest.mark.slow] if words[:3] == SWEEP else [])
        for words in COMMANDS
    ],
    ids=shlex.join,
)
def test_a_command_works_as_it_is_written(words, run, reader):
    for language, text in BLOCKS:
        if language == "yaml" and shlex.join(words) in text:
            write_own(text, reader)
    run(words)
    if words[1:3] == ["-m", "finetune.predict"]:
        header = (reader / "predictions.csv").read_text().splitlines()[0]
        assert f"predictions.csv: {header}\n" in README


def write_own(text, folder):
    """The YAML in the file that its first line names, in a folder of one's own instead of conf/."""
    path = folder / "own" / re.findall(r"^# conf/(\S+\.yaml), then", text)[0]
    path.parent.mkdir(parents=True)
    path.write_text(text)


def test_a_yaml_decides_what_it_says(tmp_path):
    for text in [text for language, text in BLOCKS if language == "yaml"]:
        write_own(text, tmp_path)
        path = next((tmp_path / "own").rglob("*.yaml"))
        group = path.parent.name
        (cfg,) = compose_jobs(
            "train", [f"{group}={path.stem}", "--config-dir", str(tmp_path / "own")]
        )
        said = {k: v for k, v in yaml.safe_load(text).items() if k != "defaults"}
        assert said
        assert said.items() <= dict(cfg[group]).items()
        shutil.rmtree(tmp_path / "own")


def test_make_train_installs_once_and_then_trains(tmp_path):
    for file in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / file, tmp_path)
    first = make_recipe(tmp_path, "train", installed=False)
    assert any("pip install" in line and "requirements.lock" in line for line in first)
    assert first[-1].split() == [".venv/bin/python", "train.py"]
    assert make_recipe(tmp_path, "train") == first[-1:]
    installed = tmp_path / ".venv" / "installed"
    assert list((tmp_path / ".venv").iterdir()) == [installed]  # nothing was run
    os.utime(installed, (0, 0))  # the lock is newer than what was installed
    assert make_recipe(tmp_path, "train", installed=False) == first


@pytest.mark.parametrize("group", GROUPS)
def test_options_build_as_they_are_written(group, reader, monkeypatch):
    for place in ("torch.cuda.device_count", "finetune.check.usable_cores"):
        monkeypatch.setattr(place, lambda: 2)
    overrides = group.split()
    if group == "head=keep":
        overrides += ["model=run", "model.path=RUN"]  # of ants, bees and cats too
    if not any(word.startswith("data=") for word in overrides):
        overrides += ["data=image_folder", "data.root=photos"]  # whose model is resnet50
    if "model" not in group and group != "head=keep":
        overrides += ["model=tiny"]  # as good as another, and soon built
    if "model.weights=FILE" in overrides:
        own = "model=module" in overrides
        state = {"0.weight": torch.ones(4, 3, 3, 3)} if own else new_weights("resnet50")
        torch.save(state, "FILE")
    (cfg,) = compose_jobs("train", overrides)
    check_all([cfg])
    if cfg.data.get("name") in CASES:  # their few images leave none for val
        uncut = lambda splits, seed: replace(splits, val=splits.val or splits.train)  # noqa: E731
        monkeypatch.setattr(build, "cut_val", uncut)
    resolve.fill_plainly(cfg)
    splits = build.build_splits(cfg)
    model = build.build_model(cfg, splits.classes)
    task = build.build_task(cfg, model, build.build_budget(cfg, len(splits.train)))
    assert task.model.backbone.num_features > 0


@pytest.mark.parametrize("key", KEYS)
def test_a_key_exists(key):
    (cfg,) = compose_jobs("train", [])
    assert key.rstrip("=") in cfg


@pytest.mark.parametrize("call", CALLS)
def test_a_signature_is_as_it_is_written(call):
    name, parameters = re.fullmatch(r"(\w+)\((.*)\)", call).groups()
    assert list(inspect.signature(getattr(Full(), name)).parameters) == parameters.split(", ")


def test_python_code_runs(reader, capsys):
    (code,) = (text for language, text in BLOCKS if language == "python")
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() in ("ant", "bee", "cat")


def test_a_run_directory_holds_what_is_listed_and_nothing_else(command, tmp_path):
    assert command("train", *SMALL, "max_steps=1", "hydra.run.dir=run").code == 0
    run = tmp_path / "run"
    held = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    patterns = []
    for files, what in RUN_FILES:
        for file in re.findall(r"`([^`]+)`", files):
            patterns.append(re.sub(r"/$", "/*", file.replace("-N.", "-*.")))
            matches = [name for name in held if fnmatch(name, patterns[-1])]
            assert matches, file
            for header in re.findall(r"`(\w+(?:,\w+)+)`", what):
                assert (run / matches[0]).read_text().splitlines()[0] == header
            if "weights_only=True" in what:
                torch.load(run / matches[0], weights_only=True)
    assert [name for name in held if not any(fnmatch(name, p) for p in patterns)] == []


@pytest.mark.parametrize("path", PATHS)
def test_a_path_exists(path, reader):
    if path.startswith("conf/local/"):
        assert "/conf/local/" in (ROOT / ".gitignore").read_text().splitlines()
    else:
        assert (ROOT / path).exists() or (reader / path).exists()


@pytest.mark.parametrize("link", [link for link in LINKS if "://" not in link])
def test_a_link_leads_somewhere(link):
    assert (ROOT / link.partition("#")[0]).exists()

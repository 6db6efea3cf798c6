"""The project as a package: what it holds, what it imports when, and what no file may say."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from finetune.overrides import CONF

ROOT = CONF.parent
MODULES = sorted((ROOT / "src").rglob("*.py"))
HEAVY = {"torch", "torchvision", "lightning", "torchmetrics", "matplotlib", "numpy", "PIL"}


def tracked_files():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no git checkout")
    return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def tracked_texts():
    for path in tracked_files():
        content = path.read_bytes()
        if b"\0" not in content[:1000]:
            yield path, content.decode()


def imported(*arguments):
    """Exit code and top-level modules that a command line imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        cwd=ROOT, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )  # fmt: skip
    names = re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.M)
    return done, {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("entry", [["train.py"], ["-m", "finetune.train"]], ids=" ".join)
def test_train_needs_no_pythonpath_and_helps_without_torch(entry):
    done, modules = imported(*entry, "--help")
    assert done.returncode == 0, done.stderr
    assert "python train.py model=resnet50 data=cifar10" in done.stdout
    assert "hydra" in modules
    assert not modules & HEAVY


@pytest.mark.parametrize(
    "arguments",
    [
        ["train.py", "epoch=3"],
        ["train.py", "model=resnet51"],
        ["-m", "finetune.evaluate", "rnu=x"],
        ["-m", "finetune.predict", "inputs=x"],
    ],
    ids=" ".join,
)
def test_an_unknown_key_is_refused_without_torch(arguments):
    done, modules = imported(*arguments)
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert not modules & HEAVY


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_says_why_it_exists(path):
    said = ast.get_docstring(ast.parse(path.read_text()))
    assert said
    assert said.splitlines()[0].endswith(".")


def test_a_todo_names_what_would_settle_it():
    # TODO(what settles it): what is to be done
    mark = "TO" + "DO"
    for path, text in tracked_texts():
        for line in text.splitlines():
            assert mark not in line or re.search(rf"{mark}\([^)]{{5,}}\): \S", line), (path, line)


# paths of one machine
ABSOLUTE = re.compile(r"""(?<![\w.}:/<>|-])/(?:work|tmp|home|root|Users|mnt)/""")


def test_no_file_names_a_path_of_one_machine():
    found = [
        (path, line)
        for path, text in tracked_texts()
        for line in text.splitlines()
        if ABSOLUTE.search(line) and path != Path(__file__)
    ]
    assert found == []


def test_the_wheel_holds_conf_and_the_embedded_files_and_nothing_of_this_machine(tmp_path):
    copy = tmp_path / "copy"
    for folder in ("src", "conf"):
        shutil.copytree(ROOT / folder, copy / folder)
    for file in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / file, copy)
    (copy / "conf" / "local").mkdir(exist_ok=True)
    (copy / "conf" / "local" / "default.yaml").write_text("batch_size: 2\n")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=copy, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "site")
    sources = [p for p in (ROOT / "src").rglob("*") if p.is_file() and p.suffix != ".pyc"]
    leaves = [path for path in CONF.rglob("*.yaml") if path.parent.name != "local"]
    expected = {path.relative_to(ROOT / "src").as_posix() for path in sources}
    expected |= {f"finetune/conf/{path.relative_to(CONF).as_posix()}" for path in leaves}
    assert held == expected
    assert {Path(name).name for name in held} >= {"tiny.safetensors", "digits.npz"}

    # installed without a checkout, it finds the conf inside
    done = subprocess.run(
        [sys.executable, "-m", "finetune.train", "--help"],
        cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "cifar100" in done.stdout

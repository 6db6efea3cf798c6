"""Objects are told apart by what they were built with, and by the files of their code."""

import functools
import importlib
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from torch import nn
from torchvision.transforms import v2

from finetune.data import transforms
from finetune.origins import NoOrigin, built_with, sources
from finetune.specs import InputSpec

Pair = namedtuple("Pair", "a b")
SCRIPT = """
from finetune.data.transforms import strong
from finetune.origins import built_with
from finetune.specs import InputSpec
print(built_with(strong(InputSpec(8, 8)))[0])
"""


class Turned(nn.Module):
    """Says nothing of itself in its repr."""

    def __init__(self, quarters):
        super().__init__()
        self.quarters = quarters


@pytest.mark.parametrize(
    "make",
    [
        lambda n: Turned(n),
        lambda n: v2.Compose([v2.RandomHorizontalFlip(), Turned(n)]),
        lambda n: functools.partial(transforms.light, scale=(n / 10, 1.0)),
        lambda n: torch.full((2, 3), n, dtype=torch.bfloat16),
        lambda n: torch.zeros(n),
        lambda n: Pair("a", {"b": [n]}),
    ],
)
def test_the_same_is_the_same_and_other_values_are_not(make):
    one, again, other = (built_with(make(n))[0] for n in (1, 1, 2))
    assert one == again != other


def test_another_process_finds_the_same():
    here = built_with(transforms.strong(InputSpec(8, 8)))[0]
    words = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == here


@pytest.mark.parametrize("value", [lambda: None, v2.Lambda(lambda image: image)])
def test_what_cannot_be_told_from_others_says_so(value):
    with pytest.raises(NoOrigin):
        built_with(value)


def test_something_that_holds_itself_says_so():
    value = []
    value.append(value)
    with pytest.raises(NoOrigin):
        built_with(value)


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """theirs(base=..., turned=...): a module of somebody's, and what a file of his says by then."""
    monkeypatch.syspath_prepend(tmp_path)
    names = "their_base", "their_turned"

    def read(base="quarters = 1", turned="extra = 0"):
        (tmp_path / "their_base.py").write_text(f"class Base:\n    {base}\n")
        (tmp_path / "their_turned.py").write_text(
            "from their_base import Base\n"
            f"class Turned(Base):\n    {turned}\n"
            "def turn(image):\n    return image\n"
        )
        for name in names:
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return importlib.import_module("their_turned")

    yield read
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("change", [{"base": "quarters = 22"}, {"turned": "extra = 11"}])
@pytest.mark.parametrize(
    "use",
    [
        lambda module: module.Turned(),
        lambda module: v2.Compose([module.Turned()]),
        lambda module: [functools.partial(module.turn, 1), module.Turned],
    ],
)
def test_a_line_in_a_file_of_its_code_changes_the_sources(theirs, use, change):
    found = [sources(built_with(use(theirs(**values)))[1]) for values in ({}, {}, change)]
    assert found[0] == found[1] != found[2]


def test_packages_are_told_by_their_versions():
    assert sources([v2.Compose, nn.Linear, torch.relu, int]) == []

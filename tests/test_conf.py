"""Every YAML of conf/ composes, passes the checks and says what it is."""

from pathlib import Path

import pytest
import yaml
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from conftest import composed
from finetune.check import problems_of
from finetune.overrides import CONF

COMMANDS = sorted(path.stem for path in CONF.glob("*.yaml"))
GROUPS = ("recipe", "model", "head", "data", "task", "strategy", "augment", "optimizer",
          "schedule", "trainer", "logger", "launcher", "experiment")  # fmt: skip
LEAVES = [
    (group, path.stem)
    for group in GROUPS
    for path in sorted((CONF / group).glob("*.yaml"))
    if (group, path.stem) != ("data", "base")  # what the others inherit from
]
# what must be typed, and something to type
DUMMIES = {
    "model.name": "resnet18", "model.path": "logs/run", "model.target": "torch.nn.Linear",
    "data.root": "photos", "data.table": "labels.csv", "data.name": "cifar10",
    "run": "logs/run", "runs": ["logs/run"], "input": "photo.jpg",
}  # fmt: skip


def filled(cfg):
    for key in OmegaConf.missing_keys(cfg):
        OmegaConf.update(cfg, key, DUMMIES[key])
    return cfg


def targets_of(node):
    """Every _target_ in a config."""
    found = []
    for key in node:
        if key == "_target_" and node[key] is not None:  # null where a recipe chooses
            found.append(node[key])
        elif isinstance(node[key], DictConfig):
            found += targets_of(node[key])
    return found


def test_every_group_is_tested():
    assert {path.name for path in CONF.iterdir() if path.is_dir()} - {"hydra", "local"} == {*GROUPS}


@pytest.mark.parametrize(("group", "leaf"), LEAVES)
def test_a_leaf_composes_and_passes_the_checks(group, leaf):
    cfg = filled(composed(f"{group}={leaf}"))
    # this machine may have neither GPUs nor two cores nor wandb, and has no such run
    absent = ("trainer.", "logger=wandb needs wandb", "model.path=logs/run is no run")
    problems = [p for p in problems_of(cfg) if not p.startswith(absent)]
    assert problems == []
    for target in targets_of(cfg):
        assert callable(get_object(target))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_composes_and_passes_the_checks(command):
    assert list(problems_of(filled(composed(command=command)))) == []


@pytest.mark.parametrize(
    "path", sorted(CONF.rglob("*.yaml")), ids=lambda p: str(p.relative_to(CONF))
)
def test_a_file_opens_with_what_it_is(path):
    lines = [line for line in path.read_text().splitlines() if "@package" not in line]
    assert lines[0].startswith("# "), path
    assert len(lines[0]) > 10


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(CONF.glob("*/*.yaml")) if p.parent.name in ("model", "data")],
    ids=lambda p: str(p.relative_to(CONF)),
)
def test_a_leaf_is_short_or_is_what_others_inherit_from(path):
    content = yaml.safe_load(path.read_text())
    if "_target_" not in content and path.stem != "base":
        assert len(content) <= 4


@pytest.mark.parametrize(
    "path", sorted(CONF.rglob("*.yaml")), ids=lambda p: str(p.relative_to(CONF))
)
def test_no_file_states_a_fact_about_data(path):
    content = yaml.safe_load(path.read_text()) or {}
    made_up = path == CONF / "data" / "fake.yaml"
    facts = {"num_classes", "classes", "channels"}
    assert made_up or all(content[key] is None for key in facts & {*content})


def test_a_command_parses_in_c_and_reads_the_same(command, monkeypatch):
    monkeypatch.setattr(yaml, "SafeLoader", yaml.loader.SafeLoader)
    texts = [path.read_text() for path in CONF.rglob("*.yaml")]
    texts += ["lr: 1e-3", "a: [1_000, .5, 0o7, 2026-11-26, yes, null, ~]", "é: 'ü' # ö"]
    before = [OmegaConf.to_container(OmegaConf.create(text)) for text in texts]
    assert command("train", "--help").code == 0
    assert yaml.SafeLoader is yaml.CSafeLoader
    assert [OmegaConf.to_container(OmegaConf.create(text)) for text in texts] == before
    with pytest.raises(yaml.YAMLError, match=r"line 2, column 1"):
        OmegaConf.create("a: [1,\n}")


def test_the_package_in_a_checkout_reads_the_conf_beside_it():
    assert Path(__file__).parents[1] / "conf" == CONF

"""Files from others are data: whatever is in them, nothing of it is called."""

import dataclasses
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from conftest import SMALL, facts_of
from finetune import checkpoint
from finetune.errors import CheckpointError

MARK = "it-ran"


class Payload:
    """Makes a file in the working directory, when it is unpickled the careless way."""

    def __reduce__(self):
        return os.mkdir, (MARK,)


def nothing_ran(folder):
    return not (folder / MARK).exists()


@pytest.fixture
def taken(trained, tmp_path):
    """A copy of a finished run, as someone else may have sent it."""
    return shutil.copytree(trained, tmp_path / "taken")


def test_the_payload_works_where_nobody_looks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Payload()}, "payload.pt")
    torch.load("payload.pt", weights_only=False)
    assert not nothing_ran(tmp_path)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("evaluate", ["run=taken"]),
        ("predict", ["run=taken", "input=taken/photo.png"]),
        ("export", ["run=taken"]),
        ("soup", ["runs=[taken,taken]"]),
        ("train", [*SMALL[:5], "model=run", "model.path=taken"]),
        ("train", [*SMALL, "model.weights=taken/checkpoints/best.ckpt"]),
    ],
    ids=["evaluate", "predict", "export", "soup", "model=run", "model.weights"],
)
def test_a_payload_in_a_checkpoint_is_never_run(
    command, tmp_path, taken, monkeypatch, name, arguments, forced
):
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"state_dict": Payload()}, checkpoint.best_path(taken))
    done = command(name, *arguments)
    assert done.code == 1
    assert "could run code when it is read" in done.err
    assert "Traceback" not in done.err
    assert ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" in done.out) == forced
    assert nothing_ran(tmp_path)


def test_a_payload_in_a_step_checkpoint_is_passed_over(command, tmp_path):
    run = tmp_path / "run"
    assert command("train", *SMALL, "epochs=1", "logger=csv", "hydra.run.dir=run").code == 0
    facts = (run / "run.json").read_text()
    (run / "run.json").write_text(facts.replace('"finished"', '"failed"'))
    newest = checkpoint.step_paths(run)[0]
    torch.save({"global_step": 10**6, "state_dict": Payload()}, checkpoint.step_path(run, 10**6))
    done = command("train", "resume=run")
    assert done.code == 0
    assert "step-1000000.ckpt is passed over" in done.out
    assert f"resuming from {newest}" in done.out
    assert nothing_ran(tmp_path)


def test_a_config_beside_a_checkpoint_is_never_instantiated(command, tmp_path, taken):
    hostile = {"_target_": "os.mkdir", "path": MARK}
    groups = ("model", "data", "task", "head", "strategy", "trainer", "logger", "augment")
    (taken / ".hydra").mkdir(exist_ok=True)
    for name in ("config.yaml", "hydra.yaml"):
        (taken / ".hydra" / name).write_text(yaml.safe_dump(dict.fromkeys(groups, hostile)))
    facts = facts_of(taken)
    facts["config"] |= dict.fromkeys(groups, hostile)
    (taken / "run.json").write_text(yaml.safe_dump(facts))  # no JSON any more
    assert command("evaluate", "run=taken").code == 1
    assert nothing_ran(tmp_path)


@pytest.mark.parametrize("family", ["module", "os", "__import__", "../module"])
def test_a_checkpoint_names_no_code_to_be_called(command, tmp_path, taken, family):
    path = checkpoint.best_path(taken)
    saved = checkpoint.read(path)
    recipe = {"family": family, "target": "os.mkdir", "path": MARK}
    checkpoint.write(path, dataclasses.replace(saved, backbone=recipe))
    done = command("evaluate", "run=taken")
    assert done.code == 1
    assert "Traceback" not in done.err
    assert nothing_ran(tmp_path)


def test_a_deflated_bomb_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "bomb.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(4)}}, path)
    bomb = tmp_path / "deflated.ckpt"
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as small:
        for entry in whole.infolist():
            data = whole.read(entry)
            small.writestr(entry.filename, data if "/data/" not in entry.filename else bytes(10**8))
    assert bomb.stat().st_size < 10**6
    with pytest.raises(CheckpointError, match="compressed"):
        checkpoint.load(bomb)


def test_class_names_lead_nowhere_and_do_nothing_to_the_terminal(command, tmp_path, taken):
    names = ("../../outside", "\x1b[2J\x07red", "a\nb")
    path = checkpoint.best_path(taken)
    checkpoint.write(path, dataclasses.replace(checkpoint.read(path), classes=names))
    photo = Path(facts_of(taken)["config"]["data"]["root"], "test", "ant", "0.png")
    before = set(tmp_path.rglob("*"))
    for done in (
        command("predict", "run=taken", f"input={photo}", "output=out.csv"),
        command("evaluate", "run=taken", "output=out.json"),
        command("export", "run=taken", "output=out.safetensors"),
    ):
        assert not {"\x1b", "\x07"} & {*done.out, *done.err}
        assert "Traceback" not in done.err
    assert {p.name for p in set(tmp_path.rglob("*")) - before} <= {
        "out.csv", "out.json", "out.safetensors",
    }  # fmt: skip


def test_a_pickled_data_set_is_not_read_if_it_is_another(command, tmp_path):
    """CIFAR-10 comes as pickles: only those with the published checksums are opened."""
    folder = tmp_path / "datasets" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Payload()))
    done = command(
        "train", *(o for o in SMALL if not o.startswith("data")), "data=cifar10",
        "data.download=false", "data.root=datasets",
    )  # fmt: skip
    assert done.code == 1
    assert "Traceback" not in done.err
    assert nothing_ran(tmp_path)

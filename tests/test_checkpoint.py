"""What a checkpoint holds, and what is refused when one is read."""

import os
import pickle
from contextlib import suppress
from random import Random

import pytest
import torch

from finetune import checkpoint
from finetune.checkpoint import Checkpoint
from finetune.errors import CheckpointError
from finetune.specs import InputSpec

SAVED = Checkpoint(
    state_dict={"head.weight": torch.arange(6.0).view(2, 3)},
    classes=("cat", "dog"),
    input_spec=InputSpec(16, 20, mean=(0.1, 0.2, 0.3)),
    backbone={"family": "tiny", "input_size": 16},
    head={"kind": "mlp", "hidden": 5, "dropout": 0.1},
    epoch=1,
    step=7,
    monitor="val/accuracy",
    value=0.5,
)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "checkpoints" / "best.ckpt"
    checkpoint.write(path, SAVED)
    return path


def test_what_is_written_is_what_is_read(path):
    again = checkpoint.read(path)
    assert torch.equal(again.state_dict["head.weight"], SAVED.state_dict["head.weight"])
    for name in ("classes", "input_spec", "backbone", "head", "epoch", "step", "monitor", "value"):
        assert getattr(again, name) == getattr(SAVED, name)


def test_a_checkpoint_loads_with_weights_only(path):
    content = torch.load(path, weights_only=True)
    assert content["classes"] == ["cat", "dog"]


def test_a_save_that_fails_leaves_the_old_checkpoint(path, monkeypatch):
    before = path.read_bytes()

    def fail(content, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        checkpoint.write(path, SAVED)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


class Payload:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("write", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o, 2))],
                         ids=["torch.save", "pickle"])  # fmt: skip
def test_a_payload_is_refused_and_never_run(tmp_path, write):
    mark = tmp_path / "it ran"
    bad = tmp_path / "bad.ckpt"
    write({"state_dict": Payload(mark)}, bad)
    with pytest.raises(CheckpointError, match=r"bad\.ckpt cannot be read as a checkpoint"):
        checkpoint.read(bad)
    assert not mark.exists()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_cut_checkpoint_is_refused_by_name(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"best\.ckpt cannot be read"):
        checkpoint.read(path)


@pytest.mark.filterwarnings("ignore")  # torch's, about what it finds
def test_a_damaged_checkpoint_is_read_or_refused_and_nothing_else(path):
    data, random = path.read_bytes(), Random(0)
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(random.choice([1, 3, 20])):
            damaged[random.randrange(len(data))] = random.randrange(256)
        path.write_bytes(damaged)
        with suppress(CheckpointError):
            checkpoint.load(path)


def test_what_is_no_checkpoint_of_ours_is_refused(tmp_path):
    torch.save({"state_dict": {"fc.weight": torch.zeros(1)}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"model\.weights=.*other\.pt"):
        checkpoint.read(tmp_path / "other.pt")
    torch.save(torch.zeros(1), tmp_path / "tensor.pt")
    with pytest.raises(CheckpointError, match="holds a Tensor"):
        checkpoint.read(tmp_path / "tensor.pt")


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.ckpt: no such file"):
        checkpoint.read(tmp_path / "none.ckpt")


def test_step_checkpoints_are_listed_newest_first(tmp_path):
    for name in ("step-9", "step-10", "step-200", "step-x", "best"):
        checkpoint.save(tmp_path / "checkpoints" / f"{name}.ckpt", {})
    (tmp_path / "checkpoints" / "step-300.ckpt.123.part").touch()
    assert [p.stem for p in checkpoint.step_paths(tmp_path)] == ["step-200", "step-10", "step-9"]


def test_a_flipped_bit_is_found_wherever_a_number_lies(tmp_path):
    path = tmp_path / "a.ckpt"
    checkpoint.save(path, {"a": torch.zeros(1000), "b": torch.ones(1000)})
    whole, random = path.read_bytes(), Random(0)
    flipped, passed = 60, 0
    for _ in range(flipped):
        where = random.randrange(len(whole))
        damaged = bytearray(whole)
        damaged[where] ^= 1 << random.randrange(8)
        path.write_bytes(damaged)
        with suppress(CheckpointError):
            content = checkpoint.load(path)  # a bit between the parts says nothing
            assert torch.equal(content["a"], torch.zeros(1000))
            assert torch.equal(content["b"], torch.ones(1000))
            passed += 1
    assert passed < flipped / 3


def test_a_damaged_part_is_named(tmp_path):
    path = tmp_path / "a.ckpt"
    checkpoint.save(path, {"a": torch.full((1000,), 0.5)})
    damaged = path.read_bytes().replace(b"\0\0\0?" * 20, b"\0\0\1?" * 20, 1)
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"a\.ckpt .*the checksum of .*data/0 in it does"):
        checkpoint.load(path)

"""Weights files: what they may hold, how names are matched, and what is said of it."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from finetune.backbones.base import split_head
from finetune.backbones.weights import align_names, load_weights, read_state_dict
from finetune.errors import CheckpointError


def make_net():
    net = nn.Sequential()
    net.add_module("conv", nn.Conv2d(3, 4, 3))
    net.add_module("norm", nn.BatchNorm2d(4))
    net.add_module("fc", nn.Linear(4, 7))
    return net


def headless():
    net = make_net()
    split_head(net)
    return net


def same(net, state):
    return all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {"state_dict": state}, "optimizer": {"state": {}}},
        lambda state: {"model_ema": state, "args": None},
    ],
    ids=["plain", "state_dict", "nested", "ema"],
)
def test_a_state_dict_is_found_in_what_training_scripts_save(wrap, tmp_path):
    state = make_net().state_dict()
    torch.save(wrap(state), tmp_path / "weights.pt")
    read = read_state_dict(tmp_path / "weights.pt")
    assert list(read) == list(state)
    assert all(torch.equal(read[name], state[name]) for name in state)


def test_safetensors_are_read(tmp_path):
    state = make_net().state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    read = read_state_dict(str(tmp_path / "weights.safetensors"))
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "prefix",
    ["module.", "model.", "net.", "backbone.net.", "_orig_mod.", "model._orig_mod.module."],
)
def test_prefixes_of_wrappers_are_stripped(prefix):
    state = make_net().state_dict()
    net = headless()
    load_weights(net, {prefix + name: tensor for name, tensor in state.items()}, "weights.pt")
    assert same(net, state)


def test_data_parallel_and_compiled_nets_load(tmp_path):
    net = make_net()
    torch.save(nn.DataParallel(net).state_dict(), tmp_path / "weights.pt")
    loaded = headless()
    load_weights(loaded, read_state_dict(tmp_path / "weights.pt"), "weights.pt")
    assert same(loaded, net.state_dict())


def test_a_name_that_begins_like_a_prefix_is_kept():
    names = {"model.weight", "net.weight"}
    assert set(align_names(dict.fromkeys(names, torch.zeros(1)), names)) == names


def test_names_of_torchvisions_old_files_are_known():
    densenet = models.densenet121(weights=None).state_dict()
    name = "features.denseblock1.denselayer2.norm1.weight"
    old = name.replace("norm1", "norm.1")
    assert list(align_names({old: torch.zeros(1)}, densenet)) == [name]
    name = "encoder.layers.encoder_layer_0.mlp.3.bias"
    assert list(align_names({name.replace("3", "linear_2"): torch.zeros(1)}, [name])) == [name]


def test_the_account_names_what_is_left_over(caplog):
    caplog.set_level("INFO")
    load_weights(headless(), make_net().state_dict(), "weights.pt")
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert record.message == (
        "loaded 7 of 7 tensors from weights.pt; missing: none; left over: fc.weight, fc.bias"
    )


def test_a_backbone_matched_in_part_is_a_warning(caplog):
    state = make_net().state_dict()
    load_weights(headless(), {"conv.weight": state["conv.weight"]}, "weights.pt")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message == (
        "loaded 1 of 6 tensors from weights.pt; "
        "missing: conv.bias, norm.weight, norm.bias and 2 more; left over: none"
    )


def test_a_file_older_than_num_batches_tracked_is_complete(caplog):
    caplog.set_level("INFO")
    state = make_net().state_dict()
    del state["norm.num_batches_tracked"]
    load_weights(headless(), state, "weights.pt")
    assert "loaded 6 of 6" in caplog.text


def test_tensors_of_nan_are_missing(caplog):
    net = headless()
    state = make_net().state_dict() | {"conv.bias": torch.full((4,), torch.nan)}
    load_weights(net, state, "weights.pt")
    assert "missing: conv.bias" in caplog.text
    assert net.conv.bias.isfinite().all()


def test_nothing_that_matches_shows_three_names_of_each_side():
    state = {f"stem.{i}.weight": torch.zeros(1) for i in range(5)}
    with pytest.raises(CheckpointError) as caught:
        load_weights(headless(), state, "weights.pt")
    message = str(caught.value)
    assert "weights.pt does not fit this model" in message
    assert "The model has conv.weight, conv.bias, norm.weight and 4 more" in message
    assert "stem.0.weight, stem.1.weight, stem.2.weight and 2 more" in message


def test_another_shape_is_an_error_with_both_shapes_and_loads_nothing():
    net = headless()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = make_net().state_dict() | {"conv.weight": torch.zeros(8, 3, 3, 3)}
    with pytest.raises(CheckpointError, match=r"conv\.weight \(8, 3, 3, 3\), the model \(4, 3, 3"):
        load_weights(net, state, "weights.pt")
    assert same(net, before)


class Trap:
    def __reduce__(self):
        return (print, ("a weights file ran code",))


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("none.pt", lambda path: None, "no such weights file: .*none.pt"),
        ("text.pt", lambda path: path.write_text("hello"), r"text\.pt is not a weights file"),
        ("empty.pt", lambda path: path.touch(), r"empty\.pt is not a weights file"),
        ("bad.safetensors", lambda path: path.write_bytes(b"\0" * 9), r"bad\.safetensors is not"),
        ("trap.pt", lambda path: torch.save(Trap(), path), r"trap\.pt is not a weights file"),
        (
            "net.pt",
            lambda path: torch.save(make_net(), path),
            r"a whole module .*; save net\.st",
        ),
        (
            "old.pt",
            lambda path: torch.save(make_net(), path, _use_new_zipfile_serialization=False),
            r"a whole module .*; save net\.state_dict\(\)",
        ),
        (
            "README.md",
            lambda path: path.write_text("# A title\n" * 9),
            r"it is no file of torch",
        ),
        ("epoch.pt", lambda path: torch.save({"epoch": 1}, path), "no state dict, only: epoch"),
        ("list.pt", lambda path: torch.save([1], path), "no state dict, only: list"),
    ],
)
def test_a_file_without_weights_is_named(tmp_path, capfd, name, write, message):
    write(tmp_path / name)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_state_dict(tmp_path / name)
    assert "weights_only" not in str(caught.value)  # torch advises to trust the file
    assert "\x1b" not in str(caught.value)
    assert "ran code" not in capfd.readouterr().out


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "cut.pt"
    torch.save(make_net().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"cut\.pt is not a weights file that can be read"):
        read_state_dict(path)


def test_weights_of_nan_throughout_are_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    diverged = {
        name: value if name.endswith("num_batches_tracked") else torch.full_like(value, torch.nan)
        for name, value in net.state_dict().items()
    }
    with pytest.raises(CheckpointError, match=r"does not fit.*6 of its tensors are NaN"):
        load_weights(net, diverged, "w.pt")

"""model=run: the second stage of a chain starts from the first one's best backbone."""

import pytest
import torch

from conftest import SMALL, composed
from finetune import checkpoint
from finetune.backbones.run import run as backbone_of
from finetune.build import make
from finetune.errors import CheckpointError
from finetune.fit import fit
from finetune.restore import load


def test_the_backbone_of_a_run_is_taken_and_its_head_is_not(train, tmp_path):
    first = train("seed=3", name="first")
    saved = checkpoint.read(checkpoint.best_path(first))
    backbone = backbone_of(str(first))
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, saved.state_dict[f"backbone.{name}"]), name
    assert not any("head" in name for name in backbone.state_dict())
    assert backbone.input_spec == saved.input_spec


def test_a_chain_of_runs_can_be_loaded_without_the_first(train, tmp_path):
    first = train(name="first")
    second = tmp_path / "second"
    small = [o for o in SMALL if not o.startswith("model")]
    fit(composed(*small, "model=run", f"model.path={first}", "logger=csv"), second, [], "asked for")
    checkpoint.best_path(first).unlink()
    assert load(second).classes == ("class_0", "class_1", "class_2")


def test_another_input_size_keeps_no_crop_margin(train):
    backbone = backbone_of(str(train()), input_size=16)
    assert (backbone.input_spec.size, backbone.input_spec.resize) == (16, 16)
    assert backbone(torch.zeros(2, 3, 16, 16)).shape == (2, backbone.num_features)


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.path=.*is no run directory with weights"):
        make({"_target_": "finetune.backbones.run.run", "path": str(tmp_path)})


def test_a_class_that_a_checkpoint_names_is_not_called_unasked(train, tmp_path):
    path = checkpoint.best_path(train())
    content = checkpoint.load(path)
    content["backbone"] = {"family": "module", "target": "os.abort", "input_size": 8}
    checkpoint.save(path, content)
    with pytest.raises(CheckpointError, match=r"type model\.target=os\.abort"):
        backbone_of(str(path.parents[1]))
    content["backbone"] = {"family": "nonsense"}
    checkpoint.save(path, content)
    with pytest.raises(CheckpointError, match="unknown family of backbones 'nonsense'"):
        backbone_of(str(path.parents[1]))

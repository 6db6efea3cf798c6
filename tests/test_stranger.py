"""A network of one's own and a stranger's weights for it: real ones, where they are at hand.

FINETUNE_SHARED_DATA names a folder with resnet20-cifar10.th (a ResNet-20, trained on CIFAR-10 by
its author) and cifar10.tar.xz (CIFAR-10 as JPEG files, in <split>/<class>/).
"""

import json
import os
import tarfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import facts_of, finish
from finetune import checkpoint, cli, evaluate

SHARED = os.environ.get("FINETUNE_SHARED_DATA")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SHARED is None, reason="needs FINETUNE_SHARED_DATA"),
]

MODEL = ["model=module", "model.target=test_stranger.ResNet20", "model.input_size=32",
         f"model.weights={SHARED}/resnet20-cifar10.th", "trainer.accelerator=cpu",
         "batch_size=100"]  # fmt: skip


class BasicBlock(nn.Module):
    """He et al. 2016, figure 2; the shortcut subsamples and pads with zero channels (option A)."""

    def __init__(self, num_in, num_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_out)
        self.stride, self.padding = stride, (num_out - num_in) // 2

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(out + F.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding)))


class ResNet20(nn.Module):
    """He et al. 2016, section 4.2: 3 stages of 3 blocks, 16, 32 and 64 channels."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self.stage(16, 16, 1)
        self.layer2 = self.stage(16, 32, 2)
        self.layer3 = self.stage(32, 64, 2)
        self.linear = nn.Linear(64, 10)

    def stage(self, num_in, num_out, stride):
        blocks = [BasicBlock(num_out, num_out, 1) for _ in range(2)]
        return nn.Sequential(BasicBlock(num_in, num_out, stride), *blocks)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    with tarfile.open(Path(SHARED) / "cifar10.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "cifar10"


def backbone_weights(run):
    state = checkpoint.read(checkpoint.best_path(run)).state_dict
    return {k.removeprefix("backbone.net."): v for k, v in state.items() if k.startswith("back")}


def test_the_kept_head_is_as_right_as_its_author_made_it(cifar10, tmp_path, monkeypatch):
    run = finish(tmp_path / "run", *MODEL, "head=keep", "max_steps=0", "data=image_folder",
                 f"data.root={cifar10}")  # fmt: skip
    monkeypatch.setattr(
        "sys.argv",
        [
            "evaluate",
            f"run={run}",
            "model.target=test_stranger.ResNet20",
            "trainer.accelerator=cpu",
        ],
    )
    cli.jobs_done.clear()
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    assert stop.value.code == 0
    measured = json.loads((run / "metrics.json").read_text())
    assert measured["images"] == 10_000
    # counted with these weights in plain PyTorch; another CPU may round a close call differently
    assert round(measured["test/accuracy"] * 10_000) == pytest.approx(8103, abs=2)


def test_a_new_head_is_tuned_to_another_task_from_the_stranger_s_features(cifar10, tmp_path):
    pets = tmp_path / "pets"
    for split in ("train", "test"):
        (pets / split).mkdir(parents=True)
        for name in ("bird", "cat", "dog"):
            (pets / split / name).symlink_to(cifar10 / split / name)
    data = [*MODEL, "data=image_folder", f"data.root={pets}", "data.shots=50"]
    file = Path(SHARED) / "resnet20-cifar10.th"
    state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    start = finish(tmp_path / "start", *data, "head.init=ridge", "max_steps=0")
    for name, value in backbone_weights(start).items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, state[f"module.{name}"]), name
    tuned = finish(
        tmp_path / "tuned", *data, "head.init=ridge", "max_steps=10", "optimizer.lr=0.001"
    )
    assert facts_of(start)["test"]["test/accuracy"] > 0.6
    assert facts_of(tuned)["test"]["test/accuracy"] > 0.6
    stem = backbone_weights(tuned)["conv1.weight"]
    assert not torch.equal(stem, state["module.conv1.weight"])

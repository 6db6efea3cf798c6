"""Strategies do what a person writes by hand: LP-FT and layer decay in plain PyTorch."""

import pytest
import torch
import torchvision
from torch import nn

from conftest import composed, series
from finetune import build
from finetune.data.fake import fake
from finetune.data.sampler import epoch_order
from finetune.fit import fit

# 48 training images: 6 steps an epoch
RUN = (
    "data=fake", "data.num_classes=4", "data.num_images=80", "data.image_size=32",
    "model=resnet18", "model.weights=null", "model.input_size=32",
    "optimizer=sgd", "optimizer.lr=0.001", "schedule=constant",
    "recipe=textbook", "augment=none", "batch_size=8", "epochs=4", "max_steps=20",
    "trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "logger=csv",
)  # fmt: skip


@pytest.fixture
def ours(tmp_path):
    """ours("strategy=full", ...): the losses of our run of 20 steps."""

    def losses(*overrides):
        fit(composed(*RUN, *overrides), tmp_path / "run", [], "as asked for")
        found = series(tmp_path / "run", "train/loss")
        assert len(found) == 20
        return found

    return losses


@pytest.fixture
def net():
    """The network as torchvision has it, its last layer replaced; with our initial weights."""
    net = torchvision.models.resnet18(weights=None)
    net.fc = nn.Linear(512, 4)
    ours = build.build_model(composed(*RUN), ("a", "b", "c", "d"))
    head = {f"fc.{name}": value for name, value in ours.head.state_dict().items()}
    net.load_state_dict(ours.backbone.net.state_dict() | head)
    return net


@pytest.fixture
def batches():
    """Images (B, 3, H, W), normalised, and labels of 20 steps, in the order of our run."""
    train = fake(num_classes=4, num_images=80, image_size=32).train
    images = torch.stack([train[i][0] for i in range(48)])
    labels = torch.tensor(train.labels)
    mean = torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1)
    orders = [epoch_order(48, seed=0, epoch=epoch) for epoch in range(4)]
    chosen = [order[i : i + 8] for order in orders for i in range(0, 48, 8)][:20]
    return [((images[batch] / 255.0 - mean) / std, labels[batch]) for batch in chosen]


def step(net, optimizer, images, labels):
    """Forward, cross-entropy, backward, step."""
    loss = nn.functional.cross_entropy(net(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_twenty_steps_give_the_losses_of_lp_ft_written_by_hand(ours, net, batches):
    # phase 1: the last layer alone, on features that do not change
    for parameter in net.parameters():
        parameter.requires_grad = False
    for parameter in net.fc.parameters():
        parameter.requires_grad = True
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9)
    net.eval()
    expected = [step(net, optimizer, *batch) for batch in batches[:12]]
    # phase 2: everything, at a tenth of the lr
    for parameter in net.parameters():
        parameter.requires_grad = True
    optimizer.param_groups[0]["lr"] = 0.0001
    net.train()
    expected += [step(net, optimizer, *batch) for batch in batches[12:]]

    # null: half of the 4 epochs that begin
    assert ours("strategy=lp_ft") == pytest.approx(expected, abs=1e-5)
    assert abs(expected[12] - expected[11]) > 0.01  # batch statistics take over


def test_twenty_steps_give_the_losses_of_layer_decay_written_by_hand(ours, net, batches):
    layers = [
        [net.conv1, net.bn1],
        [net.layer1],
        [net.layer2],
        [net.layer3],
        [net.layer4],
        [net.fc],
    ]
    groups = []
    for below_the_head, modules in enumerate(reversed(layers)):
        parameters = [p for module in modules for p in module.parameters()]
        lr = 0.01 * 0.5**below_the_head
        # weight decay for convolutions and the last layer, not for BatchNorm and biases
        groups += [
            {"params": [p for p in parameters if p.ndim > 1], "lr": lr, "weight_decay": 0.01},
            {"params": [p for p in parameters if p.ndim == 1], "lr": lr, "weight_decay": 0.0},
        ]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    net.train()
    expected = [step(net, optimizer, *batch) for batch in batches]
    actual = ours(
        "strategy=layer_decay", "strategy.decay=0.5", "optimizer.lr=0.01",
        "optimizer.weight_decay=0.01",
    )  # fmt: skip
    assert actual == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.1

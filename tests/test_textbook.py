"""The training is the textbook's method: its loop stands here in plain PyTorch."""

import pytest
import torch
import torchvision
from torch import nn

from conftest import composed, series
from finetune import build
from finetune.data.fake import fake
from finetune.data.sampler import epoch_order
from finetune.fit import fit


def textbook_losses(net, images, labels, batches, mean, std):
    """Forward, cross-entropy, backward, SGD."""
    mean, std = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9)
    losses = []
    net.train()
    for batch in batches:
        logits = net((images[batch] / 255.0 - mean) / std)
        loss = nn.functional.cross_entropy(logits, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_twenty_steps_give_the_losses_of_the_textbook_loop(tmp_path):
    cfg = composed(
        "data=fake", "data.num_classes=4", "data.num_images=80", "data.image_size=32",
        "model=resnet18", "model.weights=null", "model.input_size=32",
        "recipe=textbook", "batch_size=8", "epochs=4", "max_steps=20",
        "trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "logger=csv",
    )  # fmt: skip
    fit(cfg, tmp_path / "run", [], "as asked for")

    # the network as torchvision has it, its last layer replaced
    net = torchvision.models.resnet18(weights=None)
    net.fc = nn.Linear(512, 4)
    ours = build.build_model(cfg, ("a", "b", "c", "d"))  # for its initial weights
    head = {f"fc.{name}": value for name, value in ours.head.state_dict().items()}
    net.load_state_dict(ours.backbone.net.state_dict() | head)

    train = fake(num_classes=4, num_images=80, image_size=32).train
    images = torch.stack([train[i][0] for i in range(48)])
    labels = torch.tensor(train.labels)
    orders = [epoch_order(48, seed=0, epoch=epoch) for epoch in range(4)]
    batches = [order[i : i + 8] for order in orders for i in range(0, 48, 8)][:20]
    expected = textbook_losses(
        net, images, labels, batches, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )
    actual = series(tmp_path / "run", "train/loss")
    assert len(actual) == 20
    assert actual == pytest.approx(expected, abs=1e-5)  # sums in another order, at most
    assert expected[-1] < expected[0]

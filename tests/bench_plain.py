"""What bench.py measures against: plain PyTorch, as textbooks and tutorials have it.

python tests/bench_plain.py NAME '{"argument": value}': a function below, and what it gives as JSON.
limit and loop train until they are killed, and tell of their steps.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.models import get_model

from bench_turns import Teller
from finetune.backbones.base import reordering_pays
from finetune.layering import layer_modules

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LR, MOMENTUM = 0.001, 0.9  # of recipe=textbook


def forever(step: Callable[[], int]) -> NoReturn:
    """Steps, each of which gives its images, until the process is killed."""
    tell = Teller()
    while True:
        tell(step())


def at_hand(
    model: str,
    size: int,
    batch: int,
    classes: int,
    freeze: int = 0,
    channels_last: bool = False,
    bf16: bool = False,
    fused: bool = False,
    compiled: str | None = None,
) -> tuple[Callable[[], int], "FrozenClock"]:
    """Forward, backward and step on a batch that is there.

    freeze: the first layers, and a clock for them. channels_last: in that order of memory, where
    ours takes it. fused: the optimizer steps in one kernel. compiled: the mode of torch.compile,
    None without.
    """
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    labels = torch.randint(0, classes, (batch,), device=device)
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD))
    net = get_model(model, num_classes=classes).to(device)
    clock = FrozenClock(net, freeze)
    if channels_last and (device == "cuda" or reordering_pays(net, size)):
        net.to(memory_format=torch.channels_last)

    def logits() -> Tensor:
        return net((images.float() / 255 - mean) / std)

    if compiled:
        logits = torch.compile(logits, dynamic=False, mode=compiled)
    trains = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trains, LR, MOMENTUM, fused=fused)

    def step() -> int:
        optimizer.zero_grad()
        clock.start()
        with torch.autocast(device, torch.bfloat16) if bf16 else nullcontext():
            loss = F.cross_entropy(logits(), labels)
        loss.backward()
        optimizer.step()
        return batch

    return step, clock


def limit(model: str, size: int, batch: int, classes: int, **more: Any) -> None:
    """Nothing but the steps: see at_hand, also for what is more."""
    step, _ = at_hand(model, size, batch, classes, **more)
    forever(step)


def frozen(
    model: str, size: int, batch: int, classes: int, layers: int, seconds: float
) -> dict[str, float]:
    """The share of a step that its first layers take where they are frozen, in ours' order."""
    step, clock = at_hand(model, size, batch, classes, freeze=layers, channels_last=True)
    for _ in range(3):
        step()
    clock.seconds.clear()
    began = time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        step()
    return {"share": sum(clock.seconds) / passed}


class FrozenClock:
    """Freezes the first layers of a net, and measures how long they take in each step."""

    def __init__(self, net: nn.Module, layers: int) -> None:
        net.train()
        self.began = 0.0
        self.seconds: list[float] = []
        modules = [m for layer in layer_modules(net)[:layers] for m in layer.values()]
        for module in modules:
            module.eval().requires_grad_(False)
        if modules:
            modules[-1].register_forward_hook(self.stop)

    def start(self) -> None:
        self.began = time.perf_counter()

    def stop(self, *args: object) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def endless(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """Epoch after epoch."""
    while True:
        yield from loader


def training_folder(root: str, size: int) -> ImageFolder:
    """Images as everyone augments them, by PIL."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return ImageFolder(str(Path(root) / "train"), transform)


def loop(root: str, model: str, size: int, batch: int, workers: int) -> None:
    """The loop of the tutorials over a folder."""
    torch.manual_seed(0)
    folder = training_folder(root, size)
    loader = DataLoader(folder, batch_size=batch, shuffle=True, num_workers=workers)
    batches = endless(loader)
    net = get_model(model, num_classes=len(folder.classes)).train()
    optimizer = torch.optim.SGD(net.parameters(), LR, MOMENTUM)
    running_loss = 0.0

    def step() -> int:
        nonlocal running_loss
        images, labels = next(batches)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
        return len(labels)

    forever(step)


def weights(path: str, model: str) -> dict[str, float]:
    """Write weights that both sides start from."""
    torch.manual_seed(0)
    torch.save(get_model(model).state_dict(), path)
    return {}


def probe(
    root: str, model: str, weights: str, size: int, batch: int, epochs: int, timed: int, seeds: int
) -> dict[str, Any]:
    """A frozen backbone under a head that trains: seconds of all epochs, and accuracies on val.

    timed: epochs that are run and measured, a validation after each, as all of them would take.
    Accuracies: of heads that start from so many seeds, trained on the same features, kept.
    """
    torch.manual_seed(0)
    transform = transforms.Compose(
        [
            transforms.Resize(size),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    train, val = (ImageFolder(str(Path(root) / name), transform) for name in ("train", "val"))
    net = get_model(model)
    net.load_state_dict(torch.load(weights, weights_only=True))
    net.requires_grad_(False).eval()
    num_features = net.fc.in_features
    net.fc = nn.Identity()

    def train_epoch(
        loader: DataLoader, backbone: nn.Module, head: nn.Module, optimizer: Any
    ) -> None:
        for images, labels in loader:
            with torch.no_grad():
                features = backbone(images)
            optimizer.zero_grad()
            F.cross_entropy(head(features), labels).backward()
            optimizer.step()

    @torch.no_grad()
    def accuracy(loader: DataLoader, backbone: nn.Module, head: nn.Module) -> float:
        hits = [head(backbone(images)).argmax(1) == labels for images, labels in loader]
        return float(torch.cat(hits).float().mean())

    def new_head() -> tuple[nn.Module, torch.optim.Optimizer]:
        head = nn.Linear(num_features, len(train.classes))
        return head, torch.optim.SGD(head.parameters(), LR, MOMENTUM)

    loaders = DataLoader(train, batch, shuffle=True), DataLoader(val, batch)
    head, optimizer = new_head()
    began = time.perf_counter()
    for _ in range(timed):
        train_epoch(loaders[0], net, head, optimizer)
        accuracy(loaders[1], net, head)
    seconds = (time.perf_counter() - began) / timed * epochs

    kept = [TensorDataset(*all_features(folder, net, batch)) for folder in (train, val)]
    loaders = DataLoader(kept[0], batch, shuffle=True), DataLoader(kept[1], batch)
    accuracies = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        head, optimizer = new_head()
        for _ in range(epochs):
            train_epoch(loaders[0], nn.Identity(), head, optimizer)
        accuracies.append(accuracy(loaders[1], nn.Identity(), head))
    return {"seconds": seconds, "accuracies": accuracies}


@torch.no_grad()
def all_features(folder: ImageFolder, net: nn.Module, batch: int) -> tuple[Tensor, Tensor]:
    """(N, D) and labels (N,)."""
    found = [(net(images), labels) for images, labels in DataLoader(folder, batch)]
    features, labels = zip(*found, strict=True)
    return torch.cat(features), torch.cat(labels)


def spin(threads: int) -> None:
    """Another process that is busy, until it is killed."""
    torch.set_num_threads(threads)
    matrix = torch.rand(512, 512)
    while True:
        matrix = torch.softmax(matrix @ matrix, 1)


def device() -> dict[str, str | None]:
    """The GPU, if there is one."""
    return {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))))

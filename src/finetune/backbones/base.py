"""What every backbone is: (B, 3, H, W) images to (B, D) features, the classifier taken off."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from finetune.errors import ConfigError
from finetune.specs import InputSpec

Kind = Literal["CNN with BatchNorm", "CNN", "transformer"]
Recipe = dict[str, str | int | float | bool | None]
SMALL_INPUT = 48  # pixels


@dataclass(frozen=True)
class SourceHead:
    """The head of the source task, as data for finetune.heads.

    recipe: what rebuilds it; state: its weights. classes: names, where they are known.
    """

    recipe: dict[str, Any]
    state: dict[str, Tensor]
    num_classes: int
    classes: tuple[str, ...] | None = None


LoadHead = Callable[["Backbone"], SourceHead]


class Backbone(nn.Module):
    """A headless network and what must be known of it: (B, 3, H, W) to (B, D).

    recipe: "family" and the keyword arguments that build the same architecture again, weights
    left out: FAMILIES[family](**arguments, weights=None). load_head: gives the head that the
    weights came with, once it is asked for; None where they have none.
    """

    def __init__(
        self,
        net: nn.Module,
        num_features: int,
        input_spec: InputSpec,
        recipe: Recipe,
        load_head: LoadHead | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.num_features = num_features
        self.input_spec = input_spec
        self.recipe = dict(recipe)
        self.load_head = load_head

    @property
    def num_parameters(self) -> int:
        """Of the backbone alone: the head is not counted."""
        return sum(parameter.numel() for parameter in self.net.parameters())

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, D); a feature map that is left is averaged over its pixels."""
        return pooled(self.net(images))


def pooled(features: Tensor) -> Tensor:
    """(B, D) of what a headless network gives: (B, D), or a feature map (B, D, H, W)."""
    return features.mean(dim=(2, 3)) if features.ndim == 4 else features


def split_head(net: nn.Module) -> tuple[int, str]:
    """Replace the classifier by nn.Identity, in place; return its input width D and its name.

    The classifier is the last Linear or Conv2d in registration order; auxiliary ones ("aux") do
    not count. This one rule holds for every classifier of torchvision.
    """
    heads = {
        name: module
        for name, module in net.named_modules()
        if name and isinstance(module, nn.Linear | nn.Conv2d) and "aux" not in name
    }
    if not heads:
        raise ConfigError(
            f"{type(net).__name__} has no Linear or Conv2d layer to take off as its head"
        )
    name, head = heads.popitem()
    net.set_submodule(name, nn.Identity())
    return (head.in_features if isinstance(head, nn.Linear) else head.in_channels), name


def check_size(net: nn.Module, size: int) -> None:
    """Raise ConfigError if net cannot take images of size x size pixels.

    It runs on meta tensors, which have shapes and no values, and costs no more than its layers.
    """
    tensors = chain(net.named_parameters(), net.named_buffers())  # also those outside state_dict
    state = {name: tensor.to("meta") for name, tensor in tensors}
    training = net.training
    try:
        functional_call(net.eval(), state, (torch.empty(2, 3, size, size, device="meta"),))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"model.input_size: {type(net).__name__} cannot take images of {size} x {size}: {error}"
        ) from error
    finally:
        net.train(training)


def kind_of(net: nn.Module) -> Kind:
    """What decides how a network is trained best: its norm, and whether it attends."""
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules()):
        return "CNN with BatchNorm"
    names = (type(module).__name__.lower() for module in net.modules())
    return "transformer" if any("attention" in name for name in names) else "CNN"


def reordering_pays(net: nn.Module, size: int) -> bool:
    """Whether a CPU computes a network sooner in channels_last, on images of size x size.

    Not where kernels of 3 x 3 and more see images a few pixels wide: resnet18 0.88 times as fast at
    32 pixels, 1.05 at 48 to 64, 1.13 at 96; vgg11 0.99 at 32. resnet50 1.04 at 32, 1.28 at 96;
    densenet121 1.3; mobilenet_v3_small 1.7 to 2.2. Trained in batches of 64 on 2 cores, AVX-512.
    """
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    wide = [c for c in convolutions if c.groups == 1 and max(c.kernel_size) > 1]
    return size >= SMALL_INPUT or 2 * len(wide) <= len(convolutions)

"""The network that is trained, saved and used: normalisation, backbone, head."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from finetune.backbones.base import Backbone, pooled
from finetune.heads import Head, Linear
from finetune.layering import layer_at, layer_modules, layer_of_parameter
from finetune.prefix import Split, split
from finetune.specs import InputSpec


class Activations(NamedTuple):
    """What the first layers of a backbone make of images, in place of these.

    values: (B, ...). layers: so many; after all of them values are what the head sees, (B, D).
    """

    values: Tensor
    layers: int


class Classifier(nn.Module):
    """Images as uint8 or float (B, 3, S, S), values 0 to 255, to logits (B, K).

    The normalisation is inside, on the device of the model: what leaves the transform is a quarter
    of the bytes, and nobody can forget it or use that of other weights.
    """

    mean: Tensor
    std: Tensor
    depth: int  # layers of the backbone; the head is layer depth

    def __init__(
        self, backbone: Backbone, classes: tuple[str, ...], head: Head | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = Linear(backbone.num_features, len(classes)) if head is None else head
        self.classes = classes
        self.layers = layer_modules(backbone.net)
        self.depth = len(self.layers)
        self._splits: dict[int, Split] = {}
        spec = backbone.input_spec
        # not persistent: the input spec is saved by name, in the checkpoint's own field
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)

    @property
    def input_spec(self) -> InputSpec:
        """What the images must look like; finetune.data.transforms makes them so."""
        return self.backbone.input_spec

    def modules_by_layer(self) -> list[list[nn.Module]]:
        """Modules of layer 0 (the stem) to depth (the head)."""
        return [*(list(layer.values()) for layer in self.layers), [self.head]]

    def parameters_by_layer(self) -> list[list[nn.Parameter]]:
        """Parameters of layer 0 (the stem, with class token and positions) to depth (the head)."""
        by_layer: list[list[nn.Parameter]] = [[] for _ in range(self.depth)]
        layers = layer_of_parameter(self.backbone.net)
        for name, parameter in self.backbone.net.named_parameters():
            by_layer[layers[name]].append(parameter)
        return [*by_layer, list(self.head.parameters())]

    def features(self, images: Tensor) -> Tensor:
        """What the head sees, (B, D), of images (B, 3, S, S), uint8 or float, values 0 to 255."""
        features: Tensor = self.backbone(self.normalised(images))
        return features

    def normalised(self, images: Tensor) -> Tensor:
        """What the backbone sees of images (B, 3, S, S), uint8 or float, values 0 to 255."""
        return (images.float() / 255 - self.mean) / self.std

    def forward(self, images: Tensor | Activations) -> Tensor:
        """Logits (B, K) of images (B, 3, S, S), uint8 or float, values 0 to 255.

        Or of what the first layers made of them before: see finetune.features.
        """
        if isinstance(images, Tensor):
            features = self.features(images)
        elif images.layers == self.depth:
            features = images.values
        else:
            features = pooled(self.split(images.layers).rest(images.values))
        logits: Tensor = self.head(features)
        return logits

    def activations(self, images: Tensor, layers: int) -> Tensor:
        """What the first layers, at least 1, make of images as forward takes them: (B, ...)."""
        if layers == self.depth:
            return self.features(images)
        return self.split(layers).head(self.normalised(images))

    def num_activations(self, layers: int) -> int:
        """Values of one image after the first layers, at least 1. Raises prefix.Unsplittable."""
        if layers == self.depth:
            return self.backbone.num_features
        return self.split(layers).num_values

    def split(self, layers: int) -> Split:
        """The backbone in two after so many layers, below depth. Raises prefix.Unsplittable."""
        if layers not in self._splits:
            self._splits[layers] = split(self.backbone.net, layers, self.input_spec.size)
        return self._splits[layers]

    def state_of_layers(self, layers: int) -> dict[str, Tensor]:
        """Weights and statistics of the backbone's first layers by their name in its net."""
        state = self.backbone.net.state_dict()
        return {name: v for name, v in state.items() if layer_at(self.layers, name) < layers}

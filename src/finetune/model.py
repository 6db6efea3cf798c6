"""The network that is trained, saved and used: normalisation, backbone, head."""

import torch
from torch import Tensor, nn

from finetune.backbones.base import Backbone
from finetune.heads import Head, Linear
from finetune.layering import layer_modules, layer_of_parameter
from finetune.specs import InputSpec


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
        features: Tensor = self.backbone((images.float() / 255 - self.mean) / self.std)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, 3, S, S), uint8 or float, values 0 to 255.

        Or of their features (B, D), computed before: see finetune.features.
        """
        logits: Tensor = self.head(images if images.ndim == 2 else self.features(images))
        return logits

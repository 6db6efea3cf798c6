"""What a backbone makes of images: the features that a head sees."""

from collections.abc import Iterable

import torch
from torch import Tensor

from finetune.datamodule import Batch
from finetune.model import Classifier


def extract(
    model: Classifier, batches: Iterable[Batch], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Features (N, D) and labels (N,) of all batches, on the device, with model in eval mode.

    model comes back on the CPU and in train mode, as a new one is.
    """
    model.to(device).eval()
    features, labels = [], []
    with torch.no_grad():
        for images, label in batches:
            features.append(model.features(images.to(device)))
            labels.append(label.to(device))
    model.to("cpu").train()
    return torch.cat(features), torch.cat(labels)

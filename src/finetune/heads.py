"""Heads: what stands in place of a pretrained network's last layer."""

from torch import nn


def linear(num_features: int, num_classes: int) -> nn.Linear:
    """Map (B, D) features to (B, K) logits, randomly initialised as torch does."""
    return nn.Linear(num_features, num_classes)

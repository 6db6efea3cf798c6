"""Backbones: every one maps (B, 3, H, W) to (B, D) features."""

from collections.abc import Callable

# the modules, not their functions: those bear the same names and would hide them
from finetune.backbones import module, timm, tiny, torchvision
from finetune.backbones.base import Backbone

FAMILIES: dict[str, Callable[..., Backbone]] = {
    "module": module.module,
    "timm": timm.timm,
    "tiny": tiny.tiny,
    "torchvision": torchvision.torchvision,
}

"""The new head at the base lr, the pretrained layers at a fraction of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadLr:
    """Source: a habit of TLlib (a tenth) and of fastai's two parameter groups."""

    backbone: float = 0.1

    def lr_scale(self, layer: int, depth: int, epoch: int) -> float:
        """1.0 for the head, backbone for all other layers."""
        return 1.0 if layer == depth else self.backbone

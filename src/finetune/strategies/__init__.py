"""What trains when: a strategy is one pure function of layer, depth and epoch."""

from typing import Protocol


class Strategy(Protocol):
    """Factor on the base lr, per layer and epoch; 0.0 means frozen."""

    def lr_scale(self, layer: int, depth: int, epoch: int) -> float:
        """Factor on the base lr.

        layer: 0 is the stem, depth the head. epoch: from 0.
        """
        ...

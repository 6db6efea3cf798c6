"""The lowest layers never train, whatever the strategy says of the others."""

from dataclasses import dataclass

from finetune.strategies import Strategy


@dataclass(frozen=True)
class FreezeUntil:
    """num_layers: from the stem up, those that are frozen."""

    strategy: Strategy
    num_layers: int

    def lr_scale(self, layer: int, depth: int, epoch: int) -> float:
        """0.0 below num_layers, else what the strategy says."""
        return 0.0 if layer < self.num_layers else self.strategy.lr_scale(layer, depth, epoch)

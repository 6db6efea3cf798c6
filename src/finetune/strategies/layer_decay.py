"""The lower a layer, the more general what it learnt and the less it is moved."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerDecay:
    """Source: Clark et al. 2020, ELECTRA; for images BEiT (Bao 2021) and MAE (He 2021)."""

    decay: float = 0.75

    def lr_scale(self, layer: int, depth: int, epoch: int) -> float:
        """decay ** (depth - layer): 1.0 for the head."""
        return float(self.decay ** (depth - layer))

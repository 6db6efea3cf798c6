"""Only the head trains; the backbone is a fixed feature extractor."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearProbe:
    """Source: Alain & Bengio 2016, linear classifier probes."""

    def lr_scale(self, layer: int, depth: int, epoch: int) -> float:
        """1.0 for the head, 0.0 for every layer of the backbone."""
        return 1.0 if layer == depth else 0.0

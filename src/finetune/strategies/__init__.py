"""What trains when: a strategy is one pure function of layer, depth and epoch."""

from typing import Protocol


class Strategy(Protocol):
    """Factor on the base lr, per layer and epoch; 0.0 means frozen.

    One whose fields may be None, to be chosen by the length of the run, also has
    for_run(depth, epochs), which returns it filled.
    """

    def lr_scale(self, layer: int, depth: int, epoch: int) -> float:
        """Factor on the base lr.

        layer: 0 is the stem, depth the head. epoch: from 0.
        """
        ...


def for_run(strategy: Strategy, depth: int, epochs: int) -> Strategy:
    """The strategy with what it leaves open chosen for a network and a run.

    depth: layers of the backbone. epochs: of the run, from 1.
    """
    fill = getattr(strategy, "for_run", None)
    filled: Strategy = strategy if fill is None else fill(depth, epochs)
    return filled


def scales(strategy: Strategy, depth: int, epochs: int) -> list[list[float]]:
    """Factors of layer 0 (the stem) to depth (the head), each over the epochs of a run."""
    return [
        [strategy.lr_scale(layer, depth, epoch) for epoch in range(epochs)]
        for layer in range(depth + 1)
    ]

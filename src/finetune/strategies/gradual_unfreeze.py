"""The head first, then one more layer at a time, from the top to the stem."""

from dataclasses import dataclass, replace

from finetune.strategies import Strategy, for_run


@dataclass(frozen=True)
class GradualUnfreeze:
    """then: factors of the layers that train.

    every: epochs from one layer to the next; None for all to train from half of the run on.
    Source: Howard & Ruder 2018, ULMFiT.
    """

    then: Strategy
    every: int | None = None

    def for_run(self, depth: int, epochs: int) -> "GradualUnfreeze":
        """Let layer 0 train by half of the run where every is None, if there are epochs enough."""
        every = max(1, epochs // (2 * max(1, depth))) if self.every is None else self.every
        return replace(self, every=every, then=for_run(self.then, depth, epochs))

    def lr_scale(self, layer: int, depth: int, epoch: int) -> float:
        """0.0 until the turn of a layer, then what then says."""
        assert self.every is not None  # for_run was called
        trains = depth - layer <= epoch // self.every
        return self.then.lr_scale(layer, depth, epoch) if trains else 0.0

"""A linear probe first, then everything from the head that it found."""

from dataclasses import dataclass, replace

from finetune.strategies import Strategy, for_run


@dataclass(frozen=True)
class LpFt:
    """A new head distorts good features while it learns; one that is probed first does so less.

    then: factors after the probe, its epochs counted from there. probe_epochs: None for half of
    the run. tune_lr: factor on all of then.
    Source: Kumar et al. 2022, Fine-tuning can distort pretrained features.
    """

    then: Strategy
    probe_epochs: int | None = None
    tune_lr: float = 0.1

    def for_run(self, depth: int, epochs: int) -> "LpFt":
        """Probe for half of the run where probe_epochs is None."""
        probe = max(1, epochs // 2) if self.probe_epochs is None else self.probe_epochs
        then = for_run(self.then, depth, max(1, epochs - probe))
        return replace(self, probe_epochs=probe, then=then)

    def lr_scale(self, layer: int, depth: int, epoch: int) -> float:
        """Of the probe 1.0 for the head alone, then tune_lr times what then says."""
        assert self.probe_epochs is not None  # for_run was called
        if epoch < self.probe_epochs:
            return 1.0 if layer == depth else 0.0
        return self.tune_lr * self.then.lr_scale(layer, depth, epoch - self.probe_epochs)

"""Choices of a strategy that change nothing in a run as short as this one."""

from collections.abc import Iterator
from dataclasses import is_dataclass, replace
from typing import Any

from finetune.strategies import Strategy, scales
from finetune.strategies.freeze_until import FreezeUntil
from finetune.strategies.full import Full
from finetune.strategies.linear_probe import LinearProbe


def without_effect(strategy: Strategy, depth: int, epochs: int) -> Iterator[str]:
    """A line for each choice without effect, and for layers that never get their turn.

    It compares what the strategies do, layer by layer and epoch by epoch, and holds for new ones.
    """
    run = f"in this run of {epochs} epoch{'s' * (epochs != 1)}"
    if isinstance(strategy, FreezeUntil):
        frozen, strategy = strategy, strategy.strategy
        if scales(frozen, depth, epochs) == scales(strategy, depth, epochs):
            yield f"freeze_until={frozen.num_layers} has no effect: these layers never train {run}"
    table = scales(strategy, depth, epochs)
    for plain, name in ((LinearProbe(), "linear_probe"), (Full(), "full")):
        if strategy == plain:
            return
        if table == scales(plain, depth, epochs):
            yield f"{strategy} does no more than strategy={name} {run}"
            return
    if never := [str(layer) for layer, factors in enumerate(table) if not any(factors)]:
        yield f"{strategy} never trains {len(never)} of {depth} layers {run}: {', '.join(never)}"
    chosen: Any = strategy
    then = getattr(chosen, "then", None)
    if is_dataclass(chosen) and then is not None and then != Full():
        with_full: Any = replace(chosen, then=Full())  # type: ignore[type-var]
        if scales(with_full, depth, epochs) == table:
            yield f"strategy.then: {then} does no more than full {run}"

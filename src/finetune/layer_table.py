"""What trains when, for a person: each layer with its parameters and its lr over the epochs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from torch import nn

from finetune.layering import layer_modules, layer_of_parameter
from finetune.strategies import Strategy, scales

HEADINGS = ("layer", "from module", "parameters", "lr scale", "frozen")
MOST_CHANGES = 4  # of a factor that are spelled out


@dataclass(frozen=True)
class LayerFacts:
    """One layer, or several in a row about which the rest is the same.

    layers: first and last. modules: the name that each of these begins with. parameters: None for
    a head whose classes are not known. lr_scale, frozen: in words, over the epochs.
    """

    layers: tuple[int, int]
    modules: tuple[str, str]
    parameters: int | None
    lr_scale: str
    frozen: str

    def cells(self) -> tuple[str, ...]:
        """A text for each of HEADINGS."""
        first, last = self.layers
        return (
            f"{first}" if first == last else f"{first}-{last}",
            " ... ".join(dict.fromkeys(self.modules)),
            "by classes" if self.parameters is None else f"{self.parameters:,}",
            self.lr_scale,
            self.frozen,
        )


def layer_facts(
    net: nn.Module, head: nn.Module | None, strategy: Strategy, epochs: int
) -> list[LayerFacts]:
    """From the stem to the head. net: of a backbone. epochs: of the run, from 1."""
    layers = layer_modules(net)
    counts = [0] * len(layers)
    layer_of = layer_of_parameter(net)
    for name, parameter in net.named_parameters():
        counts[layer_of[name]] += parameter.numel()
    in_head = None if head is None else sum(parameter.numel() for parameter in head.parameters())
    names = [*(next(iter(layer), "") for layer in layers), "head"]
    return [
        LayerFacts((i, i), (names[i],) * 2, number, in_words(factors), frozen_in_words(factors))
        for i, (number, factors) in enumerate(
            zip([*counts, in_head], scales(strategy, len(layers), epochs), strict=True)
        )
    ]


def compact(rows: Sequence[LayerFacts]) -> list[LayerFacts]:
    """Layers of the backbone that train alike as one row; the head, the last row, stays alone."""
    short = []
    for _, group in groupby(rows[:-1], key=lambda row: (row.lr_scale, row.frozen)):
        alike = list(group)
        if len(alike) == 1:
            short += alike
            continue
        first, last = alike[0], alike[-1]
        short.append(
            replace(
                first,
                layers=(first.layers[0], last.layers[1]),
                modules=(first.modules[0], last.modules[1]),
                parameters=sum(row.parameters or 0 for row in alike),
            )
        )
    return [*short, rows[-1]]


def text(rows: Sequence[LayerFacts]) -> str:
    """A table for the log, a line each."""
    cells = [HEADINGS, *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(width) if heading == "parameters" else cell.ljust(width)
            for cell, width, heading in zip(line, widths, HEADINGS, strict=True)
        ).rstrip()
        for line in cells
    )
    return "\n".join(lines)


def in_words(factors: Sequence[float]) -> str:
    """Such as '0 -> 0.1 from epoch 5'."""
    starts = [i for i in range(len(factors)) if i == 0 or factors[i] != factors[i - 1]]
    said = [f"{factors[i]:.3g}" + f" from epoch {i}" * (i > 0) for i in starts[: MOST_CHANGES + 1]]
    if len(starts) > len(said):
        said.append(f"... {factors[-1]:.3g}")
    return " -> ".join(said)


def frozen_in_words(factors: Sequence[float]) -> str:
    """Such as 'until epoch 5'."""
    first = next((epoch for epoch, factor in enumerate(factors) if factor > 0), None)
    if first is None:
        return "yes"
    if not all(factors[first:]):
        return "at times"
    return f"until epoch {first}" if first else "no"

"""Averages of weights: soups of runs that share a start, and the line from start to end."""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[str, Tensor]


def average(states: Sequence[State]) -> dict[str, Tensor]:
    """The mean of each tensor; of counters, the first.

    Source: Wortsman et al. 2022, Model soups. BatchNorm's statistics are averaged too.
    """
    first = states[0]
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in first.items()
    }


def interpolate(start: State, end: State, alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) * start + alpha * end; counters are those of end.

    Source: Wortsman et al. 2022, Robust fine-tuning of zero-shot models (WiSE-FT).
    """
    return {
        name: torch.lerp(start[name].double(), tensor.double(), alpha).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in end.items()
    }


def digest(state: State) -> str:
    """What tells whether two states hold the same values: 32 hexadecimal digits."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(state.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        found.update(values.numpy().data)
    return found.hexdigest()

"""lr schedules: pure functions of the progress of a run, so that a resume needs no state."""

import math
from collections.abc import Sequence


def warm_up(step: int, warmup_steps: int) -> float:
    """Linear from 1 / warmup_steps to 1.0, which is reached at step warmup_steps - 1."""
    return 1.0 if step >= warmup_steps else (step + 1) / warmup_steps


def progress(step: int, total: int, warmup_steps: int) -> float:
    """Share of the steps after the warm-up that is done, in [0, 1]."""
    return min(1.0, max(0.0, (step - warmup_steps) / max(1, total - warmup_steps)))


def constant(step: int, total: int, warmup: float = 0.0) -> float:
    """Factor on the lr: 1.0 after the warm-up.

    step: from 0. total: steps of the whole run. warmup: share of total, in [0, 1).
    """
    return warm_up(step, round(warmup * total))


def linear(step: int, total: int, warmup: float = 0.1, final: float = 0.0) -> float:
    """Factor on the lr: straight from 1.0 down to final.

    step: from 0. total: steps of the whole run. warmup: share of total, in [0, 1).
    """
    steps = round(warmup * total)
    return warm_up(step, steps) * (1.0 - (1.0 - final) * progress(step, total, steps))


def cosine(step: int, total: int, warmup: float = 0.1, final: float = 0.0) -> float:
    """Factor on the lr: half a cosine from 1.0 down to final.

    step: from 0. total: steps of the whole run. warmup: share of total, in [0, 1).
    Source: Loshchilov & Hutter 2017, SGDR, without restarts.
    """
    steps = round(warmup * total)
    factor = 0.5 * (1.0 + math.cos(math.pi * progress(step, total, steps)))
    return warm_up(step, steps) * (final + (1.0 - final) * factor)


def one_cycle(
    step: int, total: int, warmup: float = 0.3, start: float = 0.04, final: float = 4e-6
) -> float:
    """Factor on the lr: half a cosine from start up to 1.0, then another down to final.

    step: from 0; final is reached at step total - 1. total: steps of the whole run. warmup: share
    of total, in [0, 1). Source: Smith 2018, super-convergence, as torch's OneCycleLR has it; the
    momentum stays.
    """
    top = warmup * total - 1.0
    if 0.0 < top >= step:
        return _half_cosine(start, 1.0, step / top)
    top = max(0.0, top)
    return _half_cosine(1.0, final, min(1.0, (step - top) / max(1e-9, total - 1.0 - top)))


def _half_cosine(first: float, last: float, share: float) -> float:
    return last + (first - last) * 0.5 * (1.0 + math.cos(math.pi * share))


def staircase(
    step: int, total: int, warmup: float = 0.1, milestones: Sequence[float] = (0.3, 0.6, 0.9)
) -> float:
    """Factor on the lr: from 0 up to 1.0, then a tenth of it after each milestone.

    step: from 0. total: steps of the whole run. warmup, milestones: shares of total, in [0, 1).
    Source: Kolesnikov et al. 2020, Big Transfer, get_lr of its bit_hyperrule.py.
    """
    warmup_steps = round(warmup * total)
    if step < warmup_steps:
        return step / warmup_steps
    return 0.1 ** sum(round(milestone * total) < step for milestone in milestones)

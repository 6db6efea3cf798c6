"""The lr's factor, against closed forms."""

import math
from functools import partial

import pytest
import torch

from conftest import plain
from finetune.build import build_schedule
from finetune.schedules import constant, cosine, linear, one_cycle, staircase

SCHEDULES = [constant, cosine, linear]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_a_straight_line_that_starts_above_zero(schedule):
    factors = [schedule(step, 100, warmup=0.1) for step in range(11)]
    assert factors == pytest.approx([(step + 1) / 10 for step in range(10)] + [1.0])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warm_up_the_first_step_has_the_base_lr(schedule):
    assert schedule(0, 100, warmup=0.0) == 1.0


def test_constant_stays():
    assert {constant(step, 100) for step in range(100)} == {1.0}


def test_cosine_is_half_a_cosine_from_one_to_final():
    for step in range(101):
        expected = 0.2 + 0.8 * (1 + math.cos(math.pi * step / 100)) / 2
        assert cosine(step, 100, warmup=0.0, final=0.2) == pytest.approx(expected)


def test_linear_is_straight_from_one_to_final():
    for step in range(101):
        assert linear(step, 100, warmup=0.0, final=0.2) == pytest.approx(1 - 0.8 * step / 100)


@pytest.mark.parametrize("schedule", [*SCHEDULES, one_cycle])
@pytest.mark.parametrize("total", [1, 2, 3, 7, 1000])
def test_the_factor_stays_between_zero_and_one_for_any_length(schedule, total):
    factors = [schedule(step, total, warmup=0.3) for step in range(total + 2)]
    assert all(0.0 <= factor <= 1.0 for factor in factors)
    assert factors[0] > 0.0


@pytest.mark.parametrize("schedule", [cosine, linear, one_cycle])
def test_past_its_end_a_schedule_stays_at_final(schedule):
    assert schedule(150, 100, final=0.1) == pytest.approx(0.1)


@pytest.mark.parametrize("total", [7, 20, 100, 1001])
@pytest.mark.parametrize("warmup", [0.25, 0.3, 0.5, 0.9])
def test_one_cycle_is_that_of_torch(total, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=total, pct_start=warmup, cycle_momentum=False
    )
    expected = [optimizer.param_groups[0]["lr"]]
    for _ in range(total - 1):
        optimizer.step()
        cycle.step()
        expected.append(optimizer.param_groups[0]["lr"])
    actual = [one_cycle(step, total, warmup) for step in range(total)]
    assert actual == pytest.approx(expected, rel=1e-9)
    assert expected[0] < 0.2  # it does go up
    assert max(expected) > 0.9


@pytest.mark.parametrize("total", [2, 3, 10, 100])
def test_one_cycle_without_warm_up_falls_from_the_base_lr(total):
    factors = [one_cycle(step, total, warmup=0.0, final=0.1) for step in range(total)]
    assert factors[0] == 1.0
    assert factors[-1] == pytest.approx(0.1)
    assert factors == sorted(factors, reverse=True)


def published_lr(step, supports, base_lr):
    """get_lr of github.com/google-research/big_transfer, bit_hyperrule.py (Apache 2.0)."""
    if step < supports[0]:
        return base_lr * step / supports[0]
    for support in supports[1:]:
        if support < step:
            base_lr /= 10
    return base_lr


@pytest.mark.parametrize(
    "supports",
    [
        (100, 200, 300, 400, 500),
        (500, 3000, 6000, 9000, 10_000),
        (500, 6000, 12_000, 18_000, 20_000),
    ],
)
def test_staircase_is_that_of_bit(supports):
    warmup, *milestones, total = supports
    shares = [milestone / total for milestone in milestones]
    for step in range(0, total, 7):
        expected = published_lr(step, [warmup, *milestones], 1.0)
        actual = staircase(step, total, warmup=warmup / total, milestones=shares)
        assert actual == pytest.approx(expected, rel=1e-9)


def test_each_step_asks_the_schedule_itself_and_not_hydra():
    schedule = build_schedule(plain("schedule=cosine", "schedule.warmup=0.2"), total_steps=10)
    assert [schedule(step, 10) for step in range(10)] == [cosine(s, 10, 0.2) for s in range(10)]
    assert type(schedule) is partial  # Hydra's own kind takes a hundred times as long

"""Signals at real processes, in ranks and workers; torture_signals.py has all of the cases."""

import signal

import pytest

from torture_signals import Case, run_case, signal_cases

pytestmark = [pytest.mark.slow, pytest.mark.ddp]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the uninterrupted run lies too, once a case has needed it."""
    return tmp_path_factory.mktemp("signals")


@pytest.mark.parametrize(
    ("case", "resume"),
    [
        (Case(2, signal.SIGTERM, "rank"), True),
        (Case(2, signal.SIGINT, "group", workers=1), False),
        (Case(2, signal.SIGUSR1, "main", "validation"), False),
        (Case(2, signal.SIGTERM, "rank", "start"), False),
        (Case(2, signal.SIGKILL, "rank"), True),
        (Case(2, signal.SIGKILL, "main"), False),
    ],
    ids=str,
)
def test_a_signal_stops_all_ranks_in_order(case, resume, folder):
    found = run_case(case, folder, resume)
    expected = case.expected | ({} if resume else {"resumed_equal": None})
    assert {name: found.get(name) for name in expected} == expected
    assert found["seconds"] < 20  # far less on a machine of its own


def test_the_cases_cover_every_signal_and_target():
    cases = signal_cases()
    assert len(set(cases)) == len(cases)
    assert {(c.signum.name, c.target) for c in cases if c.ranks == 2} >= {
        (name, target)
        for name in ("SIGTERM", "SIGINT", "SIGUSR1")
        for target in ("main", "group", "rank")
    }

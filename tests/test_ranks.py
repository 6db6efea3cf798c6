"""Several processes: how one that has ended ends the others."""

import multiprocessing
import os
import signal
import threading
import time

import pytest

import ends
from conftest import composed
from finetune import ranks, signals
from finetune.cli import starts_ranks
from finetune.ranks import End, Rank, Ranks


@pytest.fixture
def start():
    """start(ends.done, ...): a process for each, with signals blocked, as the launcher does."""
    context, started = multiprocessing.get_context("spawn"), Ranks()

    def run(*targets):
        signals.block()
        try:
            for number, target in enumerate(targets):
                here, there = context.Pipe()
                process = context.Process(target=target, args=(there,))
                process.start()
                there.close()
                started.running.append(Rank(number, process, here))
        finally:
            signals.unblock()
        return started

    yield run
    started.kill()


def test_work_that_is_done_has_no_end_to_tell(start):
    assert start(ends.done, ends.done).wait() is None


@pytest.mark.parametrize(("target", "status"), [(ends.fails, "failed"), (ends.is_killed, "killed")])
def test_nobody_waits_for_a_rank_that_failed(start, monkeypatch, target, status):
    monkeypatch.setattr(ranks, "AFTER_A_FAILURE", 0.5)
    end = start(ends.is_deaf, target).wait()
    assert end.status == status
    said = {"failed": "no images", "killed": "rank 1 was killed by SIGKILL, perhaps for want of"}
    assert end.said.startswith(said[status])


def test_a_stop_of_one_rank_alone_is_told_to_the_others(start):
    end = start(ends.stops_when_told, ends.stops_alone).wait()
    assert end == End(0, "stopped", signal.SIGUSR1)  # and it took less than the sleep


@pytest.mark.parametrize("target", [ends.stops_when_told, ends.is_deaf])
def test_a_signal_is_forwarded_and_a_second_one_waits_for_nobody(start, target):
    started = start(target)

    def twice():
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(signals.SAME + 0.2)
        os.kill(os.getpid(), signal.SIGUSR1)

    with signals.handled(started.receive):
        threading.Thread(target=twice).start()
        end = started.wait()
        time.sleep(signals.SAME + 0.2)  # until both were sent
    expected = "stopped" if target is ends.stops_when_told else "killed"
    assert (end.status, started.received) == (expected, signal.SIGUSR1)


@pytest.mark.parametrize(
    ("overrides", "starts"),
    [
        ("trainer=ddp_cpu", True),
        ("trainer.devices=[0,1]", True),
        ("trainer.devices=2", True),
        ("trainer.devices=1", False),
        ("trainer.devices=[1]", False),
        ("trainer.devices=auto", False),  # torch knows
        ("trainer=ddp_cpu launcher=slurm", False),
    ],
)
def test_what_ranks_run_is_imported_early_where_they_are_sure(monkeypatch, overrides, starts):
    cfg = composed(*overrides.split())
    assert starts_ranks(cfg) == starts
    monkeypatch.setenv("WORLD_SIZE", "2")  # torchrun started them
    assert not starts_ranks(cfg)


def test_ranks_are_spawned_where_no_socket_can_be_made(monkeypatch):
    def fails():
        raise OSError("AF_UNIX path too long")

    monkeypatch.setattr(ranks.forkserver, "ensure_running", fails)
    assert ranks.start_server() == "spawn"
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()

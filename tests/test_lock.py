"""One process per run directory."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from finetune.errors import ConfigError
from finetune.lock import locked, this_process
from finetune.record import Record

pytest.importorskip("fcntl")


def test_a_second_holder_is_told_of_the_first(tmp_path):
    run = tmp_path / "run"
    with locked(run), pytest.raises(ConfigError, match="run is in use by another process"):
        locked(run).__enter__()
    with locked(run):
        Record.create(run, {"process": this_process(), "config": {}})
        with pytest.raises(ConfigError, match=rf"run is in use by process {os.getpid()} on "):
            locked(run).__enter__()
    with locked(tmp_path / "run"):
        pass


def test_a_killed_process_holds_nothing_not_even_by_its_workers(tmp_path):
    script = f"""
        import multiprocessing, os, signal, time
        from pathlib import Path
        from finetune.lock import locked
        fork = multiprocessing.get_context("fork")
        ready = fork.Event()
        def work():
            ready.set()
            time.sleep(60)
        with locked(Path({str(tmp_path)!r})):
            worker = fork.Process(target=work)
            worker.start()
            ready.wait()
            print(worker.pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    )
    worker = int(process.stdout.readline())
    try:
        assert process.wait() == -signal.SIGKILL
        os.kill(worker, 0)  # it lives on
        with locked(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        process.stdout.close()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"hydra\.run\.dir: .*file/run cannot be written"):
        locked(tmp_path / "file" / "run").__enter__()

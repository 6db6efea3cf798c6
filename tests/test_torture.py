"""A short round of make torture: kills of one process and of two ranks, and damaged checkpoints."""

import os
import subprocess
import sys

import pytest

from finetune.overrides import CONF


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_runs_end_as_if_nothing_had_happened():
    done = subprocess.run(
        [sys.executable, "tests/torture.py", "3", "kills", "ranks", "damaged"],
        cwd=CONF.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SIGKILL, then resume: 3 of 3" in done.stdout
    assert "SIGKILL of two ranks: 1 of 1" in done.stdout
    assert "damaged checkpoint: 3 of 3" in done.stdout

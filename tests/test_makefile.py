"""make, where no install is needed to see what it does."""

import shutil
import subprocess

import pytest

from finetune.overrides import CONF


def fake_python(path, version):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho {version}\n")
    path.chmod(0o755)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(("asked", "code"), [("3.12", 0), ("3.13", 2), (None, 0)])
def test_a_python_that_is_asked_for_is_not_passed_over(tmp_path, asked, code):
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(CONF.parent / name, tmp_path)
    fake_python(tmp_path / ".venv" / "bin" / "python", "3.12")
    fake_python(tmp_path / "other", asked)
    (tmp_path / ".venv" / "installed").touch()
    words = ["make", "setup"] + ([f"PYTHON={tmp_path / 'other'}"] if asked else [])
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    if code:
        assert ".venv has Python 3.12, and PYTHON=" in done.stderr
        assert "is 3.13; to make it anew: rm -rf .venv" in done.stderr

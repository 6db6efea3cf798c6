"""run.json and the files of a run: whole at every moment, or not there."""

import json
import os
import shutil
import subprocess

import pytest

from finetune import fit
from finetune.errors import CheckpointError, ConfigError
from finetune.files import write_json, write_whole
from finetune.record import Record


def test_what_is_written_is_what_is_read(tmp_path):
    write_json(tmp_path / "a.json", {"class": "Zürich", "value": 0.1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"class": "Zürich", "value": 0.1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    write_whole(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the n")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_whole(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.bin"
    write_whole(path, lambda file: file.write(b"old"))
    write_whole(path, lambda file: (file.write(b"new"), path.read_bytes() == b"old" or 1 / 0))
    assert path.read_bytes() == b"new"


def test_a_record_is_updated_and_read_again(tmp_path):
    record = Record.create(tmp_path / "deep" / "run", {"seed": 3, "config": {}})
    record.update(status="finished", val={"val/accuracy": 0.5})
    again = Record.read(tmp_path / "deep" / "run")
    assert again.facts == {
        "status": "finished", "error": None, "seed": 3, "config": {}, "val": {"val/accuracy": 0.5},
    }  # fmt: skip


def test_a_run_directory_is_claimed_once(tmp_path):
    Record.create(tmp_path, {"seed": 3, "config": {}})
    with pytest.raises(ConfigError, match=f"resume={tmp_path}"):
        Record.create(tmp_path, {"seed": 4, "config": {}})
    assert Record.read(tmp_path).facts["seed"] == 3


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"hydra\.run\.dir: .*file/run cannot be written"):
        Record.create(tmp_path / "file" / "run", {})


@pytest.mark.parametrize("content", [None, "", "{", "\0\0"], ids=["missing", "empty", "half", "0"])
def test_a_folder_without_a_readable_record_is_no_run(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match="is no run directory"):
        Record.read(tmp_path)


def test_a_missing_folder_is_no_run(tmp_path):
    with pytest.raises(CheckpointError, match="no such run directory"):
        Record.read(tmp_path / "nowhere")


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_to_tell_the_commit_takes_no_lock_of_somebodys_repository(tmp_path, monkeypatch):
    def git(*words):
        named = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *named, *words], cwd=tmp_path, check=True, capture_output=True)

    code, index = tmp_path / "fit.py", tmp_path / ".git" / "index"
    code.write_text("1")
    git("init")
    git("add", "fit.py")
    git("commit", "-m", "first")
    monkeypatch.setattr(fit, "__file__", str(code))
    os.utime(code, (0, 0))  # git would write down that it looked again
    before = index.read_bytes()
    assert fit.git_state()["dirty"] is False
    assert index.read_bytes() == before
    git("status")
    assert index.read_bytes() != before
    code.write_text("2")
    assert fit.git_state()["dirty"] is True

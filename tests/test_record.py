"""run.json and the files of a run: whole at every moment, or not there."""

import json

import pytest

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

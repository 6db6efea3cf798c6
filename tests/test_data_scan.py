"""Bad data is found before the training: every case of the corpus, and what is kept of a scan."""

import json
import logging
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from conftest import SMALL, composed, facts_of, write_photos
from corpus import CASES, JPEG, noise, ordinary_user, png, put, sound, table
from finetune.build import build_splits
from finetune.data import scan as scan_module
from finetune.data.csv import csv
from finetune.data.image_folder import image_folder
from finetune.data.read import MAX_PIXELS
from finetune.data.scan import Scan
from finetune.errors import DataError
from finetune.files import cache_folder


@pytest.fixture(scope="module")
def configs():
    """Of each kind of data, to be completed: composing takes longer than reading."""
    kinds = {"image_folder": "data.root=x", "csv": "data.table=x"}
    return {kind: composed(f"data={kind}", typed) for kind, typed in kinds.items()}


@pytest.fixture
def build(configs):
    def build(keys, **more):
        cfg = configs[keys["data"]].copy()
        for key, value in {**keys, **more}.items():
            if key != "data":
                OmegaConf.update(cfg, f"data.{key}", value)
        return build_splits(cfg)

    return build


def files_of(splits):
    """Paths, whatever the split."""
    parts = (splits.train, splits.val, splits.test)
    return [part.images.paths[i] for part in parts for i in part.indices]


def image_called_odd(splits):
    for part in (splits.train, splits.val, splits.test):
        for position, index in enumerate(part.indices):
            if part.images.paths[index].name.startswith("odd"):
                return part[position][0]
    raise AssertionError("it is not there")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if case.slow else [])
        for name, case in CASES.items()
    ],
)
def test_every_kind_of_data_has_its_verdict(name, build, caplog):
    case = CASES[name]
    if not case.can_be:
        pytest.skip("not on this system")
    folder = Path(tempfile.mkdtemp())  # pytest's own are closed to other users
    try:
        folder.chmod(0o755)
        keys = case.write(folder)
        if case.as_user:
            build(sound(folder / "before"))  # nobody may not import what that needs
            shutil.rmtree(folder / "before")
            with ordinary_user():
                judge(case, keys, folder, build, caplog)
        else:
            judge(case, keys, folder, build, caplog)
    finally:
        shutil.rmtree(folder)


def judge(case, keys, folder, build, caplog):
    caplog.clear()
    if case.verdict == "error":
        with pytest.raises(DataError) as caught:
            build(keys)
        assert [word for word in case.words if word not in str(caught.value)] == []
        if case.skips is None:
            with pytest.raises(DataError):
                build(keys, on_bad="skip")
        else:
            assert "data.on_bad=skip" in str(caught.value)
            splits = build(keys, on_bad="skip")
            assert [entry["path"] for entry in splits.skipped] == [str(folder / case.skips)]
            assert len(files_of(splits)) == 8
        return
    splits = build(keys)
    assert [word for word in case.words if word not in caplog.text] == []
    assert splits.skipped == ()
    if case.verdict == "right":
        assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == []
        image = image_called_odd(splits).permute(1, 2, 0).numpy()
        found = image[[0, 0, -1, -1], [0, -1, 0, -1]]
        np.testing.assert_allclose(found, np.array(case.corners), atol=4)  # JPEG, AVIF are lossy


def aged(folder):
    """The same, changed an hour ago: what changed just now could change again unseen."""
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 3600))
    return folder


def unreadable(path):
    """Something else of the same size in place of a file, with the same time of change."""
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def scanned(tmp_path):
    """A data set that was scanned before."""
    folder = tmp_path / "photos"
    sound(folder)
    image_folder(str(aged(folder)))
    return folder


def test_all_problems_are_told_at_once_and_listed_in_a_file(tmp_path, build, configs):
    folder = tmp_path / "photos"
    keys = sound(folder)
    for i in range(15):
        put(folder / f"train/cat/empty{i:02}.png", b"")
        put(folder / f"val/dog/half{i:02}.jpg", JPEG[:900])
    (folder / "train/emu").mkdir()
    cfg = configs["image_folder"].copy()
    cfg.data.root = keys["root"]
    with pytest.raises(DataError) as caught:
        build_splits(cfg, tmp_path / "run")
    first, *lines, more, where = str(caught.value).splitlines()
    assert first == (f"{folder}: 31 problems: 15 empty, 15 truncated, 1 class without images")
    assert len(lines) == 20
    assert "class folders without images: 'emu'" in lines[0]
    assert lines[1].startswith(f"  {folder}/train/cat/empty00.png cannot be read: it is empty")
    assert more == "  and 11 more"
    assert where == f"All of them: {tmp_path}/run/problems.txt"
    listed = (tmp_path / "run/problems.txt").read_text().splitlines()
    assert len(listed) == 31
    assert listed[-1].startswith(f"truncated\t{folder}/val/dog/half14.jpg cannot be read: ")


def test_a_few_problems_need_no_file(tmp_path, configs):
    cfg = configs["image_folder"].copy()
    cfg.data.root = sound(tmp_path / "photos")["root"]
    put(tmp_path / "photos/train/cat/empty.png", b"")
    with pytest.raises(DataError, match=r"empty\.png cannot be read: it is empty .*on_bad=skip$"):
        build_splits(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["image_folder", "csv"])
def test_skipping_never_leaves_a_class_empty(tmp_path, build, kind):
    keys = table(tmp_path) if kind == "csv" else sound(tmp_path)
    (tmp_path / "val/dog/0.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"on_bad=skip would leave .*'dog', since none"):
        build(keys, on_bad="skip")


def test_what_is_skipped_is_told_and_the_rest_is_as_without_it(tmp_path, build, caplog):
    keys = sound(tmp_path / "photos")
    expected = build(keys)
    put(tmp_path / "photos/train/cat/1.jpg", JPEG[:900])
    splits = build(keys, on_bad="skip")
    assert splits.skipped == (
        {
            "path": str(tmp_path / "photos/train/cat/1.jpg"),
            "why": "it is truncated: its end is missing",
        },
    )
    assert "data.on_bad=skip leaves out 1 files that cannot be read: 1 truncated" in caplog.text
    assert files_of(splits) == files_of(expected)
    assert splits.train.labels == expected.train.labels


def test_a_second_start_asks_for_the_folders_only(scanned, caplog):
    for path in scanned.rglob("*.png"):
        unreadable(path)
    with caplog.at_level(logging.INFO):
        assert len(image_folder(str(scanned)).train) == 4
    assert "scanned" not in caplog.text
    with pytest.raises(DataError, match="8 problems: 8 unknown format"):
        image_folder(str(scanned), rescan=True)
    with pytest.raises(DataError, match="8 problems"):  # what is known to be bad is read again
        image_folder(str(scanned))


def test_a_folder_that_changed_is_read_again_but_only_its_new_files(scanned, caplog):
    unreadable(scanned / "train/cat/0.png")  # as far as size and time tell it is as it was
    put(scanned / "train/cat/new.png", noise(60))
    with caplog.at_level(logging.INFO):
        assert len(image_folder(str(scanned)).train) == 5
    assert "scanned 1 images" in caplog.text
    put(scanned / "train/cat/half.jpg", JPEG[:900])
    with pytest.raises(DataError, match=r"half\.jpg cannot be read"):
        image_folder(str(scanned))


def test_what_is_left_out_is_told_again_at_a_second_start(tmp_path, caplog):
    CASES["unknown types of files"].write(tmp_path)
    for _ in range(2):
        caplog.clear()
        image_folder(str(aged(tmp_path)))
        assert "left out files that are no images: 2 .txt, 1 .heic" in caplog.text


def test_a_bad_file_that_was_mended_in_place_is_good(scanned):
    path = scanned / "train/cat/0.png"
    good, folder_status = path.read_bytes(), path.parent.stat()
    path.write_bytes(good[:-20])
    with pytest.raises(DataError, match="it is truncated"):
        image_folder(str(scanned), rescan=True)
    path.write_bytes(good)
    os.utime(path.parent, ns=(folder_status.st_atime_ns, folder_status.st_mtime_ns))
    assert len(image_folder(str(scanned)).train) == 4


def test_a_file_that_changed_during_the_scan_is_not_taken_for_known(tmp_path):
    sound(tmp_path)  # just now
    image_folder(str(tmp_path))
    unreadable(tmp_path / "train/cat/0.png")
    with pytest.raises(DataError, match="no image format known"):
        image_folder(str(tmp_path))


def test_another_limit_of_pixels_is_not_answered_from_the_cache(scanned):
    with pytest.raises(DataError, match=r"8 problems: 8 decompression bomb"):
        image_folder(str(scanned), max_pixels=35)
    assert image_folder(str(scanned), max_pixels=36).train[0][0].shape == (3, 6, 6)


def test_the_limit_of_pixels_holds_when_an_image_is_read_again(scanned):
    train = image_folder(str(scanned), max_pixels=40).train
    put(Path(train.images.paths[0]), png(41, 1))
    with pytest.raises(DataError, match=r"41 x 1 pixels, more than 40 \(data\.max_pixels\)"):
        train[0]


def test_a_table_is_scanned_once_too(tmp_path, caplog):
    keys = table(tmp_path)
    csv(keys["table"])
    aged(tmp_path)
    csv(keys["table"])
    for path in tmp_path.rglob("*.png"):
        unreadable(path)
    csv(keys["table"])
    with pytest.raises(DataError, match=r"labels\.csv: 8 problems: 8 unknown format\n  line 2: "):
        csv(keys["table"], rescan=True)


def test_nothing_is_written_among_the_data(tmp_path):
    sound(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]}
    image_folder(str(tmp_path))
    after = {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]}
    assert after == before


def test_a_cache_that_is_damaged_or_cannot_be_written_only_costs_time(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    sound(tmp_path / "photos")
    expected = files_of(image_folder(str(aged(tmp_path / "photos"))))
    assert not caplog.records
    (file,) = (tmp_path / "cache/scans").glob("*.npz")
    for damage in (b"", file.read_bytes()[:-30], os.urandom(300)):
        caplog.clear()
        file.write_bytes(damage)
        assert files_of(image_folder(str(tmp_path / "photos"))) == expected
        assert "and is made anew" in caplog.text
    caplog.clear()
    put(tmp_path / "file", b"")
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "file"))
    assert files_of(image_folder(str(tmp_path / "photos"))) == expected
    assert "cannot be written (Not a directory): the next start will look at all" in caplog.text


def test_the_caches_of_data_that_were_not_scanned_for_longest_make_room(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache/scans"

    def scan(name):
        sound(tmp_path / name)
        image_folder(str(tmp_path / name))
        return [path for path in folder.iterdir() if path.name.count(".npz")]

    (first,) = scan("first")
    (second,) = {*scan("second")} - {first}
    part = folder / f"{'0' * 20}.npz.1.part"  # of a process that was killed
    put(part, bytes(10))
    put(folder / "mine.npz", bytes(10))
    for path, hours in ((first, 3), (second, 2), (part, 4)):
        os.utime(path, (path.stat().st_mtime - 3600 * hours,) * 2)
    scan("first")  # now the last to go
    monkeypatch.setattr(scan_module, "_MOST_ON_DISK", 2.5 * first.stat().st_size)
    assert {*scan("third")} > {first, folder / "mine.npz"}
    assert not second.exists()
    assert not part.exists()


def test_the_cache_lies_among_those_of_the_user_or_where_it_is_told(monkeypatch, tmp_path):
    monkeypatch.delenv("FINETUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("a") == tmp_path / "finetune/a"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert cache_folder("a") == tmp_path / "me/.cache/finetune/a"
    monkeypatch.setenv("FINETUNE_CACHE", "here")
    assert cache_folder("a") == Path.cwd() / "here/a"


def test_of_two_processes_one_scans_and_the_other_waits_for_what_it_finds(
    scanned, monkeypatch, caplog
):
    fcntl = pytest.importorskip("fcntl")
    scan = Scan("image_folder", scanned, MAX_PIXELS, rescan=False)
    found = []
    with scan.cache.with_suffix(".lock").open() as lock, caplog.at_level(logging.INFO):
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = threading.Thread(target=lambda: found.append(image_folder(str(scanned))))
        other.start()
        other.join(0.3)
        assert not found
        assert "another process scans the same images" in caplog.text
        fcntl.flock(lock, fcntl.LOCK_UN)
        other.join()
    assert len(found[0].train) == 4


def test_a_rank_takes_the_rescan_of_the_first_for_its_own(scanned, monkeypatch, caplog):
    with caplog.at_level(logging.INFO):
        image_folder(str(scanned), rescan=True)
        assert caplog.text.count("scanned 8 images") == 1
        monkeypatch.setenv("RANK", "1")
        image_folder(str(scanned), rescan=True)
        assert caplog.text.count("scanned") == 1


def test_a_signal_keeps_what_was_read_before_it(scanned, monkeypatch, caplog):
    class Signalled(BaseException):
        pass

    put(scanned / "val/cat/last.png", noise(70))
    put(scanned / "train/cat/first.png", noise(71))
    aged(scanned)
    read = scan_module.check_image

    def stopped_at_last(path, max_pixels):
        if path.name == "last.png":
            raise Signalled
        return read(path, max_pixels)

    monkeypatch.setattr(scan_module, "check_image", stopped_at_last)
    with pytest.raises(Signalled):
        image_folder(str(scanned))
    monkeypatch.setattr(scan_module, "check_image", read)
    with caplog.at_level(logging.INFO):
        image_folder(str(scanned))
    assert "scanned 1 images" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_run_on_names_that_are_no_utf_8_leaves_out_a_bad_file_wherever_it_is_read(
    command, tmp_path
):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/photos\xe9"))
    sound(folder)
    for split in ("train", "val", "test"):
        (folder / split / "cat").rename(os.fsdecode(os.fsencode(folder / split) + b"/caf\xe9"))
    odd = folder / os.fsdecode(b"train/caf\xe9/\xff.png")
    put(odd, b"")
    options = [o for o in SMALL if not o.startswith("data")]
    done = command(
        "train", *options, "data=image_folder", f"data.root={folder}", "max_steps=1",
        "data.on_bad=skip", "hydra.run.dir=run",
    )  # fmt: skip
    assert done.code == 0, done.err
    data = facts_of(Path("run"))["data"]
    shown = rf"{tmp_path}/photos\xe9/train/caf\xe9/\xff.png"
    assert data["skipped"] == [{"path": shown, "why": "it is empty (0 bytes)"}]
    assert data["classes"] == [r"caf\xe9", "dog"]
    assert data["counts"] == {"train": 4, "val": 2, "test": 2}
    assert facts_of(Path("run"))["config"]["data"]["root"] == str(folder)
    assert shown in Path("run/train.log").read_text(encoding="utf-8")

    odd.rename(folder / os.fsdecode(b"test/caf\xe9/\xff.png"))
    done = command("evaluate", "run=run", "trainer.accelerator=cpu")
    assert done.code == 0, done.err
    assert json.loads(Path("run/metrics.json").read_text())["images"] == 2
    assert r"leaves out 1 files that cannot be read: 1 empty" in done.out

    done = command("predict", "run=run", f"input={folder}", "accelerator=cpu")
    assert done.code == 0, done.err
    rows = Path("predictions.csv").read_bytes().splitlines()
    assert len(rows) == 9
    assert rows[1].startswith(os.fsencode(folder) + b"/test/caf\xe9/0.png,")
    assert r"/test/caf\xe9/\xff.png cannot be read: it is empty" in done.out


def test_an_evaluation_refuses_bad_data_as_a_training_does(command, trained, tmp_path):
    folder = write_photos(tmp_path / "photos")
    for i in range(21):
        put(folder / f"train/cat/bad{i}.png", b"")
    done = command(
        "evaluate", f"run={trained}", f"data.root={folder}", "output=here",
        "trainer.accelerator=cpu",
    )  # fmt: skip
    assert done.code == 1
    assert "21 problems: 21 empty" in done.err
    assert "All of them: here/problems.txt" in done.err
    assert len(Path("here/problems.txt").read_text().splitlines()) == 21
    typed = (f"data.root={folder}", "data.on_bad=skip", "output=here", "trainer.accelerator=cpu")
    done = command("evaluate", f"run={trained}", *typed)
    assert done.code == 0, done.err
    assert "leaves out 21 files that cannot be read: 21 empty" in done.out

"""Many files: what is kept of each is small, and none is asked twice."""

import gc
import hashlib
import os
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

from corpus import noise, put, sound
from finetune.data.base import ImageFiles, LabelledImages
from finetune.data.digest import digest
from finetune.data.image_folder import image_folder
from finetune.data.path_list import Names, Paths
from finetune.data.split import cut_splits


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["photos/cat/1.png"],
        ["b/2.png", "b/1.png", "a/1.png", "b/2.png", "a/b/c/1.png", "top.png", "/root.png"],
        [os.fsdecode(b"caf\xe9/\xff.png"), "caf\u00e9/\U0001f408.png", "a b/\n.png", "../up.png"],
        ["a//b/./1.png", "./2.png"],
    ],
)
def test_a_path_comes_back_as_it_was(given):
    paths = [Path(path) for path in given]
    packed = Paths.of(given)
    assert [*packed] == [*Paths.of(paths)] == paths
    assert [*packed.texts()] == [str(path) for path in paths]
    assert [path for path, _, _ in packed.status(range(len(paths)))] == [*map(os.fsencode, paths)]
    assert packed[1:] == paths[1:]
    assert [packed[i - len(paths)] for i in range(len(paths))] == paths
    with pytest.raises(IndexError):
        packed[len(paths)]


def test_parts_of_a_list_are_what_they_were():
    first, second = Paths.of(["a/1", "b/2", "a/3"]), Paths.below("c", Names.of(["4", "5"]))
    joined = Paths.joined([first, second, Paths.of([])])
    assert [*map(str, joined)] == ["a/1", "b/2", "a/3", "c/4", "c/5"]
    assert [*joined.take([4, 0, 1]).texts()] == ["c/5", "a/1", "b/2"]
    names = Names.of(["x", "yy", "zzz"])
    assert [[*names.part(*ends)] for ends in ((0, 1), (1, 3), (2, 2))] == [["x"], ["yy", "zzz"], []]


def test_a_file_among_many_takes_less_than_200_bytes():
    count = 50_000
    gc.collect()
    tracemalloc.start()
    paths = Paths.of(f"/data/photos/class_{i // 500:03}/image_{i:08}.png" for i in range(count))
    whole = LabelledImages.of(ImageFiles(paths), [i // 500 for i in range(count)])
    splits = cut_splits(whole, tuple(map(str, range(100))), seed=0)
    del paths, whole
    for part in (splits.train, splits.val, splits.test):
        digest(part)
        part.fingerprint()
    gc.collect()
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert now / count < 100  # of 200: the batches and what the system adds come on top
    assert peak / count < 300


def in_one_folder(tmp_path):
    """Files of 1, 2, 3 bytes, and one that is not there."""
    for size in (1, 2, 3):
        put(tmp_path / f"{size % 2}/{size}.png", bytes(size))
    return [tmp_path / name for name in ("1/3.png", "0/2.png", "0/gone.png", "1/1.png")]


def test_the_digest_of_files_is_the_one_that_earlier_runs_recorded(tmp_path):
    paths = in_one_folder(tmp_path)
    plain = hashlib.blake2b(repr((3, None, (5, 6, 8))).encode(), digest_size=16)
    for path, size in ((paths[3], 1), (paths[0], 3), (paths[2], -1)):
        plain.update(os.fsencode(path)[len(os.fsencode(tmp_path)) :] + b"\0%d\0" % size)
    chosen = LabelledImages.of(ImageFiles(paths), [6, 7, 8, 5]).subset([3, 0, 2])
    assert digest(chosen) == plain.hexdigest()


def test_the_fingerprint_is_of_absolute_paths_sizes_and_times(tmp_path, monkeypatch):
    paths = in_one_folder(tmp_path)
    plain = hashlib.blake2b(digest_size=16)
    for path in (paths[2], paths[0]):
        facts = "missing"
        if path.exists():
            facts = f"{path.stat().st_size} {path.stat().st_mtime_ns}"
        plain.update(os.fsencode(path) + f"\0{facts}\n".encode())
    monkeypatch.chdir(tmp_path / "1")
    relative = ImageFiles([Path("3.png"), Path("../0/gone.png")])
    assert relative.fingerprint([1, 0]) == ImageFiles(paths).fingerprint([2, 0])
    assert relative.fingerprint([1, 0]) == plain.hexdigest()


def test_a_start_asks_each_file_once_at_most(tmp_path, monkeypatch):
    sound(tmp_path)
    put(tmp_path / "train/cat/below/deep.png", noise(99))
    for path in [tmp_path, *tmp_path.rglob("*")]:
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 3600))
    asked = []
    stat = os.stat

    def counting(path, *args, **kwargs):
        asked.append(os.fsdecode(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", counting)

    def start(*read):
        """Digests; each file was asked once, and once more by what decodes it in the scan."""
        asked.clear()
        splits = image_folder(str(tmp_path))
        parts = (splits.train, splits.val, splits.test)
        found = [(digest(part), part.fingerprint()) for part in parts]
        files = {str(path) for path in tmp_path.rglob("*.png")}
        times = {path: number for path, number in Counter(asked).items() if path in files}
        assert times == {path: 1 + (path in read) for path in files}
        return found

    first = start(*map(str, tmp_path.rglob("*.png")))
    second = start()
    assert first == second
    new = str(tmp_path / "train/cat/new.png")
    put(Path(new), noise(98))
    third = start(new)
    assert third[0] != second[0]
    assert third[1:] == second[1:]
    # overwritten in place: its folder does not tell, and the scan does not ask
    put(tmp_path / "val/cat/0.png", noise(97) + b"longer")
    assert all(now != before for now, before in zip(start(new)[1], third[1], strict=True))

"""Images that are decoded once: the same batches, shared by workers, found only where they fit."""

import logging
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image

from conftest import SMALL, assert_same_end, facts_of, finish, lose, plain, write_photos
from finetune import build
from finetune.data import cache, scan
from finetune.data.base import ImageFiles, LabelledImages
from finetune.data.cache import Choice, ImageCache, Need, choose, decoded_bytes
from finetune.data.image_folder import image_folder
from finetune.data.transforms import evaluation, light, none, strong
from finetune.datamodule import DataModule
from finetune.errors import ConfigError, DataError
from finetune.features import Phase, Plan
from finetune.specs import InputSpec
from test_datamodule import Trainer, equal, stacked

SPEC = InputSpec(8, 8)
GB = 2**30
RUN = [o for o in SMALL if not o.startswith("data")]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """PNGs, which Pillow decodes, and JPEGs of several sizes, which libjpeg does."""
    root = write_photos(tmp_path_factory.mktemp("cache") / "photos")
    noise = np.random.default_rng(0)
    for i in range(6):
        pixels = noise.integers(0, 255, (9 + i, 14 - i, 3), np.uint8)
        Image.fromarray(pixels).save(root / "train" / "ant" / f"{i}.jpg")
    return root


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where this test alone keeps images."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


def datamodule(root, kind, folder, transform=light, num_workers=0, balanced=False, epoch=0):
    choice = Choice(kind, ("train", "val") if kind != "none" else ())
    module = DataModule(
        image_folder(str(root)), transform(SPEC), evaluation(SPEC), 4, num_workers, 3, balanced,
        cache=ImageCache(choice, folder), augmented=transform is not none,
    )  # fmt: skip
    module.trainer = Trainer(epoch)
    module.trainer.max_epochs = 5
    return module


@pytest.mark.parametrize(
    ("transform", "num_workers", "balanced"),
    [(light, 0, False), (light, 2, False), (none, 0, False), (strong, 0, True)],
)
def test_batches_of_kept_images_are_the_batches_of_files(
    photos, folder, transform, num_workers, balanced
):
    for epoch in (0, 2):
        train, val = [], []
        for kind in ("none", "ram", "disk"):
            workers = 0 if kind == "none" else num_workers
            module = datamodule(photos, kind, folder, transform, workers, balanced, epoch)
            train.append(stacked(module.train_dataloader()))
            val.append(stacked(module.val_dataloader()))
        assert all(equal(train[0], others) for others in train[1:])
        assert all(equal(val[0], others) for others in val[1:])


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_a_file_is_read_once_however_many_epochs_there_are(photos, folder, kind, monkeypatch):
    read = []
    of_file = ImageFiles.__getitem__
    monkeypatch.setattr(
        ImageFiles, "__getitem__", lambda files, i: (read.append(i), of_file(files, i))[1]
    )
    module = datamodule(photos, kind, folder)
    for epoch in range(3):
        module.trainer.current_epoch = epoch
        stacked(module.train_dataloader())
        stacked(module.val_dataloader())
    assert len(read) == len(module.splits.train) + len(module.splits.val)


@pytest.mark.parametrize("kind", ["ram", "device"])
def test_nothing_is_read_while_features_stand_in_for_images(photos, folder, kind):
    module = datamodule(photos, "ram", folder, none, epoch=1)
    module.cache.choice = Choice(kind, ("train", "val"))
    module.features = SimpleNamespace(
        plan=Plan((Phase(0, 1, 4),), 1), model=SimpleNamespace(depth=4)
    )  # as in lp_ft
    module.trainer.strategy = SimpleNamespace(root_device=torch.device("cpu"))
    module.trainer.state = SimpleNamespace(fn=TrainerFn.FITTING)
    module.trainer.limit_val_batches = 1.0
    train, val = module.train_dataloader(), module.val_dataloader()
    assert not module.cache.has("val")
    assert not module.cache.has("train")
    assert module._resident is None
    expected = datamodule(photos, "none", folder, none, epoch=1)
    assert equal(stacked(train), stacked(expected.train_dataloader()))
    assert equal(stacked(val), stacked(expected.val_dataloader()))
    assert module.cache.has("val")
    assert module.cache.has("train") or module._resident is not None


def test_an_epoch_that_is_the_last_keeps_nothing_in_memory(photos, folder):
    module = datamodule(photos, "ram", folder, epoch=4)
    stacked(module.train_dataloader())
    assert not module.cache.has("train")


def test_an_image_comes_back_as_it_was_with_its_strides_and_as_a_copy(photos, folder):
    images = image_folder(str(photos)).train
    for kind in ("ram", "disk"):
        kept = ImageCache(Choice(kind, ("train",)), folder).get("train", images, None)
        assert len(kept) == len(images)
        for i in range(len(images)):
            image = images[i][0]
            assert torch.equal(kept[i], image)
            assert kept[i].stride() == image.stride()
        before = kept[0].clone()
        kept[0].zero_()  # as a transform might that works in place
        assert torch.equal(kept[0], before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forks on Linux and macOS alone")
def test_workers_share_the_memory_of_the_images_and_do_not_copy_it(photos, folder):
    kept = ImageCache(Choice("ram", ("train",)), folder).get(
        "train", image_folder(str(photos)).train, None
    )
    child = os.fork()
    if child == 0:
        kept.blocks[0][:4] = 1, 2, 3, 4
        os._exit(0)
    os.waitpid(child, 0)
    assert kept.blocks[0][:4].tolist() == [1, 2, 3, 4]  # a page of its own would be the child's


def test_images_on_disk_are_found_by_the_next_run(photos, folder, monkeypatch):
    first = stacked(datamodule(photos, "disk", folder).train_dataloader())
    monkeypatch.setattr(cache, "_read_all", None)  # nothing is read again
    assert equal(stacked(datamodule(photos, "disk", folder).train_dataloader()), first)
    assert not [*folder.glob("*.part")]


def one_file(folder):
    (path,) = folder.glob("*.images")
    return path


def kept_on_disk(images, folder, transform=None):
    return ImageCache(Choice("disk", ("train",)), folder).get("train", images, transform)


@pytest.mark.parametrize("change", ["size", "time", "order", "transform", "decoder"])
def test_images_on_disk_are_not_found_for_other_files(tmp_path, folder, change, monkeypatch):
    root = write_photos(tmp_path / "photos", train=2)
    images = LabelledImages.of(ImageFiles(sorted(root.rglob("*.png"))), [0] * 6)
    kept_on_disk(images, folder)
    transform = None
    path = images.images.paths[0]
    if change == "size":
        Image.new("RGB", (3, 5), "red").save(path)
    elif change == "time":
        os.utime(path, ns=(0, 0))
    elif change == "order":
        images = images.subset([1, 0, 2, 3, 4, 5])
    elif change == "transform":
        transform = evaluation(SPEC)
    else:
        monkeypatch.setattr(cache, "FORMAT", 0)
    if change in ("size", "time"):  # a later run, which looks again
        images = LabelledImages.of(ImageFiles(sorted(root.rglob("*.png"))), [0] * 6)
    again = kept_on_disk(images, folder, transform)
    expected = images[0][0] if transform is None else transform(images[0][0])
    assert torch.equal(again[0], expected)
    assert len([*folder.glob("*.images")]) == 2


def test_files_of_one_run_do_not_make_room_for_each_other(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(cache, "MOST_ON_DISK", 1)
    images = image_folder(str(write_photos(tmp_path / "photos", train=2))).train
    kept = ImageCache(Choice("disk", ("train", "val")), folder)
    for name, positions in (("train", [0, 1]), ("val", [2])):
        assert kept.get(name, images.subset(positions), None)
    assert len([*folder.glob("*.images")]) == 2
    kept_on_disk(images.subset([1, 0]), folder)  # of another run
    assert len([*folder.glob("*.images")]) == 1


@pytest.mark.parametrize("damage", ["cut", "short", "empty", "end", "bit"])
def test_a_file_that_is_not_whole_is_made_anew(photos, folder, damage, caplog):
    images = image_folder(str(photos)).train
    kept_on_disk(images, folder)
    path = one_file(folder)
    whole = bytearray(path.read_bytes())
    if damage in ("end", "bit"):
        whole[-1 if damage == "end" else 10] ^= 1
    keep = {"cut": len(whole) // 2, "short": len(whole) - 1, "empty": 0}
    path.write_bytes(whole[: keep.get(damage, len(whole))])
    again = kept_on_disk(images, folder)
    assert "is not whole and is made anew" in caplog.text
    assert all(torch.equal(again[i], images[i][0]) for i in range(len(images)))
    assert cache.opened(path, len(images)) is not None


def test_a_damaged_image_of_a_large_file_is_never_trained_on(photos, folder, monkeypatch):
    monkeypatch.setattr(cache, "READ_AT_ONCE", 0)
    images = image_folder(str(photos)).train
    kept_on_disk(images, folder)
    path = one_file(folder)
    damaged = bytearray(path.read_bytes())
    damaged[10] ^= 1
    path.write_bytes(damaged)
    found = kept_on_disk(images, folder)
    assert torch.equal(found[3], images[3][0])
    first = int(found.places[:, 1].argmin())  # they lie there as threads brought them
    with pytest.raises(DataError, match=r"that is kept there is damaged. The file is removed"):
        found[first]
    again = kept_on_disk(images, folder)
    assert all(torch.equal(again[i], images[i][0]) for i in range(len(images)))


def test_a_rescan_believes_no_file_of_before(photos, folder, monkeypatch):
    images, began = image_folder(str(photos)).train, time.time()
    kept_on_disk(images, folder)
    os.utime(one_file(folder), (began - 60, began - 60))
    read, choice = [], Choice("disk", ("train",))
    read_all = cache._read_all
    monkeypatch.setattr(
        cache, "_read_all", lambda *args, **kwargs: read.append(1) or read_all(*args, **kwargs)
    )
    for since, times in ((0.0, 0), (began + 60, 1), (began - 60, 1)):
        assert ImageCache(choice, folder, since).get("train", images, None)
        assert len(read) == times


def test_what_a_killed_process_left_is_removed(photos, folder):
    images = image_folder(str(photos)).train
    kept_on_disk(images, folder)
    path = one_file(folder)
    path.unlink()
    ours = folder / f"{path.name}.1.part"
    another, old = (folder / f"{i * 32}.images.2.part" for i in "ab")
    for part in (ours, another, old):
        part.write_bytes(b"half")
    os.utime(old, (0, 0))
    kept_on_disk(images, folder)
    assert [*folder.glob("*.part")] == [another]  # somebody may be writing it


def test_a_worker_that_is_no_fork_opens_the_file_again(photos, folder):
    images = image_folder(str(photos)).train
    kept = kept_on_disk(images, folder)
    make, arguments = kept.__reduce__()
    assert arguments == (one_file(folder), len(images))
    assert torch.equal(make(*arguments)[3], images[3][0])


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_an_image_that_cannot_be_read_is_named(tmp_path, folder, kind):
    root = write_photos(tmp_path / "photos")
    module = datamodule(root, kind, folder)
    (root / "train" / "bee" / "3.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"bee.3\.png cannot be read"):
        stacked(module.train_dataloader())
    assert not [*folder.glob("*.images*.part")]


def test_a_disk_without_room_is_refused_before_images_are_read(photos, folder, monkeypatch):
    usage = cache.shutil.disk_usage(photos)._replace(free=100)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match=r"data\.cache=disk: the images take about .* has room"):
        kept_on_disk(image_folder(str(photos)).train, folder)


def test_images_that_cannot_be_kept_cost_no_run(photos, folder, caplog):
    folder.parent.mkdir(parents=True)
    folder.write_text("a file where a folder should be")
    disk = stacked(datamodule(photos, "disk", folder).train_dataloader())
    assert "images of train are read again in every epoch" in caplog.text
    small = datamodule(photos, "ram", folder)
    small.cache.choice = Choice("ram", ("train",), most=1000)
    assert equal(stacked(small.train_dataloader()), disk)
    assert "they take more than 1 kB" in caplog.text


TWO = {"train": Need(GB, 9), "val": Need(GB // 4, 3)}


@pytest.mark.parametrize(
    ("asked", "needs", "memory", "ranks", "kind", "splits", "why"),
    [
        ("auto", TWO, 8 * GB, 1, "ram", ("train", "val"), None),
        ("auto", TWO, 4 * GB, 1, "ram", ("train",), None),
        ("auto", TWO, 2 * GB, 1, "ram", ("val",), "about 1.07 GB, and 2.15 GB of memory are free"),
        ("auto", {"train": Need(GB, 9)}, GB, 1, "none", (), "data.cache=disk"),
        ("auto", {"train": Need(GB, 1)}, 8 * GB, 1, "none", (), None),
        ("auto", TWO, None, 1, "none", (), "not known"),
        ("auto", TWO, 8 * GB, 2, "none", (), "2 devices"),
        ("ram", TWO, 2 * GB, 1, "ram", ("train", "val"), None),
        ("ram", TWO, None, 1, "ram", ("train", "val"), None),
        ("disk", {"train": Need(GB, 1)}, GB, 2, "disk", ("train",), None),
        ("none", TWO, 8 * GB, 1, "none", (), None),
    ],
)
def test_where_images_are_kept(asked, needs, memory, ranks, kind, splits, why):
    choice = choose(asked, needs, memory, ranks)
    assert (choice.kind, choice.splits) == (kind, splits)
    assert (why in choice.why) if why else choice.why is None


@pytest.mark.parametrize(("memory", "ranks", "said"), [(GB, 1, "about 1.34 GB"), (GB, 2, "a copy")])
def test_memory_that_is_asked_for_and_not_there_is_refused(memory, ranks, said):
    with pytest.raises(ConfigError, match=said):
        choose("ram", TWO, memory, ranks)


def test_how_large_images_are_is_known_before_they_are_decoded(photos, tmp_path):
    images = image_folder(str(photos)).train
    assert decoded_bytes(images) == sum(images[i][0].nbytes for i in range(len(images)))
    one = images.images.paths[0]
    many = LabelledImages.of(ImageFiles([one] * 1000), [0] * 1000)
    assert decoded_bytes(many) == int(cache.MARGIN * 1000 * images[0][0].nbytes)
    assert decoded_bytes(LabelledImages.of(ImageFiles([Path("gone.jpg")]), [0])) == 0
    huge = tmp_path / "huge.png"  # Pillow would warn of it
    Image.new("1", (10_000, 9_000)).save(huge)
    assert decoded_bytes(LabelledImages.of(ImageFiles([huge]), [0])) == 3 * 90_000_000


def chosen(photos, *overrides, plan=None, epochs=3, memory=8 * GB):
    data = ["data=image_folder", f"data.root={photos}"] if photos else ["data=fake"]
    cfg = plain(*RUN, *data, f"epochs={epochs}", *overrides)
    splits = build.build_splits(cfg)
    budget = build.build_budget(cfg, len(splits.train), len(splits.val or ()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "free_memory", lambda: memory)
        return build.choose_cache(cfg, splits, SPEC, plan or Plan(), budget), cfg, splits


ALWAYS = Plan((Phase(0, 3, 4),), 1, always=True)


@pytest.mark.parametrize(
    ("overrides", "plan", "epochs", "splits", "said"),
    [
        ((), None, 3, ("train", "val"), ""),
        ((), None, 1, (), ""),
        (("data.cache=ram",), None, 1, (), "data.cache=ram has no effect: every image is read"),
        (("data.cache=disk",), None, 1, ("train", "val"), ""),
        (("data.cache=none",), None, 3, (), ""),
        (("data.cache=ram",), ALWAYS, 3, (), "features stand in for the images"),
        ((), Plan((Phase(0, 1, 4),), 1), 3, ("train", "val"), ""),
        ((), Plan((Phase(0, 2, 4),), 1), 3, (), ""),
        (("+trainer.limit_train_batches=2",), None, 3, (), ""),
    ],
)  # fmt: skip
def test_images_are_kept_where_a_run_reads_them_again(
    photos, overrides, plan, epochs, splits, said, caplog
):
    choice, *_ = chosen(photos, *overrides, plan=plan, epochs=epochs)
    assert choice.splits == splits
    assert said in caplog.text if said else not caplog.records


def test_a_cache_for_images_in_memory_is_told_to_have_no_effect(caplog):
    assert chosen(None, "augment=strong")[0] == Choice()
    assert not caplog.records
    assert chosen(None, "data.cache=disk")[0] == Choice()
    assert "data.cache=disk has no effect: these images are in memory as they" in caplog.text


def test_no_workers_are_started_for_images_that_are_kept(photos, monkeypatch):
    _, cfg, splits = chosen(photos)
    monkeypatch.setattr(build, "usable_cores", lambda: 16)
    assert build.choose_workers(cfg, splits) == 4
    assert build.choose_workers(cfg, splits, Choice("ram", ("train",))) == 0
    assert build.choose_workers(cfg, splits, Choice("ram", ("val",))) == 4
    cfg.num_workers = 3
    assert build.choose_workers(cfg, splits, Choice("ram", ("train",))) == 3


def test_processes_of_one_machine_read_images_for_each_other_one_at_a_time(photos, folder):
    images = image_folder(str(photos)).train
    name = cache.digest(images, None)
    with scan.alone(folder / f"{name}.lock", ""):
        other = threading.Thread(target=kept_on_disk, args=(images, folder))
        other.start()
        other.join(0.3)
        assert other.is_alive()
        assert not [*folder.glob("*.images")]
    other.join()
    assert one_file(folder)


LONG = [*RUN, "epochs=3", "augment=strong", "logger=csv"]


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """A run of LONG without interruption, which decodes every image in every epoch."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return finish(folder, *LONG, "data=image_folder", f"data.root={photos}", "data.cache=none")


@pytest.mark.parametrize(("before", "after"), [("none", "ram"), ("ram", "disk")])
def test_a_run_that_crashed_goes_on_with_another_cache_and_ends_with_the_same_bytes(
    command, photos, folder, whole, tmp_path, at_step, before, after
):
    at_step(7, lose)
    data = ["data=image_folder", f"data.root={photos}", f"data.cache={before}"]
    crashed = command("train", *LONG, *data, "hydra.run.dir=run")
    assert crashed.code == 1
    assert "the power is gone" in facts_of(tmp_path / "run")["error"]
    resumed = command("train", "resume=run", f"data.cache={after}")
    assert resumed.code == 0, resumed.err
    assert "images: 24 of train kept" in resumed.out
    assert_same_end(tmp_path / "run", whole)


def test_what_is_kept_is_told(photos, folder, caplog):
    caplog.set_level(logging.INFO, "finetune.data.cache")
    stacked(datamodule(photos, "ram", folder).train_dataloader())
    assert "images: 24 of train kept in memory as decoded, " in caplog.text

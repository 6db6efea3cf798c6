"""Folders of images: what is found, what is left out, and what is wrong with them."""

import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from finetune.data.image_folder import image_folder
from finetune.data.split import check_splits
from finetune.errors import DataError


@pytest.fixture
def tree(tmp_path):
    """Makes files below tmp_path/photos; an image's value is its number in the call."""

    def make(*names):
        root = tmp_path / "photos"
        root.mkdir(exist_ok=True)
        for value, name in enumerate(names):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix.lower() == ".png":
                Image.new("RGB", (2, 2), (value, value, value)).save(path)
            else:
                path.write_text("text")
        return str(root)

    return make


def contents(part):
    """(name below the class folder's parent, label), as they stand."""
    paths = [part.images.paths[i] for i in part.indices]
    return [(path.name, label) for path, label in zip(paths, part.labels, strict=True)]


def test_folders_for_splits_are_kept_as_they_stand(tree):
    root = tree(
        "train/dog/1.png", "train/cat/2.png", "val/cat/3.png", "test/dog/4.png", "test/cat/5.png"
    )
    splits = image_folder(root)
    assert splits.classes == ("cat", "dog")
    assert contents(splits.train) == [("2.png", 0), ("1.png", 1)]
    assert contents(splits.val) == [("3.png", 0)]
    assert contents(splits.test) == [("5.png", 0), ("4.png", 1)]


def test_images_are_those_of_the_files(tree):
    splits = image_folder(tree("train/a/0.png", "train/b/1.png"))
    assert torch.equal(splits.train[1][0], torch.full((3, 2, 2), 1, dtype=torch.uint8))


def test_val_labels_go_by_name_never_by_position(tree):
    root = tree("train/a/1.png", "train/b/2.png", "train/c/3.png", "val/c/4.png")
    assert contents(image_folder(root).val) == [("4.png", 2)]


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_usual_names_of_splits_are_understood(tree, val):
    root = tree("Train/a/1.png", "Train/b/2.png", f"{val}/a/3.png", "TEST/b/4.png")
    splits = image_folder(root)
    assert contents(splits.val) == [("3.png", 0)]
    assert contents(splits.test) == [("4.png", 1)]


def test_a_split_that_is_not_there_is_none(tree):
    splits = image_folder(tree("train/a/1.png", "train/b/2.png", "val/a/3.png"))
    assert splits.val is not None
    assert splits.test is None


def test_class_folders_alone_are_cut_by_the_seed(tree):
    root = tree(*(f"{name}/{i:02}.png" for name in ("cat", "dog") for i in range(20)))
    splits = image_folder(root)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [28, 6, 6]
    found = [name for part in (splits.train, splits.val, splits.test) for name in contents(part)]
    assert sorted(found) == sorted((f"{i:02}.png", label) for label in (0, 1) for i in range(20))
    assert contents(image_folder(root).test) == contents(splits.test)
    assert contents(image_folder(root, split_seed=1).test) != contents(splits.test)
    check_splits(splits)


def test_a_class_may_be_called_train(tree):
    root = tree(*(f"{name}/{i}.png" for name in ("bus", "car", "train") for i in range(3)))
    assert image_folder(root).classes == ("bus", "car", "train")


def test_images_at_any_depth_belong_to_their_class_in_the_order_of_their_paths(tree):
    root = tree("train/a/z.png", "train/a/deep/er/y.png", "train/a/B.PNG", "train/b/x.png")
    assert contents(image_folder(root).train) == [
        ("B.PNG", 0), ("y.png", 0), ("z.png", 0), ("x.png", 1),
    ]  # fmt: skip


def test_what_is_hidden_is_left_out_with_a_warning(tree, caplog):
    root = tree(
        "train/a/1.png", "train/b/2.png", "train/a/.3.png", "train/.git/x.png",
        "train/__MACOSX/y.png", "train/a/.thumbs/z.png", ".cache/q.png", "__MACOSX/._r.png",
        "train/a/.DS_Store",
    )  # fmt: skip
    splits = image_folder(root)
    assert splits.classes == ("a", "b")
    assert contents(splits.train) == [("1.png", 0), ("2.png", 1)]
    (record,) = caplog.records
    assert "left out what is hidden or of __MACOSX, such as" in record.getMessage()
    assert record.getMessage().endswith("6 in all")


def test_unknown_types_of_files_are_counted(tree, caplog):
    image_folder(
        tree("train/a/1.png", "train/b/2.png", "train/a/n.TXT", "train/b/m.txt", "train/b/q")
    )
    (record,) = caplog.records
    assert "left out files that are no images: 2 .txt, 1 without suffix" in record.getMessage()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_no_utf_8_are_read(tree):
    root = tree("train/a/1.png", "train/b/2.png")
    Path(root, "train/a/1.png").rename(os.fsdecode(os.fsencode(root) + b"/train/a/caf\xe9.png"))
    assert image_folder(root).train[0][0].shape == (3, 2, 2)


def test_a_home_folder_is_expanded(tree, monkeypatch):
    root = tree("train/a/1.png", "train/b/2.png")
    monkeypatch.setenv("HOME", str(Path(root).parent))
    assert len(image_folder("~/photos").train) == 2


ERRORS = {
    "no class folders": ([], r"photos has no class folders, nor images; expected <root>/train"),
    "only images": (["1.png", "2.png"], "photos has no class folders, but 2 images straight in it"),
    "images straight in train": (
        ["train/1.png", "val/2.png"],
        r"photos/train has no class folders, but 1 images straight in it.*data=csv data\.table=",
    ),
    "images beside classes": (
        ["train/a/1.png", "train/b/2.png", "train/3.png"],
        r"holds 1 images outside its class folders, such as .*train/3\.png; move them",
    ),
    "one class": (["cat/1.png"], "photos has one class folder only, 'cat'; expected"),
    "one folder too deep": (
        ["photos/cat/1.png", "photos/dog/2.png"],
        r"one class folder only, 'photos'; .*did you mean data\.root=.*/photos/photos\?",
    ),
    "one class in train": (["train/cat/1.png"], "train has one class folder only, 'cat'"),
    "class without images": (
        ["train/a/1.png", "train/b/x.txt", "train/c/y.txt"],
        r"photos/train has class folders without images: 'b', 'c'; .*\.jpg",
    ),
    "class that train lacks": (
        ["train/a/1.png", "train/b/2.png", "val/c/3.png"],
        "photos/val has classes that train lacks: 'c'; add training images of them",
    ),
    "no train": (["val/a/1.png", "test/a/2.png"], "photos has 'test', 'val' but no train folder"),
    "split twice": (
        ["train/a/1.png", "train/b/2.png", "val/a/3.png", "valid/a/4.png"],
        "are both the val split; merge them or rename one",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_wrong_with_the_folders_is_said(tree, case):
    names, message = ERRORS[case]
    with pytest.raises(DataError, match=message):
        image_folder(tree(*names))


def test_a_missing_root_is_shown_resolved_with_what_is_there(tree, monkeypatch):
    parent = Path(tree("train/a/1.png")).parent
    monkeypatch.chdir(parent)
    with pytest.raises(DataError) as caught:
        image_folder("fotos/train")
    assert str(caught.value) == (
        f"data.root=fotos/train: {parent}/fotos/train does not exist; "
        f"{parent} holds the folders 'photos'"
    )


def test_a_root_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "photos.zip").write_text("")
    with pytest.raises(DataError, match=r"photos\.zip is a file, not a folder. Unpack it"):
        image_folder(str(tmp_path / "photos.zip"))


@pytest.mark.parametrize("target", ["../b", "../..", "."])
def test_a_folder_reached_twice_is_refused(tree, target):
    root = tree("train/a/1.png", "train/b/2.png")
    Path(root, "train/a/link").symlink_to(target)
    with pytest.raises(DataError, match=r"are the same folder \(a symbolic link\)"):
        image_folder(root)


def test_a_class_that_is_a_link_is_read(tree):
    root = tree("elsewhere/1.png", "set/train/b/2.png")
    Path(root, "set/train/a").symlink_to("../../elsewhere")
    assert image_folder(f"{root}/set").classes == ("a", "b")


def test_a_folder_without_permission_is_named(tree, monkeypatch):
    root = tree("train/a/1.png", "train/b/2.png")
    scandir = os.scandir

    def refuse(path):  # chmod would not stop root
        if os.fspath(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"photos/train/b cannot be read: Permission denied"):
        image_folder(root)


def test_folders_beside_the_splits_are_named(tree, caplog):
    root = tree("train/a/1.png", "train/b/1.png", "test/a/2.png", "test/b/2.png", "dev/a/3.png")
    assert image_folder(root).val is None
    assert "left out the folders 'dev', which are neither train, val nor test" in caplog.text


def test_images_at_any_depth_are_in_the_order_of_their_paths(tree):
    # a cut by seed goes by the order, and a folder's images do not all stand together in it
    names = ["a/1.png", "a-1.png", "a0.png", "a/b/1.png", "a/b-1.png", "a.b.png"]
    paths = sorted(f"train/{name}/{file}" for name in ("cat", "dog") for file in names)
    root = tree(*reversed(paths))
    train = image_folder(root).train
    assert [str(path) for path in train.images.paths] == [f"{root}/{path}" for path in paths]
    assert [*train.labels] == [0] * 6 + [1] * 6

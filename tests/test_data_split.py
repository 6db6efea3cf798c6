"""Cuts are stratified, repeatable and never touch test."""

import logging
from collections import Counter

import numpy as np
import pytest
import torch

from conftest import composed, write_photos
from finetune.build import build_splits
from finetune.data.base import ImageArray, LabelledImages, Splits
from finetune.data.split import (
    TRAIN_VAL_TEST,
    check_splits,
    cut,
    cut_splits,
    cut_val,
    limit_train,
    listed,
    select_classes,
    stratified,
)
from finetune.errors import ConfigError, DataError

UNEVEN = [0] * 100 + [1] * 20 + [2] * 3 + [1] * 20 + [3] * 7


def labelled(labels):
    """Image i has the value i, so that an image tells where it came from."""
    array = torch.arange(len(labels), dtype=torch.uint8).reshape(-1, 1, 1, 1)
    return LabelledImages.of(ImageArray(array), labels)


def splits(train, val=None, test=None, classes="abcd"):
    parts = (None if part is None else labelled(part) for part in (train, val, test))
    return Splits(tuple(classes), *parts)


@pytest.mark.parametrize("fractions", [(0.7, 0.15, 0.15), (0.85, 0.15), (0.5, 0.15, 0.35)])
def test_cut_deals_out_every_image_once_by_class(fractions):
    parts = cut(UNEVEN, fractions, seed=0)
    assert sorted(p for part in parts for p in part) == list(range(len(UNEVEN)))
    assert all(part == sorted(part) for part in parts)
    for label, total in Counter(UNEVEN).items():
        for part, fraction in zip(parts, fractions, strict=True):
            count = sum(UNEVEN[p] == label for p in part)
            # off by one from rounding in each later part, and by the one that a part gets at least
            assert abs(count - total * fraction) < len(fractions)
            assert count >= 1


def test_cut_depends_on_the_seed_alone():
    assert cut(UNEVEN, TRAIN_VAL_TEST, 0) == cut(UNEVEN, TRAIN_VAL_TEST, 0)
    assert cut(UNEVEN, TRAIN_VAL_TEST, 0) != cut(UNEVEN, TRAIN_VAL_TEST, 1)


def test_cut_stays_the_same_for_good():
    # np.random.RandomState([5, 0]).permutation(6) is [0 4 1 2 3 5], frozen by NEP 19
    order = np.random.RandomState([5, 0]).permutation(6).tolist()
    assert cut([0] * 6, (0.5, 0.5), 5) == [sorted(order[:3]), sorted(order[3:])]


def test_images_added_to_one_class_leave_the_cut_of_the_others():
    few, many = cut([0] * 9 + [1] * 9, (0.5, 0.5), 0), cut([0] * 9 + [1] * 30, (0.5, 0.5), 0)
    assert [p for p in few[0] if p < 9] == [p for p in many[0] if p < 9]


def test_a_class_too_small_to_cut_stays_in_train_with_one_warning(caplog):
    parts = cut([0, 0, 1, 2, 2, 2], TRAIN_VAL_TEST, 0, classes=("cat", "dog", "emu"))
    assert parts[0][:3] == [0, 1, 2]
    assert [len(part) for part in parts] == [4, 1, 1]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "'cat', 'dog'" in record.getMessage()
    assert "emu" not in record.getMessage()


def test_cutting_one_piece_gives_70_15_15():
    whole = cut_splits(labelled([0] * 100 + [1] * 20), ("a", "b"), 0)
    assert [len(part) for part in (whole.train, whole.val, whole.test)] == [84, 18, 18]
    assert whole.classes == ("a", "b")


def test_val_is_cut_from_train_and_test_is_left_alone():
    before = splits([0] * 20 + [1] * 40, test=[0, 1])
    after = cut_val(before, seed=0)
    assert after.test is before.test
    assert Counter(after.val.labels) == {0: 3, 1: 6}
    assert sorted(after.train.indices + after.val.indices) == list(range(60))
    for part in (after.train, after.val):
        for image, label in (part[i] for i in range(len(part))):
            assert label == (image[0, 0, 0] >= 20)


def test_a_val_that_exists_is_kept():
    given = splits([0, 0, 1, 1], val=[0, 1])
    assert cut_val(given, seed=0) is given


def test_val_that_cannot_be_cut_is_an_error():
    with pytest.raises(DataError, match="no class has two images"):
        cut_val(splits([0, 1, 2]), seed=0)


def test_chosen_classes_are_kept_in_every_split_with_the_order_of_the_dataset():
    before = splits([0, 1, 2, 3, 1], val=[3, 0, 2], test=[2, 2, 0], classes=("a", "b", "7", "d"))
    after = select_classes(before, ["d", 7, "b"])  # as YAML reads a class that is named 7
    assert after.classes == ("b", "7", "d")
    assert ([*after.train.indices], [*after.train.labels]) == ([1, 2, 3, 4], [0, 1, 2, 0])
    assert ([*after.val.indices], [*after.val.labels]) == ([0, 2], [2, 1])
    assert ([*after.test.indices], [*after.test.labels]) == ([0, 1], [1, 1])
    assert select_classes(before, None) is before
    assert select_classes(splits([0, 1, 2]), ["a", "b"]).test is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat", "dgo", "yak"], "data.classes: no class 'dgo', 'yak'; close: 'dog'"),
        (["cat", "yak"], "data.classes: no class 'yak'; there are 'cat', 'dog', 'emu'"),
        (["cat"], r"data.classes=\[cat\]: two or more different classes"),
        (["cat", "cat"], r"data.classes=\[cat,cat\]: two or more different classes"),
    ],
)
def test_classes_that_cannot_be_chosen_are_named(names, message):
    with pytest.raises(ConfigError, match=message):
        select_classes(splits([0, 1, 2], classes=("cat", "dog", "emu")), names)


def test_an_image_is_in_the_same_split_whichever_classes_are_chosen(tmp_path):
    # or the val of a fine-tuning would hold what its pretraining on all classes was trained on
    root = write_photos(tmp_path, train=20, test=2)  # val is cut from train
    common = ("data=image_folder", f"data.root={root}")
    everything = build_splits(composed(*common))
    chosen = build_splits(composed(*common, "data.classes=[cat,bee]"))
    assert chosen.classes == ("bee", "cat")
    for name in ("train", "val", "test"):
        whole, part = getattr(everything, name), getattr(chosen, name)
        pairs = zip(whole.indices, whole.labels, strict=True)
        assert [*part.indices] == [index for index, label in pairs if label in (1, 2)]


def test_shots_are_counted_per_class_in_train_only():
    before = splits(UNEVEN, val=[0, 0, 1], test=[1, 1])
    after = limit_train(before, shots=3, fraction=None, seed=0)
    assert Counter(after.train.labels) == {0: 3, 1: 3, 2: 3, 3: 3}
    assert list(after.train.indices) == sorted(after.train.indices)
    assert after.val is before.val
    assert after.test is before.test


def test_fewer_shots_are_a_subset_of_more_and_follow_the_seed():
    def chosen(shots, seed):
        return set(limit_train(splits(UNEVEN), shots, None, seed).train.indices)

    assert chosen(1, 0) < chosen(2, 0) < chosen(3, 0)
    assert chosen(3, 0) == chosen(3, 0)
    assert chosen(3, 0) != chosen(3, 1)


def test_a_class_with_fewer_images_gives_all_with_one_warning(caplog):
    after = limit_train(splits(UNEVEN), shots=10, fraction=None, seed=0)
    assert Counter(after.train.labels) == {0: 10, 1: 10, 2: 3, 3: 7}
    (record,) = caplog.records
    assert "data.shots=10: 2 of the classes have fewer images" in record.getMessage()
    assert "'c', 'd'" in record.getMessage()


def test_fraction_is_taken_of_every_class_but_never_all_of_it_away():
    after = limit_train(splits(UNEVEN), None, 0.1, seed=0)
    assert Counter(after.train.labels) == {0: 10, 1: 4, 2: 1, 3: 1}


def test_without_a_limit_train_is_the_same():
    before = splits(UNEVEN)
    assert limit_train(before, None, None, 0) is before
    assert limit_train(before, None, 1.0, 0) == before


@pytest.mark.parametrize(
    ("shots", "fraction", "message"),
    [
        (0, None, "data.shots=0: at least 1 image per class"),
        (-3, None, "data.shots=-3"),
        (None, 0.0, "data.fraction=0: above 0 and at most 1"),
        (None, 1.5, "data.fraction=1.5"),
        (10, 0.1, "data.shots=10 and data.fraction=0.1 both limit train; type data.shots=null too"),
    ],
)
def test_limits_out_of_range_are_refused(shots, fraction, message):
    with pytest.raises(ConfigError, match=message):
        limit_train(splits(UNEVEN), shots, fraction, 0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (splits([]), "train has no images"),
        (splits([0, 0], classes="a"), "one class only, 'a'"),
        (splits([0, 0], classes="ab"), "train has images of one class only, 'a'"),
        (splits([0, 1], val=[0, 2]), "val has classes that train lacks, .*: 'c'"),
        (splits([0, 1], test=[2, 3]), "test has classes that train lacks, .*: 'c', 'd'"),
        (splits([0, 1], val=[]), "val has no images"),
    ],
)
def test_splits_that_cannot_be_trained_on_are_refused(bad, message):
    with pytest.raises(DataError, match=message):
        check_splits(bad)


def test_a_class_that_val_cannot_judge_is_warned_of(caplog):
    check_splits(splits([0, 1, 2], val=[0, 2], test=[0]))
    (record,) = caplog.records
    assert "1 of the classes in train have no image in val" in record.getMessage()
    assert "'b'" in record.getMessage()


def test_good_splits_pass_in_silence(caplog):
    check_splits(splits([0, 1], val=[0, 1], test=[1]))
    check_splits(splits([0, 1]))
    assert not caplog.records


def test_long_lists_are_cut():
    assert listed(["a", "b"]) == "'a', 'b'"
    assert listed([str(i) for i in range(22)]).endswith("'19', and 2 more")


def test_too_few_images_to_cut_are_refused_with_what_to_do():
    with pytest.raises(DataError, match=r"4 images of 2 classes cannot be cut.*Add images"):
        cut_splits(LabelledImages.of(range(4), [0, 0, 1, 1]), ("a", "b"), seed=0)


def test_the_same_share_of_each_class_is_chosen_as_one_by_one():
    positions = {label: [p for p, k in enumerate(UNEVEN) if k == label] for label in range(4)}
    shares = []
    for label, found in positions.items():
        order = np.random.RandomState([3, label]).permutation(len(found))
        shares += [(i / len(found), found[place]) for i, place in enumerate(order)]
    assert stratified(UNEVEN, 20, 3) == sorted(position for _, position in sorted(shares)[:20])

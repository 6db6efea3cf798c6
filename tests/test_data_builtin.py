"""The datasets that need no files: digits, letters, fake."""

import string
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from finetune.data.digits import digits
from finetune.data.fake import fake
from finetune.data.letters import letters
from finetune.data.split import check_splits, cut
from finetune.errors import ConfigError


def stacked(part):
    return torch.stack([part[i][0] for i in range(len(part))])


def parts(splits):
    return [splits.train, splits.val, splits.test]


def test_digits_are_those_of_scikit_learn_each_once():
    oracle = load_digits()
    whole = digits()
    assert whole.classes == tuple("0123456789")
    indices = np.concatenate([part.indices for part in parts(whole)])
    assert sorted(indices) == list(range(1797))
    images = np.concatenate([stacked(part).numpy() for part in parts(whole)])
    labels = np.concatenate([part.labels for part in parts(whole)])
    np.testing.assert_array_equal(labels, oracle.target[indices])
    for channel in range(3):
        # 0 to 16 becomes 0 to 255
        levels = images[:, channel].astype(float) * 16 / 255
        np.testing.assert_allclose(levels, oracle.images[indices], atol=0.04)
    assert images.dtype == np.uint8
    assert images.max() == 255


def test_digits_are_cut_as_their_docstring_says():
    labels = load_digits().target.tolist()
    expected = cut(labels, (0.5, 0.15, 0.35), seed=0)
    assert [list(part.indices) for part in parts(digits())] == expected
    assert [len(part) for part in parts(digits())] == [899, 269, 629]


def test_digits_need_neither_scikit_learn_nor_time(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    start = time.perf_counter()
    digits()
    assert time.perf_counter() - start < 0.2  # 6 ms on an idle core


def test_letters_depend_on_the_seed_alone():
    first, again, other = letters(520), letters(520), letters(520, seed=1)
    assert torch.equal(stacked(first.train), stacked(again.train))
    assert not torch.equal(stacked(first.train), stacked(other.train))


def test_letters_are_8_by_8_grey_and_even_over_classes_and_splits():
    whole = letters(1040)
    assert whole.classes == tuple(string.ascii_uppercase + string.ascii_lowercase)
    assert [len(part) for part in parts(whole)] == [832, 104, 104]
    assert set(Counter(whole.train.labels).values()) == {16}
    assert set(Counter(whole.val.labels).values()) == {2}
    images = stacked(whole.train)
    assert images.shape == (832, 3, 8, 8)
    assert images.dtype == torch.uint8
    assert torch.equal(images[:, 0], images[:, 2])


def test_letters_look_like_digits_in_ink_and_levels():
    drawn, written = (stacked(part).double() for part in (letters(1040).train, digits().train))
    assert drawn.mean() == pytest.approx(written.mean(), rel=0.25)
    # block means of 16 pixels: 17 levels, as in the digits
    assert len(drawn.unique()) == len(written.unique()) == 17


def test_letters_come_in_the_order_of_their_labels():
    upright = {name: image for image, name in mean_letters()}
    # a bar at the left of L, at the bottom too; of T at the top
    assert upright["L"][:, :4].sum() > upright["L"][:, 4:].sum()
    assert upright["L"][6:].sum() > upright["L"][:2].sum()
    assert upright["T"][:2].sum() > upright["T"][6:].sum()
    assert upright["p"][:4].sum() > upright["p"][4:].sum()


def mean_letters():
    whole = letters(5200)
    images, labels = stacked(whole.train)[:, 0].double(), torch.tensor(whole.train.labels)
    return [(images[labels == k].mean(0), name) for k, name in enumerate(whole.classes)]


def test_letters_too_few_for_every_split_are_refused():
    with pytest.raises(ConfigError, match=r"data\.num_images=100: at least 520"):
        letters(100)


def test_fake_has_what_was_asked_for():
    whole = fake(num_classes=3, num_images=30, image_size=16, seed=2)
    assert whole.classes == ("class_0", "class_1", "class_2")
    assert [len(part) for part in parts(whole)] == [18, 6, 6]
    assert stacked(whole.train).shape == (18, 3, 16, 16)
    check_splits(whole)


def test_fake_depends_on_the_seed_alone():
    assert torch.equal(stacked(fake().train), stacked(fake().train))
    assert not torch.equal(stacked(fake().train), stacked(fake(seed=1).train))


def test_fake_can_be_learnt():
    whole = fake()
    train, test = (stacked(part).flatten(1).double() for part in (whole.train, whole.test))
    labels = torch.tensor(whole.train.labels)
    means = torch.stack([train[labels == k].mean(0) for k in range(10)])
    nearest = torch.cdist(test, means).argmin(1)
    assert nearest.tolist() == list(whole.test.labels)


@pytest.mark.parametrize("bad", [{"num_classes": 1}, {"num_images": 20}, {"image_size": 0}])
def test_fake_out_of_range_is_refused(bad):
    with pytest.raises(ConfigError, match="data=fake with"):
        fake(**bad)

"""Handwritten digits that come with the package: real data without a download."""

from importlib.resources import files

import numpy as np
import torch

from finetune.data.base import ImageArray, LabelledImages, Splits


def digits() -> Splits:
    """1,797 digits of 43 writers, 8 x 8 grey; train, val and test hold 50, 15 and 35 % per class.

    digits.npz holds images (N, 8, 8) with values 0 to 16, labels, and part (0 train, 1 val,
    2 test), which is split.cut(labels, (0.5, 0.15, 0.35), seed=0), drawn once for good.
    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, 1998, the test
    set, UCI Machine Learning Repository, CC BY 4.0, doi.org/10.24432/C50P49, in the copy of
    sklearn.datasets.load_digits. Each pixel counts the ink in a 4 x 4 block of a 32 x 32 bitmap.
    """
    with files("finetune.data").joinpath("digits.npz").open("rb") as file, np.load(file) as stored:
        levels, labels, part = stored["images"], stored["labels"], stored["part"]
    images = (levels * (255 / 16)).round().astype(np.uint8)
    whole = LabelledImages.of(ImageArray(torch.from_numpy(images)[:, None]), labels.tolist())
    train, val, test = (whole.subset(np.flatnonzero(part == i).tolist()) for i in range(3))
    return Splits(tuple("0123456789"), train, val, test)

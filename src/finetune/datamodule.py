"""The one LightningDataModule: it feeds any dataset to any model."""

import logging
import os
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from finetune.data.base import ImageArray, LabelledImages, Splits
from finetune.data.sampler import EpochBatches, stable_hash
from finetune.data.transforms import Transform, seeded
from finetune.errors import DataError

log = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]  # images uint8 (B, 3, S, S); int64 (B,) or, multi-label, float (B, K)
Sample = tuple[Tensor, int | Tensor]


class TransformedImages(Dataset[Sample | DataError]):
    """One split, transformed; asked with (epoch, position, ...), all that augmentation depends on.

    What stands behind the position tells draws of one image in one epoch apart.
    """

    def __init__(self, images: LabelledImages, transform: Transform, seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, where: tuple[int, ...]) -> Sample | DataError:
        try:
            image, label = self.images[where[1]]
        except DataError as error:
            return error  # raised in a worker it would become a traceback
        return seeded(self.transform, image, stable_hash(self.seed, *where)), label


class LazyLoader(DataLoader[Sample | DataError]):
    """A DataLoader that asks its sampler when the first batch is drawn, not at iter().

    Lightning calls iter() before the epoch's counters are set, and workers prefetch at once.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override] # of collated batches
        for batch in super().__iter__():
            if isinstance(batch, DataError):
                raise batch
            yield batch


def collate(samples: list[Sample | DataError]) -> Batch | DataError:
    """Stack images (B, 3, S, S) and labels (B,), or targets (B, K); or give the first error."""
    good: list[Sample] = []
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
        good.append(sample)
    images, labels = zip(*good, strict=True)
    several = isinstance(labels[0], Tensor)
    return torch.stack(images), torch.stack(labels) if several else torch.tensor(labels)


def leave_group(worker: int) -> None:
    """Leave the process group: what is sent to it is for the run, which still needs its workers."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def usable_cores() -> int:
    """Cores that this process may use, which in a container is fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class DataModule(L.LightningDataModule):
    """Splits to batches. batch_size: per device. num_workers: None chooses from cores and data.

    balanced: training draws every class equally often, and rare images more than once an epoch.
    """

    def __init__(
        self,
        splits: Splits,
        train_transform: Transform,
        eval_transform: Transform,
        batch_size: int,
        num_workers: int | None = None,
        seed: int = 0,
        balanced: bool = False,
    ) -> None:
        super().__init__()
        self.splits, self.balanced = splits, balanced
        self.train_transform, self.eval_transform = train_transform, eval_transform
        self.batch_size, self.seed = batch_size, seed
        # images in memory are transformed faster than they are sent between processes
        in_memory = isinstance(splits.train.images, ImageArray)
        chosen = 0 if in_memory else min(8, usable_cores() - 1)
        self.num_workers = chosen if num_workers is None else num_workers

    def train_dataloader(self) -> LazyLoader:
        """Shuffled by (seed, epoch), augmented by (seed, epoch, position)."""
        return self._loader("train", self.splits.train, self.train_transform, shuffle=True)

    def val_dataloader(self) -> LazyLoader:
        """In order, without augmentation."""
        assert self.splits.val is not None
        return self._loader("val", self.splits.val, self.eval_transform)

    def test_dataloader(self) -> LazyLoader:
        """In order, without augmentation."""
        assert self.splits.test is not None
        return self._loader("test", self.splits.test, self.eval_transform)

    def unaugmented(self, images: LabelledImages) -> LazyLoader:
        """All of these images in order, on every rank, as evaluation sees them."""
        batches = EpochBatches(len(images), self.batch_size)
        return self._of_batches(images, self.eval_transform, batches, persistent=False)

    def first_training_images(self, most: int) -> Tensor:
        """The first augmented images of the run, uint8 (N, 3, S, S): to look at."""
        images = TransformedImages(self.splits.train, self.train_transform, self.seed)
        order = self._batches(self.splits.train, shuffle=True).order(epoch=0)[:most]
        batch = collate([images[where] for where in order])
        if isinstance(batch, DataError):
            raise batch
        return batch[0]

    def _loader(
        self, name: str, images: LabelledImages, transform: Transform, shuffle: bool = False
    ) -> LazyLoader:
        assert self.trainer is not None
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        needed = world_size * (2 if shuffle else 1)
        if len(images) < needed:
            raise DataError(
                f"{name} has {len(images)} images, but {world_size} devices need at least "
                f"{needed}; fewer devices: trainer.devices=1"
            )
        sampler = self._batches(images, shuffle, rank, world_size)
        return self._of_batches(images, transform, sampler, persistent=True)

    def _of_batches(
        self, images: LabelledImages, transform: Transform, sampler: EpochBatches, persistent: bool
    ) -> LazyLoader:
        options: dict[str, Any] = {}
        if self.num_workers > 0:
            options = {"persistent_workers": persistent, "prefetch_factor": 4}
            options["worker_init_fn"] = leave_group
        return LazyLoader(
            TransformedImages(images, transform, self.seed),
            batch_sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            **options,
        )

    def _batches(
        self, images: LabelledImages, shuffle: bool, rank: int = 0, world_size: int = 1
    ) -> EpochBatches:
        return EpochBatches(
            len(images),
            self.batch_size,
            self.seed,
            shuffle,
            rank,
            world_size,
            self._where if shuffle else lambda: (0, 0),
            images.strata() if shuffle and self.balanced else None,
        )

    def _where(self) -> tuple[int, int]:
        """Epoch and batch that the training loop will run next."""
        assert self.trainer is not None
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        return self.trainer.current_epoch, progress.current.ready

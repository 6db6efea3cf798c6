"""The one LightningDataModule: it feeds any dataset to any model."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, islice
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from finetune.data.base import ImageArray, LabelledImages, Splits
from finetune.data.cache import ImageCache
from finetune.data.resident import Drawn, ResidentImages, crops_of
from finetune.data.sampler import EpochBatches, stable_hash
from finetune.data.transforms import Transform, seeded
from finetune.errors import DataError
from finetune.features import Collectives, FeatureLoader, Features, Plan, Stored, Wheres
from finetune.files import readable
from finetune.model import Activations

log = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]  # images uint8 (B, 3, S, S); int64 (B,) or, multi-label, float (B, K)
Given = tuple[Tensor | Activations, Tensor]  # what a task gets: activations may stand in for images
Sample = tuple[Tensor, int | Tensor]
Keep = Callable[[], tuple[LabelledImages, Transform]]
EVALUATED_AT_ONCE = 4096  # features: a head alone takes little memory
SMALL_HEAD = 1_000_000  # weights: to wake a second thread takes longer than to use it


class TransformedImages(Dataset[Sample | DataError]):
    """One split, transformed; asked with (epoch, position, ...), all that augmentation depends on.

    What stands behind the position tells draws of one image in one epoch apart. keep: gives images
    and transform that stand in for these, when the first of them is about to be read.
    """

    def __init__(
        self, images: LabelledImages, transform: Transform, seed: int, keep: Keep | None = None
    ) -> None:
        self.images, self.transform, self.seed, self.keep = images, transform, seed, keep

    def prepare(self) -> None:
        """Read all images now, if they are to be kept; before workers are there to share them."""
        if self.keep is not None:
            self.images, self.transform = self.keep()
            self.keep = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, where: tuple[int, ...]) -> Sample | DataError:
        try:
            image, label = self.images[where[1]]
        except DataError as error:
            return error  # raised in a worker it would become a traceback
        return seeded(self.transform, image, self.seed_of(where)), label

    def seed_of(self, where: tuple[int, ...]) -> int:
        """What an image is augmented by, whatever computes it."""
        return stable_hash(self.seed, *where)


class Awaited:
    """What gives batches and counts how long they are waited for.

    waited: seconds, so far, until a batch that was asked for was there.
    """

    waited = 0.0

    def _awaited(self, batches: Iterator[Any]) -> Iterator[Batch]:
        began = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - began
            if isinstance(batch, DataError):
                raise batch
            yield batch
            began = time.perf_counter()


class LazyLoader(Awaited, DataLoader[Sample | DataError]):
    """A DataLoader that asks its sampler when the first batch is drawn, not at iter().

    Lightning calls iter() before the epoch's counters are set, and workers prefetch at once.
    """

    dataset: TransformedImages

    def prepare(self) -> None:
        """Read all images now, if they are to be kept."""
        self.dataset.prepare()

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override] # of collated batches
        yield from self._awaited(self._read())

    def _read(self) -> Iterator[Any]:
        self.prepare()
        yield from DataLoader.__iter__(self)


class TrainingLoader(LazyLoader):
    """Reads on over the end of an epoch, as far as workers read ahead within one.

    Else each epoch would begin with a wait until a worker has read a whole batch. Next to a network
    on the CPU that wait is the better: workers then have all cores, and later it has them.
    """

    batch_sampler: EpochBatches  # through all epochs
    _ahead: Iterator[Any] = iter(())
    _next: tuple[int, int] | None = None  # epoch and batch that it gives next, where that is known

    def _read(self) -> Iterator[Any]:
        self.prepare()
        epoch, first = self.batch_sampler.where()
        if (epoch, first) != self._next:
            self._ahead = DataLoader.__iter__(self)
        self._next = None  # unless the epoch is taken to its last batch, behind which nobody asks
        left = len(self) - first
        for taken, batch in enumerate(islice(self._ahead, left), 1):
            if taken == left:
                self._next = (epoch + 1, 0)
            yield batch


class DeviceLoader(Awaited):
    """The batches of a loader, cut from images that live on the device.

    images: these, asked for before the first batch is drawn; None: the loader's batches are those
    to take. labels: in the split's order.
    """

    def __init__(
        self, loader: LazyLoader, labels: Tensor, images: Callable[[], ResidentImages | None]
    ) -> None:
        self.loader, self.labels, self.images = loader, labels, images
        self.batch_sampler: Any = loader.batch_sampler  # Lightning looks whether it shuffles
        self._ahead: tuple[int, tuple[Tensor, Drawn | None]] = (-1, (torch.empty(0), None))

    def __len__(self) -> int:
        return len(self.loader)

    def prepare(self) -> None:
        """Bring the images to the device now."""
        if self.images() is None:
            self.loader.prepare()

    def __iter__(self) -> Iterator[Batch]:
        began = time.perf_counter()
        images = self.images()
        self.waited += time.perf_counter() - began
        if images is None:
            yield from self._awaited(iter(self.loader))
        elif images.pixels.device.type == "cpu":
            yield from self._awaited(self._cut(images))
        else:  # it is asked for crops as for steps, and nobody waits for them
            yield from self._cut(images)

    def _cut(self, images: ResidentImages) -> Iterator[Batch]:
        epoch, first = self.batch_sampler.where()
        drawn = self._ahead[1] if self._ahead[0] == epoch else self._drawn(images, epoch)
        # once an epoch: whatever is brought to a GPU is waited for
        order, crops = drawn[0].to(images.pixels.device), images.on_device(drawn[1])
        labels = self.labels.to(order.device)[order]
        sizes = self.batch_sampler.sizes()
        starts = [0, *accumulate(sizes)]
        together = max(1, images.most_at_once // self.batch_sampler.batch_size)
        # a resume crops together what the other run did: sums round by how many they are of
        for batch in range(first - first % together, len(sizes), together):
            here = sizes[batch : batch + together]
            part = slice(starts[batch], starts[batch] + sum(here))
            pixels = images.batch(order[part], crops and (crops[0][part], crops[1][part]))
            if batch + together >= len(sizes):  # while a GPU has steps to do
                self._ahead = epoch + 1, self._drawn(images, epoch + 1)
            pairs = zip(pixels.split(here), labels[part].split(here), strict=True)
            yield from islice(pairs, max(0, first - batch), None)

    def _drawn(self, images: ResidentImages, epoch: int) -> tuple[Tensor, Drawn | None]:
        """Positions (N,) that this rank's batches take in an epoch, and their crops; on the CPU."""
        wheres = self.batch_sampler.of_epoch(epoch)
        seeds = [self.loader.dataset.seed_of(where) for where in wheres] if images.crops else []
        return torch.tensor([position for _, position, *_ in wheres]), images.drawn(seeds)


def collate(samples: list[Sample | DataError]) -> Batch | DataError:
    """Stack images (B, 3, S, S) and labels (B,), or targets (B, K); or give the first error."""
    good: list[Sample] = []
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
        good.append(sample)
    images, labels = zip(*good, strict=True)
    # in a worker it stacks into memory that is shared, and knows one layout
    stack = default_collate if all(image.is_contiguous() for image in images) else torch.stack
    several = isinstance(labels[0], Tensor)
    return stack([*images]), torch.stack(labels) if several else torch.tensor(labels)


def as_it_is(image: Tensor) -> Tensor:
    """The transform of an image that was kept transformed."""
    return image


def labels_of(images: LabelledImages) -> Tensor:
    """Classes (N,), or targets (N, K), as batches hold them."""
    if images.num_classes is None:
        return torch.from_numpy(np.array(images.labels))  # torch.tensor takes 30 times as long
    return images.targets(images.num_classes)


def leave_group(worker: int) -> None:
    """Leave the process group: what is sent to it is for the run, which still needs its workers."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


class DataModule(L.LightningDataModule):
    """Splits to batches.

    batch_size: per device. eval_batch_size: of val and test. num_workers: processes that read.
    balanced: training draws every class equally often, and rare images more than once an epoch.
    features: what stands in for images while layers are frozen; a batch then holds Activations in
    their place. cache: keeps images from one epoch to the next. augmented: whether the training
    transform draws random numbers. compiled: what crops images on a GPU is compiled. for_gpu:
    nothing but reading needs the cores; workers read on over the end of an epoch.
    """

    def __init__(
        self,
        splits: Splits,
        train_transform: Transform,
        eval_transform: Transform,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        balanced: bool = False,
        features: Features | None = None,
        eval_batch_size: int | None = None,
        cache: ImageCache | None = None,
        augmented: bool = True,
        compiled: bool = False,
        for_gpu: bool = False,
    ) -> None:
        super().__init__()
        self.compiled, self.for_gpu = compiled, for_gpu
        self.features, self.cache, self.augmented = features, cache, augmented
        self._resident: ResidentImages | None = None
        self._held: dict[str, Activations] = {}  # (views, N, ...) by split
        self.splits, self.balanced = splits, balanced
        self.train_transform, self.eval_transform = train_transform, eval_transform
        self.batch_size, self.seed = batch_size, seed
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers

    @property
    def plan(self) -> Plan:
        """Which features stand in for images."""
        return self.features.plan if self.features else Plan()

    @property
    def on_device(self) -> bool:
        """Whether training images live on the device."""
        return self.cache is not None and self.cache.choice.kind == "device"

    @property
    def in_memory(self) -> bool:
        """Whether training decodes no file by now."""
        kept = self._resident is not None or (self.cache is not None and self.cache.has("train"))
        return kept or isinstance(self.splits.train.images, ImageArray)

    def train_dataloader(self) -> LazyLoader | DeviceLoader | FeatureLoader:
        """Shuffled by (seed, epoch), augmented by (seed, epoch, position)."""
        images = self.splits.train
        loader: LazyLoader | DeviceLoader
        loader = self._loader("train", images, self.train_transform, shuffle=True)
        if self.on_device:
            loader = DeviceLoader(loader, labels_of(images), self._resident_images)
        if not self.plan.views:
            loader.prepare()  # before the training begins: a signal then stops it at once
            return loader
        batches: Any = loader.batch_sampler
        return FeatureLoader(loader, labels_of(images), lambda: self._training_features(batches))

    def val_dataloader(self) -> LazyLoader | FeatureLoader:
        """In order, without augmentation."""
        assert self.splits.val is not None
        return self._evaluated("val", self.splits.val)

    def test_dataloader(self) -> LazyLoader | FeatureLoader:
        """In order, without augmentation."""
        assert self.splits.test is not None
        return self._evaluated("test", self.splits.test)

    def unaugmented_features(self, images: LabelledImages, device: torch.device) -> Tensor:
        """Of these training images (N, D), before the training; the model comes back on the CPU.

        Every rank computes the same.
        """
        assert self.features is not None
        self.features.model.to(device)
        load = partial(self._some, images, self.eval_transform)
        features = self.features.of("train", images, self.eval_transform, load, device)
        self.features.model.to("cpu")
        return features

    def first_training_images(self, most: int) -> Tensor:
        """The first augmented images of the run, uint8 (N, 3, S, S): to look at."""
        images = TransformedImages(self.splits.train, self.train_transform, self.seed)
        batches = self._batches(self.splits.train, shuffle=True)
        first = batches.drawn(0, batches.order(epoch=0), slice(most))
        if resident := self._resident_images():
            positions = torch.tensor([position for _, position, *_ in first])
            drawn = resident.drawn([images.seed_of(where) for where in first])
            return resident.batch(positions, resident.on_device(drawn), one_look=True)
        batch = collate([images[where] for where in first])
        if isinstance(batch, DataError):
            raise batch
        return batch[0]

    def _resident_images(self) -> ResidentImages | None:
        """None where they do not live there, or are of several sizes, which auto did not know."""
        if self._resident is None and self.on_device:
            assert self.cache is not None
            assert self.trainer is not None
            images = self.splits.train
            crops = crops_of(self.train_transform) if self.augmented else None
            pixels: Tensor | None
            if crops and isinstance(images.images, ImageArray):
                pixels = images.images.array[list(images.indices)]
            else:
                pixels = self.cache.stacked(images, None if crops else self.train_transform)
                if pixels is None:
                    return None
            device = self.trainer.strategy.root_device
            self._resident = ResidentImages(
                pixels.to(device), crops, self.compiled and device.type == "cuda"
            )
            log.info(
                "images: %s of train live on %s, %s (data.cache=)",
                f"{len(images):,}", device, readable(pixels.nbytes),
            )  # fmt: skip
        return self._resident

    def _training_features(self, batches: EpochBatches) -> Stored | None:
        """Of all views, in the epochs that they stand in for images."""
        assert self.features is not None
        plan, layers = self.plan, self.plan.layers_at(self._where()[0])
        self._let_go_but(layers)
        if not layers:
            return None
        if "train" not in self._held:
            if plan.augmented:
                transform, seed, views = self.train_transform, self.seed, plan.views
            else:
                transform, seed, views = self.eval_transform, None, 1
            found = [
                self._features_of("train", self.splits.train, transform, layers, seed, view)
                for view in range(views)
            ]
            values = torch.stack(found) if views > 1 else found[0][None]
            self._held["train"] = Activations(values, layers)
            head = sum(weight.numel() for weight in self.features.model.head.parameters())
            if plan.always and head < SMALL_HEAD:
                torch.set_num_threads(1)
        return self._held["train"], batches

    def _evaluated(self, name: str, images: LabelledImages) -> LazyLoader | FeatureLoader:
        loader = self._loader(name, images, self.eval_transform)
        if not self.plan.phases:
            loader.prepare()
            return loader
        batches: Any = loader.batch_sampler
        stored = partial(self._evaluated_features, name, images, batches)
        return FeatureLoader(loader, labels_of(images), stored)

    def _evaluated_features(
        self, name: str, images: LabelledImages, batches: EpochBatches
    ) -> Stored | None:
        """Of a split, while the layers that make them are what they were at the start."""
        assert self.trainer is not None
        assert self.features is not None
        trainer, depth = self.trainer, self.features.model.depth
        if trainer.state.fn == TrainerFn.FITTING:
            layers = self.plan.layers_at(trainer.current_epoch)
        else:  # one look is worth features, which are few and may be there, and no more
            layers = depth if self.plan.always else 0
        self._let_go_but(layers)
        if not layers:
            return None
        if name not in self._held:
            values = self._features_of(name, images, self.eval_transform, layers)[None]
            self._held[name] = Activations(values, layers)
        limited = getattr(trainer, f"limit_{name}_batches") != 1.0  # to some of this size
        if layers == depth and not limited:
            ranks = trainer.global_rank, trainer.world_size
            batches = EpochBatches(len(images), EVALUATED_AT_ONCE, 0, False, *ranks)
        return self._held[name], batches

    def _let_go_but(self, layers: int) -> None:
        """Hold what so many layers make of images, and no longer what others did."""
        self._held = {name: a for name, a in self._held.items() if a.layers == layers}

    def _features_of(
        self,
        name: str,
        images: LabelledImages,
        transform: Transform,
        layers: int,
        seed: int | None = None,
        view: int = 0,
    ) -> Tensor:
        assert self.features is not None
        assert self.trainer is not None
        trainer = self.trainer
        return self.features.of(
            name,
            images,
            transform,
            partial(self._some, images, transform),
            trainer.strategy.root_device,
            seed,
            view,
            Collectives(trainer.global_rank, trainer.world_size, trainer.strategy),
            str(trainer.precision),
            trainer.precision_plugin.forward_context,
            layers,
        )

    def _some(
        self, images: LabelledImages, transform: Transform, batches: Sequence[Wheres]
    ) -> LazyLoader:
        """Just these batches, once. Workers would take longer to start than to read one of them."""
        workers = self.num_workers if len(batches) > 1 else 0
        return self._of_batches(images, transform, batches, persistent=False, num_workers=workers)

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
        keep = partial(self._kept, name, images, transform)
        kind = LazyLoader
        if shuffle and self.for_gpu:
            kind, sampler.num_epochs = TrainingLoader, self._num_epochs
        return self._of_batches(images, transform, sampler, True, self.num_workers, keep, kind)

    def _kept(
        self, name: str, images: LabelledImages, transform: Transform
    ) -> tuple[LabelledImages, Transform]:
        """Images of a split as they were read once, and what is left to do with them."""
        assert self.trainer is not None
        if self.cache is None:
            return images, transform
        last = (self.trainer.max_epochs or 0) - self.trainer.current_epoch < 2  # of a resume
        if last and self.cache.choice.kind == "ram" and not self.cache.has(name):
            return images, transform
        random = name == "train" and self.augmented
        kept = self.cache.get(name, images, None if random else transform)
        if kept is None:
            return images, transform
        labelled = LabelledImages.of(kept, images.labels, images.num_classes)
        return labelled, transform if random else as_it_is

    def _of_batches(
        self,
        images: LabelledImages,
        transform: Transform,
        sampler: EpochBatches | Sequence[Wheres],
        persistent: bool,
        num_workers: int,
        keep: Keep | None = None,
        kind: type[LazyLoader] = LazyLoader,
    ) -> LazyLoader:
        options: dict[str, Any] = {}
        if num_workers > 0:
            options = {"persistent_workers": persistent, "worker_init_fn": leave_group}
            options["prefetch_factor"] = 4 if num_workers < 8 else 2  # held in shared memory
        return kind(
            TransformedImages(images, transform, self.seed, keep),
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=self.for_gpu and torch.cuda.is_available(),
            **options,
        )

    def _batches(
        self, images: LabelledImages, shuffle: bool, rank: int = 0, world_size: int = 1
    ) -> EpochBatches:
        return EpochBatches(
            len(images),
            self.batch_size if shuffle else self.eval_batch_size,
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

    def _num_epochs(self) -> int:
        """Of the training."""
        assert self.trainer is not None
        assert self.trainer.max_epochs is not None
        return self.trainer.max_epochs

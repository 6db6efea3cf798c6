"""Which image comes when: a pure function of (seed, epoch), so that no state needs saving."""

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler


def stable_hash(*parts: int | str) -> int:
    """A seed from parts: 63 bits, the same in every process and version of Python."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def epoch_order(num_images: int, seed: int, epoch: int) -> "array[int]":
    """A permutation of range(num_images)."""
    generator = torch.Generator().manual_seed(stable_hash("order", seed, epoch))
    return _numbers(torch.randperm(num_images, generator=generator))


def balanced_order(labels: Sequence[int], seed: int, epoch: int) -> "array[int]":
    """As many positions as labels (N,), drawn with replacement, of every class equally many.

    The counts of two classes differ by one at most; within a class each image is as likely.
    """
    generator = torch.Generator().manual_seed(stable_hash("balanced", seed, epoch))
    classes = torch.from_numpy(np.array(labels))  # torch.tensor takes a second for a million
    by_class = torch.argsort(classes, stable=True)
    _, counts = classes.unique(return_counts=True)
    # the classes in turn, from one that is drawn; then shuffled
    turns = torch.randint(len(counts), (1,), generator=generator) + torch.arange(len(labels))
    drawn = (turns % len(counts))[torch.randperm(len(labels), generator=generator)]
    within = torch.rand(len(labels), generator=generator, dtype=torch.float64) * counts[drawn]
    return _numbers(by_class[(counts.cumsum(0) - counts)[drawn] + within.long()])


def _numbers(tensor: Tensor) -> "array[int]":
    return array("q", tensor.numpy().tobytes())  # a list would take five times as much


def batch_bounds(num_images: int, global_batch: int, smallest: int) -> list[tuple[int, int]]:
    """[start, stop) of the batches of an epoch.

    global_batch: images per step over all ranks. A last batch of fewer than smallest images joins
    the one before it; fewer images than one batch are one batch. Nothing is dropped or repeated.
    """
    starts = list(range(0, num_images, global_batch))
    if len(starts) > 1 and num_images - starts[-1] < smallest:
        starts.pop()
    return list(zip(starts, [*starts[1:], num_images], strict=True))


class EpochBatches(Sampler[list[tuple[int, ...]]]):
    """The batches of one rank as lists of (epoch, position), from where the training loop stands.

    where: gives (epoch, first batch); asked when the first batch is drawn, since a resume sets the
    loop's counters later than it asks for the iterator. shuffle=False: in order, for evaluation.
    labels: given, every class is drawn equally often, as (epoch, position, place in the epoch):
    an image that comes again in an epoch is augmented anew. num_epochs: of the training, through
    which the batches go on; fewer than begun: to the end of this epoch.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = False,
        rank: int = 0,
        world_size: int = 1,
        where: Callable[[], tuple[int, int]] = lambda: (0, 0),
        labels: Sequence[int] | None = None,
        num_epochs: Callable[[], int] = lambda: 0,
    ) -> None:
        # BatchNorm needs two images a rank to train on
        smallest = world_size * (2 if shuffle else 1)
        self.bounds = batch_bounds(num_images, batch_size * world_size, smallest)
        self.batch_size = batch_size
        self.num_images, self.seed, self.shuffle = num_images, seed, shuffle
        self.rank, self.world_size, self.where = rank, world_size, where
        self.labels = labels if shuffle else None
        self.num_epochs = num_epochs

    def __len__(self) -> int:
        return len(self.bounds)

    def order(self, epoch: int) -> Sequence[int]:
        """Positions that all ranks together draw in an epoch, in order."""
        if not self.shuffle:
            return range(self.num_images)
        if self.labels is None:
            return epoch_order(self.num_images, self.seed, epoch)
        return balanced_order(self.labels, self.seed, epoch)

    def order_on(self, epoch: int, device: torch.device) -> Tensor:
        """The same as a tensor, on a device."""
        return torch.from_numpy(np.array(self.order(epoch))).to(device)

    def drawn(self, epoch: int, order: Sequence[int], places: slice) -> list[tuple[int, ...]]:
        """What stands at these places of an epoch's order, as a batch holds it."""
        if self.labels is None:
            return [(epoch, position) for position in order[places]]
        numbered = zip(order[places], range(self.num_images)[places], strict=True)
        return [(epoch, position, place) for position, place in numbered]

    def places(self) -> list[slice]:
        """What this rank takes of an epoch's order, batch by batch."""
        return [slice(start + self.rank, stop, self.world_size) for start, stop in self.bounds]

    def sizes(self) -> list[int]:
        """Images of each batch of this rank."""
        return [len(range(self.num_images)[batch]) for batch in self.places()]

    def of_epoch(self, epoch: int) -> list[tuple[int, ...]]:
        """What this rank's batches of an epoch hold, one after another."""
        order = self.order(epoch)
        return [where for batch in self.places() for where in self.drawn(epoch, order, batch)]

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        begun, first = self.where()
        for epoch in range(begun, max(begun + 1, self.num_epochs())):
            order = self.order(epoch)
            for places in self.places()[first:]:
                yield self.drawn(epoch, order, places)
            first = 0

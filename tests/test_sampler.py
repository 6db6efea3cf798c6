"""Which image comes when: all of it from (seed, epoch), nothing twice, nothing left out."""

import hashlib
import itertools

import pytest
import torch

from finetune.data.sampler import EpochBatches, batch_bounds, epoch_order, stable_hash


@pytest.mark.parametrize(
    ("num_images", "batch", "smallest", "sizes"),
    [
        (8, 4, 2, [4, 4]),
        (10, 4, 2, [4, 4, 2]),
        (9, 4, 2, [4, 5]),  # a last batch of one joins the one before
        (9, 4, 1, [4, 4, 1]),
        (3, 4, 2, [3]),  # fewer images than a batch are one batch
        (1, 4, 2, [1]),
        (11, 8, 4, [11]),  # two ranks: each needs two images
        (12, 8, 4, [8, 4]),
    ],
)
def test_batches_of_an_epoch(num_images, batch, smallest, sizes):
    bounds = batch_bounds(num_images, batch, smallest)
    assert [stop - start for start, stop in bounds] == sizes
    assert bounds[0][0] == 0
    assert bounds[-1][1] == num_images
    assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))


def test_the_order_is_a_permutation_and_a_function_of_seed_and_epoch():
    order = epoch_order(100, seed=1, epoch=2)
    assert sorted(order) == list(range(100))
    torch.manual_seed(7)  # what was drawn before does not matter
    assert epoch_order(100, seed=1, epoch=2) == order
    others = [epoch_order(100, 1, 3), epoch_order(100, 2, 2), epoch_order(100, 0, 0)]
    assert all(other != order for other in others)


def test_a_seed_from_parts_is_the_same_in_every_process():
    # Python's own hash() of a text is not, and a resume is another process
    digest = hashlib.blake2b(b"('order', 3, -1)", digest_size=8).digest()
    assert stable_hash("order", 3, -1) == int.from_bytes(digest, "little") // 2
    assert 0 <= stable_hash("step", 2**70) < 2**63


@pytest.mark.parametrize("shuffle", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_images", [6, 7, 24, 25, 26, 29, 31])
def test_ranks_together_see_every_image_once(num_images, world_size, shuffle):
    ranks = [
        list(EpochBatches(num_images, 4, seed=3, shuffle=shuffle, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    seen = sorted(position for batches in ranks for batch in batches for _, position in batch)
    assert seen == list(range(num_images))
    # all ranks take the same number of steps, or one would wait for ever
    assert len({len(batches) for batches in ranks}) == 1
    if shuffle:  # BatchNorm needs two
        assert min(len(batch) for batches in ranks for batch in batches) >= 2


def test_one_rank_and_two_see_the_same_images_in_a_step():
    one = list(EpochBatches(21, 8, seed=5, shuffle=True))
    two = [list(EpochBatches(21, 4, 5, True, rank, world_size=2)) for rank in range(2)]
    assert [set(batch) for batch in one] == [
        {*first, *second} for first, second in zip(*two, strict=True)
    ]


def test_an_epoch_taken_up_in_its_middle_goes_on_with_the_same_batches():
    whole = list(EpochBatches(22, 4, seed=1, shuffle=True, where=lambda: (6, 0)))
    rest = list(EpochBatches(22, 4, seed=1, shuffle=True, where=lambda: (6, 2)))
    assert rest == whole[2:]
    assert {epoch for batch in whole for epoch, _ in batch} == {6}


def test_the_batches_of_a_training_go_on_from_epoch_to_epoch():
    def batches(epoch, first, num_epochs=0):
        more = {"where": lambda: (epoch, first), "num_epochs": lambda: num_epochs}
        return list(EpochBatches(22, 4, seed=1, shuffle=True, **more))

    assert batches(1, 3, num_epochs=4) == batches(1, 3) + batches(2, 0) + batches(3, 0)
    assert batches(5, 3, num_epochs=4) == batches(5, 3)  # a run that was ended, and goes on


def test_where_to_start_is_asked_when_the_first_batch_is_drawn():
    at = [(0, 0)]
    batches = iter(EpochBatches(8, 4, shuffle=True, where=lambda: at[0]))
    at[0] = (3, 1)
    assert {epoch for epoch, _ in next(batches)} == {3}
    assert list(batches) == []


def test_evaluation_is_in_order():
    assert list(EpochBatches(5, 2)) == [[(0, 0), (0, 1)], [(0, 2), (0, 3)], [(0, 4)]]


def test_an_order_stays_the_same_for_good():
    # torch.randperm by the seed stable_hash("order", 5, 2): what a run of before resumes with
    generator = torch.Generator().manual_seed(stable_hash("order", 5, 2))
    order = [(2, p) for p in torch.randperm(11, generator=generator).tolist()]
    batches = EpochBatches(11, 4, 5, shuffle=True, where=lambda: (2, 0))
    assert [where for batch in batches for where in batch] == order
    assert [*epoch_order(8, seed=5, epoch=2)] == [0, 5, 4, 6, 2, 1, 7, 3]

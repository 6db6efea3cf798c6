"""Batches as the training gets them."""

from itertools import islice

import lightning as L
import pytest
import torch

from conftest import composed
from finetune import build, recipes, resolve
from finetune.data.fake import fake
from finetune.data.sampler import EpochBatches, epoch_order
from finetune.data.transforms import evaluation, strong
from finetune.datamodule import DataModule, collate
from finetune.errors import DataError
from finetune.recipes import DataFacts, ModelFacts
from finetune.specs import InputSpec

SPEC = InputSpec(8, 8)
QUIET = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")


class Trainer:
    """What a DataModule asks a trainer for: where the training stands, and the ranks."""

    def __init__(self, epoch=0, batch=0, rank=0, world_size=1, max_epochs=3):
        self.current_epoch, self.global_rank, self.world_size = epoch, rank, world_size
        self.ready, self.max_epochs = batch, max_epochs
        self.fit_loop = self.epoch_loop = self.batch_progress = self.current = self


def datamodule(num_workers=0, for_gpu=False, **stands):
    splits = fake(num_classes=3, num_images=45, image_size=8)
    more = {"seed": 0, "for_gpu": for_gpu}
    module = DataModule(splits, strong(SPEC), evaluation(SPEC), 4, num_workers, **more)
    module.trainer = Trainer(**stands)
    return module


def stacked(loader):
    return [(images.clone(), labels.clone()) for images, labels in loader]


def equal(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y)
        for one, two in zip(a, b, strict=True)
        for x, y in zip(one, two, strict=True)
    )


def test_a_batch_is_uint8_images_and_their_labels():
    images, labels = next(iter(datamodule().train_dataloader()))
    assert (images.shape, images.dtype) == ((4, 3, 8, 8), torch.uint8)
    assert (labels.shape, labels.dtype) == ((4,), torch.int64)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_do_not_change_the_augmented_images(num_workers):
    alone = stacked(datamodule(epoch=2).train_dataloader())
    assert equal(stacked(datamodule(num_workers, epoch=2).train_dataloader()), alone)


def test_an_image_is_augmented_anew_in_every_epoch():
    epochs = [stacked(datamodule(epoch=epoch).train_dataloader()) for epoch in (0, 1)]
    assert not equal(*epochs)
    labels = [sorted(torch.cat([label for _, label in batches]).tolist()) for batches in epochs]
    assert labels[0] == labels[1]


def test_an_epoch_taken_up_in_its_middle_has_the_same_images():
    whole = stacked(datamodule(epoch=1).train_dataloader())
    assert equal(stacked(datamodule(epoch=1, batch=3).train_dataloader()), whole[3:])


@pytest.mark.parametrize("for_gpu", [True, False])
@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("left", [None, 0, 1], ids=["whole", "the first left", "the second left"])
def test_batches_follow_the_epochs(num_workers, left, for_gpu):
    module = datamodule(num_workers, for_gpu)
    loader = module.train_dataloader()
    for epoch in range(3):
        module.trainer.current_epoch = epoch
        most = 2 if epoch == left else None  # as trainer.limit_train_batches=2 has it
        expected = stacked(datamodule(epoch=epoch).train_dataloader())[:most]
        assert equal(stacked(islice(loader, most)), expected)


@pytest.mark.parametrize(("max_epochs", "asked"), [(2, [0, 1]), (1, [0])])
def test_workers_read_on_over_the_end_of_an_epoch_but_the_last(monkeypatch, max_epochs, asked):
    module = datamodule(num_workers=1, for_gpu=True, max_epochs=max_epochs)
    loader, orders = module.train_dataloader(), []
    order = loader.batch_sampler.order
    monkeypatch.setattr(loader.batch_sampler, "order", lambda e: orders.append(e) or order(e))
    stacked(loader)
    assert orders == asked


class Sees(L.LightningModule):
    """Keeps its batches."""

    def __init__(self):
        super().__init__()
        self.seen, self.weight = [], torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight])


@pytest.mark.parametrize("most", [None, 3], ids=["whole", "cut short"])
def test_workers_read_on_when_lightning_asks_for_no_more_than_an_epoch(monkeypatch, most):
    orders, order = [], EpochBatches.order

    def noted(self, epoch):
        orders.extend([epoch] * self.shuffle)
        return order(self, epoch)

    monkeypatch.setattr(EpochBatches, "order", noted)
    sees = Sees()
    trainer = L.Trainer(
        "cpu", max_epochs=3, limit_train_batches=most, **dict.fromkeys(QUIET, False)
    )
    trainer.fit(sees, datamodule=datamodule(num_workers=1, for_gpu=True))
    assert orders == [0, 1, 2]  # none of them twice
    epochs = [stacked(datamodule(epoch=epoch).train_dataloader())[:most] for epoch in range(3)]
    assert equal(sees.seen, [batch for epoch in epochs for batch in epoch])


def test_where_the_training_stands_is_asked_at_the_first_batch():
    module = datamodule()
    batches = iter(module.train_dataloader())
    module.trainer.current_epoch = 2  # as a resume sets it: after iter()
    assert equal(list(batches), stacked(datamodule(epoch=2).train_dataloader()))


def test_evaluation_is_in_order_and_not_augmented():
    module = datamodule()
    images = torch.cat([images for images, _ in module.val_dataloader()])
    val = module.splits.val
    assert torch.equal(images, torch.stack([val[i][0] for i in range(len(val))]))
    labels = torch.cat([labels for _, labels in module.test_dataloader()]).tolist()
    assert labels == list(module.splits.test.labels)


def test_two_ranks_measure_every_image_once():
    val = datamodule().splits.val
    seen = []
    for rank in range(2):
        for images, _ in datamodule(rank=rank, world_size=2).val_dataloader():
            seen += [tuple(image.flatten().tolist()) for image in images]
    assert sorted(seen) == sorted(tuple(val[i][0].flatten().tolist()) for i in range(len(val)))


def test_fewer_images_than_devices_is_an_error():
    module = datamodule(world_size=40)
    with pytest.raises(DataError, match=r"train has 27 images, but 40 devices need at least 80"):
        module.train_dataloader()
    with pytest.raises(DataError, match=r"val has 9 images"):
        module.val_dataloader()


def test_the_pictures_show_what_the_first_batch_holds():
    module = datamodule()
    first = next(iter(module.train_dataloader()))[0]
    assert torch.equal(module.first_training_images(4), first)
    assert len(module.first_training_images(100)) == 27


def test_a_batch_of_one_image_is_a_batch():
    images, labels = collate([(torch.zeros(3, 2, 2, dtype=torch.uint8), 1)])
    assert images.shape == (1, 3, 2, 2)
    assert labels.tolist() == [1]


@pytest.mark.parametrize(
    ("num_images", "overrides", "expected"),
    [
        (128, [], (250, 2, 500)),  # 500 steps for a few images
        (6400, [], (10, 100, 1000)),
        (6400, ["epochs=3"], (3, 100, 300)),
        (6400, ["max_steps=250"], (3, 100, 250)),
        (6400, ["max_steps=0"], (None, 100, 0)),
        (6400, ["epochs=2", "max_steps=1000"], (2, 100, 200)),
        (6400, ["epochs=2", "trainer.accumulate_grad_batches=3"], (2, 34, 68)),
        (6401, ["epochs=1"], (1, 100, 100)),  # the last image joins a batch
        (3, ["epochs=2"], (2, 1, 2)),
    ],
)
def test_how_long_a_run_trains(num_images, overrides, expected):
    cfg = composed("data=fake", "trainer.accelerator=cpu", "batch_size=64", *overrides)
    facts = DataFacts(
        num_images, image_area=1, batch=64, accumulate=cfg.trainer.accumulate_grad_batches
    )
    resolve.fill(cfg, recipes.none(facts, ModelFacts("CNN", pretrained=True, num_parameters=1)))
    budget = build.build_budget(cfg, num_images)
    epochs, steps, total = expected
    assert (budget.steps_per_epoch, budget.total_steps) == (steps, total)
    assert epochs in (None, budget.epochs)


def test_the_order_of_the_first_epoch_is_the_public_one():
    module = datamodule()
    labels = torch.cat([labels for _, labels in module.train_dataloader()]).tolist()
    assert labels == [module.splits.train.labels[i] for i in epoch_order(27, seed=0, epoch=0)]


@pytest.mark.parametrize(
    ("num_images", "epochs", "num_val", "every"),
    [
        (45_000, 10, 5000, 1),  # every epoch
        (100, 250, 269, 10),  # 25 times
        (250, 125, 3750, 25),  # 5 times: val is large, the training short
        (1000, 100, 3750, 8),  # half of 100,000 images are 13 times 3,750
        (100, 3, 100_000, 1),
    ],
)
def test_validation_costs_a_part_of_the_training(num_images, epochs, num_val, every):
    budget = build.Budget(epochs, 10, None, num_images, num_val)
    assert budget.validate_every == every

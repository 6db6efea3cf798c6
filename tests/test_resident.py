"""Training images that live on the device: crops as the CPU's transform makes them."""

import itertools
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from conftest import SMALL, assert_same_end, facts_of, finish, lose, plain, series
from finetune import build
from finetune.data import resident, transforms
from finetune.data.cache import Choice, ImageCache
from finetune.data.fake import fake
from finetune.data.image_folder import image_folder
from finetune.data.resident import KERNELS, ResidentImages, crops_of, draw, resized
from finetune.data.sampler import stable_hash
from finetune.datamodule import DataModule
from finetune.errors import ConfigError
from finetune.specs import InputSpec
from test_cache import photos  # noqa: F401  a fixture
from test_datamodule import Trainer, equal, stacked

SPEC = InputSpec(8, 8)
# SMALL, but for its data and how they are augmented
TRAINED = [word for word in SMALL if not word.startswith(("data", "augment"))]
BILINEAR, BICUBIC = InterpolationMode.BILINEAR, InterpolationMode.BICUBIC


def noise(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("interpolation", [BILINEAR, BICUBIC])
@pytest.mark.parametrize(
    ("box", "size"),
    [((0, 0, 20, 30), 20), ((3, 5, 10, 9), 24), ((1, 2, 18, 25), 6), ((19, 29, 1, 1), 5)],
    ids=["all of it", "enlarged", "made smaller", "one pixel"],
)
@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_on_the_device_is_that_of_torchvision(box, size, flip, interpolation):
    images = noise(2, 3, 20, 30)
    boxes, flips = torch.tensor([box, (0, 0, 20, 30)]), torch.tensor([flip, False])
    ours = resized(images, boxes, flips, size, KERNELS[interpolation.value])[0]
    theirs = F.resized_crop(images[0], *box, [size, size], interpolation, antialias=True)
    theirs = F.horizontal_flip(theirs) if flip else theirs
    # torch's kernels on a CPU round their weights to 16 bits
    assert (ours.int() - theirs.int()).abs().max() <= (1 if interpolation == BILINEAR else 2)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_compiled_crops_of_one_process_keep_to_their_own_kernel():
    pixels, all_of_them = noise(4, 3, 12, 12), torch.arange(4)
    for interpolation in (BILINEAR, BICUBIC, BILINEAR):
        crops = crops_of(transforms.light(InputSpec(8, 8, interpolation=interpolation)))
        eager, compiled = (
            images.batch(all_of_them, images.drawn(range(4))).int()
            for images in (ResidentImages(pixels, crops, how) for how in (False, True))
        )
        assert (eager - compiled).abs().max() <= 1


@pytest.mark.parametrize(
    ("make", "height", "width"),
    [
        (transforms.light, 30, 20),
        (transforms.light, 375, 500),
        (lambda spec: transforms.light(spec, scale=(0.7, 1.0), flip=False), 32, 32),
        (lambda spec: transforms.light(spec, scale=(1.0, 1.0)), 4, 100),  # where none may fit
        (lambda spec: transforms.light(spec, scale=(1.0, 1.0)), 100, 4),
        (lambda spec: v2.Compose([v2.RandomResizedCrop(8), v2.RandomHorizontalFlip(0.3)]), 9, 16),
    ],
)
def test_crops_are_drawn_as_the_transform_draws_them(make, height, width):
    transform = make(SPEC)
    seeds = [stable_hash("seed", number) for number in range(2000)]
    boxes, flips = draw(crops_of(transform), seeds, height, width)
    image, (crop, *flip) = torch.empty(3, height, width), transform.transforms
    for seed, box, flipped in zip(seeds, boxes.tolist(), flips.tolist(), strict=True):
        torch.manual_seed(seed)
        made = crop.make_params([image])
        assert box == [made["top"], made["left"], made["height"], made["width"]]
        assert flipped == bool(flip and torch.rand(1) < flip[0].p)


@pytest.mark.parametrize(
    ("make", "known"),
    [
        (transforms.light, True),
        (transforms.strong, False),
        (transforms.randaugment, False),
        (transforms.crop, False),
        (transforms.subpixel, False),
        (transforms.none, False),
        (lambda spec: v2.Compose([v2.RandomResizedCrop(8)]), True),
        (lambda spec: v2.Compose([v2.RandomResizedCrop(8, antialias=False)]), False),
        (lambda spec: v2.Compose([v2.RandomResizedCrop(8, interpolation=2)]), False),
    ],
)
def test_only_crops_and_flips_are_computed_on_the_device(make, known):
    assert (crops_of(make(SPEC)) is not None) == known


def datamodule(splits, kind, transform=transforms.light, balanced=False, **stands):
    augmented, cache = transform is not transforms.none, ImageCache(Choice(kind, ("train",)), None)
    module = DataModule(
        splits, transform(SPEC), transforms.evaluation(SPEC), 4, 0, 3, balanced,
        cache=cache, augmented=augmented,
    )  # fmt: skip
    module.trainer = Trainer(**stands)
    module.trainer.max_epochs = 5
    module.trainer.strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return module


def test_without_augmentation_the_batches_are_those_of_the_cpu(photos):  # noqa: F811
    for splits in (fake(3, 45, 12), image_folder(str(photos))):  # the photos of many sizes
        ours, theirs = (
            stacked(datamodule(splits, kind, transforms.none, epoch=1).train_dataloader())
            for kind in ("device", "ram")
        )
        assert equal(ours, theirs)


@pytest.mark.parametrize("balanced", [False, True])
def test_crops_are_those_that_workers_would_make(balanced):
    epochs = [
        stacked(datamodule(fake(3, 45, 12), kind, balanced=balanced, epoch=2).train_dataloader())
        for kind in ("device", "ram")
    ]
    for (ours, labels), (theirs, their_labels) in zip(*epochs, strict=True):
        assert torch.equal(labels, their_labels)
        different = (ours.int() - theirs.int()).abs()  # of 255: torch rounds its weights
        assert different.max() <= 2
        assert (different > 0).float().mean() < 0.1


def test_images_of_several_sizes_cannot_be_cropped_there(photos):  # noqa: F811
    with pytest.raises(ConfigError, match=r"images of one size .* data\.cache=ram"):
        datamodule(image_folder(str(photos)), "device").train_dataloader()


@pytest.mark.parametrize("batches", [1, 2, 7])
def test_crops_on_the_device_are_new_in_each_epoch_and_the_same_after_a_resume(
    monkeypatch, batches
):
    monkeypatch.setattr(resident, "AT_ONCE_ON_CPU", batches * 4 * 3 * 12**2)
    splits = fake(3, 45, 12)
    first = stacked(datamodule(splits, "device").train_dataloader())
    assert (first[0][0].shape, first[0][0].dtype) == ((4, 3, 8, 8), torch.uint8)
    second = stacked(datamodule(splits, "device", epoch=1).train_dataloader())
    assert not equal(first, second)
    again = datamodule(splits, "device", epoch=1, batch=3)
    assert equal(stacked(again.train_dataloader()), second[3:])
    labels = [sorted(torch.cat([y for _, y in batches]).tolist()) for batches in (first, second)]
    assert labels[0] == labels[1]


def test_an_image_that_is_drawn_twice_in_an_epoch_is_cropped_twice():
    splits = fake(3, 45, 12)
    module = datamodule(splits, "device", balanced=True)
    images, seed_of = module._resident_images(), module.train_dataloader().loader.dataset.seed_of
    drawn = images.drawn([seed_of((0, 5, place)) for place in (1, 2)])
    one, other = images.batch(torch.tensor([5, 5]), drawn)
    assert not torch.equal(one, other)
    assert len(stacked(module.train_dataloader())) == 7


def test_the_pictures_show_what_the_first_batch_on_the_device_holds():
    module = datamodule(fake(3, 45, 12), "device")
    assert torch.equal(module.first_training_images(4), next(iter(module.train_dataloader()))[0])


def chosen(*overrides, data=SMALL[:4], before=None):
    cfg = plain(*data, *TRAINED, *overrides)
    splits = build.build_splits(cfg)
    budget = build.build_budget(cfg, len(splits.train), len(splits.val))
    return build.choose_cache(cfg, splits, SPEC, build.Plan(), budget, before)


def test_a_cpu_that_crops_batches_says_how_long_the_network_waits(monkeypatch):
    batch = ResidentImages.batch

    def slowly(*args, **kwargs):
        time.sleep(0.02)
        return batch(*args, **kwargs)

    monkeypatch.setattr(ResidentImages, "batch", slowly)
    loader = datamodule(fake(3, 45, 12), "device").train_dataloader()
    stacked(loader)
    assert loader.waited >= 0.02


def test_what_cannot_live_on_the_device_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"augment=strong is not computed on the device"):
        chosen("data.cache=device", "augment=strong")
    monkeypatch.setattr(build, "free_memory", lambda: 1000)
    with pytest.raises(ConfigError, match=r"take about 3\.46 kB, and 1 kB of the device are free"):
        chosen("data.cache=device", "augment=light")
    monkeypatch.setattr(build, "free_memory", lambda: 3000)
    monkeypatch.setattr(build, "device_memory", lambda cfg: (10**9, 10**9))
    with pytest.raises(ConfigError, match=r"take about 3\.46 kB of memory, and 3 kB are free"):
        chosen("data.cache=device", "augment=light")


@pytest.mark.parametrize(
    ("augment", "total", "kind"),
    [("light", 10**6, "device"), ("light", 10**4, "none"), ("strong", 10**6, "none")],
)
def test_images_in_memory_live_on_a_gpu_with_room(monkeypatch, augment, total, kind):
    monkeypatch.setattr(build, "on_gpu", lambda cfg: True)
    monkeypatch.setattr(build, "device_memory", lambda cfg: (0, total))  # a resume finds the same
    assert chosen(f"augment={augment}").kind == kind


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ((), "device"),
        (("data.image_size=64",), "device"),
        (("data.image_size=65",), "none"),
        (("augment=upright",), "device"),
        (("augment=strong",), "none"),
        (("augment=none",), "none"),
        (("data.cache=none",), "none"),
        (("num_workers=2",), "device"),  # and for other workers
    ],
    ids=str,
)
def test_small_images_on_a_cpu_are_cropped_in_batches(changes, kind):
    assert chosen("augment=light", *changes).kind == kind


def write_squares(root, *sides):
    """Images for training and for val, one of each size for each of two classes."""
    for split, label in itertools.product(("train", "val"), ("a", "b")):
        (root / split / label).mkdir(parents=True)
        for number, side in enumerate(sides):
            pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
            Image.fromarray(pixels).save(root / split / label / f"{number}.png")
    return ["data=image_folder", f"data.root={root}"]


@pytest.mark.parametrize(
    ("sides", "kind"), [((12,) * 4, "device"), ((12, 12, 12, 13), "ram"), ((70,) * 4, "ram")]
)
def test_small_files_of_one_size_are_cropped_in_batches(tmp_path, sides, kind):
    folder = write_squares(tmp_path / "squares", *sides)
    assert chosen("augment=light", data=folder).kind == kind
    assert chosen("augment=light", "trainer.devices=2", data=folder).kind == "none"


@pytest.mark.parametrize(
    ("changes", "before", "kind"),
    [
        (("epochs=1",), None, "none"),  # they are not read again
        (("+trainer.limit_train_batches=2",), None, "none"),
        (("epochs=2",), False, "ram"),  # of an earlier version, or begun for one epoch
        (("epochs=1",), True, "device"),
        (("data.cache=none",), True, "none"),  # which is refused later
        (("trainer.devices=2",), True, "none"),  # and this
    ],
    ids=str,
)
def test_a_resume_crops_files_where_the_run_did(tmp_path, changes, before, kind):
    folder = write_squares(tmp_path / "squares", *(12,) * 4)
    assert chosen("augment=light", *changes, data=folder, before=before).kind == kind


def test_a_run_of_one_epoch_goes_on_for_more_without_other_crops(command, tmp_path):
    arguments = [*write_squares(tmp_path / "squares", *(12,) * 8), *TRAINED, "augment=light"]
    arguments += ["schedule=constant", "logger=csv"]
    whole = finish(tmp_path / "whole", *arguments, "epochs=3", "data.cache=ram")
    finish(tmp_path / "run", *arguments, "epochs=1")
    done = command("train", "resume=run", "epochs=3")
    assert done.code == 0, done.err
    assert_same_end(tmp_path / "run", whole)


def test_a_resume_without_the_device_that_auto_took_is_refused(command, tmp_path):
    finish(tmp_path / "run", *SMALL, "augment=light", "schedule=constant")
    refused = command("train", "resume=run", "epochs=3", "data.cache=none")
    assert refused.code == 1
    said = "training images on the device then, in files or memory now (leave it out)"
    assert f"data.cache: {said}" in refused.err


def test_a_size_that_nobody_saw_before_sends_images_to_memory(command, tmp_path, monkeypatch):
    data = write_squares(tmp_path / "squares", 12, 12, 12, 13)
    arguments = [*data, *TRAINED, "augment=light", "logger=csv"]
    in_memory = finish(tmp_path / "in memory", *arguments, "data.cache=ram")
    monkeypatch.setattr(build, "sizes_of_some", lambda images: [(12, 12)])
    run = finish(tmp_path / "run", *arguments)
    assert_same_end(run, in_memory)
    assert facts_of(run)["images_on_device"] is False


def test_a_run_on_the_device_sees_what_others_see(tmp_path):
    arguments = [*SMALL, "augment=light", "logger=csv", "optimizer.lr=0.000001"]
    ours, theirs = (
        series(finish(tmp_path / kind, *arguments, f"data.cache={kind}"), "train/loss")
        for kind in ("device", "none")
    )
    assert ours == pytest.approx(theirs, rel=1e-2)


def test_a_run_on_the_device_that_crashed_ends_with_the_same_bytes(command, tmp_path, at_step):
    arguments = [*SMALL, "augment=light", "data.cache=device", "logger=csv"]
    whole = finish(tmp_path / "whole", *arguments)
    at_step(7, lose)
    assert command("train", *arguments, "hydra.run.dir=run").code == 1
    refused = command("train", "resume=run", "data.cache=ram")
    assert "data.cache: the run has device, not ram" in refused.err
    resumed = command("train", "resume=run")
    assert resumed.code == 0, resumed.err
    assert "images: 18 of train live on cpu, " in resumed.out
    assert "images: 6 of val kept in memory as the model sees them" in resumed.out
    assert facts_of(tmp_path / "run")["images_on_device"] is True
    assert_same_end(tmp_path / "run", whole)

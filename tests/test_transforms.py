"""From an image of any size to what a backbone expects."""

import pickle

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from finetune.data import transforms
from finetune.specs import InputSpec

SPEC = InputSpec(size=16, resize=20)
AUGMENTS = [
    transforms.none,
    transforms.light,
    transforms.subpixel,
    transforms.strong,
    transforms.randaugment,
]


def image(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("make", [transforms.evaluation, *AUGMENTS])
@pytest.mark.parametrize("size", [(1, 1), (1, 60), (16, 16), (40, 30), (300, 17)])
def test_any_image_becomes_uint8_of_the_input_size(make, size):
    out = transforms.seeded(make(SPEC), image(*size), seed=1)
    assert out.shape == (3, 16, 16)
    assert out.dtype == torch.uint8


def test_evaluation_resizes_the_shorter_side_and_crops_the_centre():
    photo = image(40, 60)
    resized = F.resize(photo, [20, 30], antialias=True)
    assert torch.equal(transforms.evaluation(SPEC)(photo), resized[:, 2:18, 7:23])


def test_an_image_of_the_input_size_is_left_as_it_is():
    photo = image(16, 16)
    assert torch.equal(transforms.evaluation(InputSpec(16, 16))(photo), photo)


def test_a_pil_image_is_evaluated_as_its_tensor_is():
    photo = image(40, 60)
    pil = Image.fromarray(photo.permute(1, 2, 0).numpy())
    by_tensor = transforms.evaluation(SPEC)(photo).float()
    by_pil = v2.functional.pil_to_tensor(transforms.evaluation(SPEC)(pil)).float()
    assert (by_tensor - by_pil).abs().max() <= 1  # two roundings of one antialiased resize


def test_no_augmentation_is_evaluation():
    photo = image(40, 60)
    assert torch.equal(transforms.none(SPEC)(photo), transforms.evaluation(SPEC)(photo))


@pytest.mark.parametrize("make", AUGMENTS)
def test_augmentation_can_be_sent_to_a_worker_that_is_spawned(make):
    augment = pickle.loads(pickle.dumps(make(SPEC)))
    assert transforms.seeded(augment, image(40, 60), seed=1).shape == (3, 16, 16)


@pytest.mark.parametrize("make", AUGMENTS[1:])
def test_augmentation_is_a_function_of_the_seed_alone(make):
    augment, photo = make(SPEC), image(40, 60)
    first = [transforms.seeded(augment, photo, seed) for seed in range(8)]
    torch.manual_seed(99)
    again = [transforms.seeded(augment, photo, seed) for seed in reversed(range(8))][::-1]
    assert all(map(torch.equal, first, again))
    assert len({tuple(out.flatten().tolist()) for out in first}) == 8


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(1, 1), (1, 60), (16, 16), (40, 30), (300, 17), (9, 100)])
def test_light_draws_and_computes_what_torchvision_does(size, interpolation):
    mode = transforms.InterpolationMode(interpolation)
    theirs = v2.Compose(
        [v2.RandomResizedCrop(16, (0.2, 1.0), interpolation=mode), v2.RandomHorizontalFlip()]
    )
    ours = transforms.light(InputSpec(16, 16, interpolation=interpolation))
    planar = image(*size)
    interleaved = planar.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # as JPEGs are decoded
    for seed in range(20):
        expected = transforms.seeded(theirs, planar, seed)
        assert torch.equal(transforms.seeded(ours, planar, seed), expected)
        assert torch.equal(transforms.seeded(ours, interleaved, seed), expected)
        assert torch.equal(transforms.seeded(theirs, interleaved, seed), expected)


def test_a_seeded_transform_leaves_the_generator_as_it_was():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    transforms.seeded(transforms.light(SPEC), image(40, 60), seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_failing_transform_leaves_the_generator_as_it_was():
    def fail(photo):
        torch.rand(1)
        raise ValueError

    before = torch.get_rng_state()
    with pytest.raises(ValueError):  # noqa: PT011
        transforms.seeded(fail, image(4, 4), seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_flip_is_half_of_the_images_and_can_be_turned_off():
    ramp = torch.arange(16, dtype=torch.uint8).expand(3, 16, 16).contiguous()
    spec = InputSpec(16, 16)

    def share(flip):
        augment = transforms.light(spec, scale=(1.0, 1.0), flip=flip)
        outs = [transforms.seeded(augment, ramp, seed) for seed in range(200)]
        return sum(bool(out[0, 8, 0] > out[0, 8, -1]) for out in outs) / 200

    assert share(flip=False) == 0.0
    assert share(flip=True) == pytest.approx(0.5, abs=0.15)  # 4 standard deviations


@pytest.mark.parametrize("make", [transforms.strong, transforms.randaugment])
def test_erase_blanks_a_rectangle(make):
    white = torch.full((3, 16, 16), 255, dtype=torch.uint8)
    always = make(InputSpec(16, 16), flip=False, erase=1.0)
    blanked = [bool((transforms.seeded(always, white, s) == 0).any()) for s in range(20)]
    assert all(blanked)


def test_randaugment_changes_more_with_more_operations_and_magnitude():
    photo = F.resize(image(4, 4), [32, 32], antialias=True)

    def change(num_ops, magnitude):
        options = {"scale": (1.0, 1.0), "flip": False, "erase": 0.0}
        augment = transforms.randaugment(
            InputSpec(32, 32), **options, num_ops=num_ops, magnitude=magnitude
        )
        plain = transforms.light(InputSpec(32, 32), scale=(1.0, 1.0), flip=False)
        pairs = [
            (transforms.seeded(augment, photo, seed), transforms.seeded(plain, photo, seed))
            for seed in range(100)
        ]
        return sum(float((a.float() - b.float()).abs().mean()) for a, b in pairs) / 100

    assert change(1, 1) < change(1, 9) < change(1, 30)
    assert change(1, 9) < change(3, 9)


def test_crop_is_a_part_of_the_whole_image_squashed():
    image = torch.randint(256, (3, 40, 40), dtype=torch.uint8)
    spec = InputSpec(16, 16)
    square = transforms.evaluation(InputSpec(20, 20))(image)
    crops = [
        transforms.seeded(transforms.crop(spec, margin=1.25, flip=False), image, seed)
        for seed in range(20)
    ]
    windows = [square[:, top : top + 16, left : left + 16] for top in range(5) for left in range(5)]
    assert all(any(torch.equal(crop, window) for window in windows) for crop in crops)
    assert len({crop.sum().item() for crop in crops}) > 3


def test_a_subpixel_crop_is_a_crop_and_keeps_left_left():
    slope = torch.arange(0, 256, 16, dtype=torch.uint8).expand(3, 16, 16)  # from left to right
    augment = transforms.subpixel(InputSpec(16, 16), scale=(0.5, 0.5))
    widths = set()
    for seed in range(20):
        row = transforms.seeded(augment, slope, seed)[0, 8].float()
        assert (row.diff() >= 0).all()
        widths.add(float(row[12] - row[4]))  # of 128 in the whole image
    assert len(widths) > 10
    assert all(128 * 0.5**0.5 * 0.75**0.5 - 2 < width < 128 + 2 for width in widths)

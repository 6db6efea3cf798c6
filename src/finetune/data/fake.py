"""Made-up images that can be learnt: for tests and for trying a command."""

import torch

from finetune.data.base import ImageArray, LabelledImages, Splits
from finetune.errors import ConfigError


def fake(
    num_classes: int = 10, num_images: int = 200, image_size: int = 32, seed: int = 0
) -> Splits:
    """Coloured gratings in noise: a class has one colour, one direction and one period.

    num_images: of all classes and splits together; 60 % train, 20 % val, 20 % test, with the
    classes in turn, so it takes 5 per class. image_size: H = W in pixels.
    """
    if num_classes < 2 or num_images < 5 * num_classes or image_size < 1:
        raise ConfigError(
            f"data=fake with num_classes={num_classes} num_images={num_images} "
            f"image_size={image_size}: at least 2 classes, 5 images of each, and 1 pixel"
        )
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_images) % num_classes
    colours = torch.rand(num_classes, 3, 1, 1, generator=generator)
    angles = torch.pi * torch.arange(num_classes) / num_classes
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, image_size)] * 2, indexing="ij")
    across = angles.cos()[:, None, None] * x + angles.sin()[:, None, None] * y
    gratings = 0.5 + 0.5 * torch.cos(2 * torch.pi * (2 + angles[:, None, None]) * across)
    patterns = 255 * colours * gratings[:, None]  # (K, 3, H, W)

    noise = torch.randn(num_images, 3, image_size, image_size, generator=generator)
    array = (patterns[labels] + 25 * noise).clamp(0, 255).to(torch.uint8)
    whole = LabelledImages.of(ImageArray(array), labels.tolist())
    # Each round of the classes goes to one split: rounds 3 and 4 of every 5 to val and test
    rounds = torch.arange(num_images) // num_classes % 5
    train, val, test = (
        whole.subset(torch.nonzero(chosen).flatten().tolist())
        for chosen in (rounds < 3, rounds == 3, rounds == 4)
    )
    return Splits(tuple(f"class_{k}" for k in range(num_classes)), train, val, test)

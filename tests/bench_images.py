"""The images that bench.py trains on: drawn, since nothing is downloaded, or unpacked."""

import tarfile
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 10


def noise_image(generator: np.random.Generator, size: tuple[int, int], label: int) -> Image.Image:
    """Smooth noise under fine noise, tinted by the class. size: width and height."""
    width, height = size
    coarse = generator.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), np.uint8)
    smooth = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    tint = np.random.default_rng(label).integers(-50, 50, 3)
    pixels = np.asarray(smooth) + tint + generator.normal(0, 12, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image) -> bytes:
    """Encoded at a quality of 85."""
    file = BytesIO()
    image.save(file, "JPEG", quality=85)
    return file.getvalue()


def write_images(root: Path, counts: Mapping[str, int], size: tuple[int, int]) -> None:
    """root/split/class/N.jpg, each another image."""
    generator = np.random.default_rng(0)
    for path, label in paths(root, counts):
        path.write_bytes(jpeg(noise_image(generator, size, label)))


def write_files(root: Path, counts: Mapping[str, int]) -> None:
    """root/split/class/N.jpg, 32 x 32: a few images, and behind each file's end its number."""
    generator = np.random.default_rng(0)
    images = [jpeg(noise_image(generator, (32, 32), label)) for label in range(CLASSES)]
    for number, (path, label) in enumerate(paths(root, counts)):
        path.write_bytes(images[label] + number.to_bytes(4, "little"))


def paths(root: Path, counts: Mapping[str, int]) -> Iterator[tuple[Path, int]]:
    """Of all images, with their classes; the folders are made."""
    for split, count in counts.items():
        folders = [root / split / f"class-{label}" for label in range(CLASSES)]
        for folder in folders:
            folder.mkdir(parents=True)
        for number in range(count):
            label = number % CLASSES
            yield folders[label] / f"{number:07d}.jpg", label


def unpack_cifar(archive: Path, root: Path, counts: Mapping[str, int]) -> None:
    """As many images of each class as counts ask for; those of val are of its test split."""
    from_split = {"train": "train", "test": "val"}
    taken: dict[tuple[str, str], int] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if not member.isfile() or len(parts) != 4 or parts[1] not in from_split:
                continue
            split, name = from_split[parts[1]], parts[2]
            taken[split, name] = taken.get((split, name), 0) + 1
            if taken[split, name] <= counts[split] // CLASSES:
                path = root / split / name / parts[3]
                path.parent.mkdir(parents=True, exist_ok=True)
                content = tar.extractfile(member)
                assert content is not None
                path.write_bytes(content.read())

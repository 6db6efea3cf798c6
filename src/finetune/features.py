"""What a frozen backbone makes of images: computed once, and found again by later runs."""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune import averaging, checkpoint
from finetune.data.base import LabelledImages
from finetune.data.transforms import Transform
from finetune.errors import CheckpointError
from finetune.files import cache_folder, make_room, readable
from finetune.machine import total_memory
from finetune.model import Classifier
from finetune.strategies import Strategy

log = logging.getLogger(__name__)

FORMAT = 1
BATCH = 64  # images; fixed: another composition of batches may change a last bit
MOST_ON_DISK = 20e9  # bytes of all files; those that were not read for longest go first
MOST_ON_DEVICE = 1e9  # bytes; more stay in the machine's memory
SHARE_OF_MEMORY = 0.25  # of the machine's, for the features of the training images
SAME = 0.01  # of the largest feature: further apart is another network, not another batch

Batches = Iterable[tuple[Tensor, Tensor]]
Wheres = list[tuple[int, ...]]  # (view or epoch, position in the split, ...) for each image


@dataclass(frozen=True)
class Plan:
    """What stands in for images.

    epochs: the first so many, in which no layer of the backbone trains. views: of each training
    image: 1 without augmentation; 0: training sees images. always: the backbone never trains, so
    that features serve after the training too. why_not: why views is 0, where that can be changed.
    """

    epochs: int = 0
    views: int = 0
    augmented: bool = False
    always: bool = False
    why_not: str | None = None


def frozen_epochs(strategy: Strategy, depth: int, epochs: int) -> int:
    """How many epochs pass before a layer of the backbone trains; at most all of the run's."""
    for epoch in range(epochs):
        if any(strategy.lr_scale(layer, depth, epoch) > 0 for layer in range(depth)):
            return epoch
    return epochs


def plan(
    frozen: int,
    epochs: int,
    augment: str | None,
    views: int | None,
    mixes: bool,
    unused: bool,
    num_bytes: int,
) -> Plan:
    """Decide whether features stand in for training images.

    frozen: epochs before the backbone trains, of epochs. augment: its name; None for none. mixes:
    mixup or cutmix. unused: several devices, and a backbone that trains later. num_bytes: of one
    view of the training images' features.
    """
    augmented, always = augment is not None, frozen == epochs
    if not frozen:
        return Plan()
    why, memory = None, total_memory()
    num = (views or 1) if augmented else 1
    if mixes:
        why = "mixup and cutmix blend pixels; without them it would be computed once"
    elif augmented and views is None:
        why = (
            f"augment={augment} makes new pixels in each of {frozen} epochs; with augment=none it "
            "would be computed once, with features.views=4 four times"
        )
    elif unused:
        why = "DDP waits for gradients of all that trains later; with one device it would not"
    elif memory and num * num_bytes > SHARE_OF_MEMORY * memory:
        why = (
            f"the features would take {readable(num * num_bytes)} of {readable(memory)}; type a "
            "smaller data.fraction" + " or features.views" * (num > 1)
        )
    return Plan(frozen, 0 if why else num, augmented, always, why)


@contextmanager
def evaluating(model: Classifier) -> Iterator[None]:
    """Eval mode without gradients; afterwards each module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        # also within Lightning's inference_mode: what comes out may be trained on
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def threads(num: int) -> Iterator[None]:
    """So many threads compute, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class FeatureLoader:
    """The batches of a loader, with features in place of images while they stand in for them.

    features: of a split, (views, N, D), or None; asked when the first batch is drawn. labels: of
    the split, in its order. sampler: of the same batches, or of larger ones in an evaluation.
    """

    def __init__(
        self,
        images: Any,
        sampler: Iterable[Wheres],
        labels: Tensor,
        features: Callable[[], Tensor | None],
    ) -> None:
        self.images, self.sampler, self.labels, self.features = images, sampler, labels, features

        self.batch_sampler = images.batch_sampler  # Lightning looks whether it shuffles

    def __len__(self) -> int:
        return len(self.images)

    @property
    def waited(self) -> float:
        """Seconds that were spent on images; features are there."""
        return float(self.images.waited)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        features = self.features()
        if features is None:
            yield from self.images
            return
        views, num_images = features.shape[:2]
        flat, labels = features.flatten(0, 1), self.labels.to(features.device)
        for wheres in self.sampler:
            positions = torch.tensor([where[1] for where in wheres], device=features.device)
            # an image that comes again in an epoch is seen in another view
            turns = [(where[0] + sum(where[2:])) % views for where in wheres]
            rows = positions + num_images * torch.tensor(turns, device=features.device)
            yield flat[rows], labels[positions]


@dataclass(frozen=True)
class Ranks:
    """What several devices agree by. strategy: Lightning's; None: each works for itself."""

    rank: int = 0
    world_size: int = 1
    strategy: Any = None

    def all_agree(self, found: bool) -> bool:
        """Whether it is so on every rank."""
        if self.world_size == 1:
            return found
        return bool(self.strategy.reduce_boolean_decision(found, all=True))

    def gather(self, features: Tensor) -> Tensor:
        """Of (B, D) on each rank, (world_size, B, D)."""
        if self.world_size == 1:
            return features[None]
        gathered: Tensor = self.strategy.all_gather(features.to(self.strategy.root_device))
        return gathered


class Features:
    """Features of one backbone as long as it does not change.

    folder: of the files; None keeps them in memory alone. num_threads: that compute them, while
    fewer may do for the head.
    """

    def __init__(
        self,
        model: Classifier,
        folder: Path | None,
        batch_size: int,
        plan: Plan,
        num_threads: int = 1,
    ) -> None:
        self.model, self.folder, self.plan = model, folder, plan
        self.num_threads = num_threads
        # enough memory where little is left for training; the same for all usual sizes
        self.batch_size = min(BATCH, 4 * batch_size)
        self._weights: str | None = None

    def of(
        self,
        name: str,
        images: LabelledImages,
        transform: Transform,
        load: Callable[[Sequence[Wheres]], Batches],
        device: torch.device,
        seed: int | None = None,
        view: int = 0,
        ranks: Ranks | None = None,
        precision: str = "32-true",
        context: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> Tensor:
        """(N, D), on the device if it is not too large; model is there already.

        name: for messages. load: gives the images (B, 3, S, S) of each batch. seed: of the
        augmentation; None for none. context: the precision's forward pass.
        """
        began, ranks = time.perf_counter(), ranks or Ranks()
        digest = self.digest(images, transform, device, seed, view, precision)
        path = self.folder and digest and self.folder / f"{digest}.pt"
        run = self._runner(load, device, context)
        found = self._read(path, len(images), run, view) if path else None
        if not ranks.all_agree(found is not None):
            found = None
        how = "found"
        if found is None:
            found = self._compute(len(images), run, view, ranks)
            how = f"computed in {time.perf_counter() - began:.1f} s"
            if path and ranks.rank == 0:
                write(path, found)
        log.info(
            "features: %s images of %s%s, %d values each, %s",
            f"{len(images):,}", name, "" if seed is None else f", view {view}", found.shape[1], how,
        )  # fmt: skip
        return found.to(device) if found.nbytes < MOST_ON_DEVICE else found

    def digest(
        self,
        images: LabelledImages,
        transform: Transform,
        device: torch.device,
        seed: int | None = None,
        view: int = 0,
        precision: str = "32-true",
    ) -> str | None:
        """Of all that the features depend on; None where the images cannot be told from others."""
        backbone, files = self.model.backbone, images.fingerprint()
        if files is None:
            return None
        if self._weights is None:
            self._weights = averaging.digest(backbone.state_dict())
        parts = {
            "code": (FORMAT, *versions()),
            "backbone": backbone.recipe,
            "input": asdict(backbone.input_spec),
            "weights": self._weights,
            "transform": repr(transform),
            "images": files,
            "augmentation": None if seed is None else (seed, view),
            "arithmetic": (precision, device.type, self.batch_size),
        }
        text = json.dumps(parts, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def _runner(
        self,
        load: Callable[[Sequence[Wheres]], Batches],
        device: torch.device,
        context: Callable[[], AbstractContextManager[Any]] | None,
    ) -> Callable[[Sequence[Wheres]], Iterator[Tensor]]:
        def run(batches: Sequence[Wheres]) -> Iterator[Tensor]:
            for images, _ in load(batches):
                with evaluating(self.model), threads(self.num_threads):
                    if context is None:
                        features = self.model.features(images.to(device))
                    else:
                        with context():
                            features = self.model.features(images.to(device))
                yield features.cpu()

        return run

    def _compute(
        self,
        num_images: int,
        run: Callable[[Sequence[Wheres]], Iterator[Tensor]],
        view: int,
        ranks: Ranks,
    ) -> Tensor:
        """Batches in order, each rank every world_size-th: the same whatever their number."""
        places: Wheres = [(view, position) for position in range(num_images)]
        size = self.batch_size
        batches = [places[start : start + size] for start in range(0, num_images, size)]
        rounds = -(-len(batches) // ranks.world_size)
        mine = batches[ranks.rank :: ranks.world_size]
        features = torch.empty(0)
        computed = run(mine or batches[:1])  # the shape is needed, whatever is there to do
        for turn in range(rounds):
            own = next(computed, None) if turn < max(1, len(mine)) else None
            if turn == 0 and own is not None:
                features = own.new_empty(num_images, own.shape[1])
            padded = features.new_zeros(size, features.shape[1])
            if own is not None:
                padded[: len(own)] = own
            for rank, theirs in enumerate(ranks.gather(padded)):
                start = (turn * ranks.world_size + rank) * size
                rows = max(0, min(size, num_images - start))
                features[start : start + rows] = theirs[:rows].cpu()
        return features

    def _read(
        self,
        path: Path,
        num_images: int,
        run: Callable[[Sequence[Wheres]], Iterator[Tensor]],
        view: int,
    ) -> Tensor | None:
        """What is in a file; None if there is none, or it does not hold what is computed now.

        The first and the last image are computed again: the digest knows of versions, and not of
        a line that somebody changed in a network or a transform.
        """
        if not path.exists():
            return None
        try:
            features = checkpoint.load(path)["features"]
        except (CheckpointError, KeyError) as error:
            log.warning("features are computed again: %s", error)
            return None
        if features.shape != (num_images, self.model.backbone.num_features):
            return None
        ends: Wheres = [(view, 0), (view, num_images - 1)]
        now = next(iter(run([ends])))
        then = features[[0, num_images - 1]]
        if not torch.allclose(now, then, rtol=0.0, atol=SAME * float(now.abs().max())):
            log.info("features are computed again: the code has changed since %s", path)
            return None
        with suppress(OSError):  # it is another user's
            os.utime(path)  # read now: the last to go
        return features  # type: ignore[no-any-return]


def versions() -> list[str]:
    """Of the code that features come from."""
    found = []
    for name in ("finetune", "torch", "torchvision", "timm", "pillow"):
        with suppress(PackageNotFoundError):  # timm is an extra
            found.append(f"{name} {version(name)}")
    return found


def write(path: Path, features: Tensor) -> None:
    """Keep features if there is room; files that were not read for longest make some."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < 2 * features.nbytes:
            log.info("features are not kept: %s has no room for them", path.parent)
            return
        checkpoint.save(path, {"features": features})
        make_room(path, MOST_ON_DISK)
    except OSError as error:
        log.info("features are not kept: %s: %s", path, error.strerror or error)


def default_folder() -> Path:
    """Where features are kept if nothing else is asked for."""
    return cache_folder("features")

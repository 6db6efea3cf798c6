"""What frozen layers make of images: computed once, and found again by later runs."""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune import averaging, checkpoint
from finetune.data.base import LabelledImages
from finetune.data.read import read_image
from finetune.data.sampler import EpochBatches
from finetune.data.transforms import Transform
from finetune.errors import CheckpointError
from finetune.files import cache_folder, is_newer, make_room, note_read, readable, sweep_abandoned
from finetune.machine import threads, total_memory
from finetune.model import Activations, Classifier
from finetune.origins import PACKAGES, NoOrigin, built_with, sources
from finetune.prefix import Unsplittable, modes_kept
from finetune.strategies import Strategy

log = logging.getLogger(__name__)

FORMAT = 2
BATCH = 64  # images; fixed: another composition of batches may change a last bit
MOST_ON_DISK = 20e9  # bytes of all files; those that were not read for longest go first
MOST_ON_DEVICE = 1e9  # bytes; more stay in the machine's memory
SHARE_OF_MEMORY = 0.25  # of the machine's, for the features of the training images
SAME = 0.01  # of the largest feature: further apart is another network, not another batch

READING = (read_image, Classifier.normalised)  # what else is done to pixels
Batches = Iterable[tuple[Tensor, Tensor]]
Wheres = list[tuple[int, ...]]  # (view or epoch, position in the split, ...) for each image
Stored = tuple[Activations, EpochBatches]


@dataclass(frozen=True)
class Phase:
    """Epochs in which the same layers are frozen, and were from the start.

    end: the first epoch that is not in it. layers: so many, from the stem up.
    """

    first: int
    end: int
    layers: int


@dataclass(frozen=True)
class Plan:
    """What stands in for images.

    phases: in which epochs, and after how many layers. views: of each training image: 1 without
    augmentation; 0: training sees images. always: the backbone never trains, so that features serve
    after the training too. why_not: why views is 0, where that can be changed.
    """

    phases: tuple[Phase, ...] = ()
    views: int = 0
    augmented: bool = False
    always: bool = False
    why_not: str | None = None

    @property
    def epochs(self) -> int:
        """How many epochs see them."""
        return sum(phase.end - phase.first for phase in self.phases)

    def layers_at(self, epoch: int) -> int:
        """Layers whose activations stand in for images in an epoch; 0 for images."""
        return next((p.layers for p in self.phases if p.first <= epoch < p.end), 0)


def frozen_phases(strategy: Strategy, depth: int, epochs: int) -> list[Phase]:
    """Epochs in which the same first layers have not trained yet, and are worth computing once.

    A part of the backbone is if it serves two epochs: its activations take an epoch to compute, and
    room. Layers that are frozen for fewer are counted with those that are frozen longer. All of the
    backbone always is: its features take little room, and later runs find them.
    """
    phases: list[Phase] = []
    frozen = depth
    for epoch in range(epochs):
        trains = (layer for layer in range(frozen) if strategy.lr_scale(layer, depth, epoch) > 0)
        frozen = next(trains, frozen)
        if not frozen:
            break
        first = epoch
        if phases and (phases[-1].layers == frozen or is_short(phases[-1], depth)):
            first = phases.pop().first
        phases.append(Phase(first, epoch + 1, frozen))
    return [phase for phase in phases if not is_short(phase, depth)]


def is_short(phase: Phase, depth: int) -> bool:
    """Whether nothing is won in it."""
    return phase.end - phase.first < 2 and phase.layers < depth


def plan(
    phases: Sequence[Phase],
    depth: int,
    epochs: int,
    augment: str | None,
    views: int | None,
    mixes: bool,
    several: bool,
    num_bytes: Callable[[int], int],
) -> Plan:
    """Decide what stands in for training images, and when.

    phases: of frozen layers, of depth, in epochs. augment: its name; None for none. mixes: mixup or
    cutmix. several: devices. num_bytes: of the activations of all images, once each, after so many
    layers; raises Unsplittable.
    """
    augmented, always = augment is not None, [*phases] == [Phase(0, epochs, depth)]
    if not phases:
        return Plan()
    why = None
    num = (views or 1) if augmented else 1
    if several and phases[-1].end == epochs:
        phases = [Phase(0, epochs, phases[-1].layers)]  # what never trains has no gradients
    if mixes:
        why = "mixup and cutmix blend pixels; without them it would be computed once"
    elif augmented and views is None:
        most = max(phase.end - phase.first for phase in phases)
        why = (
            f"augment={augment} makes new pixels in each of {most} epochs; with augment=none it "
            "would be computed once, with features.views=4 four times"
        )
    elif several and phases[-1].end < epochs:
        why = "DDP waits for gradients of all that trains later; with one device it would not"
    else:
        found = [fitting(phase, num, num_bytes) for phase in phases]
        if fit := tuple(phase for phase in found if isinstance(phase, Phase)):
            return Plan(fit, num, augmented, always)
        why = next(reason for reason in found if isinstance(reason, str))
    # the features of val alone are worth it: they are few, and take next to no memory
    whole = tuple(phase for phase in phases if phase.layers == depth)
    return Plan(whole, 0, augmented, always, why)


def fitting(phase: Phase, num: int, num_bytes: Callable[[int], int]) -> Phase | str:
    """The phase with the most layers whose activations fit into memory, or why there is none.

    num: views of each image. num_bytes: as in plan.
    """
    memory, reasons = total_memory(), []
    for layers in range(phase.layers, 0, -1):
        try:
            needed = num * num_bytes(layers)
        except Unsplittable as error:
            reasons.append(f"the network cannot be taken apart after {layers} layers: {error}")
            continue
        if memory is None or needed <= SHARE_OF_MEMORY * memory:
            return replace(phase, layers=layers)
        reasons.append(
            f"the features would take {readable(needed)} of {readable(memory)}; type a smaller "
            "data.fraction" + " or features.views" * (num > 1)
        )
    return reasons[0]


@contextmanager
def evaluating(model: Classifier) -> Iterator[None]:
    """Eval mode without gradients; afterwards each module is in the mode that it was in."""
    # also within Lightning's inference_mode: what comes out may be trained on
    with modes_kept(model), torch.inference_mode(False), torch.no_grad():
        model.eval()
        yield


class FeatureLoader:
    """The batches of a loader, with activations in place of images while they stand in for them.

    labels: of the split, in its order. stored: activations of the split, (views, N, ...), and the
    batches to make of them: those of the loader, or larger ones in an evaluation; or None. Asked
    when the first batch is drawn.
    """

    def __init__(self, images: Any, labels: Tensor, stored: Callable[[], Stored | None]) -> None:
        self.images, self.labels, self.stored = images, labels, stored
        self.batch_sampler = images.batch_sampler  # Lightning looks whether it shuffles

    def __len__(self) -> int:
        return len(self.images)

    @property
    def waited(self) -> float:
        """Seconds that were spent on images; features are there."""
        return float(self.images.waited)

    def __iter__(self) -> Iterator[tuple[Tensor | Activations, Tensor]]:
        stored = self.stored()
        if stored is None:
            yield from self.images
            return
        (values, layers), batches = stored
        views, num_images = values.shape[:2]
        flat, device = values.flatten(0, 1), values.device
        epoch, first = batches.where()
        # once an epoch, and no batch makes a tensor of numbers: it took longer than the head
        order = batches.order_on(epoch, device)
        turn = torch.tensor(epoch, device=device)
        if batches.labels is not None:  # an image that comes again is seen in another view
            turn = turn + torch.arange(len(order), device=device)
        rows, labels = order + num_images * (turn % views), self.labels.to(device)[order]
        for places in batches.places()[first:]:
            yield Activations(flat.index_select(0, rows[places]), layers), labels[places]


@dataclass(frozen=True)
class Collectives:
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
        """Of (B, ...) on each rank, (world_size, B, ...)."""
        if self.world_size == 1:
            return features[None]
        gathered: Tensor = self.strategy.all_gather(features.to(self.strategy.root_device))
        return gathered


class Features:
    """Features of one backbone, and activations in it, as long as what makes them is frozen.

    folder: of the files; None keeps them in memory alone. num_threads: that compute them, while
    fewer may do for the head. since: a time; files that are older are made anew.
    """

    def __init__(
        self,
        model: Classifier,
        folder: Path | None,
        batch_size: int,
        plan: Plan,
        num_threads: int = 1,
        since: float = 0.0,
    ) -> None:
        self.model, self.folder, self.plan = model, folder, plan
        self.num_threads, self.since = num_threads, since
        # enough memory where little is left for training; the same for all usual sizes
        self.batch_size = min(BATCH, 4 * batch_size)
        self._weights: dict[int, str] = {}  # digests by number of layers

    def of(
        self,
        name: str,
        images: LabelledImages,
        transform: Transform,
        load: Callable[[Sequence[Wheres]], Batches],
        device: torch.device,
        seed: int | None = None,
        view: int = 0,
        ranks: Collectives | None = None,
        precision: str = "32-true",
        context: Callable[[], AbstractContextManager[Any]] | None = None,
        layers: int | None = None,
    ) -> Tensor:
        """(N, D), or activations (N, ...), on the device if not too large; model is there already.

        name: for messages. load: gives the images (B, 3, S, S) of each batch. seed: of the
        augmentation; None for none. context: the precision's forward pass. layers: of the backbone,
        from 1; None for all.
        """
        began, ranks = time.perf_counter(), ranks or Collectives()
        layers = layers or self.model.depth
        digest = self.digest(images, transform, device, seed, view, precision, layers)
        path = self.folder and digest and self.folder / f"{digest}.pt"
        run = self._runner(load, device, context, layers)
        found = self._read(path, len(images), run, view) if path else None
        if not ranks.all_agree(found is not None):
            found = None
        how = "found"
        if found is None:
            found = self._compute(len(images), run, view, ranks)
            how = f"computed in {time.perf_counter() - began:.1f} s"
            if path and ranks.rank == 0:
                write(path, found)
        depth = self.model.depth
        after = "" if layers == depth else f" after {layers} of {depth} layers"
        log.info(
            "features%s: %s images of %s%s, %d values each, %s", after, f"{len(images):,}", name,
            "" if seed is None else f", view {view}", found[0].numel(), how,
        )  # fmt: skip
        num_bytes = found.nbytes * max(1, self.plan.views)
        return found.to(device) if num_bytes < MOST_ON_DEVICE else found

    def digest(
        self,
        images: LabelledImages,
        transform: Transform,
        device: torch.device,
        seed: int | None = None,
        view: int = 0,
        precision: str = "32-true",
        layers: int | None = None,
    ) -> str | None:
        """Of all that the features depend on.

        None where the images, or what transforms them, cannot be told from others.
        """
        backbone, files = self.model.backbone, images.fingerprint()
        if files is None:
            return None
        try:
            made_by, code = built_with(transform)  # its repr may leave out a part
        except NoOrigin as error:
            log.info("features are not kept, since augment= cannot be told from others: %s", error)
            return None
        code |= {*READING, type(images.images), *map(type, backbone.modules())}
        layers = layers or self.model.depth
        if layers not in self._weights:
            self._weights[layers] = averaging.digest(self.model.state_of_layers(layers))
        parts = {
            "code": (FORMAT, *versions(), *sources(code)),
            "backbone": backbone.recipe,
            "input": asdict(backbone.input_spec),
            "layers": layers,
            "weights": self._weights[layers],
            "transform": (repr(transform), made_by),
            "images": files,
            "augmentation": None if seed is None else (seed, view),
            "arithmetic": (precision, device.type, self.batch_size, memory_order(backbone)),
        }
        text = json.dumps(parts, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def _runner(
        self,
        load: Callable[[Sequence[Wheres]], Batches],
        device: torch.device,
        context: Callable[[], AbstractContextManager[Any]] | None,
        layers: int,
    ) -> Callable[[Sequence[Wheres]], Iterator[Tensor]]:
        def run(batches: Sequence[Wheres]) -> Iterator[Tensor]:
            for images, _ in load(batches):
                with evaluating(self.model), threads(self.num_threads):
                    if context is None:
                        features = self.model.activations(images.to(device), layers)
                    else:
                        with context():
                            features = self.model.activations(images.to(device), layers)
                yield features.cpu()

        return run

    def _compute(
        self,
        num_images: int,
        run: Callable[[Sequence[Wheres]], Iterator[Tensor]],
        view: int,
        ranks: Collectives,
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
                features = own.new_empty(num_images, *own.shape[1:])
            padded = features.new_zeros(size, *features.shape[1:])
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

        The first and the last image are computed again: the digest knows the files of a network and
        of a transform, and not of a line that somebody changed in what those import.
        """
        if not is_newer(path, self.since):
            return None
        try:
            features = checkpoint.load(path)["features"]
        except (CheckpointError, KeyError) as error:
            log.warning("features are computed again: %s", error)
            return None
        ends: Wheres = [(view, 0), (view, num_images - 1)]
        now = next(iter(run([ends])))
        if features.shape != (num_images, *now.shape[1:]):
            return None
        then = features[[0, num_images - 1]]
        if not torch.allclose(now, then, rtol=0.0, atol=SAME * float(now.abs().max())):
            log.info("features are computed again: the code has changed since %s", path)
            return None
        note_read(path)
        return features  # type: ignore[no-any-return]


def memory_order(net: nn.Module) -> str:
    """Of the kernels, which decides how sums are rounded."""
    plain = all(p.is_contiguous() for p in net.parameters() if p.ndim == 4)
    return "contiguous" if plain else "channels_last"


def versions() -> list[str]:
    """Of the code that features come from."""
    found = []
    for name in ("finetune", *PACKAGES, "pillow"):
        with suppress(PackageNotFoundError):  # timm is an extra
            found.append(f"{name} {version(name)}")
    return found


def write(path: Path, features: Tensor) -> None:
    """Keep features if there is room; files that were not read for longest make some."""
    try:
        if features.nbytes > MOST_ON_DISK:
            log.info("features are not kept: they take %s", readable(features.nbytes))
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < 2 * features.nbytes:
            log.info("features are not kept: %s has no room for them", path.parent)
            return
        sweep_abandoned(path)
        checkpoint.save(path, {"features": features})
        make_room([path], MOST_ON_DISK)
    except OSError as error:
        log.info("features are not kept: %s: %s", path, error.strerror or error)


def default_folder() -> Path:
    """Where features are kept if nothing else is asked for."""
    return cache_folder("features")

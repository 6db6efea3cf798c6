"""From config to objects: the only caller of hydra's instantiate."""

import inspect
import logging
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

import finetune
from finetune import features
from finetune.backbones.base import Backbone
from finetune.callbacks.checkpoints import WholeCheckpointIO
from finetune.callbacks.speed import Trace, Unprofiled
from finetune.check import COMMON_DATA_KEYS, is_sharded, normal_devices, on_gpu, on_mps
from finetune.data import transforms
from finetune.data.base import ImageArray, LabelledImages, Splits, label_counts
from finetune.data.cache import Choice, ImageCache, Need, choose, decoded_bytes, sizes_of_some
from finetune.data.resident import SMALL_IMAGE, crops_of
from finetune.data.sampler import batch_bounds
from finetune.data.scan import BadData
from finetune.data.split import check_splits, cut_val, limit_train, select_classes, warn_of_doubles
from finetune.datamodule import DataModule
from finetune.errors import ConfigError, FinetuneError
from finetune.features import Features, Plan
from finetune.files import cache_folder, readable
from finetune.loggers import MetricsFile
from finetune.machine import free_memory, num_threads, num_workers, total_memory, usable_cores
from finetune.model import Classifier
from finetune.specs import InputSpec
from finetune.strategies import Strategy, for_run
from finetune.strategies.effect import without_effect
from finetune.strategies.freeze_until import FreezeUntil
from finetune.tasks.base import Schedule, Task

log = logging.getLogger(__name__)

SKIPPED_BY_TRACE = 20  # steps: buffers are allocated and kernels chosen in the first
EVALUATED_PER_TRAINED = 4  # images at once: without a backward pass nothing is kept for it
# Lightning's arguments that leave out a part of the images
READ_A_PART = ("limit_train_batches", "overfit_batches", "fast_dev_run")
SHARE_OF_DEVICE = 0.1  # of its memory, for training images, where nobody asks for it
MOST_VALIDATIONS, LEAST_VALIDATIONS = 25, 5
REDRAWN = 1  # times per second; Lightning draws 100 times, in a thread that others wait for


@dataclass(frozen=True)
class Budget:
    """How long a run trains. max_steps: None for all of the epochs."""

    epochs: int
    steps_per_epoch: int
    max_steps: int | None
    num_images: int = 0  # for training
    num_val: int = 0
    sharded: bool = False  # FSDP: the model is whole in the training loop alone
    batches_per_epoch: int = 0  # of each device; more than steps where gradients accumulate

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, at most."""
        steps = self.epochs * self.steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    @property
    def epochs_begun(self) -> int:
        """Epochs that max_steps lets begin; at least 1."""
        return max(1, min(self.epochs, math.ceil(self.total_steps / self.steps_per_epoch)))

    @property
    def validate_every(self) -> int:
        """Epochs from one validation to the next, which should cost a part of the training alone.

        25 of them at most, or 5 where val is large: it sees as many images as half of the training.
        Sharded: 1, since an epoch that ends the training cannot be validated after it.
        """
        if self.sharded:
            return 1
        affordable = self.num_images * self.epochs // (2 * max(1, self.num_val))
        validations = min(MOST_VALIDATIONS, max(LEAST_VALIDATIONS, affordable))
        return math.ceil(self.epochs / validations)


def make(node: Any) -> Any:
    """Call what a node of the config names. A user's mistake comes as it was raised there."""
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, FinetuneError):
            raise error.__cause__ from None
        raise


def build_splits(cfg: DictConfig, folder: Path | None = None) -> Splits:
    """The dataset, checked, with a val split, and classes and train limited as asked.

    folder: gets problems.txt, if more is wrong with the data than a message can show.
    """
    node: Any = OmegaConf.to_container(cfg.data, resolve=True)
    common = {key: node.pop(key) for key in COMMON_DATA_KEYS if key in node}
    try:
        splits: Splits = make(node)
    except BadData as error:
        if folder is None:
            raise
        raise error.listed_in(folder / "problems.txt") from None
    check_labels(splits, cfg)
    # val is cut before classes are chosen: an image is in the same split whichever are
    splits = cut_val(splits, seed=node.get("split_seed", 0))
    splits = select_classes(splits, common.get("classes"))
    check_splits(splits)
    warn_of_doubles(splits)
    return limit_train(splits, common.get("shots"), common.get("fraction"), seed=cfg.seed)


def check_labels(splits: Splits, cfg: DictConfig) -> None:
    """Raise ConfigError where the task takes one label per image and the data have several."""
    task: type[Task] = make(cfg.task).func
    several = splits.train.num_classes is not None
    if task.multilabel and not several:
        raise ConfigError(
            "task=multilabel: these images have one label each; type task=classification, or for "
            "a table with several labels in a field: data=csv data.table=FILE "
            "data.label_separator=';'"
        )
    if several and not task.multilabel:
        raise ConfigError(
            f"task={task.task_name}: with data.label_separator an image has several labels or "
            "none; type task=multilabel"
        )


def build_model(cfg: DictConfig, classes: tuple[str, ...]) -> Classifier:
    """The backbone with its weights, and the head."""
    torch.manual_seed(cfg.seed)  # of the head, and of a backbone from scratch
    backbone = build_backbone(cfg)
    return Classifier(backbone, classes, make(cfg.head)(backbone, classes))


def use_device(cfg: DictConfig, model: Classifier) -> None:
    """Lay a model out as its device computes fastest. cfg: filled.

    Raises ConfigError for CUDA graphs where gradients outlive a step, or are sent to others.
    """
    if cfg.get("channels_last"):
        model.to(memory_format=torch.channels_last)
    if cfg.get("compile"):
        # by shape: what a resume compiles first must not decide what all shapes are computed by;
        # each of several in each phase of a strategy, or the last phases would not be compiled
        torch._dynamo.config.recompile_limit = 16 * (model.depth + 2)
        mode = None if cfg.compile is True else cfg.compile
        batches, devices = cfg.trainer.accumulate_grad_batches, num_devices(cfg)
        has_cuda_graphs = mode is not None and on_gpu(cfg)
        if has_cuda_graphs and (batches > 1 or devices > 1):
            raise ConfigError(
                f"compile={mode}: its CUDA graphs write each step's gradients to the same place, "
                f"for one device and trainer.accumulate_grad_batches=1; this run has {devices} and "
                f"{batches}. Type compile=true"
            )
        model.compile(dynamic=False, mode=mode)


def build_backbone(cfg: DictConfig, weights: bool = True) -> Backbone:
    """The backbone of model=. weights: whether to read or download those that are asked for."""
    node = OmegaConf.to_container(cfg.model, resolve=True)
    assert isinstance(node, dict)
    if not weights and "weights" in node:  # an earlier run brings its own
        node["weights"] = None
    backbone: Backbone = make(node)
    return backbone


def build_datamodule(
    cfg: DictConfig,
    splits: Splits,
    model: Classifier,
    task: Task | None = None,
    budget: Budget | None = None,
    was_on_device: bool | None = None,
) -> DataModule:
    """Splits as batches of what the model's weights expect.

    task: given, features stand in for images while its backbone is frozen. budget: given, it is
    trained: images that its epochs read again are kept, and activations stand in for images while
    first layers are frozen. was_on_device: as in choose_cache.
    """
    features = build_features(cfg, model, task, splits, trains=budget is not None)
    cache = None
    if budget is not None:
        spec, plan = model.input_spec, features.plan
        choice = choose_cache(cfg, splits, spec, plan, budget, was_on_device)
        cache = ImageCache(choice, cache_folder("images"), made_since(cfg))
    return DataModule(
        splits,
        train_transform=make(cfg.augment)(model.input_spec),
        eval_transform=transforms.evaluation(model.input_spec),
        batch_size=cfg.batch_size,
        eval_batch_size=cfg.batch_size * (EVALUATED_PER_TRAINED if on_gpu(cfg) else 1),
        num_workers=choose_workers(cfg, splits, cache.choice if cache else Choice()),
        seed=cfg.seed,
        balanced=cfg.data.get("balance") == "sampler",
        features=features,
        cache=cache,
        augmented=is_random(cfg),
        compiled=bool(cfg.get("compile")),
        for_gpu=on_gpu(cfg),
    )


def is_random(cfg: DictConfig) -> bool:
    """Whether augment= makes another image of the same one each time."""
    return make(cfg.augment).func is not transforms.none


def choose_cache(
    cfg: DictConfig,
    splits: Splits,
    spec: InputSpec,
    plan: Plan,
    budget: Budget,
    was_on_device: bool | None = None,
) -> Choice:
    """Where images are kept that the epochs of a run read again; told, where it is nowhere.

    was_on_device: of a run that is resumed, whether training images lived there.
    """
    asked = cfg.data.get("cache", "auto")
    if asked == "none":
        return Choice()
    in_memory = isinstance(splits.train.images, ImageArray)
    train_reads = budget.epochs_begun - (plan.epochs if plan.views else 0)
    if train_reads <= 0:
        return _no_effect(asked, "features stand in for the images in every epoch")
    transformed = 3 * spec.size**2
    train, val = splits.train, splits.val
    needs = {}
    if val is not None:
        interval = cfg.trainer.get("val_check_interval")
        each = budget.batches_per_epoch / interval if interval else 1 / budget.validate_every
        val_reads = math.ceil(each * (budget.epochs_begun - plan.epochs))
        needs["val"] = Need(transformed * len(val), val_reads)
    again = train_reads > 1 and not any(cfg.trainer.get(key) for key in READ_A_PART)
    pays = was_on_device
    if pays is None and on_gpu(cfg):
        pays = in_memory
    elif pays is None:
        pays = (in_memory or again) and crops_together(cfg, train, spec)
    if asked == "device" or (asked == "auto" and pays):
        choice = choose_device(cfg, train, spec)
        if choice.kind == "device":
            others = choose("auto", needs, free_memory(), ranks_here(cfg))
            return Choice("device", ("train", *others.splits), tentative=asked == "auto")
    if in_memory:
        return _no_effect(asked, "these images are in memory as they are")
    if asked == "auto" and not again:
        return Choice()
    num_bytes = decoded_bytes(train) if is_random(cfg) else transformed * len(train)
    needs = {"train": Need(num_bytes, train_reads), **needs}
    choice = choose(asked, needs, free_memory(), ranks_here(cfg))
    if choice.kind == "none" and asked != "auto":
        return _no_effect(asked, "every image is read once")
    if choice.why:
        log.info("images: those of train are decoded in every epoch: %s", choice.why)
    return choice


def crops_together(cfg: DictConfig, train: LabelledImages, spec: InputSpec) -> bool:
    """Whether a CPU crops these images sooner in whole batches: small ones, of one size."""
    if on_mps(cfg) or not is_random(cfg) or spec.size > SMALL_IMAGE:
        return False
    sizes = {*sizes_of_some(train)}
    return len(sizes) == 1 and max(*sizes.pop()) <= SMALL_IMAGE


def choose_device(cfg: DictConfig, train: LabelledImages, spec: InputSpec) -> Choice:
    """Whether training images live on the device. Raises ConfigError where they cannot."""
    asked, augment = cfg.data.get("cache", "auto"), make(cfg.augment)
    crops = crops_of(augment(spec)) if is_random(cfg) else None
    if is_random(cfg) and crops is None:
        if asked == "auto":
            return Choice()
        raise ConfigError(
            f"data.cache=device: augment={augment.func.__name__} is not computed on the device; "
            "type augment=light, upright or none, or data.cache=ram"
        )
    in_memory = isinstance(train.images, ImageArray)
    if not in_memory and ranks_here(cfg) > 1:
        if asked == "auto":
            return Choice()
        raise ConfigError(
            f"data.cache=device: {ranks_here(cfg)} devices would decode all images each; type "
            "data.cache=disk"
        )
    if crops is None:
        num_bytes = 3 * spec.size**2 * len(train)
    else:
        num_bytes = train[0][0].nbytes * len(train) if in_memory else decoded_bytes(train)
    free, total = device_memory(cfg)
    if asked == "auto":  # by the total: a resume finds the same
        on_host = total_memory() or 0
        fits = total is not None and num_bytes < min(SHARE_OF_DEVICE * total, on_host / 4)
        return Choice("device", ("train",)) if fits else Choice()
    if free is not None and num_bytes > free:
        raise ConfigError(
            f"data.cache=device: the images take about {readable(num_bytes)}, and "
            f"{readable(free)} of the device are free; type data.cache=none"
        )
    here, needed = free_memory(), num_bytes * (1 if in_memory else 2)
    if here is not None and needed > here:
        raise ConfigError(
            f"data.cache=device: on their way there the images take about {readable(needed)} of "
            f"memory, and {readable(here)} are free; type data.cache=none"
        )
    return Choice("device", ("train",))


def device_memory(cfg: DictConfig) -> tuple[int | None, int | None]:
    """Free and total bytes of this rank's device; None where that cannot be told."""
    if not on_gpu(cfg):
        return free_memory(), total_memory()
    devices = normal_devices(cfg.trainer.devices)
    rank = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    return torch.cuda.mem_get_info(devices[rank] if isinstance(devices, list) else rank)


def _no_effect(asked: str, why: str) -> Choice:
    if asked != "auto":
        log.warning("data.cache=%s has no effect: %s", asked, why)
    return Choice()


def choose_workers(cfg: DictConfig, splits: Splits, cache: Choice | None = None) -> int:
    """num_workers, or what the cores of each rank and the images ask for.

    cache: where training images are kept, so that little is left to do for them.
    """
    if cfg.num_workers is not None:
        return int(cfg.num_workers)
    cores, gpu = usable_cores() // ranks_here(cfg), on_gpu(cfg)
    cheap = isinstance(splits.train.images, ImageArray)
    if cache is not None and "train" in cache.splits:
        # a network on the CPU takes many times what is left, a GPU needs it from several cores
        cheap = cheap or cache.kind == "device" or not (gpu and is_random(cfg))
    return num_workers(cores, cheap, gpu)


def use_cores(cfg: DictConfig) -> None:
    """Let this process compute on the cores that it has."""
    threads = num_threads(ranks_here(cfg))
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def tell_of_cores(cfg: DictConfig, workers: int) -> None:
    """Tell how the cores are used."""
    log.info(
        "cores: %d; %d threads compute, %d workers read images (OMP_NUM_THREADS=, num_workers=)",
        usable_cores(), num_threads(ranks_here(cfg)), workers,
    )  # fmt: skip


def build_features(
    cfg: DictConfig, model: Classifier, task: Task | None, splits: Splits, trains: bool
) -> Features:
    """Where features are kept, and what they stand in for. task, trains: of build_datamodule."""
    kept = cfg.features.cache != "none"
    typed = cfg.features.dir
    folder = Path(typed).expanduser() if typed else features.default_folder()
    plan = Plan()
    if task is not None and kept and not is_sharded(cfg):
        is_ddp = "ddp" in str(cfg.trainer.get("strategy"))
        phases = features.frozen_phases(task.strategy_, model.depth, task.epochs)
        num_images = len(splits.train) + len(splits.val or ())
        plan = features.plan(
            [phase for phase in phases if trains or phase.layers == model.depth],
            model.depth,
            task.epochs,
            augment=make(cfg.augment).func.__name__ if is_random(cfg) else None,
            views=cfg.features.views,
            mixes=bool(cfg.mixup or cfg.cutmix),
            several=num_devices(cfg) > 1 or is_ddp,
            num_bytes=lambda n: 4 * num_images * model.num_activations(n) * ranks_here(cfg),
        )
    threads = num_threads(ranks_here(cfg))
    return Features(model, folder if kept else None, cfg.batch_size, plan, threads, made_since(cfg))


def made_since(cfg: DictConfig) -> float:
    """When a kept file must have been made to be taken: data.rescan= believes none of before."""
    return finetune.started if cfg.data.get("rescan") else 0.0


def tell_of_features(cfg: DictConfig, plan: Plan) -> None:
    """Tell why frozen layers are computed again and again, and of views that nobody sees."""
    if plan.why_not:
        log.info("features: what is frozen is computed in every epoch: %s", plan.why_not)
    views = cfg.features.views
    if views is not None and not (plan.views and plan.augmented):
        why = "training sees no views"
        if not plan.phases and not plan.why_not:
            why = "no epoch trains the head alone, and no two freeze the same layers"
        if cfg.features.cache == "none" or is_sharded(cfg):
            why = "none are kept with features.cache=none, nor with trainer.strategy=fsdp"
        log.warning("features.views=%s has no effect: %s", views, why)


def build_budget(cfg: DictConfig, num_images: int, num_val: int = 0) -> Budget:
    """epochs; where they are null, as many as max_steps needs."""
    global_batch = cfg.batch_size * num_devices(cfg)
    batches = len(batch_bounds(num_images, global_batch, smallest=2 * num_devices(cfg)))
    steps = math.ceil(batches / cfg.trainer.accumulate_grad_batches)
    epochs = max(1, math.ceil(cfg.max_steps / steps)) if cfg.epochs is None else cfg.epochs
    sharded = is_sharded(cfg)
    return Budget(epochs, steps, cfg.max_steps, num_images, num_val, sharded, batches)


def build_strategy(cfg: DictConfig, depth: int, epochs: int) -> Strategy:
    """What trains when. depth: layers of the backbone. epochs: of the run, from 1."""
    strategy = for_run(make(cfg.strategy), depth, epochs)
    if cfg.freeze_until > depth:
        raise ConfigError(
            f"freeze_until={cfg.freeze_until}: the backbone has {depth} layers; type at most "
            f"{depth}. To list them: python -m finetune.layers model=..."
        )
    return FreezeUntil(strategy, cfg.freeze_until) if cfg.freeze_until else strategy


def warn_of_no_effect(strategy: Strategy, depth: int, epochs: int) -> None:
    """Tell what the strategy cannot do in a run of this length."""
    for line in without_effect(strategy, depth, epochs):
        log.warning("%s", line)


def build_task(
    cfg: DictConfig, model: Classifier, budget: Budget, train: LabelledImages | None = None
) -> Task:
    """The LightningModule. train: whose classes the loss is balanced by; None for no balance."""
    balance: dict[str, Any] = {}
    if train is not None:
        counts = label_counts(train.labels, len(model.classes))
        balance = {"balance": cfg.data.get("balance"), "class_counts": counts}
    task: Task = make(cfg.task)(
        model=model,
        strategy=build_strategy(cfg, model.depth, budget.epochs_begun),
        optimizer=build_optimizer(cfg),
        schedule=build_schedule(cfg, budget.total_steps),
        weight_decay=cfg.optimizer.weight_decay,
        epochs=budget.epochs_begun,
        total_steps=budget.total_steps,
        seed=cfg.seed,
        **balance,
        mixup=cfg.mixup,
        cutmix=cfg.cutmix,
        l2_sp=cfg.l2_sp,
    )
    return task


def build_optimizer(cfg: DictConfig) -> Callable[..., torch.optim.Optimizer]:
    """To be called with parameter groups; it steps in one kernel where there is one."""
    optimizer: Callable[..., torch.optim.Optimizer] = make(cfg.optimizer)
    known = inspect.signature(optimizer).parameters
    decided = cfg.optimizer.get("fused") is not None or cfg.optimizer.get("foreach") is not None
    # Lightning refuses to clip by value, or with a scaler, what steps in one kernel
    by_value = cfg.trainer.get("gradient_clip_algorithm") == "value"
    scaled = str(cfg.trainer.precision).startswith("16")
    if decided or by_value or scaled or on_mps(cfg) or "fused" not in known:
        return optimizer
    return partial(optimizer, fused=True)


def build_schedule(cfg: DictConfig, total_steps: int) -> Schedule:
    """Factor on the lr from (step, total_steps)."""
    schedule: Schedule = make(cfg.schedule)
    schedule(0, max(1, total_steps))
    # Hydra holds a target and its arguments against its policy in every call: it has done so now,
    # and each step would pay for it again
    if isinstance(schedule, partial):
        return partial(schedule.func, *schedule.args, **schedule.keywords)
    return schedule


def build_loggers(cfg: DictConfig, run: Path, resumed_at: int | None) -> list[Logger]:
    """metrics.csv always, and what logger= asks for."""
    chosen: Logger = make(cfg.logger)(run=run, resumed_at=resumed_at)
    return [chosen] if isinstance(chosen, MetricsFile) else [chosen, MetricsFile(run, resumed_at)]


def build_trainer(
    cfg: DictConfig, run: Path, budget: Budget, callbacks: list[Callback], loggers: list[Logger]
) -> L.Trainer:
    """Lightning's Trainer: device, precision and ranks are its own."""
    if sys.stdout.isatty():  # elsewhere a line per validation tells how it goes
        callbacks = [*callbacks, RichProgressBar(refresh_rate=REDRAWN, leave=False)]
    make_trainer: Callable[..., L.Trainer] = make(cfg.trainer)
    if on_gpu(cfg):
        torch.set_float32_matmul_precision("high")  # TF32, as convolutions have it by default
    interval = cfg.trainer.get("val_check_interval")
    if interval and interval > budget.batches_per_epoch:
        log.warning(
            "trainer.val_check_interval=%d has no effect: an epoch has %d batches, and its end is "
            "validated", interval, budget.batches_per_epoch,
        )  # fmt: skip
        interval = None
    # Lightning's "pytorch" counts validation steps too, and torch refuses what comes of it
    if (profiler := cfg.trainer.get("profiler")) in (None, "pytorch"):
        make_trainer = partial(make_trainer, profiler=Unprofiled())
    if profiler == "pytorch":
        callbacks = [*callbacks, Trace(run, skip=min(SKIPPED_BY_TRACE, budget.total_steps // 2))]
    try:
        return make_trainer(
            default_root_dir=run,
            max_epochs=budget.epochs,
            max_steps=-1,  # callbacks.MaxSteps: with Lightning's own, a resume skips epochs
            check_val_every_n_epoch=1 if interval else budget.validate_every,
            val_check_interval=interval or 1.0,
            callbacks=callbacks,
            logger=loggers,
            plugins=[WholeCheckpointIO()],
            deterministic=cfg.deterministic,
            num_sanity_val_steps=0,
            log_every_n_steps=max(1, min(cfg.trainer.log_every_n_steps, budget.total_steps)),
            enable_checkpointing=False,  # ours are whole or absent, and hold what a reader needs
            enable_model_summary=False,
            enable_progress_bar=sys.stdout.isatty(),
            use_distributed_sampler=False,  # ours repeats no image
        )
    except (ValueError, TypeError, RuntimeError) as error:  # MisconfigurationException among them
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error


def ranks_here(cfg: DictConfig) -> int:
    """Processes of this run that share the cores that this one may use."""
    if local := os.environ.get("LOCAL_WORLD_SIZE"):  # of torchrun, and of our own ranks
        return int(local)
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1:  # srun gives each task cores of its own
        return 1
    return max(1, num_devices(cfg) // int(cfg.trainer.get("num_nodes", 1)))


def num_devices(cfg: DictConfig) -> int:
    """Devices that trainer.devices asks for on this machine, times trainer.num_nodes."""
    devices = normal_devices(cfg.trainer.devices)
    if isinstance(devices, list):
        devices = len(devices)
    elif devices in (-1, "auto"):
        devices = torch.cuda.device_count() if on_gpu(cfg) else 1
    return int(devices or 1) * int(cfg.trainer.get("num_nodes", 1))

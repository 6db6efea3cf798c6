"""From config to objects: the only caller of hydra's instantiate."""

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

from finetune import features
from finetune.backbones.base import Backbone
from finetune.callbacks import Trace, WholeCheckpointIO
from finetune.check import COMMON_DATA_KEYS, is_sharded, normal_devices, on_gpu
from finetune.data import transforms
from finetune.data.base import ImageArray, LabelledImages, Splits, label_counts
from finetune.data.sampler import batch_bounds
from finetune.data.scan import BadData
from finetune.data.split import check_splits, cut_val, limit_train, select_classes, warn_of_doubles
from finetune.datamodule import DataModule
from finetune.errors import ConfigError, FinetuneError
from finetune.features import Features, Plan
from finetune.loggers import MetricsFile
from finetune.machine import num_threads, num_workers, usable_cores
from finetune.model import Classifier
from finetune.strategies import Strategy, for_run
from finetune.strategies.effect import without_effect
from finetune.strategies.freeze_until import FreezeUntil
from finetune.tasks.base import Task

log = logging.getLogger(__name__)

SKIPPED_BY_TRACE = 20  # steps: buffers are allocated and kernels chosen in the first
MOST_VALIDATIONS, LEAST_VALIDATIONS = 25, 5


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
    trains: bool = True,
) -> DataModule:
    """Splits as batches of what the model's weights expect.

    task: given, features stand in for images while its backbone is frozen, and, where it trains,
    activations while its first layers are.
    """
    return DataModule(
        splits,
        train_transform=make(cfg.augment)(model.input_spec),
        eval_transform=transforms.evaluation(model.input_spec),
        batch_size=cfg.batch_size,
        num_workers=choose_workers(cfg, splits),
        seed=cfg.seed,
        balanced=cfg.data.get("balance") == "sampler",
        features=build_features(cfg, model, task, splits, trains),
    )


def choose_workers(cfg: DictConfig, splits: Splits) -> int:
    """num_workers, or what the cores of each rank and the images ask for."""
    if cfg.num_workers is not None:
        return int(cfg.num_workers)
    cores = usable_cores() // ranks_here(cfg)
    return num_workers(cores, isinstance(splits.train.images, ImageArray), on_gpu(cfg))


def use_cores(cfg: DictConfig, workers: int) -> None:
    """Let this process compute on the cores that it has, and tell how they are used."""
    threads = num_threads(ranks_here(cfg))
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    log.info(
        "cores: %d; %d threads compute, %d workers read images (OMP_NUM_THREADS=, num_workers=)",
        usable_cores(), threads, workers,
    )  # fmt: skip


def build_features(
    cfg: DictConfig, model: Classifier, task: Task | None, splits: Splits, trains: bool
) -> Features:
    """Where features are kept, and what they stand in for. task, trains: of build_datamodule."""
    kept = cfg.features.cache != "none"
    typed = cfg.features.dir
    folder = Path(typed).expanduser() if typed else features.default_folder()
    augment = make(cfg.augment).func
    plan = Plan()
    if task is not None and kept and not is_sharded(cfg):
        is_ddp = "ddp" in str(cfg.trainer.get("strategy"))
        phases = features.frozen_phases(task.strategy_, model.depth, task.epochs)
        num_images = len(splits.train) + len(splits.val or ())
        plan = features.plan(
            [phase for phase in phases if trains or phase.layers == model.depth],
            model.depth,
            task.epochs,
            augment=None if augment is transforms.none else augment.__name__,
            views=cfg.features.views,
            mixes=bool(cfg.mixup or cfg.cutmix),
            several=num_devices(cfg) > 1 or is_ddp,
            num_bytes=lambda n: 4 * num_images * model.num_activations(n) * ranks_here(cfg),
        )
    threads = num_threads(ranks_here(cfg))
    return Features(model, folder if kept else None, cfg.batch_size, plan, threads)


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
        optimizer=make(cfg.optimizer),
        schedule=make(cfg.schedule),
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


def build_loggers(cfg: DictConfig, run: Path, resumed_at: int | None) -> list[Logger]:
    """metrics.csv always, and what logger= asks for."""
    chosen: Logger = make(cfg.logger)(run=run, resumed_at=resumed_at)
    return [chosen] if isinstance(chosen, MetricsFile) else [chosen, MetricsFile(run, resumed_at)]


def build_trainer(
    cfg: DictConfig, run: Path, budget: Budget, callbacks: list[Callback], loggers: list[Logger]
) -> L.Trainer:
    """Lightning's Trainer: device, precision and ranks are its own."""
    if sys.stdout.isatty():  # elsewhere a line per validation tells how it goes
        callbacks = [*callbacks, RichProgressBar(leave=False)]
    make_trainer: Callable[..., L.Trainer] = make(cfg.trainer)
    interval = cfg.trainer.get("val_check_interval")
    if interval and interval > budget.batches_per_epoch:
        log.warning(
            "trainer.val_check_interval=%d has no effect: an epoch has %d batches, and its end is "
            "validated", interval, budget.batches_per_epoch,
        )  # fmt: skip
        interval = None
    if cfg.trainer.get("profiler") == "pytorch":
        # Lightning's own counts validation steps too, and torch refuses what comes of it
        make_trainer = partial(make_trainer, profiler=None)
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

"""From config to objects: the only caller of hydra's instantiate."""

import logging
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from finetune.callbacks import WholeCheckpointIO
from finetune.check import COMMON_DATA_KEYS, normal_devices, on_gpu
from finetune.data import transforms
from finetune.data.base import Splits
from finetune.data.sampler import batch_bounds
from finetune.data.split import check_splits, cut_val, limit_train
from finetune.datamodule import DataModule
from finetune.errors import ConfigError, FinetuneError
from finetune.loggers import MetricsFile
from finetune.model import Classifier
from finetune.tasks.base import Task

log = logging.getLogger(__name__)

LEAST_EPOCHS, LEAST_STEPS = 10, 500  # BiT-HyperRule: 500 steps for fewer than 20k images
MOST_VALIDATIONS = 25


@dataclass(frozen=True)
class Budget:
    """How long a run trains. max_steps: None for all of the epochs."""

    epochs: int
    steps_per_epoch: int
    max_steps: int | None

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, at most."""
        steps = self.epochs * self.steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    @property
    def validate_every(self) -> int:
        """Epochs from one validation to the next: all of them cost time on a few images."""
        return math.ceil(self.epochs / MOST_VALIDATIONS)


def make(node: Any) -> Any:
    """Call what a node of the config names. A user's mistake comes as it was raised there."""
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, FinetuneError):
            raise error.__cause__ from None
        raise


def build_splits(cfg: DictConfig) -> Splits:
    """The dataset, checked, with a val split, and train limited as asked."""
    node: Any = OmegaConf.to_container(cfg.data, resolve=True)
    common = {key: node.pop(key) for key in COMMON_DATA_KEYS if key in node}
    splits: Splits = make(node)
    splits = cut_val(splits, seed=node.get("split_seed", 0))
    check_splits(splits)
    return limit_train(splits, **common, seed=cfg.seed)


def build_model(cfg: DictConfig, classes: tuple[str, ...]) -> Classifier:
    """The backbone with its weights, and a new head."""
    torch.manual_seed(cfg.seed)  # of the head, and of a backbone from scratch
    backbone = make(cfg.model)
    return Classifier(backbone, classes)


def build_datamodule(cfg: DictConfig, splits: Splits, model: Classifier) -> DataModule:
    """Splits as batches of what the model's weights expect."""
    return DataModule(
        splits,
        train_transform=make(cfg.augment)(model.input_spec),
        eval_transform=transforms.evaluation(model.input_spec),
        batch_size=cfg.batch_size,
        num_workers=cfg.num_workers,
        seed=cfg.seed,
    )


def build_budget(cfg: DictConfig, num_images: int) -> Budget:
    """epochs as typed; else 10, or as many as 500 steps or max_steps need."""
    global_batch = cfg.batch_size * num_devices(cfg)
    batches = len(batch_bounds(num_images, global_batch, smallest=2 * num_devices(cfg)))
    steps = math.ceil(batches / cfg.trainer.accumulate_grad_batches)
    wanted = LEAST_STEPS if cfg.max_steps is None else cfg.max_steps
    epochs = cfg.epochs
    if epochs is None:
        needed = math.ceil(wanted / steps)
        epochs = needed if cfg.max_steps else max(LEAST_EPOCHS, needed)
    return Budget(epochs, steps, cfg.max_steps)


def build_task(cfg: DictConfig, model: Classifier, budget: Budget) -> Task:
    """The LightningModule."""
    task: Task = make(cfg.task)(
        model=model,
        strategy=make(cfg.strategy),
        optimizer=make(cfg.optimizer),
        schedule=make(cfg.schedule),
        weight_decay=cfg.optimizer.weight_decay,
        epochs=budget.epochs,
        total_steps=budget.total_steps,
        seed=cfg.seed,
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
    try:
        return make_trainer(
            default_root_dir=run,
            max_epochs=budget.epochs,
            max_steps=-1,  # callbacks.MaxSteps: with Lightning's own, a resume skips epochs
            check_val_every_n_epoch=budget.validate_every,
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


def num_devices(cfg: DictConfig) -> int:
    """Devices that trainer.devices asks for on this machine, times trainer.num_nodes."""
    devices = normal_devices(cfg.trainer.devices)
    if isinstance(devices, list):
        devices = len(devices)
    elif devices in (-1, "auto"):
        devices = torch.cuda.device_count() if on_gpu(cfg) else 1
    return int(devices or 1) * int(cfg.trainer.get("num_nodes", 1))

"""What a model reaches on a split: measured over all images and ranks, and shown as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from finetune import build
from finetune.check import is_sharded
from finetune.data.base import LabelledImages, Splits
from finetune.data.paths import printable
from finetune.model import Classifier


@dataclass(frozen=True)
class Measured:
    """values: {"test/accuracy": ...}. per_class: per_class_metric of each class by name."""

    values: dict[str, float]
    per_class: dict[str, float | None]
    per_class_metric: str


def measure(
    cfg: DictConfig,
    run: Path,
    model: Classifier,
    splits: Splits,
    split: str,
    callbacks: Sequence[Callback] = (),
) -> Measured:
    """Measure a model with all of its weights on the test or val split."""
    cfg = cfg.copy()
    if is_sharded(cfg):
        cfg.trainer.strategy = "ddp"  # without a backward pass there is nothing to save by parts
    cfg.compile = False  # one pass takes less
    cfg.trainer.profiler = cfg.trainer.val_check_interval = None  # those are of the training
    build.use_device(cfg, model)
    budget = build.build_budget(cfg, len(splits.train))
    task = build.build_task(cfg, model, budget)  # unbalanced: only training is balanced
    datamodule = build.build_datamodule(cfg, splits, model, task)
    trainer = build.build_trainer(cfg, run, budget, [*callbacks], loggers=[])
    run_loop = trainer.test if split == "test" else trainer.validate
    run_loop(task, datamodule=datamodule, verbose=False)
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    per_class = dict(zip(model.classes, task.last_per_class, strict=True))
    return Measured(values, per_class, task.per_class_metric)


def named_splits(splits: Splits) -> dict[str, LabelledImages]:
    """The splits that there are."""
    found = {"train": splits.train, "val": splits.val, "test": splits.test}
    return {name: images for name, images in found.items() if images is not None}


def print_metrics(
    splits: Mapping[str, Mapping[str, float]],
    per_class: Mapping[str, float | None],
    split: str,
    metric: str,
) -> None:
    """A table of metrics by split, and the metric of at most 20 classes, else of the 20 worst.

    splits: {"val": {"val/accuracy": ...}}. split: what per_class was measured on.
    """
    console = Console()
    table = Table("metric", *splits)
    first = next(iter(splits))
    for name in sorted(key.removeprefix(f"{first}/") for key in splits[first]):
        table.add_row(name, *(f"{values[f'{s}/{name}']:.4f}" for s, values in splits.items()))
    console.print(table)
    measured = [(name, value) for name, value in per_class.items() if value is not None]
    title = f"{metric.replace('_', ' ')} per class on {split}"
    if len(measured) > 20:
        measured = sorted(measured, key=lambda item: item[1])[:20]
        title += f", the 20 worst of {len(per_class)}"
    listed = ", ".join(f"{printable(name)} {value:.2f}" for name, value in measured)
    console.print(f"{title}: {listed}", highlight=False, markup=False, soft_wrap=True)

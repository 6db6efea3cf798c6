"""One run from its config to its run.json, in one process or in each of several ranks."""

import logging
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

import finetune
from finetune import build, checkpoint
from finetune.callbacks import (
    BestCheckpoint,
    EarlyStop,
    Interrupted,
    MaxSteps,
    Pictures,
    StepCheckpoints,
    StopSignals,
    Throughput,
    show_confusion,
    tensorboard,
)
from finetune.cli import shown_path
from finetune.data.base import LabelledImages, Splits
from finetune.datamodule import DataModule
from finetune.errors import CheckpointError, ConfigError, FinetuneError
from finetune.loggers import end_wandb
from finetune.model import Classifier
from finetune.record import Record
from finetune.tasks.base import Task, parameter_counts
from finetune.tasks.classification import per_class_accuracy

log = logging.getLogger(__name__)

# what a resume may change: none of it changes the arithmetic
FREE_TO_CHANGE = ("num_workers", "logger", "checkpoint", "resume", "data.root", "data.download")


def fit(
    cfg: DictConfig, run: Path, overrides: Sequence[str], why_model: str, rank: int = 0
) -> None:
    """Train, keep the best by val, test it once; all that is known goes to run/run.json.

    Raises FinetuneError for a user's mistake, Interrupted after a signal.
    """
    quiet_libraries()
    steps = StepCheckpoints(run, cfg.checkpoint.every_n_steps)
    stop = StopSignals(steps)
    record = None
    try:
        with stop.installed():
            if rank == 0:
                record = open_record(cfg, run)
                record.update(status="running", error=None)
            train_and_test(cfg, run, overrides, why_model, record, steps, stop)
    except Interrupted as error:
        if record:
            record.update(status="interrupted", error=f"stopped by {error}")
            log.warning(
                "stopped by %s. To go on: python train.py resume=%s", error, shown_path(run)
            )
        raise
    except Exception as error:
        if record:
            kind = "" if isinstance(error, FinetuneError) else f"{type(error).__name__}: "
            record.update(status="failed", error=f"{kind}{error}")
        raise
    finally:
        end_wandb()


def train_and_test(
    cfg: DictConfig,
    run: Path,
    overrides: Sequence[str],
    why_model: str,
    record: Record | None,
    steps: StepCheckpoints,
    stop: StopSignals,
) -> None:
    """The run itself. record: None on all ranks but the first."""
    began = time.time()
    parts = prepare(cfg, why_model)
    resume_from, resumed_at = find_resume(cfg, run)
    best, throughput = BestCheckpoint(run, cfg.monitor), Throughput()
    callbacks: list[Callback] = [throughput, best, Pictures(), steps, stop]
    if cfg.max_steps is not None:
        callbacks.insert(0, MaxSteps(cfg.max_steps))
    if cfg.patience is not None:
        callbacks.append(EarlyStop(cfg.monitor, cfg.patience))
    loggers = build.build_loggers(cfg, run, resumed_at)
    trainer = build.build_trainer(cfg, run, parts.budget, callbacks, loggers)
    if record:
        record.update(**facts_of(parts, cfg), device=device_name(trainer))

    if parts.budget.total_steps > 0:
        trainer.fit(parts.task, parts.datamodule, ckpt_path=resume_from, weights_only=True)
    if best.validated_step != trainer.global_step:  # nothing was trained, or max_steps is 0
        trainer.validate(parts.task, datamodule=parts.datamodule, verbose=False)
    show_confusion(trainer, best, parts.splits.classes)
    results = measure_best(trainer, parts, best)

    if record:
        write_hparams(trainer, cfg, overrides, results.test or results.val)
    for logger in trainer.loggers:
        logger.finalize("success")  # closed by Lightning after the test, and opened again since
    if record:
        first_step = throughput.first_step_at
        record.update(
            best={k: best.best[k] for k in ("epoch", "step", "monitor", "value")}
            | {"path": str(best.path.relative_to(run))},
            val=results.val,
            test=results.test,
            per_class_accuracy={results.per_class_split: results.per_class},
            images_per_second=throughput.images_per_second,
            seconds=time.time() - began,
            time_to_first_step=first_step and first_step - finetune.STARTED,
        )
        record.update(status="finished")  # last: all before can be repeated
        splits = {"val": results.val} | ({"test": results.test} if results.test else {})
        print_metrics(splits, results.per_class, results.per_class_split)
        log.info("run: %s", shown_path(run))
        if tensorboard(trainer):
            log.info("look: tensorboard --logdir %s", tensorboard_folder(run))


@dataclass(frozen=True)
class Parts:
    """What a run is made of."""

    splits: Splits
    budget: build.Budget
    task: Task
    datamodule: DataModule


def prepare(cfg: DictConfig, why_model: str) -> Parts:
    """Build data, model and task, and say what they are."""
    splits = build.build_splits(cfg)
    log.info("model: %s", why_model)
    model = build.build_model(cfg, splits.classes)
    budget = build.build_budget(cfg, len(splits.train))
    task = build.build_task(cfg, model, budget)
    task.freeze_what_never_trains()
    check_monitor(cfg.monitor, task)
    check_batch(cfg.batch_size, model)
    counts = (f"{name} {len(images)}" for name, images in named_splits(splits).items())
    log.info("data: %s, %d classes", ", ".join(counts), len(splits.classes))
    log.info("{:,} of {:,} parameters train".format(*parameter_counts(model)))
    log.info(
        "%d steps: %d epochs of %d, validated every %s",
        budget.total_steps, budget.epochs, budget.steps_per_epoch,
        "epoch" if budget.validate_every == 1 else f"{budget.validate_every} epochs",
    )  # fmt: skip
    return Parts(splits, budget, task, build.build_datamodule(cfg, splits, model))


def check_monitor(monitor: str, task: Task) -> None:
    """Raise ConfigError before the training for what only the number of classes can tell."""
    known = [f"val/{name}" for name in task.metric_names]
    if monitor not in known:
        raise ConfigError(
            f"monitor={monitor}: not measured with {len(task.model.classes)} classes; "
            f"there are {', '.join(known)}"
        )


def check_batch(batch_size: int, model: Classifier) -> None:
    """Raise ConfigError if BatchNorm would train on single images."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    if batch_size == 1 and any(p.requires_grad for norm in norms for p in norm.parameters()):
        raise ConfigError(
            "batch_size=1: the BatchNorm of this network cannot train on single images; type "
            "batch_size=2 or more, or strategy=linear_probe"
        )


def facts_of(parts: Parts, cfg: DictConfig) -> dict[str, Any]:
    """Data and model, for run.json."""
    counts = {name: len(images) for name, images in named_splits(parts.splits).items()}
    trainable, parameters = parameter_counts(parts.task.model)
    return {
        "data": {
            "classes": list(parts.splits.classes),
            "counts": {"train": 0, "val": 0, "test": 0} | counts,
            "skipped": list(parts.splits.skipped),
        },
        "model": {
            **parts.task.model.backbone.recipe,
            "weights": cfg.model.get("weights"),
            "parameters": parameters,
            "trainable": trainable,
        },
    }


@dataclass(frozen=True)
class Results:
    """What the best checkpoint reached. test: empty without a test split."""

    val: dict[str, float]
    test: dict[str, float]
    per_class: dict[str, float | None]
    per_class_split: str


def measure_best(trainer: L.Trainer, parts: Parts, best: BestCheckpoint) -> Results:
    """Val as it was at the best; test, read once, with the weights of the best."""
    val, confusion = dict(best.best["metrics"]), best.confusion
    test: dict[str, float] = {}
    if parts.splits.test is None:
        log.info("no test split: nothing is tested; val chose the best and is no fair estimate")
    else:
        parts.task.model.load_state_dict(checkpoint.read(best.path).state_dict)
        trainer.test(parts.task, datamodule=parts.datamodule, verbose=False)
        test = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("test/")}
        confusion = parts.task.last_confusion
    assert confusion is not None  # of the last validation or test
    per_class = dict(zip(parts.splits.classes, per_class_accuracy(confusion), strict=True))
    return Results(val, test, per_class, "test" if test else "val")


def named_splits(splits: Splits) -> dict[str, LabelledImages]:
    """The splits that there are."""
    found = {"train": splits.train, "val": splits.val, "test": splits.test}
    return {name: images for name, images in found.items() if images is not None}


def open_record(cfg: DictConfig, run: Path) -> Record:
    """Claim the run directory, or take up the one to resume."""
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    if cfg.resume:
        if not (run / "run.json").exists():
            log.info("%s was stopped before it began; starting from step 0", run)
        else:
            record = Record.read(run)
            refuse_changes(record.facts["config"], config, run)
            return record
    return Record.create(
        run,
        {
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "config": config,
            "git": git_state(),
            "versions": {
                "python": platform.python_version(),
                **{
                    name: version(name)
                    for name in ("torch", "torchvision", "lightning", "finetune")
                },
            },
            "seed": cfg.seed,
        },
    )


def refuse_changes(recorded: Any, config: Any, run: Path) -> None:
    """Raise ConfigError that names each value that a resume would change."""
    before, now = flat(recorded), flat(config)
    changed = [
        f"{key}: the run has {before.get(key)!r}, not {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and not any(key == free or key.startswith(f"{free}.") for free in FREE_TO_CHANGE)
    ]
    if changed:
        raise ConfigError(
            f"resume={run} would go on with another run: {'; '.join(changed)}. Leave these out, "
            f"or start anew without resume="
        )


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    if not isinstance(config, Mapping):
        return {prefix: config}
    return {
        key: value
        for name, child in config.items()
        for key, value in flat(child, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def find_resume(cfg: DictConfig, run: Path) -> tuple[Path | None, int | None]:
    """The newest step checkpoint that can be read, and its step."""
    if not cfg.resume:
        return None, None
    for path in checkpoint.step_paths(run):
        try:
            step = int(checkpoint.load(path)["global_step"])
        except (CheckpointError, KeyError) as error:
            log.warning("%s is passed over: %s", path, error)
            continue
        log.info("resuming from %s", path)
        return path, step
    log.info("%s has no checkpoint to resume from; starting from step 0", run)
    return None, 0


def git_state() -> dict[str, Any] | None:
    """Commit of the code that runs, and whether it was changed since; None outside of git."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=5, check=True
        )
        return done.stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "-uno")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def device_name(trainer: L.Trainer) -> str:
    """Such as '2 x NVIDIA H200' or 'cpu'."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return name if trainer.world_size == 1 else f"{trainer.world_size} x {name}"


def quiet_libraries() -> None:
    """Leave out warnings about what is meant to be so."""
    for message in (
        "The '.*_dataloader' does not have many workers",  # chosen from cores and data
        "The number of training batches .* is smaller than the logging interval",
        "You're resuming from a checkpoint that ended before the epoch ended",  # ours goes on there
        "Found .* module.* in eval mode at the start of training",  # a frozen layer is
        "It is recommended to use `self.log\\(.*sync_dist=True",  # computed over all ranks already
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # lightning 2.6.6 with torch 2.14
    ):
        warnings.filterwarnings("ignore", message)


def write_hparams(
    trainer: L.Trainer, cfg: DictConfig, overrides: Sequence[str], metrics: Mapping[str, float]
) -> None:
    """The HPARAMS tab: what was chosen, against what came out."""
    writer = tensorboard(trainer)
    if writer is None:
        return
    chosen = dict(o.lstrip("+").split("=", 1) for o in overrides if "=" in o and o[0] != "~")
    chosen.pop("resume", None)
    shown = {"optimizer.lr": cfg.optimizer.lr, "batch_size": cfg.batch_size, "seed": cfg.seed}
    writer.write_hparams({**shown, **{k: number(v) for k, v in chosen.items()}}, list(metrics))


def number(text: str) -> float | str:
    """A typed value as a number where it is one, so that TensorBoard can sort by it."""
    try:
        return float(text)
    except ValueError:
        return text


def print_metrics(
    splits: Mapping[str, Mapping[str, float]], per_class: Mapping[str, float | None], split: str
) -> None:
    """A table of metrics by split, and the accuracy of at most 20 classes, else the 20 worst.

    splits: {"val": {"val/accuracy": ...}}. per_class, split: what the accuracies are measured on.
    """
    console = Console()
    table = Table("metric", *splits)
    first = next(iter(splits))
    for name in sorted(key.removeprefix(f"{first}/") for key in splits[first]):
        table.add_row(name, *(f"{values[f'{s}/{name}']:.4f}" for s, values in splits.items()))
    console.print(table)
    measured = [(name, value) for name, value in per_class.items() if value is not None]
    title = f"accuracy per class on {split}"
    if len(measured) > 20:
        measured = sorted(measured, key=lambda item: item[1])[:20]
        title += f", the 20 worst of {len(per_class)}"
    listed = ", ".join(f"{name} {value:.2f}" for name, value in measured)
    console.print(f"{title}: {listed}", highlight=False, markup=False, soft_wrap=True)


def tensorboard_folder(run: Path) -> Path:
    """logs/ if the run lies in it, so that TensorBoard shows all runs; else the run itself."""
    logs = Path.cwd() / "logs"
    return Path("logs") if logs in run.absolute().parents else run

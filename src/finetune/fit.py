"""One run from its config to its run.json, in one process or in each of several ranks."""

import errno
import logging
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import astuple, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf

import finetune
from finetune import (
    averaging,
    build,
    checkpoint,
    heads,
    layer_table,
    replay,
    resolve,
    resume,
    ridge,
)
from finetune.callbacks.checkpoints import BestCheckpoint, Pace, StepCheckpoints, refuse_lost_end
from finetune.callbacks.guard import FiniteGuard
from finetune.callbacks.pictures import Pictures, show_confusion, tensorboard
from finetune.callbacks.speed import Throughput, verdict
from finetune.callbacks.stopping import EarlyStop, MaxSteps, StopSignals
from finetune.cli import shown_path
from finetune.data.balance import warn_of_imbalance
from finetune.data.base import Splits, label_counts
from finetune.data.digest import digest
from finetune.data.split import stratified
from finetune.datamodule import DataModule, labels_of
from finetune.ema import EMA
from finetune.errors import (
    CheckpointError,
    ConfigError,
    FinetuneError,
    Interrupted,
    NotFinite,
    TrainingError,
)
from finetune.files import readable, sweep_parts
from finetune.lock import locked, this_process
from finetune.loggers import end_wandb
from finetune.machine import usable_cores
from finetune.measure import measure, named_splits, print_metrics
from finetune.model import Classifier
from finetune.overrides import without_launcher
from finetune.recipes import Choice, Recipe, none
from finetune.record import Record, has_record
from finetune.restore import saved_model
from finetune.tasks.base import Task, parameter_counts
from finetune.typed import to_type

log = logging.getLogger(__name__)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
EVERY_N_STEPS, SHARE_FOR_CHECKPOINTS = 200, 0.02  # of the time; without checkpoint.every_n_steps
WRITTEN_PER_SECOND = 2e8  # bytes of a checkpoint, to begin with
MOST_FOR_RIDGE = 50_000  # images: beyond them the head gains nothing and the time is felt


def fit(
    cfg: DictConfig, run: Path, overrides: Sequence[str], why_model: str, rank: int = 0
) -> None:
    """Train, keep the best by val, test it once; all that is known goes to run/run.json.

    Raises FinetuneError for a user's mistake, Interrupted after a signal.
    """
    quiet_libraries()
    stop, record = StopSignals(), None
    with stop.installed():
        try:
            with locked(run) if rank == 0 else nullcontext():
                if cfg.debug == "replay":
                    replay_failure(cfg, run, why_model)
                    return
                if rank == 0:
                    record = open_record(cfg, run)
                    for folder in (run, checkpoint.best_path(run).parent):
                        sweep_parts(folder)
                    if record.facts["status"] != "finished":  # or it stays so, until more is agreed
                        record.facts.pop("not_finite", None)  # of what is resumed
                        record.update(status="running", error=None, process=this_process())
                train_and_test(cfg, run, overrides, why_model, record, stop)
        except (Exception, Interrupted) as raised:
            # what stumbles on the way out of a stop has not failed: Lightning's teardown may
            filled = OmegaConf.create(record.facts["config"]) if record else cfg
            error = stop.leaving or failure_of(raised, filled, run)
            if record and record.facts["status"] != "finished":
                with suppress(OSError):  # of a full disk
                    record.update(**how_it_ended(error))
            if error is not raised:
                raise error from raised
            raise
        finally:
            end_wandb()


def how_it_ended(error: BaseException) -> dict[str, Any]:
    """Status and error of a run that did not finish, for run.json."""
    if isinstance(error, Interrupted):
        return {"status": "interrupted", "error": f"stopped by {error}"}
    kind = "" if isinstance(error, FinetuneError) else f"{type(error).__name__}: "
    facts: dict[str, Any] = {"status": "failed", "error": f"{kind}{error}"}
    if isinstance(error, NotFinite):
        facts["not_finite"] = {"step": error.step, "loss": error.loss}
    return facts


def replay_failure(cfg: DictConfig, run: Path, why_model: str) -> None:
    """Repeat the step that ended a run, and write nothing."""
    recorded = Record.read(run).facts
    resume.refuse_changes(recorded, OmegaConf.to_container(cfg, resolve=True), run)
    if "not_finite" not in recorded:
        raise ConfigError(
            f"debug=replay: {run} was not stopped by a step that is not finite (status "
            f"{recorded['status']}); leave it out"
        )
    cfg.compile = False  # hooks look into the modules
    parts = prepare(cfg, why_model, run)
    resume_from, _ = resume.find_resume(run)
    if resume_from is None:
        start_head(parts, torch.device("cpu"))
    until = recorded["not_finite"]["step"]
    replay.replay(parts.cfg, parts.task, parts.datamodule, parts.budget, resume_from, until)


def failure_of(error: BaseException, cfg: DictConfig, run: Path) -> BaseException:
    """The same; for a full disk or too little memory, one that says what to type."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return CheckpointError(
            f"{error.filename or run}: {error.strerror}. What was written before stays; make room, "
            f"then go on: python train.py {to_type('resume', shown_path(run))}"
        )
    if cfg.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = str(error).strip().splitlines()[0]
        return TrainingError(
            f"compile={str(cfg.compile).lower()}: torch cannot compile this network here: "
            f"{reason}. Leave it out: compile=false"
        )
    # torch has no class of its own for it on a CPU
    out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if not (out_of_memory or "DefaultCPUAllocator" in str(error)):
        return error
    batch, accumulate = cfg.batch_size, cfg.trainer.accumulate_grad_batches or 1
    precision = cfg.trainer.precision or "32-true"
    half = "" if "16" in str(precision) else "trainer.precision=bf16-mixed, "
    smaller = (
        f"batch_size={batch // 2} trainer.accumulate_grad_batches={2 * accumulate} (as many images "
        "per step; BatchNorm sees half as many), "
    )
    return TrainingError(
        f"out of memory with batch_size={batch}, trainer.accumulate_grad_batches={accumulate}, "
        f"trainer.precision={precision}. Start anew with {smaller if batch > 3 else ''}"
        f"{half}a smaller model.input_size, or freeze_until=1 and more"
    )


def train_and_test(
    cfg: DictConfig,
    run: Path,
    overrides: Sequence[str],
    why_model: str,
    record: Record | None,
    stop: StopSignals,
) -> None:
    """The run itself. record: None on all ranks but the first."""
    began = time.time()
    parts = prepare(cfg, why_model, run)
    cfg = parts.cfg
    resume_from, resumed_at = resume.find_resume(run) if cfg.resume else (None, None)
    digests = begin_digests(parts.splits) if record else None

    def record_what_is_known_late() -> None:
        if not record or not digests:
            return
        known = {
            "data": record.facts["data"] | {"digests": digests.result()},
            "images_on_device": parts.datamodule.on_device,  # auto may have met several sizes
        }
        if any(record.facts.get(key) != value for key, value in known.items()):
            record.update(**known)

    watch = watch_over(parts, run, stop, record_what_is_known_late)
    loggers = build.build_loggers(cfg, run, resumed_at)
    trainer = build.build_trainer(cfg, run, parts.budget, watch.callbacks, loggers)
    if record:
        facts = facts_of(parts, trainer)
        if cfg.resume and digests:
            facts["data"]["digests"] = digests.result()
        record_begun(record, facts, parts, resumed_at or 0, run)
        check_space(cfg, run, parts)  # others may be here before the directory is made

    if resume_from is None:
        start_head(parts, trainer.strategy.root_device)
        if record:
            model = {**record.facts["model"], "start": start_digests(parts.task.model)}
            record.update(model=model)
    if parts.budget.total_steps > 0:
        trainer.fit(parts.task, parts.datamodule, ckpt_path=resume_from, weights_only=True)
    best = watch.best
    if best.validated_step != trainer.global_step:  # nothing was trained, or max_steps is 0
        trainer.validate(parts.task, datamodule=parts.datamodule, verbose=False)
    refuse_lost_end(trainer, best)
    show_confusion(trainer, best, parts.splits.classes)
    results = measure_best(trainer, parts, best, run, stop)

    record_what_is_known_late()  # of a training without steps
    if record:
        write_hparams(trainer, cfg, overrides, results.test or results.val)
    for logger in trainer.loggers:
        logger.finalize("success")  # closed by Lightning after the test, and opened again since
    if record:
        record_results(record, parts, watch, results, run, began)
        splits = {"val": results.val} | ({"test": results.test} if results.test else {})
        print_metrics(splits, results.per_class, results.per_class_split, results.per_class_metric)
        log.info("run: %s", shown_path(run))
        if tensorboard(trainer):
            log.info("look: tensorboard --logdir %s", tensorboard_folder(run))


@dataclass(frozen=True)
class Parts:
    """What a run is made of. cfg: filled by the recipe, with the choices that it took."""

    cfg: DictConfig
    choices: list[Choice]
    splits: Splits
    budget: build.Budget
    task: Task
    datamodule: DataModule


def prepare(cfg: DictConfig, why_model: str, run: Path) -> Parts:
    """Build data, model and task, and say what they are. run: gets the list of what is wrong."""
    cfg = cfg.copy()
    splits = build.build_splits(cfg, run)
    build.use_cores(cfg)
    recipe: Recipe = build.make(cfg.recipe)
    data = resolve.data_facts(cfg, splits, build.num_devices(cfg))
    choices = resolve.fill(cfg, recipe(data, None))
    log.info("model: %s", why_model)
    model = build.build_model(cfg, splits.classes)
    facts = resolve.model_facts(cfg, model)
    choices += resolve.fill(cfg, recipe(data, facts))
    for choice in choices:
        log.info("recipe: %s=%s (%s)", choice.key, choice.value, choice.why)
    choices += resolve.fill(cfg, none(data, facts))  # what it leaves open
    build.use_device(cfg, model)
    budget = build.build_budget(cfg, len(splits.train), len(splits.val or ()))
    task = build.build_task(cfg, model, budget, splits.train)
    if cfg.data.get("balance") is None and not task.multilabel:
        warn_of_imbalance(label_counts(splits.train.labels, len(model.classes)), model.classes)
    task.freeze_what_never_trains()
    check_monitor(cfg.monitor, task)
    check_batch(cfg.batch_size, model)
    counts = (f"{name} {len(images)}" for name, images in named_splits(splits).items())
    log.info("data: %s, %d classes", ", ".join(counts), len(splits.classes))
    build.warn_of_no_effect(task.strategy_, model.depth, task.epochs)
    rows = layer_table.layer_facts(model.backbone.net, model.head, task.strategy_, task.epochs)
    log.info("%s", layer_table.text(layer_table.compact(rows)))
    log.info("{:,} of {:,} parameters train".format(*parameter_counts(model)))
    every = "epoch" if budget.validate_every == 1 else f"{budget.validate_every} epochs"
    interval = cfg.trainer.get("val_check_interval")
    if interval and interval <= budget.batches_per_epoch:
        every = f"{interval} batches"
    log.info(
        "%d steps: %d epochs of %d, validated every %s",
        budget.total_steps, budget.epochs, budget.steps_per_epoch, every,
    )  # fmt: skip
    # what was taken then, now that it may have more epochs, or the machine less memory
    then = Record.read(run).facts.get("images_on_device") if cfg.resume else None
    datamodule = build.build_datamodule(cfg, splits, model, task, budget, then)
    build.tell_of_features(cfg, datamodule.plan)
    build.tell_of_cores(cfg, datamodule.num_workers)
    return Parts(cfg, choices, splits, budget, task, datamodule)


def check_monitor(monitor: str | None, task: Task) -> None:
    """Raise ConfigError before the training for what only the number of classes can tell."""
    num_classes = len(task.model.classes)
    if monitor == "val/top5" and num_classes <= 5:
        known = ", ".join(f"val/{name}" for name in task.metric_names if name != "top5")
        raise ConfigError(
            f"monitor={monitor}: not measured with {num_classes} classes; there are {known}"
        )


def check_batch(batch_size: int, model: Classifier) -> None:
    """Raise ConfigError if BatchNorm would train on single images."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    if batch_size == 1 and any(p.requires_grad for norm in norms for p in norm.parameters()):
        raise ConfigError(
            "batch_size=1: the BatchNorm of this network cannot train on single images; type "
            "batch_size=2 or more, or strategy=linear_probe"
        )


def check_space(cfg: DictConfig, run: Path, parts: Parts) -> None:
    """Raise ConfigError if the disk has no room for the checkpoints: the best, two, and a next."""
    model, folder = parts.task.model, checkpoint.best_path(run).parent
    weights = checkpoint.num_bytes(model.state_dict())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    moments = trained * (2 if "adam" in str(cfg.optimizer._target_).lower() else 1)
    step = weights * (1 + bool(cfg.ema)) + moments if parts.budget.total_steps else 0
    needed = weights + 3 * step
    here = sum(path.stat().st_size for path in folder.glob("*.ckpt"))  # of a resume
    free = shutil.disk_usage(run).free + here
    if free < needed:
        raise ConfigError(
            f"hydra.run.dir: {run} has room for {readable(free)}, and the checkpoints need about "
            f"{readable(needed)}. Make room, or name another disk: hydra.run.dir=FOLDER"
        )


@dataclass(frozen=True)
class Watch:
    """What watches over a training: all callbacks in their order, and those asked afterwards."""

    callbacks: list[Callback]
    best: BestCheckpoint
    throughput: Throughput


def watch_over(
    parts: Parts, run: Path, stop: StopSignals, before_state: Callable[[], None]
) -> Watch:
    """The callbacks of a run. before_state: what must be done before one can be resumed from."""
    cfg, task = parts.cfg, parts.task
    monitor = cfg.monitor or f"val/{task.metric_names[0]}"
    again = f"To see where it comes from: python train.py {to_type('resume', shown_path(run))}"
    guard, throughput = FiniteGuard(f"{again} debug=replay"), Throughput()
    typed = cfg.checkpoint.every_n_steps
    first = 2 * checkpoint.num_bytes(task.model.state_dict()) / WRITTEN_PER_SECOND
    best = BestCheckpoint(run, monitor, Pace(None if typed else SHARE_FOR_CHECKPOINTS, first))
    steps = StepCheckpoints(run, typed or EVERY_N_STEPS, guard, best, before_state)
    stop.steps = steps
    callbacks: list[Callback] = [guard, throughput, best, Pictures(), steps, stop]
    if cfg.ema:
        callbacks.insert(callbacks.index(steps), EMA(cfg.ema))  # best first, see there
    if cfg.max_steps is not None:
        callbacks.insert(0, MaxSteps(cfg.max_steps))
    if cfg.patience is not None:
        callbacks.append(EarlyStop(monitor, cfg.patience))
    return Watch(callbacks, best, throughput)


def record_begun(
    record: Record, facts: dict[str, Any], parts: Parts, resumed_at: int, run: Path
) -> None:
    """Note what is about to train; of a resume, refuse what is not the run that was begun."""
    cfg = parts.cfg
    config = OmegaConf.to_container(cfg, resolve=True)
    if start := record.facts.get("model", {}).get("start"):  # of the run that is resumed
        facts["model"]["start"] = start
    if cfg.resume and "recipe" in record.facts:  # it was begun
        resume.refuse_changes(record.facts, config, run)
        resume.refuse_other_data(record.facts, facts, run)
        resume.refuse_another_past(cfg, record.facts, parts.task, parts.budget, resumed_at, run)
        resume.warn_of_other_machine(record.facts, facts | {"versions": versions()})
    grown = cfg.resume and resume.trains_longer(record.facts, cfg)
    facts["epochs_grown"] = grown or record.facts.get("epochs_grown", False)
    facts |= {"status": "running", "error": None, "process": this_process()}
    record.update(config=config, recipe=resolve.told(parts.choices), **facts)


def begin_digests(splits: Splits) -> Future[dict[str, str]]:
    """Of the images and labels of each split, beside what follows: seconds for a million files."""

    def digests() -> dict[str, str]:
        return {name: digest(images) for name, images in named_splits(splits).items()}

    pool = ThreadPoolExecutor(1)
    found = pool.submit(digests)
    pool.shutdown(wait=False)
    return found


def start_digests(model: Classifier) -> dict[str, str]:
    """Digests of the weights before the training: runs that share them can be averaged."""
    return {
        "backbone": averaging.digest(model.backbone.state_dict()),
        "head": averaging.digest(model.head.state_dict()),
    }


def start_head(parts: Parts, device: torch.device) -> None:
    """Give the head the weights that the training starts from, as far as they need the data."""
    if parts.cfg.head.get("init") == "ridge":
        start_from_ridge(parts, device, parts.cfg.seed)


def start_from_ridge(parts: Parts, device: torch.device, seed: int) -> None:
    """Set the linear head to the ridge solution on the training features, without augmentation.

    Every rank computes the same.
    """
    began = time.time()
    model, images = parts.task.model, parts.splits.train
    assert isinstance(model.head, heads.Linear)  # finetune.check refuses others
    if len(images) > MOST_FOR_RIDGE:
        log.info("head.init=ridge: %d of %d training images", MOST_FOR_RIDGE, len(images))
        images = images.subset(stratified(images.strata(), MOST_FOR_RIDGE, seed))
    features = parts.datamodule.unaugmented_features(images, device)
    if device.type != "cuda":  # others have no float64
        features = features.cpu()
    labels = labels_of(images).to(features.device)
    targets = F.one_hot(labels, len(model.classes))
    found = ridge.solve(features, targets)
    scale = ridge.softmax_scale(found.predictions, targets)
    with torch.no_grad():
        model.head.weight.copy_(scale * found.weight)
        model.head.bias.copy_(scale * found.bias)
    accuracy = float((found.predictions.argmax(1) == labels).double().mean())
    log.info(
        "head.init=ridge: %d images, lambda %.3g, leave-one-out accuracy %.4f, %.1f s",
        len(images), found.penalty, accuracy, time.time() - began,
    )  # fmt: skip


def facts_of(parts: Parts, trainer: L.Trainer) -> dict[str, Any]:
    """Data, model and machine, for run.json."""
    splits, model = named_splits(parts.splits), parts.task.model
    counts = {name: len(images) for name, images in splits.items()}
    trainable, parameters = parameter_counts(model)
    plan = parts.datamodule.plan
    return {
        "data": {
            "classes": list(parts.splits.classes),
            "counts": {"train": 0, "val": 0, "test": 0} | counts,
            "skipped": list(parts.splits.skipped),
        },
        "model": {
            **model.backbone.recipe,
            "weights": parts.cfg.model.get("weights"),
            "head": model.head.recipe,
            "parameters": parameters,
            "trainable": trainable,
        },
        "device": device_name(trainer),
        "world_size": trainer.world_size,
        "threads": torch.get_num_threads(),
        "images_on_device": parts.datamodule.on_device,
        "features": {"phases": [[*astuple(p)] for p in plan.phases], "views": plan.views},
    }


@dataclass(frozen=True)
class Results:
    """What the best checkpoint reached. test: empty without a test split."""

    val: dict[str, float]
    test: dict[str, float]
    per_class: dict[str, float | None]
    per_class_split: str
    per_class_metric: str


def measure_best(
    trainer: L.Trainer, parts: Parts, best: BestCheckpoint, run: Path, stop: StopSignals
) -> Results:
    """Val as it was at the best; test, read once, with the weights of the best as they lie on disk.

    They are read into a new model: that of the training may be in parts on several devices.
    """
    val, metric = dict(best.best["metrics"]), parts.task.per_class_metric
    if parts.splits.test is None:
        log.info("no test split: nothing is tested; val chose the best and is no fair estimate")
        named = dict(zip(parts.splits.classes, best.per_class, strict=True))
        return Results(val, {}, named, "val", metric)
    _, model = saved_model(run, OmegaConf.select(parts.cfg, "model.target"))
    test = measure(parts.cfg, run, model, parts.splits, "test", [stop])
    for logger in trainer.loggers:
        logger.log_metrics(test.values, trainer.global_step)
    return Results(val, test.values, test.per_class, "test", metric)


def record_results(
    record: Record, parts: Parts, watch: Watch, results: Results, run: Path, began: float
) -> None:
    """Note what came out, and that the run is finished. began: when this process took it up."""
    best, throughput = watch.best, watch.throughput
    first_step = throughput.first_step_at
    per_class = {results.per_class_split: results.per_class}
    record.update(
        best={k: best.best[k] for k in ("epoch", "step", "monitor", "value")}
        | {"path": str(best.path.relative_to(run))},
        val=results.val,
        test=results.test,
        **{f"per_class_{results.per_class_metric}": per_class},
        images_per_second=throughput.images_per_second,
        **waiting(throughput, parts.cfg, parts.datamodule),
        seconds=time.time() - began,
        time_to_first_step=first_step and first_step - finetune.started,
    )
    record.update(status="finished")  # last: all before can be repeated


def waiting(throughput: Throughput, cfg: DictConfig, datamodule: DataModule) -> dict[str, Any]:
    """Share of the time that waits for data, and what it means: told, and for run.json."""
    share = throughput.data_wait
    if share is None:
        skipped = f"the first {throughput.SKIP} are left out"
        said = f"not measured: {throughput.steps} steps were trained here, and {skipped}"
    else:
        said = verdict(
            share,
            datamodule.num_workers,
            usable_cores() // build.ranks_here(cfg),
            datamodule.in_memory,
            datamodule.augmented,
            datamodule.on_device and cfg.data.get("cache") == "device" and not datamodule.for_gpu,
        )
    log.info("%s", said)
    return {"data_wait": share, "verdict": said}


def open_record(cfg: DictConfig, run: Path) -> Record:
    """Claim the run directory, or take up the one to resume."""
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    if cfg.resume:
        if not has_record(run):
            log.info("%s was stopped before it began; starting from step 0", run)
        else:
            record = Record.read(run)
            resume.refuse_changes(record.facts, config, run)
            return record
    return Record.create(
        run,
        {
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "config": config,
            "git": git_state(),
            "versions": versions(),
            "seed": cfg.seed,
        },
    )


def versions() -> dict[str, str]:
    """Of Python and the packages that a result depends on."""
    packages = ("torch", "torchvision", "lightning", "finetune")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def git_state() -> dict[str, Any] | None:
    """Commit of the code that runs, and whether it was changed since; None outside of git."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        # a run that is killed here must leave no lock behind in somebody's repository
        words = ["git", "--no-optional-locks", *arguments]
        done = subprocess.run(
            words, cwd=folder, capture_output=True, text=True, timeout=5, check=True
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
        "The `srun` command is available on your system but is not used",  # launcher=slurm does
        "Found .* module.* in eval mode at the start of training",  # a frozen layer is
        "It is recommended to use `self.log\\(.*sync_dist=True",  # computed over all ranks already
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # lightning 2.6.6 with torch 2.14
    ):
        warnings.filterwarnings("ignore", message)
    # compile=true on a machine without a GPU
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def write_hparams(
    trainer: L.Trainer, cfg: DictConfig, overrides: Sequence[str], metrics: Mapping[str, float]
) -> None:
    """The HPARAMS tab: what was chosen, against what came out."""
    writer = tensorboard(trainer)
    if writer is None:
        return
    of_run = without_launcher(overrides)
    chosen = dict(o.lstrip("+").split("=", 1) for o in of_run if "=" in o and o[0] != "~")
    chosen.pop("resume", None)
    shown = {"optimizer.lr": cfg.optimizer.lr, "batch_size": cfg.batch_size, "seed": cfg.seed}
    writer.write_hparams({**shown, **{k: number(v) for k, v in chosen.items()}}, list(metrics))


def number(text: str) -> float | str:
    """A typed value as a number where it is one, so that TensorBoard can sort by it."""
    try:
        return float(text)
    except ValueError:
        return text


def tensorboard_folder(run: Path) -> Path:
    """logs/ if the run lies in it, so that TensorBoard shows all runs; else the run itself."""
    logs = Path.cwd() / "logs"
    return Path("logs") if logs in run.absolute().parents else run

"""What a resume goes on from, and what it may change: nothing that changes the arithmetic."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from finetune import build, checkpoint, resolve
from finetune.errors import CheckpointError, ConfigError
from finetune.strategies import scales
from finetune.tasks.base import Task
from finetune.typed import shown, to_type

log = logging.getLogger(__name__)

# none of it changes the arithmetic
FREE_TO_CHANGE = (
    *("num_workers", "logger", "checkpoint", "resume", "sweep", "launcher", "debug"),
    *("features.dir", "data.cache"),
    # with the same contents: see refuse_other_data
    *("data.root", "data.table", "data.download", "data.on_bad", "data.max_pixels", "data.rescan"),
)


def trains_longer(recorded: Mapping[str, Any], cfg: Mapping[str, Any]) -> bool:
    """Whether more epochs are asked for than the run has; refuse_another_past says if it may."""
    before, now = recorded["config"].get("epochs"), cfg.get("epochs")
    return before is not None and now is not None and now > before


def refuse_changes(recorded: Mapping[str, Any], config: Any, run: Path) -> None:
    """Raise ConfigError that names each value that a resume would change.

    recorded: the facts of the run. config: as composed, whose open values the recipe will choose
    as it did before; or as filled by it.
    """
    before, now = flat(recorded["config"]), flat(config)
    chosen = recorded.get("recipe", ())
    free = (*FREE_TO_CHANGE, "epochs") if trains_longer(recorded, config) else FREE_TO_CHANGE
    new = {key for key in now if key.split(".", 1)[0] not in recorded["config"]}
    if began_without := sorted(key for key in new if now[key]):
        raise ConfigError(
            f"{to_type('resume', str(run))}: the run was begun by a version without "
            f"{', '.join(began_without)}. Go on with that version, or start anew"
        )
    changed = [
        f"{key}: the run has {shown(before.get(key))}, not {shown(now.get(key))}"
        for key in sorted((before.keys() | now.keys()) - new)
        if before.get(key) != now.get(key)
        and not resolve.is_open(key, now, chosen)
        and (
            not any(key == name or key.startswith(f"{name}.") for name in free)
            # it rounds the pixels of its crops otherwise
            or (key == "data.cache" and "device" in (before.get(key), now.get(key)))
        )
    ]
    if changed:
        raise ConfigError(
            f"{to_type('resume', str(run))} would go on with another run: {'; '.join(changed)}. "
            "Leave these out, or start anew without resume="
        )


def refuse_another_past(
    cfg: DictConfig,
    recorded: Mapping[str, Any],
    task: Task,
    budget: build.Budget,
    step: int,
    run: Path,
) -> None:
    """Raise ConfigError if with more epochs the steps that are done had been other ones.

    cfg: filled. step: how many are done. What changes from here on is told.
    """
    if not trains_longer(recorded, cfg):
        return
    epochs = recorded["config"]["epochs"]
    anew = f"start another run from its weights: model=run {to_type('model.path', str(run))}"
    if (best := recorded.get("best", {}).get("step", 0)) > step:
        raise ConfigError(
            f"epochs={cfg.epochs}: the best weights are of step {best}, after the last state that "
            f"can be resumed, of step {step}. Go on without epochs=, or {anew}"
        )
    before = build.Budget(
        epochs, budget.steps_per_epoch, cfg.max_steps, budget.num_images, budget.num_val,
        budget.sharded,
    )  # fmt: skip
    done_epochs = -(-step // budget.steps_per_epoch)
    strategy = build.build_strategy(cfg, task.model.depth, before.epochs_begun)
    other = [
        name
        for name, was, would_be in (
            (
                f"schedule={resolve.class_name(cfg.schedule)}",
                [task.schedule(i, before.total_steps) for i in range(step)],
                [task.schedule(i, budget.total_steps) for i in range(step)],
            ),
            (
                f"strategy={resolve.class_name(cfg.strategy)}",
                scales(strategy, task.model.depth, done_epochs),
                scales(task.strategy_, task.model.depth, done_epochs),
            ),
        )
        if was != would_be
    ]
    if other:
        raise ConfigError(
            f"epochs={cfg.epochs}: {' and '.join(other)} would have set other learning rates in "
            f"the {step} steps that are done, with {epochs} epochs in view. Go on without epochs=, "
            f"or {anew}"
        )
    log.info(
        "epochs=%d instead of %d: %d steps instead of %d, validated every %d epochs instead of %d",
        cfg.epochs, epochs, budget.total_steps, before.total_steps, budget.validate_every,
        before.validate_every,
    )  # fmt: skip


def refuse_other_data(recorded: Mapping[str, Any], now: Mapping[str, Any], run: Path) -> None:
    """Raise ConfigError if images, labels, classes or the number of ranks are not those of the run.

    now: data and world_size, as for run.json. A run killed before it noted them has none.
    """
    changed = []
    before = recorded.get("data")
    if before is not None:
        if before["classes"] != now["data"]["classes"]:
            changed.append(f"classes: {_differing(before['classes'], now['data']['classes'])}")
        changed += [
            f"{split}: {before['counts'].get(split, 0)} images then, "
            f"{now['data']['counts'].get(split, 0)} now, and not the same files and labels"
            for split, digest in before.get("digests", {}).items()
            if digest != now["data"]["digests"].get(split)
        ]
    on_device = recorded.get("images_on_device", now["images_on_device"])
    if on_device != now["images_on_device"]:  # it rounds pixels otherwise
        then, here = ("on the device", "in files or memory")[:: 1 if on_device else -1]
        changed.append(f"data.cache: training images {then} then, {here} now (leave it out)")
    ranks = recorded.get("world_size", now["world_size"])
    if ranks != now["world_size"]:
        changed.append(f"trainer.devices: {ranks} devices then, {now['world_size']} now")
    if changed:
        raise ConfigError(
            f"{to_type('resume', str(run))} would go on with other data or devices: "
            f"{'; '.join(changed)}. Bring back what was, or start anew without resume="
        )


def warn_of_other_machine(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Say so where a resume cannot end with the bytes of an uninterrupted run."""
    changed = [
        f"{name} {before} then, {now['versions'][name]} now"
        for name, before in recorded["versions"].items()
        if before != now["versions"].get(name)
    ]
    for what in ("threads", "features"):
        if recorded.get(what, now[what]) != now[what]:
            changed.append(f"{what} {recorded[what]} then, {now[what]} now")
    if (device := recorded.get("device", now["device"])) != now["device"]:
        changed.append(f"device {device} then, {now['device']} now")
    if changed:
        log.warning(
            "this resume will not end with the very bytes of an uninterrupted run: %s",
            "; ".join(changed),
        )


def find_resume(run: Path) -> tuple[Path | None, int]:
    """The newest step checkpoint that can be read, and its step; None and 0 if there is none."""
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


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    if not isinstance(config, Mapping):
        return {prefix: config}
    return {
        key: value
        for name, child in config.items()
        for key, value in flat(child, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _differing(before: list[str], now: list[str]) -> str:
    gone = [name for name in before if name not in now]
    new = [name for name in now if name not in before]
    changes = [*(f"no {name!r} now" for name in gone), *(f"{name!r} is new" for name in new)]
    return ", ".join(changes) or "in another order"

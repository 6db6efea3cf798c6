"""Average the weights of runs that share a start, or go back towards it; val decides."""

import logging
import shutil
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from omegaconf import DictConfig

from finetune import cli
from finetune.errors import ConfigError
from finetune.overrides import CONF
from finetune.record import taken

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.checkpoint import Checkpoint

    State = dict[str, Tensor]

log = logging.getLogger(__name__)

ALPHAS = tuple(i / 10 for i in range(11))  # those that alpha=auto tries, as WiSE-FT's paper


def main() -> NoReturn:
    """Entry point of python -m finetune.soup."""
    cli.command("soup", task)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="soup")
def task(cfg: DictConfig) -> None:
    """One soup."""
    if isinstance(cfg.runs, str) or not cfg.runs:
        cli.fail(ConfigError(f"runs={cfg.runs}: must be a list of run directories: runs=[RUN,RUN]"))
    cli.guarded([f"runs={cfg.runs}"], Path(str(cfg.runs[0])), lambda: soup(cfg))


def soup(cfg: DictConfig) -> None:
    """Write a new run directory with the averaged weights.

    Raises FinetuneError for a user's mistake, such as runs that do not share a start.
    """
    from finetune import averaging, build, checkpoint, fit  # late: imports torch
    from finetune.callbacks.checkpoints import lower_is_better, write_best
    from finetune.overrides import compose_run
    from finetune.record import Record
    from finetune.restore import saved_model

    fit.quiet_libraries()
    runs = [Path(str(run)) for run in cfg.runs]
    saved = [saved_model(run, cfg.model.target)[0] for run in runs]
    facts = [Record.read(run).facts for run in runs]
    refuse_strangers(runs, saved, facts)
    name = f"logs/soup/{datetime.now():%Y-%m-%d_%H-%M-%S_%f}"
    output = Path(name if cfg.output is None else str(cfg.output))
    if (output / "run.json").exists():
        raise taken(output)

    parts = fit.prepare(compose_run(runs[0], typed(cfg)), f"that of {runs[0]}", output)
    trainer = build.build_trainer(parts.cfg, output, parts.budget, callbacks=[], loggers=[])
    model, monitor = parts.task.model, saved[0].monitor
    start = {}
    if cfg.alpha is not None:
        fit.start_head(parts, trainer.strategy.root_device)
        start = averaging.average([model.state_dict()])  # a copy
        if fit.start_digests(model) != facts[0]["model"]["start"]:
            log.warning("the start of %s could not be made again bit for bit", runs[0])

    def measured(state: "State") -> dict[str, float]:
        model.load_state_dict(state)
        trainer.validate(parts.task, datamodule=parts.datamodule, verbose=False)
        values = trainer.callback_metrics.items()
        return {name: float(value) for name, value in values if name.startswith("val/")}

    sign = -1.0 if lower_is_better(monitor) else 1.0

    def goodness(state: "State") -> float:
        return sign * measured(state)[monitor]

    order = sorted(range(len(runs)), key=lambda i: -sign * saved[i].value)
    kept = greedy([saved[i].state_dict for i in order], goodness)
    mixed = averaging.average([saved[order[i]].state_dict for i in kept])
    names = [str(runs[order[i]]) for i in kept]
    alpha = 1.0
    if cfg.alpha is not None:
        alphas = ALPHAS if cfg.alpha == "auto" else (float(cfg.alpha),)
        alpha = best_alpha(start, mixed, alphas, goodness)
        mixed = averaging.interpolate(start, mixed, alpha)

    val = measured(mixed)
    record = Record.create(output, {**facts[0], "status": "running", "test": {}, "val": val})
    shutil.copytree(runs[0] / ".hydra", output / ".hydra")
    first = saved[order[0]]
    best = {"epoch": first.epoch, "step": first.step, "monitor": monitor, "value": val[monitor]}
    path = checkpoint.best_path(output)
    write_best(
        path,
        model,
        {f"model.{name}": tensor for name, tensor in mixed.items()},
        best | {"task": first.task},
    )
    record.update(
        best={**best, "path": str(path.relative_to(output))},
        soup={"runs": [str(run) for run in runs], "kept": names, "alpha": alpha},
        status="finished",
    )
    log.info("kept %d of %d runs: %s", len(names), len(runs), ", ".join(names))
    log.info("%s %.4f, alpha %g", monitor, val[monitor], alpha)
    log.info("run: %s", cli.shown_path(output))
    log.info("test it: python -m finetune.evaluate run=%s", cli.shown_path(output))


def typed(cfg: DictConfig) -> list[str]:
    """Overrides of what the runs were started with."""
    from finetune.typed import overrides_of

    values = {
        "data.root": cfg.data.root,
        "data.table": cfg.data.table,
        "model.target": cfg.model.target,
        "num_workers": cfg.num_workers,
        "features.cache": "none",  # the backbone changes from one measurement to the next
        "trainer": "default",
        "trainer.accelerator": cfg.trainer.accelerator,
        "trainer.devices": 1,
        "trainer.precision": cfg.trainer.precision,
        "compile": False,  # one pass takes less
    }
    return overrides_of(values)


def refuse_strangers(
    runs: Sequence[Path], saved: "Sequence[Checkpoint]", facts: Sequence[dict[str, Any]]
) -> None:
    """Raise ConfigError for runs whose weights cannot be averaged."""
    starts = [fact.get("model", {}).get("start") for fact in facts]
    for run, other, start in zip(runs, saved, starts, strict=True):
        first = saved[0]
        if start is None:
            raise ConfigError(f"{run} has not recorded the weights it started from; train it again")
        for what, one, two in (
            ("backbone", first.backbone, other.backbone),
            ("head", first.head, other.head),
            ("classes", first.classes, other.classes),
            ("monitor", first.monitor, other.monitor),
            ("pretrained weights", starts[0]["backbone"], start["backbone"]),
        ):
            if one != two:
                raise ConfigError(
                    f"{run} and {runs[0]} do not share a start: their {what} differ "
                    f"({two} and {one}); give runs of one model= and one data="
                )
        if start["head"] != starts[0]["head"]:
            log.warning(
                "%s and %s started from different heads (another seed or head.init): "
                "their average may be worse, and val will tell", run, runs[0],
            )  # fmt: skip


def greedy(states: "Sequence[State]", goodness: "Callable[[State], float]") -> list[int]:
    """Indices of the states whose average is best: each is kept if it makes it no worse.

    states: from the best to the worst. Source: Wortsman et al. 2022, Model soups, recipe 1.
    """
    from finetune.averaging import average

    kept, best = [0], goodness(states[0])
    for i in range(1, len(states)):
        value = goodness(average([states[k] for k in (*kept, i)]))
        if value >= best:
            kept, best = [*kept, i], value
    return kept


def best_alpha(
    start: "State", end: "State", alphas: "Sequence[float]", goodness: "Callable[[State], float]"
) -> float:
    """The alpha on the way from start to end that is best on val; of equals the largest."""
    from finetune.averaging import interpolate

    tried = [(goodness(interpolate(start, end, alpha)), alpha) for alpha in alphas]
    return max(tried)[1]


if __name__ == "__main__":
    main()

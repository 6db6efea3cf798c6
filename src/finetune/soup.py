"""Average the weights of runs that share a start, or go back towards it; val decides."""

import logging
import shutil
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import hydra
from omegaconf import DictConfig

from finetune import cli
from finetune.overrides import CONF

if TYPE_CHECKING:
    from torch import Tensor

    State = dict[str, Tensor]

log = logging.getLogger(__name__)

ALPHAS = tuple(i / 10 for i in range(11))  # those that alpha=auto tries, as WiSE-FT's paper


def main() -> NoReturn:
    """Entry point of python -m finetune.soup."""
    cli.command("soup", task)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="soup")
def task(cfg: DictConfig) -> None:
    """One soup."""
    runs = [str(run) for run in cfg.runs]
    cli.guarded([f"runs=[{','.join(runs)}]"], Path(runs[0]), lambda: soup(cfg))


def soup(cfg: DictConfig) -> None:
    """Write a new run directory with the averaged weights.

    Raises FinetuneError for a user's mistake, such as runs that do not share a start.
    """
    from finetune import averaging, checkpoint, fit  # late: imports torch
    from finetune.callbacks import lower_is_better
    from finetune.record import Record
    from finetune.restore import saved_model

    fit.quiet_libraries()
    runs = [Path(run) for run in cfg.runs]
    output = Path(cfg.output or f"logs/soup/{datetime.now():%Y-%m-%d_%H-%M-%S_%f}")
    saved = [saved_model(run, cfg.model.target)[0] for run in runs]
    facts = [Record.read(run).facts for run in runs]
    refuse_strangers(runs, saved, facts)

    parts, trainer = fit.prepare_again(runs[0], cfg)
    model, monitor = parts.task.model, saved[0].monitor
    sign = -1.0 if lower_is_better(monitor) else 1.0

    def value_of(state: "State") -> float:
        model.load_state_dict(state)
        trainer.validate(parts.task, datamodule=parts.datamodule, verbose=False)
        return float(trainer.callback_metrics[monitor])

    start = None
    if cfg.alpha is not None:
        fit.start_head(parts, trainer.strategy.root_device, parts.cfg)
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if averaging.digest(start) != facts[0]["model"]["start"]["all"]:
            log.warning("the start of %s was made anew and is not bit for bit what it was", runs[0])

    state, kept, value = greedy(runs, saved, value_of, sign)
    alpha = 1.0
    if start is not None:
        state, alpha, value = along(cfg.alpha, start, state, value_of, sign)

    record = Record.create(
        output, {k: facts[0][k] for k in facts[0] if k not in ("status", "error")}
    )
    shutil.copytree(runs[0] / ".hydra", output / ".hydra")
    parts.task.model.load_state_dict(state)
    trainer.validate(parts.task, datamodule=parts.datamodule, verbose=False)
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
    best = {"epoch": saved[0].epoch, "step": saved[0].step, "monitor": monitor, "value": value}
    fit.write_weights(checkpoint.best_path(output), model, best)
    record.update(
        best=best | {"path": str(checkpoint.best_path(output).relative_to(output))},
        val=metrics,
        test={},
        soup={"runs": [str(run) for run in runs], "kept": [str(run) for run in kept], "alpha": alpha},
        status="finished",
    )  # fmt: skip
    log.info("%s %.4f with %d of %d runs, alpha %g", monitor, value, len(kept), len(runs), alpha)
    log.info("run: %s", cli.shown_path(output))
    log.info("test it: python -m finetune.evaluate run=%s", cli.shown_path(output))

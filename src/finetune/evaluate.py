"""Measure the best checkpoint of a run again, on its test or val split."""

import logging
from pathlib import Path
from typing import NoReturn

import hydra
from omegaconf import DictConfig

from finetune import cli
from finetune.overrides import CONF

log = logging.getLogger(__name__)


def main() -> NoReturn:
    """Entry point of python -m finetune.evaluate."""
    cli.command("evaluate", task)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="evaluate")
def task(cfg: DictConfig) -> None:
    """One evaluation."""
    cli.guarded([f"run={cfg.run}"], Path(cfg.run), lambda: evaluate(cfg))


def evaluate(cfg: DictConfig) -> None:
    """Print a table and write metrics.json. Raises FinetuneError for a user's mistake."""
    from finetune import build, fit, resolve  # late: imports torch
    from finetune.data.split import listed
    from finetune.errors import ConfigError, DataError
    from finetune.files import try_to_write, write_json
    from finetune.measure import measure, named_splits, print_metrics
    from finetune.overrides import compose_run
    from finetune.record import Record
    from finetune.restore import load
    from finetune.typed import overrides_of

    fit.quiet_libraries()
    run = Path(cfg.run)
    model = load(run, cfg.model.target).model
    recorded = Record.read(run).facts["config"]
    typed = {
        **{f"data.{key}": value for key, value in cfg.data.items()},
        "batch_size": cfg.batch_size,
        "num_workers": cfg.num_workers,
        "trainer": "default",
        "trainer.accelerator": cfg.trainer.accelerator,
        "trainer.devices": 1,
        "trainer.precision": cfg.trainer.precision or recorded.get("trainer", {}).get("precision"),
        "channels_last": recorded.get("channels_last"),
    }
    run_cfg = compose_run(run, overrides_of(typed))
    resolve.fill_plainly(run_cfg)  # nothing is trained
    target = Path(cfg.output or run) / "metrics.json"
    try:
        try_to_write(target)  # before the work is done
    except OSError as error:
        raise ConfigError(f"output: {target} cannot be written: {error.strerror}") from error
    splits = build.build_splits(run_cfg, target.parent)
    images = named_splits(splits).get(cfg.split)
    if images is None:
        raise DataError(f"split={cfg.split}: this data has no {cfg.split} split; type split=val")
    if splits.classes != model.classes:
        theirs, ours = listed(splits.classes, most=5), listed(model.classes, most=5)
        raise DataError(f"the classes of this data are {theirs}; the run was trained on {ours}")
    measured = measure(run_cfg, run, model, splits, cfg.split)
    facts = {"split": cfg.split, "images": len(images), **measured.values}
    try:
        write_json(target, {**facts, f"per_class_{measured.per_class_metric}": measured.per_class})
    except OSError as error:
        raise ConfigError(f"output: {target} cannot be written: {error.strerror}") from error
    print_metrics(
        {cfg.split: measured.values}, measured.per_class, cfg.split, measured.per_class_metric
    )
    log.info("%d images of %s; written to %s", len(images), cfg.split, target)


if __name__ == "__main__":
    main()

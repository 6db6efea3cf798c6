"""Loggers that write straight into the run directory, and go on where a resume does."""

import csv
import importlib.util
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from finetune.data.paths import text_of
from finetune.errors import ConfigError


class TensorBoard(TensorBoardLogger):
    """Event files in the run directory itself. resumed_at: later points of an earlier try go."""

    def __init__(self, run: Path, resumed_at: int | None = None) -> None:
        super().__init__(run, name="", version="", default_hp_metric=False, purge_step=resumed_at)

    @rank_zero_only
    def save(self) -> None:
        """Flush; without Lightning's hparams.yaml, since run.json holds the config."""
        self.experiment.flush()

    @rank_zero_only
    def write_hparams(self, params: dict[str, Any], metrics: list[str]) -> None:
        """Fill the HPARAMS tab. metrics: tags of scalars that were logged already."""
        from torch.utils.tensorboard.summary import hparams

        plain = {
            k: v if isinstance(v, bool | int | float) else text_of(str(v))
            for k, v in params.items()
        }
        for summary in hparams(plain, dict.fromkeys(metrics, 0.0)):
            self.experiment._get_file_writer().add_summary(summary)


class MetricsFile(Logger):
    """metrics.csv with columns step,metric,value: appended to, so a killed run keeps its rows.

    As a table: pandas.read_csv(...).pivot(index="step", columns="metric", values="value").
    """

    def __init__(self, run: Path, resumed_at: int | None = None) -> None:
        super().__init__()
        self.path = run / "metrics.csv"
        self.resumed_at = resumed_at
        self._opened = False

    @property
    def name(self) -> str:
        """Of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """There is one per run directory."""
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> Path:
        """The file."""
        return self.path

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing: they are in run.json."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row per metric; the first call drops what a resume will log again."""
        if not self._opened:
            self._opened = True
            self._keep_before_resume()
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(
                [step, name, repr(float(value))] for name, value in sorted(metrics.items())
            )

    def _keep_before_resume(self) -> None:
        rows = []
        if self.resumed_at is not None and self.path.exists():
            with self.path.open(newline="") as file:
                rows = [row for row in csv.reader(file) if len(row) == 3 and row[0].isdigit()]
        with self.path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["step", "metric", "value"])
            writer.writerows(row for row in rows if int(row[0]) < (self.resumed_at or 0))


def wandb(run: Path, resumed_at: int | None, project: str, offline: bool) -> Logger:
    """Weights & Biases, an extra. resumed_at: unused; a resume continues the same wandb run."""
    check_wandb()
    from lightning.pytorch.loggers import WandbLogger

    name = f"{run.absolute().parent.name}-{run.name}"  # of two sweeps, each has a job 0
    return WandbLogger(
        project=project,
        offline=offline,
        save_dir=run,
        id=name,
        name=name,
        resume="allow",
    )


def check_wandb(**arguments: Any) -> None:
    """Raise ConfigError if wandb is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError('logger=wandb needs wandb; type: pip install -e ".[wandb]"')


def end_wandb() -> None:
    """End the wandb run, if there is one: the next job of a sweep must get its own."""
    module = sys.modules.get("wandb")
    if module is not None and module.run is not None:
        module.run.finish()

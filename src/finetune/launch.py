"""From one composed config to one process per device: composed once, so that all ranks agree."""

import logging
import logging.config
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from finetune.build import num_devices
from finetune.callbacks import Interrupted
from finetune.errors import ConfigError, FinetuneError
from finetune.fit import fit
from finetune.machine import num_threads

log = logging.getLogger(__name__)

STOPPED = {130: 2, 143: 15, 138: 10}  # exit code: signal


def run(cfg: DictConfig, run_dir: Path, overrides: Sequence[str], why_model: str) -> None:
    """Run a job in this process, or in one process per device."""
    devices = num_devices(cfg)
    outside = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))
    if outside > 1:  # torchrun or SLURM started the ranks already
        if not any(o.startswith("hydra.run.dir=") for o in HydraConfig.get().overrides.hydra):
            raise ConfigError(
                f"{outside} ranks were started from outside and must share a run directory; "
                "type hydra.run.dir=logs/NAME"
            )
        rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
        if rank > 0:
            logging.getLogger().setLevel(logging.ERROR)  # one rank tells what all of them do
        fit(cfg, run_dir, overrides, why_model, rank)
    elif devices == 1:
        fit(cfg, run_dir, overrides, why_model)
    elif cfg.trainer.num_nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes={cfg.trainer.num_nodes}: start one rank per device yourself, with "
            "torchrun or srun, and the same hydra.run.dir for all"
        )
    else:
        start_ranks(cfg, run_dir, overrides, why_model, devices)


def start_ranks(
    cfg: DictConfig, run_dir: Path, overrides: Sequence[str], why_model: str, devices: int
) -> None:
    """One process per device of this machine; a failure of one ends all.

    Lightning's own launcher re-runs sys.argv in every rank: in a sweep each would then start a
    sweep of its own, and ranks would train with different overrides.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGUSR1"
    quiet_elastic()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id="finetune",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
        logs_specs=DefaultLogsSpecs(),
    )
    logging_config = OmegaConf.to_container(HydraConfig.get().job_logging, resolve=True)
    plain = OmegaConf.to_container(cfg, resolve=True)
    threads = num_threads(devices)
    try:
        elastic_launch(config, rank_main)(
            plain, str(run_dir), list(overrides), why_model, logging_config, threads
        )
    except SignalException as error:
        raise Interrupted(int(error.sigval)) from error
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        if stopped := codes & STOPPED.keys():
            raise Interrupted(STOPPED[stopped.pop()]) from error
        raise RankFailed(said_by(error.get_first_failure()[1])) from error


def quiet_elastic() -> None:
    """Leave out what torch says of signals and failed ranks: we tell it ourselves.

    torch sets a level on every logger of its own, so that of the parent does not count.
    """
    noisy = ("torch.distributed.elastic", "torch.multiprocessing")
    for name in (*noisy, *logging.root.manager.loggerDict):
        if name.startswith(noisy):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def said_by(failure: ProcessFailure) -> str:
    """A user's mistake as its message alone; anything else as the rank's traceback."""
    said = failure.error_file_data.get("message") if failure.error_file_data else None
    if not isinstance(said, dict):  # it was killed, or could not write
        return f"rank {failure.local_rank} ended with exit code {failure.exitcode}"
    _, found, message = str(said["message"]).partition("FinetuneError: ")
    return (
        message if found else f"in rank {failure.local_rank}\n{said['extraInfo']['py_callstack']}"
    )


class RankFailed(FinetuneError):
    """One of the ranks failed; the message is what it said."""


def rank_main(
    plain: dict[str, Any],
    run_dir: str,
    overrides: list[str],
    why_model: str,
    logging_config: dict[str, Any],
    threads: int,
) -> None:
    """What each rank runs. Its exit code tells the launcher of a signal."""
    from torch.distributed.elastic.multiprocessing.errors import record

    rank = int(os.environ["RANK"])
    torch.set_num_threads(threads)  # or the ranks' threads fight over the cores
    logging.config.dictConfig(logging_config)
    if rank > 0:
        logging.getLogger().setLevel(logging.CRITICAL)

    @record  # writes what was raised to the file that the launcher reads
    def job() -> None:
        try:
            fit(OmegaConf.create(plain), Path(run_dir), overrides, why_model, rank)
        except FinetuneError as error:
            raise RuntimeError(f"FinetuneError: {error}") from error

    try:
        job()
    except Interrupted as stop:
        sys.exit(128 + stop.signum)
    except Exception:
        sys.exit(1)

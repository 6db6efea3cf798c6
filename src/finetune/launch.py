"""From one composed config to one process per device: composed once, so that all ranks agree."""

import logging
import logging.config
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch.distributed import TCPStore  # type: ignore[attr-defined] # it re-exports

import finetune
from finetune import signals
from finetune.build import num_devices
from finetune.errors import ConfigError, FinetuneError, Interrupted
from finetune.fit import fit
from finetune.lock import locked
from finetune.machine import keep_freed_memory, num_threads, process_rank
from finetune.ranks import End, Rank, Ranks, die_with_launcher, start_server, started_outside
from finetune.record import Record, Status

log = logging.getLogger(__name__)

MOST_SAID = 20_000  # characters: a pipe holds no more until it is read


def run(cfg: DictConfig, run_dir: Path, overrides: Sequence[str], why_model: str) -> None:
    """Run a job in this process, or in one process per device."""
    try:
        run_job(cfg, run_dir, overrides, why_model)
    finally:
        finetune.started = time.time()  # the next job of a sweep


def run_job(cfg: DictConfig, run_dir: Path, overrides: Sequence[str], why_model: str) -> None:
    """The same, of a process that may run more."""
    devices = num_devices(cfg)
    outside = started_outside()
    if outside > 1:
        if not any(o.startswith("hydra.run.dir=") for o in HydraConfig.get().overrides.hydra):
            raise ConfigError(
                f"{outside} ranks were started from outside and must share a run directory; "
                "type hydra.run.dir=logs/NAME"
            )
        rank = process_rank()
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
    """One process per device of this machine; the end of one ends all.

    Lightning's own launcher re-runs sys.argv in every rank: in a sweep each would then start a
    sweep of its own, and ranks would train with different overrides. torch's elastic launcher
    kills the other ranks when one has stopped, in the middle of what they write.
    """
    # found by the ranks as torchrun's; the port is free, since it is open already
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    logging_config = OmegaConf.to_container(HydraConfig.get().job_logging, resolve=True)
    plain = OmegaConf.to_container(cfg, resolve=True)
    threads = num_threads(devices)
    workers = multiprocessing.get_start_method()
    context: Any = multiprocessing.get_context(start_server())
    ranks = Ranks()
    signals.block()  # in the ranks until they can take one, and here until all are started
    try:
        with signals.handled(ranks.receive):
            for number in range(devices):
                here, there = context.Pipe()
                variables = os.environ | environment(number, devices, store.port)
                process = context.Process(
                    target=rank_main,
                    args=(there, number, variables, plain, str(run_dir), list(overrides), why_model,
                          logging_config, threads, workers, finetune.started),
                )  # fmt: skip
                process.start()
                there.close()
                ranks.running.append(Rank(number, process, here))
            signals.unblock()
            end = ranks.wait()
    finally:
        signals.unblock()
        ranks.kill()
    if end is None and not ranks.received:
        return
    if end is None or end.status == "stopped":
        stop = Interrupted(end.signum if end else ranks.received)
        settle(run_dir, "interrupted", f"stopped by {stop}")
        raise stop
    settle(run_dir, "failed", end.error, whatever=end.rank > 0)
    raise RankFailed(end.said)


def settle(run_dir: Path, status: Status, error: str, whatever: bool = False) -> None:
    """Write to run.json how the run ended, where its first rank could not tell, or knew less.

    whatever: it stands there what the first rank saw of the end of another.
    """
    with suppress(FinetuneError, OSError), locked(run_dir):  # there may be no run.json yet
        record = Record.read(run_dir)
        stands = record.facts["status"]
        if stands != "finished" and (whatever or stands != status):
            record.update(status=status, error=error)


class RankFailed(FinetuneError):
    """One of the ranks failed; the message is what it said."""


def rank_main(
    pipe: Connection,
    rank: int,
    variables: dict[str, str],
    plain: dict[str, Any],
    run_dir: str,
    overrides: list[str],
    why_model: str,
    logging_config: dict[str, Any],
    threads: int,
    workers: str,
    started: float,
) -> None:
    """What each rank runs. Signals are blocked until it can take them."""
    # a pipe, and not PR_SET_PDEATHSIG: it is there on every system, and cannot miss a launcher
    # that died before the rank asked for the signal
    threading.Thread(target=die_with_launcher, args=(pipe,), daemon=True).start()
    keep_freed_memory()
    os.environ.clear()  # it may have been forked of a process that was started before some were set
    os.environ.update(variables)
    # of a DataLoader: as in one process. A spawned one would import torch again
    multiprocessing.set_start_method(workers, force=True)
    finetune.started = started
    torch.set_num_threads(threads)  # or the ranks' threads fight over the cores
    logging.config.dictConfig(logging_config)
    if rank > 0:
        logging.getLogger().setLevel(logging.CRITICAL)
    end: End | None = None
    with signals.handled(signals.at_once):
        try:
            signals.unblock()
            fit(OmegaConf.create(plain), Path(run_dir), overrides, why_model, rank)
        except Interrupted as stop:
            end = End(rank, "stopped", stop.signum, stop.together)
        except FinetuneError as error:
            end = End(rank, "failed", said=str(error), error=str(error))
        except Exception as error:  # our bug or the machine's trouble: the traceback is wanted
            said = f"in rank {rank}\n{traceback.format_exc()[-MOST_SAID:]}"
            end = End(rank, "failed", said=said, error=f"{type(error).__name__}: {error}")
        signals.ignore()
        if end is not None:
            pipe.send(end)
    signals.ignore()
    if end is not None:
        signals.exit_now(128 + end.signum if end.signum else 1)


def environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun would set, and Lightning reads."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "finetune",
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the launcher's
    }

"""launcher=slurm: a run as a batch job that SLURM starts again, until it is done.

A script that can be read, and no plugin: those pickle the job, set handlers of their own, and start
a new run when they requeue. Shortly before the time is up SLURM sends SIGUSR1; the run stops with a
checkpoint and exit code 138, and the job asks for another turn, in which it goes on.
"""

import logging
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from finetune.errors import ConfigError
from finetune.files import write_whole
from finetune.record import NAME
from finetune.typed import quoted

log = logging.getLogger(__name__)

SCRIPT = """#!/bin/bash
{options}
cd {here} || exit
if [ -s {record} ]; then
  set -- {resume}
else  # it never began
  set -- {start}
fi
srun --kill-on-bad-exit=1{cpus} {python} {entry} "$@"
code=$?
if [ $code -eq 138 ]; then  # SIGUSR1: the time is nearly up
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""


def submit(cfg: DictConfig, run: Path, overrides: Sequence[str], flags: Sequence[str]) -> None:
    """Write run/job.sh and hand it to sbatch.

    overrides: of the run, without those of the launcher. flags: of the command line, such as
    --config-dir. Raises ConfigError where SLURM is missing or refuses.
    """
    refuse_missing()
    script = run / "job.sh"
    text = job_script(cfg, run, overrides, flags)
    write_whole(script, lambda file: file.write(text.encode()))
    done = subprocess.run(
        ["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise ConfigError(f"launcher=slurm: sbatch refuses {script}: {done.stderr.strip()}")
    job = done.stdout.strip().partition(";")[0]
    log.info("submitted as job %s: squeue --job %s, tail -f %s", job, job, run / "slurm.log")


def refuse_missing() -> None:
    """Raise ConfigError if there is no SLURM here."""
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "launcher=slurm: there is no sbatch here; log in where SLURM is, or leave it out"
        )


def job_script(cfg: DictConfig, run: Path, overrides: Sequence[str], flags: Sequence[str]) -> str:
    """The batch script: the same for the first turn and for each one after a requeue."""
    there = quoted(str(run))
    cpus = cfg.launcher.cpus is not None
    return SCRIPT.format(
        options="\n".join(f"#SBATCH {option}" for option in options(cfg, run)),
        here=shlex.quote(str(Path.cwd())),
        record=shlex.quote(str(run / NAME)),
        resume=shlex.join([*flags, *overrides, f"resume={there}"]),
        start=shlex.join([*flags, *overrides, "launcher=local", f"hydra.run.dir={there}"]),
        cpus=' --cpus-per-task="$SLURM_CPUS_PER_TASK"' if cpus else "",  # srun takes no other's
        python=shlex.quote(sys.executable),
        entry=shlex.join(entry()),
    )


def options(cfg: DictConfig, run: Path) -> list[str]:
    """What sbatch is asked for. One task starts the ranks of its node itself."""
    launcher, nodes = cfg.launcher, int(cfg.trainer.get("num_nodes", 1))
    devices = num_devices(cfg)
    cpu = cfg.trainer.accelerator == "cpu"
    gpus = launcher.gpus if launcher.gpus is not None else 0 if cpu else devices
    chosen = {
        "job-name": "finetune",
        "output": run / "slurm.log",
        "open-mode": "append",
        "signal": f"USR1@{launcher.grace}",
        "nodes": nodes,
        "ntasks-per-node": devices if nodes > 1 else 1,
        "gpus-per-node": gpus or None,
        "cpus-per-task": launcher.cpus,
        "mem": launcher.memory,
        "time": launcher.time,
        "partition": launcher.partition,
        "account": launcher.account,
        "qos": launcher.qos,
    }
    asked = [f"--{key}={value}" for key, value in chosen.items() if value is not None]
    return ["--requeue", *map(shell_quoted, [*asked, *launcher.extra])]


def shell_quoted(option: str) -> str:
    """An option as a line of #SBATCH takes it. Raises ConfigError for what a line cannot hold."""
    if re.search(r"[\n\r\"\\]", option):
        raise ConfigError(f"launcher: {option!r} cannot stand in a batch script")
    key, equals, value = option.partition("=")
    return f'{key}{equals}"{value}"' if re.search(r"[\s'#;]", value) else option


def num_devices(cfg: DictConfig) -> int:
    """Devices of each node, which cannot be counted from here."""
    devices: Any = cfg.trainer.devices
    if OmegaConf.is_list(devices):
        return len(devices)
    if str(devices).isdigit() and int(devices) > 0:
        return int(devices)
    raise ConfigError(
        f"launcher=slurm: trainer.devices={devices} counts what is here, not there; type their "
        "number, such as trainer.devices=4"
    )


def entry() -> list[str]:
    """How this program was started, without its arguments."""
    main = sys.modules["__main__"]
    if main.__spec__ is not None:
        return ["-m", main.__spec__.name]
    return [str(Path(sys.argv[0]).absolute())]

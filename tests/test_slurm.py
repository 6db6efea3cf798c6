"""launcher=slurm, with programs in place of SLURM's that do with the script what SLURM does."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from conftest import SMALL, assert_same_end, composed, facts_of
from finetune import slurm
from finetune.errors import ConfigError
from torture_signals import wait_until

ROOT = Path(__file__).parents[1]

# sbatch: a job that runs here. The step is a process group of its own, and gets the signal
SBATCH = """#!/bin/bash
script="${@: -1}"
echo "$@" >> "$SLURM/sbatch.log"
[[ $(<"$script") == *"--partition=none"* ]] && { echo "invalid partition" >&2; exit 1; }
(
  export SLURM_JOB_ID=7 SLURM_NTASKS=1 SLURM_CPUS_PER_TASK=1 SLURM_RESTART_COUNT=0
  output=$(sed -n 's/^#SBATCH --output=//p' "$script" | tr -d '"')
  until rm -f "$SLURM/requeued"; bash "$script" >> "$output" 2>&1; [ ! -e "$SLURM/requeued" ]; do
    SLURM_RESTART_COUNT=$((SLURM_RESTART_COUNT + 1))
  done
  echo $? $SLURM_RESTART_COUNT > "$SLURM/end"
) > /dev/null 2>&1 &
echo 7
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec setsid --wait bash -c 'echo $$ > "$SLURM/step"; exec "$@"' srun "$@"
"""
SCONTROL = """#!/bin/bash
[ "$*" = "requeue 7" ] && touch "$SLURM/requeued"
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The folder where the programs tell what they did."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM", str(folder))
    return folder


def script_of(*overrides):
    cfg = composed("launcher=slurm", *overrides)
    return slurm.job_script(cfg, Path("/runs/my run"), ["data.root='my photos'", "epochs=2"], [])


def test_the_script_says_what_was_asked_for():
    text = script_of(
        "launcher.time=12:00:00", "launcher.partition=gpu", "launcher.cpus=8", "launcher.gpus=2",
        "launcher.memory=32G", "launcher.grace=60", "launcher.extra=['--constraint=a100']",
    )  # fmt: skip
    asked = [line.removeprefix("#SBATCH ") for line in text.splitlines() if "#SBATCH" in line]
    assert asked == [
        "--requeue", "--job-name=finetune", '--output="/runs/my run/slurm.log"',
        "--open-mode=append", "--signal=USR1@60", "--nodes=1", "--ntasks-per-node=1",
        "--gpus-per-node=2", "--cpus-per-task=8", "--mem=32G", "--time=12:00:00",
        "--partition=gpu", "--constraint=a100",
    ]  # fmt: skip
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("overrides", "asked"),
    [
        (["trainer.devices=4"], ["--ntasks-per-node=1", "--gpus-per-node=4"]),
        (["trainer.devices=4", "trainer.num_nodes=2"], ["--nodes=2", "--ntasks-per-node=4"]),
        (["trainer.devices=[0,1]"], ["--gpus-per-node=2"]),
    ],
)
def test_gpus_and_tasks_follow_from_the_devices(overrides, asked):
    lines = script_of(*overrides).splitlines()
    assert set(asked) <= {line.removeprefix("#SBATCH ") for line in lines}


def test_no_gpu_is_asked_for_without_one():
    assert "gpus" not in script_of("trainer.accelerator=cpu")


@pytest.mark.parametrize(
    ("override", "said"),
    [("trainer.devices=-1", "type their number"), ("launcher.qos='a\"'", "cannot stand in")],
)
def test_what_a_script_cannot_hold_is_refused(override, said):
    with pytest.raises(ConfigError, match=said):
        script_of(override)


def test_without_slurm_there_is_one_error_and_no_run(command, tmp_path):
    refused = command("train", "-m", *SMALL, "seed=0,1", "launcher=slurm", "launcher.time=10")
    assert refused.code == 1
    assert refused.err.count("there is no sbatch here") == 1
    assert "Traceback" not in refused.err
    assert not list(tmp_path.rglob("overrides.yaml"))


def test_what_sbatch_refuses_is_told(command, cluster):
    refused = command("train", *SMALL, "launcher=slurm", "launcher.partition=none")
    assert refused.code == 1
    assert "sbatch refuses" in refused.err
    assert "invalid partition" in refused.err
    assert "Traceback" not in refused.err


def ended(cluster):
    wait_until(lambda: (cluster / "end").exists(), 240)
    return (cluster / "end").read_text().split()


@pytest.mark.slow
def test_a_run_whose_time_is_up_goes_on_in_its_next_turn(command, cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}")
    monkeypatch.setattr(slurm, "entry", lambda: [str(ROOT / "train.py")])
    arguments = [*SMALL, "data.num_images=900", "epochs=3", "logger=csv"]  # 405 steps
    submitted = command("train", *arguments, "launcher=slurm", "hydra.run.dir='my run'")
    assert submitted.code == 0, submitted.err
    assert "submitted as job 7" in submitted.out
    run = tmp_path / "my run"
    wait_until(lambda: any((run / "checkpoints").glob("step-*.ckpt")), 120)
    os.killpg(int((cluster / "step").read_text()), signal.SIGUSR1)
    assert ended(cluster) == ["0", "1"], (run / "slurm.log").read_text()
    said = (run / "slurm.log").read_text()
    assert "stopped by SIGUSR1" in said
    assert said.count("resuming from") == 1
    assert "Traceback" not in said
    assert facts_of(run)["config"]["launcher"] == {}
    assert command("train", *arguments, "hydra.run.dir=whole").code == 0
    assert_same_end(run, tmp_path / "whole")


@pytest.mark.slow
def test_each_job_of_a_sweep_is_submitted_and_can_be_waited_for(
    command, cluster, tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}")
    monkeypatch.setattr(slurm, "entry", lambda: [str(ROOT / "train.py")])
    done = command("train", "-m", *SMALL, "logger=csv", "max_steps=1", "seed=0,1",
                   "launcher=slurm", "hydra.sweep.dir=sweep")  # fmt: skip
    assert done.code == 0, done.err
    assert "0 of 2 jobs done, 2 submitted: sweep/<job>" in done.out
    assert len((cluster / "sbatch.log").read_text().splitlines()) == 2
    records = [tmp_path / "sweep" / n / "run.json" for n in "01"]
    wait_until(lambda: all(r.exists() and '"finished"' in r.read_text() for r in records), 240)
    again = command("train", "-m", "sweep.resume=sweep")
    assert "2 of 2 jobs were done before" in again.out
    assert again.code == 0

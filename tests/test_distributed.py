"""Several ranks: real gloo processes on the CPU, started as users start them."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import assert_same_end, facts_of, metrics_of, same
from finetune import cli, evaluate
from finetune.overrides import CONF
from test_frozen import CASES

pytestmark = pytest.mark.ddp

ROOT = CONF.parent
SMALL = [
    "model.weights=null",
    "trainer=ddp_cpu",
    "batch_size=8",
    "max_steps=6",
    "trainer.log_every_n_steps=1",
]


def train(*arguments: str, entry: str = "train.py") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, entry, *SMALL, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def in_ranks(script: str, folder: Path) -> None:
    """Run a script in a pair of processes that torchrun starts, in a folder of their own."""
    (folder / "script.py").write_text(script)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = [str(ROOT / "src"), str(ROOT / "tests")]
    done = subprocess.run(
        [sys.executable, *launcher, "script.py"],
        cwd=folder, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


# what a rank holds when training ends; and a disk slower than the other rank, which has to wait for
# the best checkpoint before it tests it
SAVING = """
import os, time, torch
import lightning as L
from finetune import build
from finetune.callbacks import checkpoints

def write_best(*arguments):
    time.sleep(2)
    original_write_best(*arguments)

original_write_best, checkpoints.write_best = checkpoints.write_best, write_best

class Save(L.Callback):
    def on_train_end(self, trainer, task):
        path = os.path.join(os.environ["SAVE_TO"], f"rank{trainer.global_rank}.pt")
        torch.save(task.model.state_dict(), path)

original = build.build_trainer
build.build_trainer = lambda cfg, run, budget, callbacks, loggers: original(
    cfg, run, budget, [*callbacks, Save()], loggers
)
if __name__ == "__main__":
    from finetune.train import main
    main()
"""


def test_ranks_end_with_equal_parameters_and_measure_what_one_process_measures(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "saving.py").write_text(SAVING)
    monkeypatch.setenv("SAVE_TO", str(tmp_path))
    run = tmp_path / "run"
    # ridge: each rank computes the head on its own
    done = train(f"hydra.run.dir={run}", "head.init=ridge", entry=str(tmp_path / "saving.py"))
    assert done.returncode == 0, done.stdout + done.stderr

    first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    parameters = [name for name in first if not name.endswith(statistics)]
    assert len(parameters) > 10
    for name in parameters:
        assert torch.equal(first[name], second[name]), name

    facts = json.loads((run / "run.json").read_text())
    assert facts["status"] == "finished"
    assert facts["data"]["counts"] == {"train": 100, "val": 269, "test": 629}  # both odd
    for split in ("val", "test"):
        monkeypatch.setattr(
            sys, "argv", ["evaluate", f"run={run}", f"split={split}", f"output={tmp_path / split}"]
        )
        cli.jobs_done.clear()
        with pytest.raises(SystemExit) as stop:
            evaluate.main()
        assert stop.value.code == 0, capsys.readouterr()
        alone = json.loads((tmp_path / split / "metrics.json").read_text())
        for name, value in facts[split].items():
            assert alone[name] == pytest.approx(value, rel=1e-6, abs=1e-6), (
                name
            )  # sums in another order


# what a rank holds after the last validation, and how it mixed
AVERAGING = """
import os, torch
import lightning as L
from finetune import build
from finetune.ema import EMA
from finetune.tasks import base

class Save(L.Callback):
    def on_validation_end(self, trainer, task):
        (ema,) = (c for c in trainer.callbacks if isinstance(c, EMA))
        path = os.path.join(os.environ["SAVE_TO"], f"rank{trainer.global_rank}.pt")
        torch.save([task.model.state_dict(), ema.average, targets], path)

def mix(*arguments):
    mixed = original_mix(*arguments)
    targets.append(mixed[1])
    return mixed

targets = []
original_mix, base.mix = base.mix, mix
original = build.build_trainer
build.build_trainer = lambda cfg, run, budget, callbacks, loggers: original(
    cfg, run, budget, [*callbacks, Save()], loggers
)
if __name__ == "__main__":
    from finetune.train import main
    main()
"""


def test_ranks_mix_differently_and_end_with_equal_weights_and_averages(tmp_path, monkeypatch):
    (tmp_path / "averaging.py").write_text(AVERAGING)
    monkeypatch.setenv("SAVE_TO", str(tmp_path))
    # every second of 27 epochs is validated, and then the last one by itself, without DDP
    done = train(
        "data=fake", "data.num_classes=3", "data.num_images=30", "data.image_size=8", "model=tiny",
        "epochs=27", "max_steps=null", "mixup=0.4", "cutmix=1", "ema=0.9", "l2_sp=0.1",
        "trainer.gradient_clip_val=0.5", "task.label_smoothing=0.1",
        f"hydra.run.dir={tmp_path / 'run'}", entry=str(tmp_path / "averaging.py"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (first, average, targets), (second, other_average, other_targets) = (
        torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1)
    )
    assert all(torch.equal(first[n], second[n]) for n in first if "running" not in n)
    assert all(torch.equal(average[n], other_average[n]) for n in average)
    assert len(targets) == len(other_targets) == 27
    weights = [[float(t.max(1).values.min()) for t in of] for of in (targets, other_targets)]
    differ = [mine != other for mine, other in zip(*weights, strict=True)]
    assert sum(differ) > 20  # some boxes are of one area


# every strategy in one pair of processes: to start them takes longer than the training
FROZEN = """
import os, pathlib, torch
from conftest import layer_of
from test_frozen import CASES, Watch, fit

for number, case in enumerate(CASES):
    watch = Watch()
    task = fit((*case, "epochs=2", "trainer=ddp_cpu"), pathlib.Path.cwd(), watch)
    layers = range(task.model.depth + 1)
    never = {l for l in layers if not any(task.lr_scale(l, epoch) for epoch in range(2))}
    frozen = [name for name in watch.states[0] if layer_of(task, name) in never]
    path = f"case{number}-rank{task.global_rank}.pt"
    torch.save({"start": watch.states[0], "end": watch.states[-1], "frozen": frozen}, path)
"""


@pytest.mark.slow
def test_under_every_strategy_both_ranks_end_equal_and_frozen_layers_as_they_were(tmp_path):
    in_ranks(FROZEN, tmp_path)
    for number, case in enumerate(CASES):
        first, second = (
            torch.load(tmp_path / f"case{number}-rank{rank}.pt", weights_only=True)
            for rank in (0, 1)
        )
        assert same(first, second), case
        for name in first["frozen"]:
            assert torch.equal(first["start"][name], first["end"][name]), (case, name)
        assert bool(first["frozen"]) == any(
            word in " ".join(case) for word in ("linear_probe", "freeze_until", "gradual")
        )
        assert not torch.equal(first["start"]["head.weight"], first["end"]["head.weight"])


# what a rank finds in its environment
TELLING = """
import os
from pathlib import Path
from finetune.tasks.base import Task

def tell(task):
    Path(os.environ["SAVE_TO"], f"{os.environ['OF_THE_JOB']}-{task.global_rank}").touch()

Task.on_train_start = tell
if __name__ == "__main__":
    from finetune.train import main
    main()
"""


def test_a_sweep_over_several_ranks_gives_each_job_its_own_overrides_and_one_directory(
    tmp_path, monkeypatch
):
    (tmp_path / "telling.py").write_text(TELLING)
    monkeypatch.setenv("SAVE_TO", str(tmp_path))
    done = train(
        "-m", "optimizer.lr=0.01,0.002", "schedule=constant",
        "+hydra.job.env_set.OF_THE_JOB='job${hydra:job.num}'",
        f"hydra.sweep.dir={tmp_path / 'jobs'}", entry=str(tmp_path / "telling.py"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = {path.name: path for path in (tmp_path / "jobs").iterdir() if path.is_dir()}
    assert sorted(jobs) == ["0", "1"]
    for job, lr in (("0", 0.01), ("1", 0.002)):
        facts = facts_of(jobs[job])
        assert (facts["status"], facts["config"]["optimizer"]["lr"]) == ("finished", lr)
        rows = csv.DictReader((jobs[job] / "metrics.csv").read_text().splitlines())
        rates = {float(row["value"]) for row in rows if row["metric"] == "lr/head"}
        assert rates == {lr}
        # the process that they are forked of knows no job
        assert all((tmp_path / f"job{job}-{rank}").exists() for rank in (0, 1))


def test_a_mistake_that_only_the_ranks_find_is_one_message(tmp_path):
    (tmp_path / "photos").mkdir()
    done = train(
        "data=image_folder", f"data.root={tmp_path / 'photos'}", f"hydra.run.dir={tmp_path}/run"
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert str(tmp_path / "photos") in done.stderr
    assert done.stderr.count("error:") == 1
    assert json.loads(Path(tmp_path / "run" / "run.json").read_text())["status"] == "failed"


# Lightning starts FSDP on GPUs alone; torch shards on the CPU as well
SHARDED = """
import os, time
from pathlib import Path
import torch
from lightning.pytorch.strategies import FSDPStrategy, StrategyRegistry
from torch.distributed.fsdp import FullyShardedDataParallel
from conftest import SMALL, composed
from finetune.callbacks.checkpoints import StepCheckpoints
from finetune.fit import fit

class OnCPU(FSDPStrategy):
    def _setup_model(self, model):
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)

def lose_power(self, trainer, task, optimizer):
    assert task.model.head.weight.ndim == 1  # this rank's part of it, flattened
    if trainer.global_step == 7:
        raise RuntimeError("the power is gone")

def run(name, *more):
    cfg = composed(*SMALL, *how, "trainer=ddp_cpu", *more)
    rank = int(os.environ["RANK"])
    if name == "ddp0" and rank == 0:
        time.sleep(8)  # the other is there before the directory is made
    fit(cfg, Path(name), [], "tiny", rank)

StrategyRegistry.register("fsdp_on_cpu", OnCPU)
for number, how in enumerate(HOWS):
    run(f"ddp{number}")
    sharded = "trainer.strategy=fsdp_on_cpu"
    run(f"fsdp{number}", sharded)
    StepCheckpoints.on_before_optimizer_step = lose_power
    try:
        run(f"resumed{number}", sharded)
    except RuntimeError:
        pass
    del StepCheckpoints.on_before_optimizer_step
    run(f"resumed{number}", sharded, f"resume=resumed{number}")
"""
# not AdamW: on the CPU torch gathers both of its states into one buffer
HOWS = [
    ["strategy=lp_ft", "strategy@strategy.then=layer_decay", "trainer.gradient_clip_val=0.1"],
    ["strategy=gradual_unfreeze", "optimizer.weight_decay=0.1", "freeze_until=1"],
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("frozen", "num_splits"),
    [("strategy=linear_probe", 3), ("freeze_until=2", 2)],  # test too, and without
)
def test_ranks_share_the_work_of_features_and_later_runs_find_them(tmp_path, frozen, num_splits):
    few = ["data.shots=4", "epochs=2"]  # of 3 steps each
    probe = [frozen, *few, "augment=none", f"features.dir={tmp_path / 'features'}"]
    done = train(*probe, f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len([*(tmp_path / "features").iterdir()]) == num_splits
    again = train(*probe, f"hydra.run.dir={tmp_path / 'again'}")
    assert_same_end(tmp_path / "again", tmp_path / "run")
    assert again.stdout.count("values each, found") == num_splits
    alone = train(*probe, "trainer=default", f"hydra.run.dir={tmp_path / 'alone'}")
    # the same digests: none of them tells of ranks
    assert alone.stdout.count("values each, found") == num_splits, alone.stdout + alone.stderr


@pytest.mark.slow
def test_fsdp_trains_as_ddp_does_and_resumes(tmp_path):
    how = ["epochs=4", "checkpoint.every_n_steps=5"]  # of 3 steps each
    hows = f"HOWS = {[[*more, *how] for more in HOWS]}"
    in_ranks(hows + SHARDED, tmp_path)
    for number in range(len(HOWS)):
        ddp, fsdp, resumed = (tmp_path / f"{name}{number}" for name in ("ddp", "fsdp", "resumed"))
        assert facts_of(fsdp)["config"]["trainer"]["strategy"] == "fsdp_on_cpu"
        assert_same_end(resumed, fsdp)
        of_ddp, of_fsdp = (
            {(step, name): value for step, name, value in metrics_of(run)} for run in (ddp, fsdp)
        )
        assert of_ddp.keys() == of_fsdp.keys()
        for where, value in of_ddp.items():
            if not where[1].startswith("time/"):
                assert of_fsdp[where] == pytest.approx(value, rel=1e-4, abs=1e-5), where

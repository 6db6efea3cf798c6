"""A user's mistake is one message that says what to do, exit code 1, and no traceback."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conftest import SMALL, facts_of, write_photos
from finetune.machine import usable_cores

MODEL = [o for o in SMALL if not o.startswith("data")]


@pytest.fixture
def refused(command):
    """refused("train", ...): what the user is told."""

    def run(name, *arguments):
        done = command(name, *arguments)
        assert done.code == 1, (done.out, done.err)
        assert done.err.startswith("error: ")
        assert done.err.count("error: ") == 1
        assert "Traceback" not in done.out + done.err
        return done.err

    return run


# found from the command line alone; test_overrides.py and test_check.py hold every case
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model=resnet51"], "no such option in conf/model/; close: resnet50"),
        (["epoch=3"], "epoch: no such key; close: epochs"),
        (["epochs=-1"], "epochs=-1: must be a whole number from 1"),
        (["model.input_size=big"], "must be a whole number or null"),
        (["monitor=val/acc"], "monitor=val/acc: must be one of val/accuracy"),
        (["data=image_folder"], "data.root has no value; type data.root=..."),
        (["trainer.accelerator=cpu", f"trainer.devices={usable_cores() + 1}"], "CPU cores here"),
        (["data.fraction=0.1"], "both limit train; type data.shots=null too"),
        (["model=run", "model.path=nowhere"], "model.path=nowhere is no run directory"),
        (["resume="], "resume= has no value (a shell variable that is not set?)"),
        (["resume=5"], "5: no such run directory"),
        (["optimizer=null"], "one must be chosen"),
        (["model.weights=${nowhere}"], "nowhere"),
        (["-m", "--cfg", "job"], "--multirun and --cfg do not go together"),
        (["--cfg", "job", "epcoh=3"], "epcoh: no such key; close: epochs"),
        (["--config-name", "x"], "see --help"),
        (["--hydra.run.dir=x"], "--hydra.run.dir=x: not understood"),
    ],
)
def test_what_was_typed_cannot_work(refused, tmp_path, arguments, said):
    assert said in refused("train", *arguments)
    assert list(tmp_path.iterdir()) == []  # not even a run directory


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data=image_folder", "data.root=nowhere"], "nowhere"),
        (["data=image_folder", "data.root=empty"], "expected <root>/"),
        (["data=csv", "data.table=none.csv"], "none.csv"),
        (["data=fake", "data.num_images=3"], "5 images of each"),
    ],
)
def test_data_that_is_not_there(refused, tmp_path, overrides, said):
    (tmp_path / "empty").mkdir()
    assert said in refused("train", *MODEL, *overrides, "hydra.run.dir=run")
    facts = facts_of(tmp_path / "run")
    assert facts["status"] == "failed"
    assert said in facts["error"]


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("evaluate", ["run=5"], "5: no such run directory"),
        ("evaluate", ["run=null"], "run=null: must be a path"),
        ("evaluate", ["run=x", "-m"], "finetune.evaluate takes one run at a time"),
        ("predict", ["run=5", "input=5", "output=5"], "5: no such run directory"),
        (
            "predict",
            ["run=x", "input=y", "accelerator=gup"],
            "accelerator=gup: must be auto",
        ),
    ],
)
def test_what_was_typed_for_a_run_cannot_work(refused, name, arguments, said):
    assert said in refused(name, *arguments)


def test_a_sweep_does_not_overwrite_what_the_runs_there_were_started_with(refused, tmp_path):
    run = tmp_path / "sweep" / "1"
    (run / ".hydra").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (run / ".hydra" / "overrides.yaml").write_text("- seed=1\n")
    message = refused("train", "-m", *SMALL, "seed=5,6", "hydra.sweep.dir=sweep")
    assert "sweep/1 already holds a run. To go on with it, type resume=sweep/1; " in message
    assert "in a sweep hydra.sweep.dir" in message
    assert (run / ".hydra" / "overrides.yaml").read_text() == "- seed=1\n"
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["1"]


def test_a_sweep_directory_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("")
    message = refused("train", "-m", *SMALL, "seed=5,6", "hydra.sweep.dir=file/sweep")
    assert "hydra.sweep.dir: " in message
    assert "cannot be written: Not a directory" in message


def test_a_key_that_the_data_of_the_run_lack(refused, trained):
    message = refused("evaluate", f"run={trained}", "data.table=labels.csv")
    assert "data.table: the run has data=image_folder, which has no such key" in message


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("epochs=5", "schedule=cosine would have set other learning rates"),
        ("epcohs=5", "epcohs: no such key; close: epochs"),
        ("epochs=-1", "epochs=-1: must be a whole number from 1"),
    ],
)
def test_a_finished_run_is_not_trained_longer(refused, tmp_path, trained, typed, said):
    run = shutil.copytree(trained, tmp_path / "my run")
    message = refused("train", f"resume={run}", typed)
    assert said in message
    if typed == "epochs=5":
        assert f"model=run \"model.path='{run}'\"" in message
    assert facts_of(run) == facts_of(trained)


def test_a_finished_run_with_the_same_values_is_done(command, tmp_path, trained):
    run = shutil.copytree(trained, tmp_path / "run")
    done = command("train", f"resume={run}", "epochs=3", "num_workers=1")
    assert (done.code, done.err) == (0, "")
    assert "is finished already; nothing to do" in done.out


def test_one_class_only(refused, tmp_path):
    root = write_photos(tmp_path / "photos")
    for folder in root.glob("*/[bc]*"):
        folder.rename(tmp_path / f"{folder.parent.name}{folder.name}")
    message = refused("train", *MODEL, "data=image_folder", f"data.root={root}")
    assert "one class folder only, 'ant'" in message


def test_a_class_in_val_that_train_lacks(refused, tmp_path):
    root = write_photos(tmp_path / "photos")
    (root / "train" / "bee").rename(tmp_path / "bee")
    message = refused("train", *MODEL, "data=image_folder", f"data.root={root}")
    assert "'bee'" in message
    assert "val" in message


def test_an_unknown_name_of_weights(refused):
    message = refused("train", "data=fake", "model=resnet18", "model.weights=IMAGENET")
    assert "IMAGENET1K_V1" in message
    assert "resnet18" in message


def test_an_unknown_name_of_a_model(refused):
    message = refused("train", "data=fake", "model=torchvision", "model.name=resnet17")
    assert "resnet17" in message
    assert "resnet18" in message


def test_weights_that_do_not_fit_show_both_sides(refused, tmp_path):
    save_file({f"other.layer{i}": torch.zeros(2) for i in range(5)}, tmp_path / "w.safetensors")
    overrides = [o for o in SMALL if not o.startswith("model.weights")]
    message = refused("train", *overrides, "model.weights=w.safetensors")
    assert "stem.0.weight" in message
    assert "other.layer0, other.layer1, other.layer2" in message


@pytest.mark.parametrize("name", ["evaluate", "predict"])
@pytest.mark.parametrize("run", ["nowhere", "folder"])
def test_a_path_that_is_no_run(refused, tmp_path, name, run):
    (tmp_path / "folder").mkdir()
    message = refused(name, f"run={run}", *(["input=x.jpg"] if name == "predict" else []))
    assert run in message
    assert "run directory" in message


def test_an_input_that_is_not_there_or_holds_no_image(refused, tmp_path, trained):
    assert "input=nowhere: no such" in refused("predict", f"run={trained}", "input=nowhere")
    (tmp_path / "folder").mkdir()
    assert "no images" in refused("predict", f"run={trained}", "input=folder")


def test_a_damaged_checkpoint_of_a_run(refused, tmp_path, trained):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "run.json").write_text((trained / "run.json").read_text())
    assert "resume=run" in refused("predict", "run=run", "input=x.jpg")  # no best.ckpt yet
    half = (trained / "checkpoints" / "best.ckpt").read_bytes()[:5000]
    (run / "checkpoints" / "best.ckpt").write_bytes(half)
    assert "best.ckpt cannot be read" in refused("predict", "run=run", "input=x.jpg")


def test_an_output_that_cannot_be_written(refused, tmp_path, trained):
    (tmp_path / "file").write_text("")
    photo = trained.parent / "photos" / "test" / "ant" / "0.png"
    message = refused("predict", f"run={trained}", f"input={photo}", "output=file/p.csv")
    assert "output: file/p.csv cannot be written" in message
    message = refused("evaluate", f"run={trained}", "output=file", "trainer.accelerator=cpu")
    assert "output: file/metrics.json cannot be written" in message


def test_an_output_is_tried_before_the_work_is_done(refused, tmp_path, trained, monkeypatch):
    def work(*arguments, **options):
        raise AssertionError("the work began")

    monkeypatch.setattr("finetune.build.build_splits", work)
    monkeypatch.setattr("torch.utils.data.DataLoader", work)
    (tmp_path / "file").write_text("")
    photos = trained.parent / "photos"
    refused("predict", f"run={trained}", f"input={photos}", "output=file/p.csv")
    refused("evaluate", f"run={trained}", "output=file", "trainer.accelerator=cpu")


def test_a_run_directory_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("")
    message = refused("train", *SMALL, "hydra.run.dir=file/run")
    assert "file/run" in message
    assert "cannot be written" in message


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_run_directory_without_permission(refused, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "cannot be written" in refused("train", *SMALL, "hydra.run.dir=locked/run")


def test_an_extra_that_is_not_installed(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    message = refused("train", *SMALL, "logger=wandb", "logger.offline=true")
    assert 'pip install -e ".[wandb]"' in message


def test_a_failing_job_of_a_sweep_does_not_stop_the_others(command, tmp_path):
    done = command(
        "train", "-m", *SMALL, "epochs=1", "logger=csv", "model.input_size=8,3,16",
        "hydra.sweep.dir=sweep",
    )  # fmt: skip
    assert done.code == 1
    assert "2 of 3 jobs done" in done.out
    assert "model.input_size=3" in done.err
    assert "Traceback" not in done.err
    statuses = [facts_of(tmp_path / "sweep" / str(i))["status"] for i in range(3)]
    assert statuses == ["finished", "failed", "finished"]


def test_a_bug_shows_its_traceback_and_the_run_says_failed(command, tmp_path, monkeypatch):
    def explode(self, batch, batch_idx):
        raise ZeroDivisionError("our own fault")

    monkeypatch.setattr("finetune.tasks.classification.Classification.training_step", explode)
    done = command("train", *SMALL, "hydra.run.dir=run")
    assert done.code == 1
    assert "Traceback" in done.err
    facts = facts_of(tmp_path / "run")
    assert (facts["status"], facts["error"]) == ("failed", "ZeroDivisionError: our own fault")


def test_a_mistake_in_a_real_process_is_one_message(tmp_path):
    done = subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "train.py", "model=resnet51", "epochz=3"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[0] == "error: 2 mistakes in what was typed"
    assert len(done.stderr.splitlines()) == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_image_is_named_whoever_reads_it(refused, tmp_path, num_workers):
    root = write_photos(tmp_path / "photos")
    damaged = root / "train" / "bee" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    message = refused(
        "train", *MODEL, "data=image_folder", f"data.root={root}", f"num_workers={num_workers}",
        "hydra.run.dir=run", "logger=csv",
    )  # fmt: skip
    assert len(message.splitlines()) == 1
    assert str(damaged) in message
    assert facts_of(tmp_path / "run")["error"] == message.removeprefix("error: ").rstrip()


def test_top5_of_three_classes_is_refused_before_the_training(refused, tmp_path):
    message = refused("train", *SMALL, "monitor=val/top5", "hydra.run.dir=run")
    assert "monitor=val/top5: not measured with 3 classes; there are val/accuracy" in message
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_a_batch_of_one_image_is_refused_where_batchnorm_trains(refused, command):
    message = refused("train", *SMALL, "batch_size=1")
    assert "batch_size=1: the BatchNorm of this network" in message
    probe = ("strategy=linear_probe", "max_steps=2", "logger=csv")
    assert command("train", *SMALL, "batch_size=1", *probe).code == 0

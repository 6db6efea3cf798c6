"""A run that was stopped and taken up again ends as if nothing had happened."""

import json
import shutil
import signal
import threading

import pytest

from conftest import (
    SMALL,
    assert_same_end,
    composed,
    facts_of,
    finish,
    lose,
    same,
    series,
    write_photos,
)
from finetune import build, checkpoint, fit
from finetune.data.digest import digest
from finetune.datamodule import DataModule
from finetune.tasks.classification import Classification

# 15 steps, 5 of an epoch
RUN = (*SMALL, "epochs=3", "augment=strong", "logger=csv")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """RUN without interruption; not to be changed."""
    return finish(tmp_path_factory.mktemp("whole") / "run", *RUN)


def terminate():
    signal.raise_signal(signal.SIGTERM)


def newest(run):
    """The state that the training ended with."""
    path = checkpoint.step_paths(run)[0]
    return path, path.read_bytes()


def test_a_run_stopped_again_and_again_ends_with_the_same_bytes(command, tmp_path, at_step, whole):
    run = tmp_path / "my run"
    arguments = [*RUN, "hydra.run.dir='my run'"]
    for step in (1, 4, 5, 8):  # 4: the last of an epoch
        at_step(step, terminate)
        stopped = command("train", *arguments)
        assert stopped.code == 143, stopped.err
        assert "To go on: python train.py \"resume='my run'\"" in stopped.out
        assert facts_of(run)["status"] == "interrupted"
        assert "SIGTERM" in facts_of(run)["error"]
        arguments = ["resume='my run'"]
    resumed = command("train", *arguments)
    assert resumed.code == 0, resumed.err
    assert_same_end(run, whole)


@pytest.mark.parametrize(
    "changes",
    [
        ("trainer.accumulate_grad_batches=2", "checkpoint.every_n_steps=1"),
        ("checkpoint.every_n_steps=3", "num_workers=2"),
        ("checkpoint.every_n_steps=1", "patience=1", "strategy=linear_probe"),
        ("checkpoint.every_n_steps=100", "max_steps=13", "optimizer=adamw"),
        ("checkpoint.every_n_steps=2", "max_steps=9"),
        ("checkpoint.every_n_steps=3", "mixup=0.4", "l2_sp=0.1", "ema=0.9", "augment=randaugment"),
        ("checkpoint.every_n_steps=1", "trainer.accumulate_grad_batches=2", "mixup=0.4",
         "cutmix=1.0", "task.label_smoothing=0.1", "l2_sp=0.1", "ema=0.9",
         "trainer.gradient_clip_val=0.5", "trainer.precision=bf16-mixed"),
        ("checkpoint.every_n_steps=3", "head.init=ridge", "head.dropout=0.2"),
        ("checkpoint.every_n_steps=3", "recipe=auto"),
        ("checkpoint.every_n_steps=3", "channels_last=true", "ema=0.9", "l2_sp=0.1"),
        ("checkpoint.every_n_steps=1", "trainer.val_check_interval=2"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_run_that_crashed_ends_with_the_same_bytes(command, tmp_path, at_step, changes):
    assert command("train", *RUN, *changes, "hydra.run.dir=whole").code == 0
    at_step(7, lose)
    crashed = command("train", *RUN, *changes, "hydra.run.dir=run")
    assert crashed.code == 1
    assert "the power is gone" in facts_of(tmp_path / "run")["error"]
    resumed = command("train", "resume=run", "num_workers=0")
    assert resumed.code == 0, resumed.err
    assert "resuming from" in resumed.out
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_workers_that_read_on_change_nothing(command, tmp_path, at_step, monkeypatch, whole):
    def as_on_a_gpu(*args, **kwargs):
        return DataModule(*args, **{**kwargs, "for_gpu": True})

    monkeypatch.setattr(build, "DataModule", as_on_a_gpu)
    at_step(7, terminate)
    arguments = [*RUN, "num_workers=2", "checkpoint.every_n_steps=3", "hydra.run.dir=run"]
    assert command("train", *arguments).code == 143
    resumed = command("train", "resume=run")
    assert resumed.code == 0, resumed.err
    assert_same_end(tmp_path / "run", whole)


@pytest.mark.parametrize("changes", [("patience=1", "epochs=6"), ("max_steps=8",)])
def test_a_run_lost_before_its_test_does_not_train_again(command, tmp_path, monkeypatch, changes):
    assert command("train", *RUN, *changes, "hydra.run.dir=whole").code == 0
    with monkeypatch.context() as patch:
        patch.setattr(Classification, "on_test_start", lambda task: lose())
        assert command("train", *RUN, *changes, "hydra.run.dir=run").code == 1
    trained = newest(tmp_path / "run")
    assert command("train", "resume=run").code == 0
    assert newest(tmp_path / "run") == trained
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_resume_starts_from_the_newest_checkpoint_that_can_be_read(
    command, tmp_path, at_step, whole
):
    at_step(12, lose)
    command("train", *RUN, "hydra.run.dir=run")
    last, earlier = checkpoint.step_paths(tmp_path / "run")
    last.write_bytes(last.read_bytes()[:1000])
    resumed = command("train", "resume=run")
    assert f"{last.name} is passed over" in resumed.out
    assert f"resuming from {earlier}" in resumed.out
    assert_same_end(tmp_path / "run", whole)


def test_a_run_lost_before_its_first_checkpoint_starts_anew_and_says_so(
    command, tmp_path, at_step, whole
):
    at_step(2, lose)
    command("train", *RUN, "hydra.run.dir=run")
    resumed = command("train", "resume=run")
    assert "no checkpoint to resume from; starting from step 0" in resumed.out
    assert_same_end(tmp_path / "run", whole)


def files_of(run):
    return {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_resume_of_a_finished_run_says_so_and_changes_nothing(command, tmp_path):
    assert command("train", *RUN, "epochs=1", "hydra.run.dir=run").code == 0
    before = files_of(tmp_path / "run")
    again = command("train", "resume=run")
    assert again.code == 0
    assert "finished already" in again.out
    assert files_of(tmp_path / "run") == before


def test_a_second_start_in_a_run_directory_is_refused(command, tmp_path):
    assert command("train", *RUN, "epochs=1", "hydra.run.dir=run").code == 0
    before = files_of(tmp_path / "run")
    again = command("train", *RUN, "epochs=1", "seed=1", "hydra.run.dir=run")
    assert again.code == 1
    assert "already holds a run" in again.err
    assert "resume=" in again.err
    assert "Traceback" not in again.err
    assert files_of(tmp_path / "run") == before


def test_resume_with_another_value_is_refused_by_name(command, tmp_path, at_step):
    at_step(7, lose)
    command("train", *RUN, "hydra.run.dir=run")
    before = facts_of(tmp_path / "run")
    refused = command("train", "resume=run", "optimizer.lr=0.5", "batch_size=3", "patience=2")
    assert refused.code == 1
    assert "optimizer.lr: the run has 0.01, not 0.5" in refused.err
    assert "batch_size: the run has 4, not 3" in refused.err
    assert "patience: the run has null, not 2" in refused.err
    assert "Traceback" not in refused.err
    # it can still be resumed, as what it was
    assert facts_of(tmp_path / "run")["config"] == before["config"]
    assert command("train", "resume=run", "checkpoint.every_n_steps=50").code == 0


def test_resume_keeps_what_the_run_was_started_with(command, tmp_path, at_step):
    at_step(7, lose)
    command("train", *RUN, "hydra.run.dir=run")
    hydra = files_of(tmp_path / "run" / ".hydra")
    assert command("train", "resume=run").code == 0
    assert files_of(tmp_path / "run" / ".hydra") == hydra
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("path", ["nowhere", "."], ids=["missing", "another folder"])
def test_resume_of_what_is_no_run_says_so(command, path):
    refused = command("train", f"resume={path}")
    assert refused.code == 1
    assert "no such run directory" in refused.err or "is no run directory" in refused.err
    assert "Traceback" not in refused.err


def test_a_recorded_target_is_never_called(command, tmp_path, at_step):
    at_step(2, lose)
    command("train", *RUN, "hydra.run.dir=run")
    recorded = tmp_path / "run" / ".hydra" / "overrides.yaml"
    recorded.write_text(recorded.read_text() + "- +strategy._target_=os.abort\n")
    refused = command("train", "resume=run")
    assert refused.code == 1
    assert "which is refused" in refused.err


def test_nothing_of_hydra_is_taken_from_a_run_directory(command, tmp_path, at_step):
    at_step(2, lose)
    command("train", *RUN, "hydra.run.dir=run")
    recorded = tmp_path / "run" / ".hydra" / "overrides.yaml"
    recorded.write_text(recorded.read_text() + "- hydra.searchpath=[elsewhere]\n")
    assert "hydra.searchpath=[elsewhere]" in command("train", "resume=run").err


def test_the_code_of_your_own_network_is_asked_for_again(command, tmp_path, at_step):
    mine = ("model=module", "model.target=nets.Cnn", "model.input_size=8")
    arguments = [o for o in RUN if not o.startswith("model")]
    at_step(7, lose)
    assert command("train", *arguments, *mine, "hydra.run.dir=run").code == 1
    refused = command("train", "resume=run")
    assert refused.code == 1
    assert "if you trust it, type that too: model.target=nets.Cnn" in refused.err
    other = command("train", "resume=run", "model.target=nets.Swin")
    assert "model.target: the run has nets.Cnn, not nets.Swin" in other.err
    assert command("train", "resume=run", "model.target=nets.Cnn").code == 0


PHOTOS = [o for o in RUN if not o.startswith("data")]


def test_the_same_images_may_lie_elsewhere_and_no_others(command, tmp_path, at_step):
    photos = write_photos(tmp_path / "photos")
    at_step(7, lose)
    arguments = [*PHOTOS, "data=image_folder", f"data.root={photos}", "hydra.run.dir=run"]
    assert command("train", *arguments).code == 1
    moved = tmp_path / "moved"
    photos.rename(moved)
    other = shutil.copytree(moved, tmp_path / "other")
    (other / "train/ant/0.png").write_bytes((other / "train/bee/0.png").read_bytes() + b"more")
    refused = command("train", "resume=run", f"data.root={other}")
    assert refused.code == 1
    assert "train: 18 images then, 18 now, and not the same files and labels" in refused.err
    assert "val:" not in refused.err
    (moved / "val/ant").rename(moved / "val/hidden")
    (moved / "val/hidden").rename(moved / "val/ant")
    assert command("train", "resume=run", f"data.root={moved}").code == 0


def test_a_run_goes_on_for_more_epochs_where_the_lr_so_far_would_be_the_same(command, tmp_path):
    """It then is the run that had all of them in view from the start."""
    how = (*RUN, "schedule=constant", "schedule.warmup=0")
    assert command("train", *how, "hydra.run.dir=whole").code == 0
    assert command("train", *how, "epochs=2", "hydra.run.dir=run").code == 0
    longer = command("train", "resume=run", "epochs=3")
    assert longer.code == 0, longer.err
    assert "epochs=3 instead of 2: 15 steps instead of 10" in longer.out
    run, whole = tmp_path / "run", tmp_path / "whole"
    mine, other = (checkpoint.load(checkpoint.step_paths(folder)[0]) for folder in (run, whole))
    assert mine["global_step"] == 15
    assert same(mine["state_dict"], other["state_dict"])
    assert same(mine["optimizer_states"], other["optimizer_states"])
    assert series(run, "train/loss") == series(whole, "train/loss")
    assert series(run, "val/loss") == series(whole, "val/loss")
    assert facts_of(run)["config"]["epochs"] == 3
    assert "finished already" in command("train", "resume=run").out


@pytest.mark.parametrize(
    ("how", "named"),
    [("schedule=cosine", "schedule=cosine"), ("strategy=gradual_unfreeze", "gradualunfreeze")],
)
def test_more_epochs_are_refused_where_the_steps_so_far_had_been_others(command, how, named):
    assert command("train", *RUN, how, "epochs=2", "hydra.run.dir=run").code == 0
    refused = command("train", "resume=run", "epochs=30")
    assert refused.code == 1
    assert named in refused.err
    assert "would have set other learning rates in the 10 steps that are done" in refused.err
    fewer = command("train", "resume=run", "epochs=1")
    assert "epochs: the run has 2, not 1" in fewer.err


def test_a_recipe_that_chooses_otherwise_by_now_is_told(command, tmp_path, at_step):
    at_step(7, lose)
    command("train", *RUN, "recipe=auto", "optimizer=auto", "hydra.run.dir=run")
    record = tmp_path / "run" / "run.json"
    facts = json.loads(record.read_text())
    chosen = facts["config"]["optimizer"]["lr"]
    facts["config"]["optimizer"]["lr"] = 0.123
    record.write_text(json.dumps(facts))
    refused = command("train", "resume=run")
    assert f"optimizer.lr: the run has 0.123, not {chosen}" in refused.err


def test_a_run_of_a_version_with_fewer_keys_goes_on_where_they_are_off(command, tmp_path, at_step):
    at_step(7, lose)
    command("train", *RUN, "hydra.run.dir=run")
    facts = facts_of(tmp_path / "run")
    del facts["config"]["compile"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(facts))
    refused = command("train", "resume=run", "compile=true")
    assert refused.code == 1
    assert "begun by a version without compile" in refused.err
    assert command("train", "resume=run").code == 0


def test_another_version_is_told(command, tmp_path, at_step):
    at_step(7, lose)
    command("train", *RUN, "hydra.run.dir=run")
    record = tmp_path / "run" / "run.json"
    record.write_text(record.read_text().replace('"python": "3', '"python": "2'))
    done = command("train", "resume=run")
    assert done.code == 0
    assert "will not end with the very bytes" in done.out
    assert "python 2" in done.out


def test_a_longer_run_that_is_stopped_goes_on_as_the_longer_one(command, tmp_path, at_step):
    how = (*RUN, "schedule=constant", "schedule.warmup=0", "epochs=2", "hydra.run.dir=run")
    assert command("train", *how).code == 0
    at_step(12, lose)
    assert command("train", "resume=run", "epochs=3").code == 1
    done = command("train", "resume=run")
    assert done.code == 0, done.err
    assert checkpoint.load(checkpoint.step_paths(tmp_path / "run")[0])["global_step"] == 15


@pytest.mark.parametrize("said", ["+model@strategy=module", "model@head=module"])
def test_no_option_of_a_run_directory_stands_where_another_belongs(
    command, tmp_path, at_step, said
):
    """Then its target would be imported: model.target has another name there."""
    at_step(2, lose)
    command("train", *RUN, "hydra.run.dir=run")
    recorded = tmp_path / "run" / ".hydra" / "overrides.yaml"
    recorded.write_text(recorded.read_text() + f"- {said}\n")
    assert f"which is refused: {said}" in command("train", "resume=run").err


@pytest.mark.parametrize("text", ["", "[]", '{"status": "running"}'], ids=["empty", "list", "bare"])
def test_a_record_without_a_run_is_none(command, tmp_path, at_step, text):
    at_step(2, lose)
    command("train", *RUN, "hydra.run.dir=run")
    (tmp_path / "run" / "run.json").write_text(text)
    done = command("train", "resume=run")
    assert "Traceback" not in done.err
    if text:
        assert "run.json holds no run" in done.err
    else:  # killed while it was made
        assert done.code == 0
        assert facts_of(tmp_path / "run")["status"] == "finished"


def test_what_the_images_are_is_found_beside_the_training(command, tmp_path, at_step, monkeypatch):
    trains, waited = threading.Event(), []

    def slow(images):
        waited.append(trains.wait(timeout=60))
        return digest(images)

    monkeypatch.setattr(fit, "digest", slow)
    at_step(2, trains.set)
    assert command("train", *RUN, "epochs=1", "hydra.run.dir=run").code == 0
    assert waited
    assert all(waited)
    found = facts_of(tmp_path / "run")["data"]
    assert found["digests"].keys() == {name for name, num in found["counts"].items() if num}


def test_no_state_is_written_before_it_is_known_of_which_images(
    command, tmp_path, at_step, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(fit, "digest", lambda images: lose())
        assert command("train", *RUN, "hydra.run.dir=none").code == 1
    assert "the power is gone" in facts_of(tmp_path / "none")["error"]
    assert not checkpoint.step_paths(tmp_path / "none")
    at_step(3, lose)
    assert command("train", *RUN, "checkpoint.every_n_steps=2", "hydra.run.dir=run").code == 1
    assert checkpoint.step_paths(tmp_path / "run")[0].name == "step-2.ckpt"
    splits = build.build_splits(composed(*RUN))
    assert facts_of(tmp_path / "run")["data"]["digests"]["train"] == digest(splits.train)

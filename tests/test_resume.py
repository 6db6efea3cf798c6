"""A run that was stopped and taken up again ends as if nothing had happened."""

import signal

import pytest

from conftest import SMALL, assert_same_end, facts_of, finish
from finetune import checkpoint
from finetune.callbacks import StepCheckpoints
from finetune.tasks.classification import Classification

# 15 steps, 5 of an epoch
RUN = (*SMALL, "epochs=3", "augment=strong", "logger=csv")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """RUN without interruption; not to be changed."""
    return finish(tmp_path_factory.mktemp("whole") / "run", *RUN)


@pytest.fixture
def at_step(monkeypatch):
    """at_step(7, action): call action once, in the middle of this step."""

    def arrange(step, action):
        done = []

        def on_before_optimizer_step(self, trainer, task, optimizer):
            if trainer.global_step == step and not done:
                done.append(step)
                action()

        monkeypatch.setattr(
            StepCheckpoints, "on_before_optimizer_step", on_before_optimizer_step, raising=False
        )

    return arrange


def terminate():
    signal.raise_signal(signal.SIGTERM)


def lose():
    raise RuntimeError("the power is gone")


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

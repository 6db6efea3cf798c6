"""A sweep that was stopped or killed goes on with what is missing or unfinished."""

import functools
import shutil
import signal
import time

import pytest

import finetune
from conftest import SMALL, assert_same_end, facts_of
from finetune.callbacks.checkpoints import StepCheckpoints

SWEEP = ("-m", *SMALL, "logger=csv", "seed=0,1", "optimizer.lr=0.01,0.02")


@pytest.fixture
def sweep(command):
    """sweep("-m", ...): train.py."""
    return functools.partial(command, "train")


@pytest.fixture
def whole(sweep, tmp_path):
    """The sweep without interruption."""
    assert sweep(*SWEEP, "hydra.sweep.dir=whole").code == 0
    return tmp_path / "whole"


def files_of(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def test_the_first_step_of_a_job_is_counted_from_its_own_start(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "started", time.time() - 1000)
    assert sweep("-m", *SMALL, "seed=0,1", "hydra.sweep.dir=sweep").code == 0
    first, second = (facts_of(tmp_path / "sweep" / job) for job in "01")
    assert first["time_to_first_step"] > 1000
    assert second["time_to_first_step"] < second["seconds"] + 60


def test_a_sweep_goes_on_where_it_was_stopped(sweep, tmp_path, whole, monkeypatch):
    """The first job is done, the second crashed, the third is stopped, the fourth is missing."""
    begun = []

    def stop(self, trainer, task, optimizer):
        begun.extend([trainer.default_root_dir] * (trainer.global_step == 0))
        if trainer.global_step == 7 and len(begun) == 2:
            raise RuntimeError("the power is gone")
        if trainer.global_step == 7 and len(begun) == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(StepCheckpoints, "on_before_optimizer_step", stop, raising=False)
        stopped = sweep(*SWEEP, "hydra.sweep.dir='my sweep'")
    assert stopped.code == 143
    told = [line for line in stopped.out.splitlines() if "To go on" in line]
    assert told == [
        "warning: stopped by SIGTERM. To go on: python train.py -m \"sweep.resume='my sweep'\""
    ]
    folder = tmp_path / "my sweep"
    statuses = [facts_of(folder / str(n))["status"] for n in range(3)]
    assert statuses == ["finished", "failed", "interrupted"]
    done = files_of(folder / "0")

    resumed = sweep("-m", "sweep.resume='my sweep'")
    assert resumed.code == 0, resumed.err
    assert resumed.out.count("resuming from") == 2
    assert "4 of 4 jobs done: my sweep/<job>" in resumed.out
    assert files_of(folder / "0") == done
    assert sorted(p.name for p in folder.iterdir()) == [*map(str, range(4)), "multirun.yaml"]
    for number in range(4):
        assert_same_end(folder / str(number), whole / str(number))
        names = ("overrides.yaml", "config.yaml")
        ours, theirs = ([(at / str(number) / ".hydra" / n).read_text() for n in names]
                        for at in (folder, whole))  # fmt: skip
        assert ours == theirs

    before = files_of(folder)
    again = sweep("sweep.resume='my sweep'")
    assert again.code == 0
    assert "4 of 4 jobs were done before" in again.out
    assert files_of(folder) == before


@pytest.fixture
def killed(sweep, tmp_path):
    """A sweep of two jobs that was killed before the first of them had a run.json."""
    sweep("-m", *SMALL, "logger=csv", "epochs=1,2", "hydra.sweep.dir=sweep")
    for number in "01":
        shutil.rmtree(tmp_path / "sweep" / number)
    (tmp_path / "sweep/0/.hydra").mkdir(parents=True)
    (tmp_path / "sweep/0/.hydra/overrides.yaml").write_text("- epo")
    return tmp_path / "sweep"


def test_a_sweep_that_was_killed_at_once_starts_anew_in_the_same_directories(sweep, killed):
    resumed = sweep("sweep.resume=sweep")
    assert resumed.code == 0, resumed.err
    assert [facts_of(killed / n)["config"]["epochs"] for n in "01"] == [1, 2]


def test_what_is_typed_beside_sweep_resume_is_refused_by_name(sweep, killed):
    refused = sweep("-m", "sweep.resume=sweep", "epochs=3", "optimizer.lr=0.1,0.2")
    assert refused.code == 1
    assert "leave out epochs=3 optimizer.lr=0.1,0.2" in refused.err
    assert "Traceback" not in refused.err


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_what_is_no_sweep_says_so(sweep, folder):
    refused = sweep("-m", f"sweep.resume={folder}")
    assert refused.code == 1
    assert "no such sweep directory" in refused.err or "is no sweep" in refused.err
    assert "Traceback" not in refused.err


def test_a_target_that_a_sweep_recorded_is_never_called(sweep, killed):
    path = killed / "multirun.yaml"
    path.write_text(path.read_text().replace("- epochs=1,2", "- +strategy._target_=os.abort"))
    refused = sweep("-m", "sweep.resume=sweep")
    assert refused.code == 1
    assert "which is refused" in refused.err


@pytest.mark.parametrize("change", ["overrides", "config"])
def test_the_run_of_another_job_is_refused_before_any_starts(sweep, killed, change):
    other = "epochs=3" if change == "overrides" else "epochs=2"
    assert sweep(*SMALL, "logger=csv", other, "hydra.run.dir=sweep/1").code == 0
    if change == "config":
        path = killed / "1" / "run.json"
        path.write_text(path.read_text().replace('"batch_size": 4', '"batch_size": 5'))
    refused = sweep("-m", "sweep.resume=sweep")
    assert refused.code == 1
    assert ("epochs=3 is not of the sweep" if change == "overrides" else "batch_size: the run has 5"
            ) in refused.err  # fmt: skip
    assert not (killed / "0" / "run.json").exists()


def test_a_job_that_failed_by_a_mistake_fails_again_with_its_message(sweep, tmp_path):
    arguments = [o for o in SMALL if not o.startswith("data")]
    failed = sweep(
        "-m", *arguments, "logger=csv", "epochs=1,2", "data=image_folder", "data.root=photos",
        "hydra.sweep.dir=sweep",
    )  # fmt: skip
    assert failed.code == 1
    again = sweep("-m", "sweep.resume=sweep")
    assert again.code == 1
    message = next(line for line in failed.err.splitlines() if "photos" in line)
    assert message in again.err
    assert "0 of 2 jobs done" in again.out
    assert "Traceback" not in again.err

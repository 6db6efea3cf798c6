"""What is kept of a run, and how it stops."""

import json
import os
import shutil
import signal
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

from conftest import (
    SMALL,
    assert_same_end,
    facts_of,
    finish,
    lose,
    metrics_of,
    series,
    write_photos,
)
from finetune import checkpoint
from finetune.callbacks import checkpoints, speed
from finetune.callbacks.checkpoints import (
    Best,
    BestCheckpoint,
    Pace,
    StepCheckpoints,
    WholeCheckpointIO,
    lower_is_better,
)
from finetune.callbacks.pictures import confusion_figure
from finetune.callbacks.speed import Throughput, verdict
from finetune.callbacks.stopping import StopSignals
from finetune.data import cache
from finetune.datamodule import TransformedImages
from finetune.errors import Interrupted
from finetune.tasks.classification import Classification, per_class_accuracy


@pytest.mark.parametrize("monitor", ["val/accuracy", "val/f1", "val/loss", "val/ece"])
def test_the_best_checkpoint_is_the_best_by_its_monitor(train, monitor):
    run = train(f"monitor={monitor}", "epochs=4", "optimizer.lr=0.05")
    best = min if monitor in ("val/loss", "val/ece") else max
    values = series(run, monitor)
    facts = facts_of(run)
    assert facts["best"]["value"] == best(values)
    assert facts["best"]["epoch"] == values.index(best(values))
    saved = checkpoint.read(checkpoint.best_path(run))
    assert (saved.monitor, saved.value, saved.epoch) == (
        monitor, best(values), facts["best"]["epoch"],
    )  # fmt: skip
    assert facts["val"][monitor] == best(values)


def test_which_metrics_are_better_when_lower():
    names = ("accuracy", "f1", "top5", "loss", "ece")
    assert [lower_is_better(f"val/{name}") for name in names] == [False] * 3 + [True] * 2


def test_a_metric_that_is_not_a_number_is_never_the_best(train, monkeypatch):
    compute, calls = Classification._log_split, []

    def nan_later(self, metrics):
        calls.append(1)
        if len(calls) > 1:
            metrics.loss.update(torch.tensor(1.0), weight=0.0)
            metrics.loss.mean_value.fill_(float("nan"))
        compute(self, metrics)

    monkeypatch.setattr(Classification, "_log_split", nan_later)
    facts = facts_of(train("monitor=val/loss", "epochs=3"))
    assert facts["best"]["epoch"] == 0


def test_the_newest_two_step_checkpoints_stay(train):
    run = train("checkpoint.every_n_steps=3", "epochs=3")
    assert [path.name for path in checkpoint.step_paths(run)] == ["step-15.ckpt", "step-12.ckpt"]
    assert {path.suffix for path in (run / "checkpoints").iterdir()} == {".ckpt"}


def test_writing_takes_a_share_of_the_time_or_all_that_it_needs(monkeypatch):
    now, trainer = [100.0], SimpleNamespace(strategy=SimpleNamespace(broadcast=lambda value: value))
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pace, always = Pace(0.1, expected=1.0), Pace()
    assert (pace.allows(trainer), always.allows(trainer)) == (False, True)
    now[0] = 110.0
    assert pace.allows(trainer)
    for each in (pace, always):
        with suppress(OSError), each.writing():  # what fails takes its time too
            now[0] += 2
            raise OSError
    now[0] = 139.0
    assert (pace.allows(trainer), always.allows(trainer)) == (False, True)
    now[0] = 140.0  # a tenth of 40 s: what was spent, and as much again
    assert pace.allows(trainer)


BEST_AT_FIRST = ("monitor=val/accuracy", "epochs=4", "seed=4")  # it stays what it was


@pytest.fixture
def spared(monkeypatch):
    """spared(True, False): whether there is time for a checkpoint, each time that one asks."""

    def arrange(*answers):
        answers = iter(answers)
        monkeypatch.setattr(Pace, "allows", lambda self, trainer: next(answers, False))

    return arrange


def test_without_time_to_spare_the_last_state_is_written_and_the_same_best(train, spared):
    each = train(*BEST_AT_FIRST, name="each")
    spared()
    run = train(*BEST_AT_FIRST, "checkpoint.every_n_steps=null")
    assert [path.name for path in checkpoint.step_paths(run)] == ["step-20.ckpt"]
    assert facts_of(run)["best"]["step"] == 5
    assert_same_end(run, each)


def test_a_state_for_a_resume_knows_the_best_before_it(command, tmp_path, at_step, spared):
    arguments = (*SMALL, *BEST_AT_FIRST)
    assert command("train", *arguments, "hydra.run.dir=whole").code == 0
    assert facts_of(tmp_path / "whole")["best"]["step"] == 5
    spared(False, True)
    at_step(12, lambda: os.kill(os.getpid(), signal.SIGKILL))
    if not (pid := os.fork()):
        try:
            command("train", *arguments, "checkpoint.every_n_steps=null", "hydra.run.dir=run")
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    at_step(12, lambda: None)
    run = tmp_path / "run"
    assert [path.name for path in checkpoint.step_paths(run)] == ["step-10.ckpt"]
    assert checkpoint.read(checkpoint.best_path(run)).step == 5
    assert command("train", "resume=run").code == 0
    assert_same_end(run, tmp_path / "whole")


def test_what_ends_in_an_error_leaves_its_best(command, tmp_path, at_step, spared):
    spared()
    at_step(12, lose)
    arguments = (*SMALL, "epochs=4", "checkpoint.every_n_steps=null", "hydra.run.dir=run")
    assert command("train", *arguments).code == 1
    run = tmp_path / "run"
    assert not checkpoint.step_paths(run)
    assert checkpoint.read(checkpoint.best_path(run)).step in (5, 10)


@pytest.mark.parametrize(
    ("error", "ranks", "written"),
    [(RuntimeError(), 1, True), (RuntimeError(), 2, False),
     (Interrupted(15, True), 1, False), (Interrupted(2), 1, False)],
    ids=["error", "error of a rank", "stop", "stop at once"],
)  # fmt: skip
def test_a_best_that_is_pending_is_written_where_no_resume_repeats_it(
    tmp_path, error, ranks, written, monkeypatch
):
    wrote = []
    monkeypatch.setattr(checkpoints, "write_best", lambda *args: wrote.append(args))
    best = BestCheckpoint(tmp_path, "val/accuracy", Pace(0.02))
    best.pending = Best({}, {}, None, None, [])
    best.on_exception(SimpleNamespace(world_size=ranks), None, error)
    assert bool(wrote) == written


def test_a_step_checkpoint_loads_with_weights_only(train):
    path = checkpoint.step_paths(train("epochs=1"))[0]
    content = torch.load(path, weights_only=True)
    assert {"state_dict", "optimizer_states", "loops", "callbacks"} <= content.keys()


def test_no_checkpoint_in_the_middle_of_an_accumulation(train, monkeypatch):
    saved = []
    monkeypatch.setattr(
        StepCheckpoints, "save",
        lambda self, trainer: saved.append((trainer.global_step,
                                            trainer.fit_loop.epoch_loop.batch_idx)),
    )  # fmt: skip
    train("checkpoint.every_n_steps=1", "trainer.accumulate_grad_batches=2", "epochs=1")
    # 5 batches are 3 steps; the last one is saved at the epoch's end
    assert saved[:3] == [(1, 1), (2, 3), (3, 4)]


@pytest.mark.parametrize(
    ("name", "when"),
    [
        ("SIGTERM", "training"), ("SIGINT", "training"), ("SIGUSR1", "training"),
        ("SIGTERM", "validation"), ("SIGINT", "test"),
    ],
)  # fmt: skip
def test_a_signal_stops_a_run_and_its_record_says_so(command, tmp_path, monkeypatch, name, when):
    signum = getattr(signal, name)
    hook = {"training": "on_after_backward", "validation": "on_validation_start",
            "test": "on_test_start"}[when]  # fmt: skip
    original = getattr(Classification, hook)

    def interrupted(task, *args):
        if task.global_step >= 7 or when == "test":
            signal.raise_signal(signum)
        return original(task, *args)

    monkeypatch.setattr(Classification, hook, interrupted)
    done = command("train", *SMALL, "logger=csv", "hydra.run.dir=run")
    assert done.code == 128 + signum
    facts = facts_of(tmp_path / "run")
    assert (facts["status"], facts["error"]) == ("interrupted", f"stopped by {name}")
    assert done.out.rstrip().endswith("To go on: python train.py resume=run")
    assert "Traceback" not in done.out + done.err


def test_a_second_signal_stops_at_once():
    stop = StopSignals()
    with stop.installed():
        stop.looping = True
        signal.raise_signal(signal.SIGTERM)  # waits for the batch
        stop.received_at -= 1.0
        with pytest.raises(Interrupted) as error:
            signal.raise_signal(signal.SIGINT)
    assert error.value.signum == signal.SIGINT


def test_a_signal_that_a_terminal_and_a_launcher_both_send_is_one():
    stop = StopSignals()
    with stop.installed():
        stop.looping = True
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.received == signal.SIGINT
    stop = StopSignals()
    with stop.installed():
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # while the first is on its way out


def test_handlers_are_put_back():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with StopSignals().installed():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    after = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    assert after == before


def test_a_signal_before_training_stops_at_once():
    with StopSignals().installed(), pytest.raises(Interrupted):
        signal.raise_signal(signal.SIGTERM)


def test_max_steps_ends_with_a_validation_of_its_step(train):
    run = train("max_steps=7", "epochs=5")
    rows = metrics_of(run)
    assert [step for step, name, _ in rows if name == "train/loss"] == list(range(7))
    assert [step for step, name, _ in rows if name == "val/accuracy"] == [4, 6]
    assert checkpoint.step_paths(run)[0].name == "step-7.ckpt"


def test_the_confusion_matrix_is_drawn_for_few_and_many_classes():
    for num in (2, 25, 70):
        counts = torch.eye(num, dtype=torch.long) * 3
        figure = confusion_figure(counts, tuple(f"c{i}" for i in range(num)))
        (axes,) = figure.axes
        assert len(axes.texts) == (num if num <= 20 else 0)
        assert len(axes.get_xticklabels()) == num or num > 60


def test_accuracy_per_class_is_none_without_images():
    assert per_class_accuracy(torch.tensor([[3, 1], [0, 0]])) == [0.75, None]


def test_no_thread_is_left_behind(train):
    before = set(threading.enumerate())
    train("logger=tensorboard", "epochs=1")
    assert set(threading.enumerate()) <= before


@pytest.fixture
def diverges(monkeypatch):
    """diverges("loss"): in step 7, counted from 1, it is not finite, or the gradient is not."""
    original = Classification.loss

    def arrange(what):
        def loss_of(task, logits, targets):
            loss = original(task, logits, targets)
            if task.global_step != 6:
                return loss
            if what == "gradient":
                return loss + 0 * (logits - logits.detach()).abs().sqrt().sum()
            return loss * float("nan")

        monkeypatch.setattr(Classification, "loss", loss_of)

    return arrange


DIVERGING = (*SMALL, "logger=csv", "hydra.run.dir=run", "checkpoint.every_n_steps=1", "epochs=3")


@pytest.mark.parametrize(
    ("what", "clip"), [("loss", "null"), ("gradient", "null"), ("gradient", "0.5")]
)
def test_no_checkpoint_holds_what_is_not_finite(command, tmp_path, diverges, what, clip):
    diverges(what)
    done = command("train", *DIVERGING, f"trainer.gradient_clip_val={clip}")
    assert done.code == 1
    assert f"error: step 7: the {what} is not finite (loss " in done.err
    assert "python train.py resume=run debug=replay" in done.err
    assert "Traceback" not in done.err
    facts = facts_of(tmp_path / "run")
    assert facts["status"] == "failed"
    assert facts["not_finite"]["step"] == 7
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        content = checkpoint.load(path)
        assert int(content.get("global_step", content.get("step"))) <= 6
        assert all(
            value.isfinite().all()
            for value in content["state_dict"].values()
            if value.is_floating_point()
        )


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (7, "step 8: the loss is not finite (loss nan)"),  # what the weights of step 7 made of it
        (8, "a step of 7 to 8: the gradient is not finite (loss "),  # since the last validation
    ],
)
def test_a_gradient_that_only_one_layer_shows_is_in_no_checkpoint(
    command, tmp_path, monkeypatch, bad, told
):
    """It overflows where it becomes that of a weight, and nothing of it flows to lower layers."""
    original = Classification.setup

    def setup(task, stage):
        original(task, stage)
        task.model.head.weight.register_hook(
            lambda grad: grad / 0 if task.trainer.global_step + 1 == bad else None
        )

    monkeypatch.setattr(Classification, "setup", setup)
    arguments = (*DIVERGING, "checkpoint.every_n_steps=4", "optimizer=adamw", "batch_size=8")
    done = command("train", *arguments)  # 3 steps an epoch
    assert done.code == 1
    assert f"error: {told}" in done.err
    written = [path.name for path in checkpoint.step_paths(tmp_path / "run")]
    assert written == ["step-6.ckpt", "step-4.ckpt"]
    again = command("train", "resume=run", "debug=replay")
    assert f"step {bad} again: the gradients of head.weight are not finite" in again.err


def files_of(run):
    files = [path for path in run.rglob("*") if path.is_file() and path.name != "train.log"]
    return {path: path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("what", "names"),
    [("gradient", "Function 'SqrtBackward0' returned nan values"), ("loss", "step 7 again")],
)
def test_a_replay_names_where_it_comes_from_and_writes_nothing(
    command, tmp_path, diverges, what, names
):
    diverges(what)
    assert command("train", *DIVERGING, "optimizer=adamw", "ema=0.9").code == 1
    before = files_of(tmp_path / "run")
    again = command("train", "resume=run", "debug=replay")
    assert again.code == 1
    assert names in again.err
    assert "Traceback (most" not in again.err.replace("Traceback of forward call", "")
    if what == "gradient":
        assert "abs().sqrt().sum()" in again.err  # the line that made it
    assert files_of(tmp_path / "run") == before


def test_a_replay_names_the_module_whose_output_is_not_finite(command, tmp_path, monkeypatch):
    original = Classification.on_train_batch_start

    def spoil(task, batch, batch_idx):
        original(task, batch, batch_idx)
        if task.global_step == 6:
            task.model.backbone.net.stage2[1][0].weight.data[0] = float("inf")

    monkeypatch.setattr(Classification, "on_train_batch_start", spoil)
    assert command("train", *DIVERGING).code == 1
    again = command("train", "resume=run", "debug=replay")
    assert "backbone.net.stage2.1.0 (Conv2d) is the first whose output is not finite" in again.err
    assert "with weight not finite" in again.err


def test_a_replay_of_what_did_not_fail_so_is_refused(command):
    assert command("train", *SMALL, "epochs=1", "logger=csv", "debug=replay").code == 1
    assert command("train", *SMALL, "epochs=1", "logger=csv", "hydra.run.dir=run").code == 0
    done = command("train", "resume=run", "debug=replay")
    assert "finished already" in done.out + done.err


def test_too_little_memory_is_told_with_what_to_type(command, tmp_path, monkeypatch):
    original = Classification.loss

    def loss(task, logits, targets):
        torch.empty(2**50)  # a petabyte of floats, and more
        return original(task, logits, targets)

    monkeypatch.setattr(Classification, "loss", loss)
    done = command("train", *SMALL, "logger=csv", "hydra.run.dir=run")
    assert done.code == 1
    assert "error: out of memory with batch_size=4, trainer.accumulate_grad_batches=1" in done.err
    assert "batch_size=2 trainer.accumulate_grad_batches=2" in done.err
    assert "Traceback" not in done.err
    assert facts_of(tmp_path / "run")["status"] == "failed"


@pytest.fixture
def small_disk(monkeypatch):
    """small_disk(range(5, 9)): after these steps no file grows beyond 100 kB, as on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    original = StepCheckpoints.on_train_batch_end

    def during(steps):
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        def on_train_batch_end(self, trainer, *args):
            size = 100_000 if trainer.global_step in steps else soft
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            original(self, trainer, *args)

        monkeypatch.setattr(StepCheckpoints, "on_train_batch_end", on_train_batch_end)

    yield during
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(command, tmp_path, small_disk):
    small_disk(range(5, 9))  # the end of an epoch, its validation and more
    done = command(
        "train", *SMALL, "logger=csv", "hydra.run.dir=run", "checkpoint.every_n_steps=2",
        "monitor=val/loss", "epochs=3",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "step-6.ckpt could not be written: File too large (it needs about " in done.out
    assert "step-10.ckpt could not" not in done.out
    assert facts_of(tmp_path / "run")["status"] == "finished"
    kept = [path.name for path in checkpoint.step_paths(tmp_path / "run")]
    assert kept == ["step-15.ckpt", "step-14.ckpt"]
    assert not list((tmp_path / "run").rglob("*.part"))


def test_nothing_is_begun_that_has_no_room(tmp_path, monkeypatch, caplog):
    usage = shutil.disk_usage(tmp_path)
    content = {"state": [torch.zeros(1000), {"more": torch.zeros(250)}], "step": 1}
    io = WholeCheckpointIO()
    for free, written in ((4999, False), (5000, True), (0, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, f=free: usage._replace(free=f))
        io.save_checkpoint(content, tmp_path / f"{free}.ckpt")
        assert (tmp_path / f"{free}.ckpt").exists() == written == (io.failed is None)
    assert "it needs about 5 kB, and 5 kB are free on this disk" in caplog.text


def test_a_run_whose_last_checkpoint_failed_has_failed(command, tmp_path, small_disk):
    small_disk(range(8, 100))
    done = command(
        "train", *SMALL, "logger=csv", "hydra.run.dir=run", "checkpoint.every_n_steps=2", "epochs=2"
    )
    assert done.code == 1
    assert "the last checkpoint could not be written: " in done.err
    assert "Traceback" not in done.err
    small_disk(())
    assert facts_of(tmp_path / "run")["status"] == "failed"
    # what was written before is whole, and a resume starts from it
    assert checkpoint.step_paths(tmp_path / "run")[0].name == "step-6.ckpt"
    assert command("train", "resume=run").code == 0


def test_a_disk_without_room_is_refused_before_the_training(command, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=3_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    done = command("train", *SMALL, "logger=csv", "hydra.run.dir=run")
    assert done.code == 1
    assert "run has room for 3 MB, and the checkpoints need about " in done.err
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("share", "workers", "said"),
    [
        (0.02, 1, "compute-bound: 2% of the time waits for data"),
        (0.34, 1, "input-bound: 34% of the time waits for data; try num_workers=3"),
        (0.34, 3, "input-bound: 34% of the time waits for data; smaller image files"),
    ],
)
def test_the_verdict_names_the_share_and_what_to_type(share, workers, said):
    assert verdict(share, workers, cores=4).startswith(said)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"in_memory": True}, "; a lighter augment= would help"),
        ({"in_memory": True, "augmented": False}, "waits for data"),
        (
            {"num_workers": 3, "augmented": False},
            "smaller image files or data.cache=disk would help",
        ),
        ({"in_memory": True, "crops_on_cpu": True}, "; try data.cache=ram"),
    ],
)
def test_the_verdict_names_nothing_that_would_not_help(state, said):
    assert verdict(0.34, **{"num_workers": 0, "cores": 4} | state).endswith(said)


def test_a_short_run_says_that_it_was_not_measured(train):
    facts = facts_of(train("epochs=1"))
    assert facts["images_per_second"] is facts["data_wait"] is None
    assert facts["verdict"].startswith("not measured: 5 steps were trained here")


def test_images_that_are_read_when_a_phase_begins_are_waited_for(monkeypatch, tmp_path):
    monkeypatch.setattr(Throughput, "SKIP", 2)
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    read_all = cache._read_all
    monkeypatch.setattr(cache, "_read_all", lambda *args: time.sleep(0.5) or read_all(*args))
    root = write_photos(tmp_path / "photos", train=8)
    arguments = [o for o in SMALL if not o.startswith(("data", "augment", "epochs"))]
    arguments += ["data=image_folder", f"data.root={root}", "augment=none", "data.cache=ram"]
    arguments += ["strategy=lp_ft", "strategy.probe_epochs=2", "epochs=4"]
    assert facts_of(finish(tmp_path / "run", *arguments))["data_wait"] > 0.2


def test_a_run_tells_how_long_it_waits_for_data(train, monkeypatch):
    monkeypatch.setattr(Throughput, "SKIP", 2)
    read = TransformedImages.__getitem__

    def slowly(images, where):
        time.sleep(0.02)
        return read(images, where)

    monkeypatch.setattr(TransformedImages, "__getitem__", slowly)
    facts = facts_of(train("epochs=1", "data.cache=none"))
    assert 0.3 < facts["data_wait"] < 1.0
    assert facts["verdict"].startswith("input-bound: ")


@pytest.mark.parametrize("end", ["on_validation_start", "on_train_epoch_end"])
def test_what_a_gpu_still_computes_is_counted_where_it_belongs(monkeypatch, end):
    clock = SimpleNamespace(now=0.0, left=0.0)

    def synchronize(device):
        clock.now, clock.left = clock.now + clock.left, 0.0

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock.now)
    trainer = SimpleNamespace(
        world_size=1, global_step=0, log_every_n_steps=50, train_dataloader=None
    )
    task, throughput = SimpleNamespace(device=torch.device("cuda")), Throughput()
    throughput.on_train_epoch_start(trainer, task)
    for _ in range(Throughput.SKIP + 5):  # asked for in no time, and computed in a second
        clock.left += 1
        throughput.on_train_batch_end(trainer, task, None, (None, [0] * 10), 0)
    for _ in range(2):  # the second time it stands
        getattr(throughput, end)(trainer, task)
        clock.now += 7
    assert (throughput.images, throughput.seconds) == (50, 5.0)


def test_a_profiled_run_that_is_stopped_leaves_what_it_has(train, at_step, tmp_path):
    at_step(7, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted):
        train("trainer=profile", "epochs=2", "checkpoint.every_n_steps=100")
    (trace,) = (tmp_path / "run" / "profile").glob("*.pt.trace.json")
    assert json.loads(trace.read_text())["traceEvents"]


def test_a_profiled_run_leaves_a_trace_that_a_browser_opens(train):
    run = train("trainer=profile", "epochs=2")
    (trace,) = (run / "profile").glob("*.pt.trace.json")
    events = json.loads(trace.read_text())["traceEvents"]
    names = {event.get("name", "") for event in events}
    assert any("convolution" in name for name in names)
    assert any(name.startswith("Optimizer.step") for name in names)

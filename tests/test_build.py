"""How a model is laid out, stepped and evaluated on its device."""

import json
import shutil
import sys

import pytest
import torch
from lightning.pytorch.profilers import SimpleProfiler

from conftest import SMALL, assert_same_end, facts_of, lose, plain
from finetune import build, fit
from finetune.callbacks.speed import Trace, Unprofiled
from finetune.errors import ConfigError, TrainingError

PROFILE = ("+trainer.profiler=pytorch",)
RUN = (*SMALL, "checkpoint.every_n_steps=3", "logger=csv")


def test_weights_are_laid_out_as_asked():
    for asked in (True, False):
        model = build.build_model(plain(*SMALL), ("a", "b"))
        build.use_device(plain(*SMALL, f"channels_last={asked}"), model)
        kernel = next(p for p in model.backbone.parameters() if p.ndim == 4 and p.shape[1] > 1)
        assert kernel.is_contiguous(memory_format=torch.channels_last) == asked


@pytest.mark.parametrize(
    ("said", "fused"),
    [
        ((), True),
        (("optimizer=adamw",), True),
        (("optimizer=sgd", "+optimizer.foreach=true"), False),
        (("optimizer=sgd", "+optimizer.fused=false"), False),
        (("trainer.precision=16-mixed",), False),
        (("trainer.precision=16",), False),
        (("+trainer.gradient_clip_algorithm=value",), False),
    ],
    ids=str,
)
def test_the_optimizer_steps_in_one_kernel_unless_told_otherwise(said, fused):
    cfg = plain(*SMALL, *said)
    weights = [torch.nn.Parameter(torch.zeros(2))]
    assert bool(build.build_optimizer(cfg)(weights).defaults["fused"]) == fused


@pytest.mark.parametrize(
    ("said", "kind"),
    [((), Unprofiled), (("+trainer.profiler=simple",), SimpleProfiler), (PROFILE, Unprofiled)],
    ids=str,
)
def test_a_profiler_that_is_typed_stands_but_for_torchs_which_is_ours(said, kind, tmp_path):
    budget = build.Budget(epochs=2, steps_per_epoch=3, max_steps=None)
    trainer = build.build_trainer(plain(*SMALL, *said), tmp_path, budget, [], [])
    assert type(trainer.profiler) is kind
    assert any(isinstance(c, Trace) for c in trainer.callbacks) == (said == PROFILE)


def test_on_a_gpu_evaluation_takes_larger_batches(monkeypatch):
    cfg = plain(*SMALL)
    splits = build.build_splits(cfg)
    model = build.build_model(cfg, splits.classes)
    assert build.build_datamodule(cfg, splits, model).eval_batch_size == 4
    monkeypatch.setattr(build, "on_gpu", lambda cfg: True)
    datamodule = build.build_datamodule(cfg, splits, model)
    assert (datamodule.batch_size, datamodule.eval_batch_size) == (4, 16)


def test_what_cannot_be_compiled_is_told(tmp_path):
    error = torch._dynamo.exc.BackendCompilerFailed(lambda: None, RuntimeError("no C++ here"), None)
    told = fit.failure_of(error, plain(*SMALL, "compile=true"), tmp_path)
    assert isinstance(told, TrainingError)
    assert "compile=false" in str(told)


def test_cuda_graphs_are_for_one_device_and_steps_of_one_batch(monkeypatch):
    cfg = plain(*SMALL, "compile=reduce-overhead", "trainer.accumulate_grad_batches=2")
    model = build.build_model(cfg, ("a", "b"))
    build.use_device(cfg, model)  # a CPU has none
    monkeypatch.setattr(build, "on_gpu", lambda cfg: True)
    with pytest.raises(ConfigError, match=r"compile=reduce-overhead: .* Type compile=true"):
        build.use_device(cfg, model)
    cfg.compile = True
    build.use_device(cfg, model)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_a_compiled_run_that_crashed_ends_with_the_same_bytes(command, tmp_path, at_step):
    assert command("train", *RUN, "compile=true", "hydra.run.dir=whole").code == 0
    plain_run = command("train", *RUN, "hydra.run.dir=plain")
    assert plain_run.code == 0
    at_step(7, lose)
    assert command("train", *RUN, "compile=true", "hydra.run.dir=run").code == 1
    refused = command("train", "resume=run", "compile=false")
    assert "compile: the run has true" in refused.err
    assert command("train", "resume=run").code == 0
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    again = command("evaluate", "run=run", "trainer.accelerator=cpu")
    assert again.code == 0, again.err
    measured = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert facts_of(tmp_path / "run")["test"].items() <= measured.items()  # compiled is neither
    losses = [facts_of(tmp_path / name)["val"]["val/loss"] for name in ("whole", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_the_progress_bar_is_drawn_a_few_times_a_second(tmp_path, monkeypatch):
    cfg = plain(*SMALL)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    trainer = build.build_trainer(cfg, tmp_path, build.Budget(1, 5, None), [], loggers=[])
    assert trainer.progress_bar_callback.refresh_rate < 10

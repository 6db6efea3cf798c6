"""What only a GPU can show: no step waits for it, and a run on it ends with the same bytes."""

import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from conftest import SMALL, assert_same_end, facts_of, lose, metrics_of, series
from finetune import build
from finetune.data.resident import KERNELS, resized

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
ON_GPU = [*SMALL, "trainer.accelerator=gpu", "logger=csv"]
RESIDENT = ["augment=light", "data.num_images=150"]  # 90 of them train, in 23 steps


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_a_crop_on_a_gpu_is_that_on_the_cpu(kernel):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 40, 50), generator=generator, dtype=torch.uint8)
    corners = torch.randint(1, 20, (64, 4), generator=generator)
    flips = torch.rand(64, generator=generator) < 0.5
    torch.set_float32_matmul_precision("high")  # as build_trainer does
    ours, theirs = (
        resized(images.to(d), corners.to(d), flips.to(d), 24, kernel).cpu().int()
        for d in ("cuda", "cpu")
    )
    torch.set_float32_matmul_precision("highest")
    different = (ours - theirs).abs()
    assert different.max() <= 2  # rounded twice, of sums on the edge between two values
    assert (different > 0).float().mean() < 0.05


class Unwaited(Callback):
    """Makes an error of each wait for the GPU between two points of the curves."""

    steps = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        watched = 5 <= batch_idx <= 20  # kernels are chosen first
        with warnings.catch_warnings(action="ignore"):  # that it may not see all
            torch.cuda.set_sync_debug_mode("error" if watched else "default")
        self.steps += watched


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("clip", ["null", "1.0"])
def test_no_step_waits_for_the_gpu(command, monkeypatch, precision, clip):
    build_trainer, unwaited = build.build_trainer, Unwaited()

    def watched(cfg, run, budget, others, loggers):
        return build_trainer(cfg, run, budget, [*others, unwaited] if loggers else others, loggers)

    monkeypatch.setattr(build, "build_trainer", watched)
    try:
        done = command(
            "train", *ON_GPU, *RESIDENT, f"trainer.precision={precision}", "epochs=3",
            f"trainer.gradient_clip_val={clip}", "trainer.log_every_n_steps=5",
            "hydra.run.dir=run",
        )  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert done.code == 0, done.err
    assert "live on cuda:0" in done.out
    assert unwaited.steps == 3 * 16


@pytest.mark.filterwarnings("default")  # torch's compiler has some for itself
@pytest.mark.parametrize(
    "more",
    [[], ["data.cache=none", "num_workers=2"], ["compile=true"]],
    ids=["resident", "workers", "compiled"],
)
def test_a_run_on_a_gpu_that_crashed_ends_with_the_same_bytes(command, tmp_path, at_step, more):
    arguments = [*ON_GPU, *RESIDENT, "trainer.precision=bf16-mixed", "deterministic=true", *more]
    whole = command("train", *arguments, "hydra.run.dir=whole")
    assert whole.code == 0, whole.err
    at_step(30, lose)
    lost = command("train", *arguments, "checkpoint.every_n_steps=7", "hydra.run.dir=run")
    assert lost.code == 1
    assert "the power is gone" in facts_of(tmp_path / "run")["error"], lost.err
    resumed = command("train", "resume=run")
    assert resumed.code == 0, resumed.err
    assert_same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.filterwarnings("default")
def test_cuda_graphs_train_after_a_job_that_was_tested(command):
    done = command("train", "-m", *ON_GPU, *RESIDENT, "compile=reduce-overhead", "seed=0,1")
    assert done.code == 0, done.err


@pytest.mark.filterwarnings("default")
def test_cuda_graphs_train_as_no_graphs_do(command, tmp_path):
    arguments = [*ON_GPU, *RESIDENT, "deterministic=true"]
    for name, mode in (("graphs", "reduce-overhead"), ("none", "true")):
        done = command("train", *arguments, f"compile={mode}", f"hydra.run.dir={name}")
        assert done.code == 0, done.err
    ours, theirs = (series(tmp_path / name, "train/loss") for name in ("graphs", "none"))
    # a bit makes another training of many steps: TF32 alone would part them from the 16th on
    assert ours[:10] == pytest.approx(theirs[:10], rel=0.02)
    refused = command(
        "train", *arguments, "compile=reduce-overhead", "trainer.accumulate_grad_batches=2"
    )
    assert refused.code == 1
    assert "Type compile=true" in refused.err


def test_every_point_is_logged_once_and_in_order(command, tmp_path):
    done = command("train", *ON_GPU, *RESIDENT, "checkpoint.every_n_steps=3", "hydra.run.dir=run")
    assert done.code == 0, done.err
    steps = [step for step, metric, _ in metrics_of(tmp_path / "run") if metric == "train/loss"]
    assert steps == list(range(46))
    assert facts_of(tmp_path / "run")["status"] == "finished"

"""The embedded default is real transfer learning: its pretraining is worth something."""

import pytest

from conftest import facts_of, finish


@pytest.mark.slow
def test_with_one_image_per_class_the_shipped_weights_beat_scratch(tmp_path):
    def accuracy(name, *overrides):
        runs = [
            finish(
                tmp_path / f"{name}{seed}", f"seed={seed}", "logger=csv", "epochs=100",
                "data.shots=1", "trainer.accelerator=cpu", *overrides,
            )
            for seed in range(2)
        ]  # fmt: skip
        return sum(facts_of(run)["test"]["test/accuracy"] for run in runs) / len(runs)

    pretrained, scratch = accuracy("pretrained"), accuracy("scratch", "model.weights=null")
    assert pretrained > scratch + 0.03  # the README's 5 seeds are .09 apart, 500 steps each

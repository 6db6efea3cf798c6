"""The embedded default is real transfer learning: its pretraining is worth something."""

import pytest

from conftest import facts_of, finish


@pytest.mark.slow
def test_ten_shots_reach_what_the_readme_claims_and_scratch_does_not(tmp_path):
    def accuracy(name, *overrides):
        runs = [
            finish(
                tmp_path / f"{name}{seed}", f"seed={seed}", "logger=csv", "epochs=100",
                "trainer.accelerator=cpu", *overrides,
            )
            for seed in range(2)
        ]  # fmt: skip
        return sum(facts_of(run)["test"]["test/accuracy"] for run in runs) / len(runs)

    pretrained, scratch = accuracy("pretrained"), accuracy("scratch", "model.weights=null")
    assert pretrained >= 0.95
    assert pretrained > scratch

"""Runs that share a start are averaged, val decides, and the soup is a run like any other."""

import json

import pytest
import torch

from conftest import SMALL, facts_of, finish
from finetune import averaging, checkpoint
from finetune.soup import best_alpha, greedy

RUN = (*SMALL, "logger=csv", "epochs=4", "data.num_images=60", "head.init=zero", "seed=3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("soup")
    return [
        finish(folder / str(lr), *RUN, f"optimizer.lr={lr}", "hydra.output_subdir=.hydra")
        for lr in (0.02, 0.03)
    ]


def weights_of(run):
    return checkpoint.read(checkpoint.best_path(run)).state_dict


def test_an_average_is_the_mean_of_every_weight_and_statistic():
    states = [{"w": torch.randn(3, 4), "n": torch.tensor(5 + i)} for i in range(3)]
    mean = averaging.average(states)
    expected = sum(state["w"].double() for state in states) / 3
    assert torch.equal(mean["w"], expected.float())
    assert mean["n"] == 5


@pytest.mark.parametrize(("alpha", "expected"), [(0.0, 2.0), (1.0, 6.0), (0.25, 3.0)])
def test_alpha_leads_from_the_start_to_what_was_learnt(alpha, expected):
    start = {"w": torch.tensor([2.0]), "n": torch.tensor(0)}
    end = {"w": torch.tensor([6.0]), "n": torch.tensor(9)}
    between = averaging.interpolate(start, end, alpha)
    assert between["w"].tolist() == [expected]
    assert between["n"] == 9


def test_a_digest_tells_values_names_and_shapes_apart():
    state = {"a": torch.ones(2, 2), "b": torch.zeros(1)}
    same = {"b": torch.zeros(1), "a": torch.ones(2, 2)}
    assert averaging.digest(state) == averaging.digest(same)
    for other in (
        {"a": torch.ones(4), "b": torch.zeros(1)},
        {"a": torch.ones(2, 2), "c": torch.zeros(1)},
        {"a": torch.ones(2, 2), "b": torch.full((1,), -0.0)},
    ):
        assert averaging.digest(other) != averaging.digest(state)


def test_a_greedy_soup_keeps_what_makes_val_no_worse():
    # the goal is 1.0; averages come closer with the second, not with the third
    states = [{"w": torch.tensor([value])} for value in (0.8, 1.3, 9.0)]
    kept = greedy(states, lambda state: -abs(float(state["w"]) - 1.0))
    assert kept == [0, 1]
    assert greedy(states, lambda state: 0.0) == [0, 1, 2]


def test_the_best_alpha_is_that_of_val():
    start, end = {"w": torch.tensor([0.0])}, {"w": torch.tensor([1.0])}
    alphas = [i / 10 for i in range(11)]
    best = best_alpha(start, end, alphas, lambda state: -abs(float(state["w"]) - 0.7))
    assert best == 0.7
    assert best_alpha(start, end, alphas, lambda state: 0.0) == 1.0


def test_a_soup_is_a_run_that_can_be_evaluated(runs, command, tmp_path):
    typed = f"runs=[{runs[0]},{runs[1]}]"
    done = command("soup", typed, "output=soup", "trainer.accelerator=cpu", "num_workers=0")
    assert done.code == 0, done.err
    facts = facts_of(tmp_path / "soup")
    assert facts["status"] == "finished"
    assert facts["test"] == {}  # test decides nothing and is not read
    kept = facts["soup"]["kept"]
    mean = averaging.average([weights_of(run) for run in runs if str(run) in kept])
    assert all(torch.equal(v, mean[k]) for k, v in weights_of(tmp_path / "soup").items())
    assert facts["best"]["value"] >= max(facts_of(run)["best"]["value"] for run in runs)
    assert command("evaluate", "run=soup", "split=val", "trainer.accelerator=cpu").code == 0
    measured = json.loads((tmp_path / "soup" / "metrics.json").read_text())
    assert measured["val/accuracy"] == pytest.approx(facts["best"]["value"], abs=1e-6)


def test_alpha_0_is_the_start_and_alpha_1_the_run(runs, command, tmp_path):
    for alpha in (0, 1):
        done = command(
            "soup", f"runs=[{runs[0]}]", f"alpha={alpha}", f"output={alpha}",
            "trainer.accelerator=cpu",
        )  # fmt: skip
        assert done.code == 0, done.err
        assert "bit for bit" not in done.out
    start = weights_of(tmp_path / "0")
    assert not start["head.weight"].any()  # head.init=zero
    tuned, again = weights_of(runs[0]), weights_of(tmp_path / "1")
    assert all(torch.equal(again[name], value) for name, value in tuned.items())
    digests = facts_of(runs[0])["model"]["start"]
    head = {k.removeprefix("head."): v for k, v in start.items() if k.startswith("head.")}
    assert averaging.digest(head) == digests["head"]


def test_runs_that_do_not_share_a_start_are_refused(runs, command, tmp_path):
    other = finish(tmp_path / "other", *RUN, "seed=4", "epochs=1")  # other random weights
    done = command("soup", f"runs=[{runs[0]},{other}]", "output=soup")
    assert done.code == 1
    assert "do not share a start: their pretrained weights differ" in done.err
    assert not (tmp_path / "soup").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["runs=nowhere"], "must be a list of run directories: runs=[RUN,RUN]"),
        (["runs=[nowhere]"], "nowhere: no such run directory"),
        (["runs=[x]", "alpha=2"], "alpha=2: must be a number from 0 to 1, auto, or null"),
    ],
)
def test_what_cannot_be_averaged_is_told(command, arguments, said):
    done = command("soup", *arguments)
    assert done.code == 1
    assert said in done.err
    assert "Traceback" not in done.err


def test_a_soup_does_not_take_the_place_of_a_run(runs, command):
    done = command("soup", f"runs=[{runs[0]}]", f"output={runs[0]}")
    assert done.code == 1
    assert "already holds a run" in done.err

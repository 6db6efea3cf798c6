"""Train, evaluate, predict and load, end to end, from a run directory alone."""

import csv
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import finetune
from conftest import SMALL, facts_of, metrics_of, write_photos
from finetune import checkpoint
from finetune.data.read import read_image
from finetune.train import why_model

ROOT = Path(__file__).parents[1]


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_directory_holds_what_it_should(trained):
    names = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
    assert names == {
        ".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml", "train.log",
        "metrics.csv", "run.json", "checkpoints/best.ckpt", "checkpoints/step-10.ckpt",
        "checkpoints/step-15.ckpt",
    }  # fmt: skip


def test_run_json_tells_what_the_run_was(trained):
    facts = facts_of(trained)
    assert facts["status"] == "finished"
    assert facts["error"] is None
    assert facts["data"]["classes"] == ["ant", "bee", "cat"]
    assert facts["data"]["counts"] == {"train": 18, "val": 9, "test": 9}
    assert facts["model"]["family"] == "tiny"
    assert facts["model"]["trainable"] == facts["model"]["parameters"] > 290_000
    assert facts["config"]["epochs"] == 3
    assert facts["seed"] == 0
    assert facts["device"] == "cpu"
    assert {"python", "torch", "torchvision", "lightning", "finetune"} == facts["versions"].keys()
    assert facts["best"]["path"] == "checkpoints/best.ckpt"
    assert facts["best"]["value"] == facts["val"]["val/accuracy"]
    assert facts["test"].keys() == {"test/accuracy", "test/loss", "test/f1", "test/ece"}
    assert facts["per_class_accuracy"]["test"].keys() == {"ant", "bee", "cat"}
    assert facts["seconds"] > 0
    assert facts["time_to_first_step"] > 0
    # the best of all validations, and the first to reach it
    values = [(v, -step) for step, name, v in metrics_of(trained) if name == "val/accuracy"]
    assert facts["best"]["value"] == max(values)[0]
    assert facts["best"]["step"] == -max(values)[1] + 1


def test_the_best_checkpoint_is_about_the_size_of_its_weights(trained):
    path = checkpoint.best_path(trained)
    weights = sum(t.numel() * t.element_size() for t in checkpoint.read(path).state_dict.values())
    assert weights < path.stat().st_size < weights * 1.1


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluate_gives_the_metrics_of_run_json(command, trained, tmp_path, split):
    done = command(
        "evaluate", f"run={trained}", f"split={split}", "output=.", "batch_size=5",
        "trainer.accelerator=cpu",
    )  # fmt: skip
    assert done.code == 0, done.err
    measured = json.loads((tmp_path / "metrics.json").read_text())
    expected = facts_of(trained)[split]
    assert measured["images"] == 9
    for name, value in expected.items():
        # other batches: sums of floats in another order
        assert measured[name] == pytest.approx(value, abs=1e-5), name
    assert f"{expected[f'{split}/accuracy']:.4f}" in done.out
    assert measured["per_class_accuracy"].keys() == {"ant", "bee", "cat"}


def test_evaluate_takes_data_that_moved(command, trained, tmp_path):
    moved = shutil.copytree(trained.parent / "photos", tmp_path / "moved here")
    done = command(
        "evaluate", f"run={trained}", f"data.root='{moved}'", "output=out",
        "trainer.accelerator=cpu",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert (tmp_path / "out" / "metrics.json").exists()


def test_evaluate_refuses_other_classes_by_name(command, trained, tmp_path):
    other = write_photos(tmp_path / "other")
    for split in other.iterdir():
        (split / "ant").rename(split / "yak")
    done = command("evaluate", f"run={trained}", f"data.root={other}", "trainer.accelerator=cpu")
    assert done.code == 1
    assert "'yak'" in done.err
    assert "'ant'" in done.err
    assert "Traceback" not in done.err


@pytest.fixture
def photos(tmp_path, trained):
    """Images at several depths, files that are none, and two that cannot be read."""
    root = tmp_path / "in"
    (root / "deep" / "er").mkdir(parents=True)
    (root / ".hidden").mkdir()
    source = trained.parent / "photos" / "test"
    shutil.copy(source / "ant" / "0.png", root / "a.png")
    shutil.copy(source / "bee" / "0.png", root / "deep" / "b.PNG")
    shutil.copy(source / "cat" / "0.png", root / "deep" / "er" / "ü, 1.png")
    shutil.copy(source / "cat" / "1.png", root / ".hidden" / "c.png")
    (root / "notes.txt").write_text("no image")
    (root / "broken.jpg").write_bytes((root / "a.png").read_bytes()[:60])
    (root / "page.jpeg").write_text("<!DOCTYPE html>")
    return root


def test_predict_writes_a_row_per_readable_image_and_names_the_rest(command, trained, photos):
    done = command("predict", f"run={trained}", "input=in", "output=out/p.csv", "batch_size=2")
    assert done.code == 0, done.err
    rows = rows_of(photos.parent / "out" / "p.csv")
    assert [row["path"] for row in rows] == ["in/a.png", "in/deep/b.PNG", "in/deep/er/ü, 1.png"]
    assert "2 of 5 files could not be read" in done.out
    assert "broken.jpg" in done.out
    assert "page.jpeg cannot be read: it is an HTML page" in done.out

    model, transform, classes = finetune.load(trained)
    for row in rows:
        assert row.keys() == {"path", "class", "probability", "top5"}
        image = transform(read_image(photos.parent / row["path"]))
        with torch.inference_mode():
            shares = model(image.unsqueeze(0)).softmax(1)[0]
        assert row["class"] == classes[int(shares.argmax())]
        assert float(row["probability"]) == pytest.approx(float(shares.max()), abs=1e-4)
        best = [item.rpartition(":") for item in row["top5"].split()]
        assert [float(share) for *_, share in best] == pytest.approx(
            sorted(shares.tolist(), reverse=True), abs=1e-4
        )
        assert {name for name, *_ in best} == {*classes}


def test_predict_with_strict_fails_but_does_the_rest(command, trained, photos):
    done = command("predict", f"run={trained}", "input=in", "strict=true")
    assert done.code == 1
    assert "broken.jpg" in done.err
    assert "Traceback" not in done.err
    assert len(rows_of(photos.parent / "predictions.csv")) == 3


def test_predict_takes_one_file_and_a_folder_as_output(command, trained, photos):
    done = command("predict", f"run={trained}", "input=in/a.png", "output=in")
    assert done.code == 0, done.err
    assert len(rows_of(photos / "predictions.csv")) == 1


def test_an_output_that_ends_in_a_slash_is_a_folder(command, trained, tmp_path, photos):
    done = command("predict", f"run={trained}", "input=in/a.png", "output=new/folder/")
    assert done.code == 0, done.err
    assert [row["path"] for row in rows_of(tmp_path / "new/folder/predictions.csv")] == ["in/a.png"]


NETS = """
from torch import nn

class Mine(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 9))
"""


def test_what_the_message_says_for_a_class_of_ones_own_can_be_typed(
    command, tmp_path, trained, photos, monkeypatch
):
    (tmp_path / "my_own_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = [o for o in SMALL if not o.startswith("model")]
    done = command(
        "train", *arguments, "model=module", "model.target=my_own_nets.Mine", "model.input_size=8",
        "max_steps=0", "logger=csv", "hydra.run.dir=run",
    )  # fmt: skip
    assert done.code == 0, done.err
    for name in (
        ["evaluate", "run=run", "trainer.accelerator=cpu"],
        ["predict", "run=run", "input=in"],
    ):
        refused = command(*name)
        assert refused.code == 1
        typed = re.search(r"type (\S+)", refused.err)[1]
        done = command(*name, typed)
        assert done.code == 0, done.err
        assert "has no effect" not in done.out


def test_a_class_of_ones_own_for_a_run_without_one_warns(command, trained, photos):
    done = command("predict", f"run={trained}", "input=in/a.png", "model.target=foo.Bar")
    assert done.code == 0, done.err
    assert "warning: model.target=foo.Bar has no effect" in done.out


@pytest.mark.parametrize("workers", [0, 2])
def test_predictions_do_not_depend_on_workers(command, trained, tmp_path, workers):
    source = trained.parent / "photos"
    done = command(
        "predict", f"run={trained}", f"input={source}", f"num_workers={workers}", "batch_size=7"
    )
    assert done.code == 0, done.err
    rows = rows_of(tmp_path / "predictions.csv")
    assert len(rows) == 36
    assert [row["path"] for row in rows] == sorted(str(p) for p in source.rglob("*.png"))
    model, transform, classes = finetune.load(trained)
    images = torch.stack([transform(read_image(Path(row["path"]))) for row in rows])
    with torch.inference_mode():
        labels = model(images).argmax(1).tolist()
    assert [row["class"] for row in rows] == [classes[label] for label in labels]


def test_load_gives_the_model_that_was_measured(trained):
    model, transform, classes = finetune.load(trained)
    assert classes == ("ant", "bee", "cat")
    assert not any(module.training for module in model.modules())
    hits, losses = 0, []
    for label, name in enumerate(classes):
        for path in sorted((trained.parent / "photos" / "test" / name).iterdir()):
            with torch.inference_mode():
                logits = model(transform(Image.open(path)).unsqueeze(0))
            hits += int(logits.argmax()) == label
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor([label])).item())
    test = facts_of(trained)["test"]
    assert hits / 9 == pytest.approx(test["test/accuracy"])
    # one image at a time and not in a batch
    assert sum(losses) / 9 == pytest.approx(test["test/loss"], abs=1e-5)


def test_a_run_that_was_moved_is_all_that_is_needed(command, trained, tmp_path, photos):
    moved = shutil.copytree(trained, tmp_path / "my runs" / "nr 1")
    done = command("predict", f"run='{moved}'", "input=in/a.png")
    assert done.code == 0, done.err


def test_a_run_is_the_pretraining_of_the_next(command, trained, tmp_path):
    done = command(
        "train", *SMALL[:4], "model=run", f"model.path={trained}", "max_steps=0", "logger=csv",
        "trainer.accelerator=cpu", "hydra.run.dir=next",
    )  # fmt: skip
    assert done.code == 0, done.err
    before = checkpoint.read(checkpoint.best_path(trained)).state_dict
    after = checkpoint.read(checkpoint.best_path(tmp_path / "next")).state_dict
    for name, value in after.items():
        assert torch.equal(value, before[name]) == name.startswith("backbone."), name


def test_max_steps_zero_evaluates_what_was_loaded(command, tmp_path):
    done = command("train", *SMALL, "max_steps=0", "logger=csv", "hydra.run.dir=run")
    assert done.code == 0, done.err
    facts = facts_of(tmp_path / "run")
    assert facts["best"]["step"] == 0
    assert {"val/accuracy"} <= facts["val"].keys()
    assert {"test/accuracy"} <= facts["test"].keys()
    assert not any(name.startswith("train/") for _, name, _ in metrics_of(tmp_path / "run"))


def test_without_a_test_split_nothing_is_tested(command, tmp_path):
    root = write_photos(tmp_path / "photos", train=4, val=2)
    done = command(
        "train", "data=image_folder", f"data.root={root}", *SMALL[4:], "epochs=1", "logger=csv",
        "hydra.run.dir=run",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "no test split" in done.out
    assert facts_of(tmp_path / "run")["test"] == {}
    done = command("evaluate", "run=run", "trainer.accelerator=cpu")
    assert done.code == 1
    assert "type split=val" in done.err


def test_patience_stops_early(command, tmp_path):
    done = command(
        "train", *SMALL, "epochs=30", "patience=2", "optimizer.lr=1e-12", "logger=csv",
        "hydra.run.dir=run",
    )  # fmt: skip
    assert done.code == 0, done.err
    epochs = [v for _, name, v in metrics_of(tmp_path / "run") if name == "val/accuracy"]
    assert 3 <= len(epochs) < 30


def test_two_runs_with_one_seed_are_the_same_bit_for_bit(train):
    first, second = train(name="first"), train(name="second")
    other = train("seed=1", name="other")
    a, b, c = (checkpoint.read(checkpoint.best_path(r)).state_dict for r in (first, second, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a if name.endswith("0.weight"))


def test_the_number_of_workers_does_not_change_the_weights(train):
    states = [
        checkpoint.read(
            checkpoint.best_path(train(f"num_workers={n}", "augment=strong", name=str(n)))
        ).state_dict
        for n in (0, 1, 2)
    ]
    for state in states[1:]:
        assert all(torch.equal(state[name], value) for name, value in states[0].items())


def test_the_curves_have_every_step(train):
    rows = metrics_of(train("trainer.log_every_n_steps=2"))
    assert [step for step, name, _ in rows if name == "train/loss"] == [1, 3, 5, 7, 9]
    assert [step for step, name, _ in rows if name == "val/accuracy"] == [4, 9]


def finished(*arguments, cwd):
    """A command in a process of its own, run to its end."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300
    )


def test_commands_work_from_any_folder(trained, tmp_path):
    photo = trained.parent / "photos" / "test" / "ant" / "0.png"
    done = finished("-m", "finetune.predict", f"run={trained}", f"input={photo}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "1 images classified" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.csv"]


@pytest.mark.slow
def test_a_killed_run_is_taken_up_again(tmp_path):
    """The real thing: SIGKILL from outside, at a moment of its own choosing."""
    run = tmp_path / "run"
    arguments = [ROOT / "train.py", *SMALL, "epochs=15", "checkpoint.every_n_steps=3",
                 "logger=csv"]  # fmt: skip
    assert finished(*arguments, "hydra.run.dir=whole", cwd=tmp_path).returncode == 0
    with subprocess.Popen(
        [sys.executable, *arguments, "hydra.run.dir=run"], cwd=tmp_path, stdout=subprocess.DEVNULL
    ) as victim:
        while not checkpoint.step_paths(run):
            assert victim.poll() is None
            time.sleep(0.01)
        victim.kill()
    assert facts_of(run)["status"] == "running"
    again = finished(ROOT / "train.py", "resume=run", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    state, whole = (
        checkpoint.read(checkpoint.best_path(folder)).state_dict
        for folder in (run, tmp_path / "whole")
    )
    assert all(torch.equal(state[name], value) for name, value in whole.items())
    curves, expected = (
        sorted(row for row in metrics_of(folder) if not row[1].startswith("time/"))
        for folder in (run, tmp_path / "whole")
    )
    assert curves == expected


@pytest.mark.parametrize(
    ("choices", "weights", "said"),
    [
        (
            {"model": "resnet50", "data": "csv"},
            "DEFAULT",
            "resnet50 with its weights DEFAULT, since",
        ),
        ({"model": "resnet50", "data": "csv"}, None, "resnet50 from scratch, since"),
        ({"model": "tiny", "data": "digits"}, "letters", "tiny, since no model= was given and it"),
    ],
)
def test_a_run_says_which_model_it_took_and_why(choices, weights, said):
    assert why_model([], choices, weights).startswith(said)


def test_export_writes_weights_that_say_what_they_are_for(command, trained, tmp_path):
    done = command("export", f"run={trained}", "output=out/")
    assert done.code == 0, done.err
    file = tmp_path / "out" / "model.safetensors"
    assert str(file.relative_to(tmp_path)) in done.out
    with safe_open(file, "pt") as opened:
        described = {name: json.loads(value) for name, value in opened.metadata().items()
                     if name != "format"}  # fmt: skip
    saved = checkpoint.read(checkpoint.best_path(trained))
    assert described["classes"] == ["ant", "bee", "cat"]
    assert described["input_spec"]["size"] == saved.input_spec.size
    assert described["backbone"]["family"] == "tiny"
    state = load_file(file)
    assert state.keys() == saved.state_dict.keys()
    assert all(torch.equal(state[name], saved.state_dict[name]) for name in state)
    # and the next run starts from it
    done = command(
        "train", *(o for o in SMALL if o != "model.weights=null"), "logger=csv", "max_steps=0",
        f"model.weights={file}",
    )  # fmt: skip
    assert done.code == 0, done.err


def test_export_refuses_a_format_that_it_does_not_know(command, trained):
    done = command("export", f"run={trained}", "format=onnx")
    assert done.code == 1
    assert "format=onnx: must be safetensors" in done.err

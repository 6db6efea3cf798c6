"""Several labels per image: the table, its cuts, the loss and metrics, and all commands."""

import csv as comma_separated
import json
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score

import finetune
from conftest import SMALL, composed, facts_of, finish, plain, series
from finetune import build, checkpoint
from finetune.backbones.run import run
from finetune.data.base import ImageArray, LabelledImages, Splits
from finetune.data.csv import csv
from finetune.data.read import read_image
from finetune.data.split import TRAIN_VAL_TEST, cut_images, limit_train, select_classes
from finetune.errors import ConfigError, DataError
from finetune.tasks.multilabel import MultilabelMetrics

COLOURS = ("blue", "green", "red")


def write_table(folder):
    """labels.csv with 48 images whose channels are bright or not: 6 of each of 8 combinations."""
    generator = np.random.default_rng(0)
    rows = []
    for i, on in enumerate(list(product((0, 1), repeat=3)) * 6):
        pixels = generator.integers(0, 60, (8, 8, 3)) + 180 * np.array(on)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        names = [name for name, bright in zip(("red", "green", "blue"), on, strict=True) if bright]
        rows.append(f"{i}.png,{'; '.join(names)}\n")
    (folder / "labels.csv").write_text("path,label\n" + "".join(rows))
    return folder / "labels.csv"


def several(labels, num_classes):
    array = torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8)
    return LabelledImages.of(ImageArray(array), labels, num_classes)


def held(images, label):
    return sum(label in labels for labels in images.labels)


def test_a_table_with_a_separator_has_any_number_of_labels_per_image(tmp_path):
    write_table(tmp_path)
    table = tmp_path / "few.csv"
    table.write_text("path,label,split\n0.png,red; blue ,train\n1.png,,train\n2.png,blue;red;,val\n"
                     "3.png,green;green,train\n./0.png,blue;red,train\n")  # fmt: skip
    splits = csv(str(table), label_separator=";")
    assert splits.classes == COLOURS
    assert splits.train.labels == ((0, 2), (), (1,))
    assert splits.val.labels == ((0, 2),)
    assert splits.train.targets(3).tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert splits.train[0][1].tolist() == [1, 0, 1]


def test_bad_rows_of_such_a_table_are_told(tmp_path):
    write_table(tmp_path)
    table = tmp_path / "bad.csv"
    table.write_text("path,label\n0.png,a;b\n0.png,a\n1.png,nan\n")
    with pytest.raises(DataError) as error:
        csv(str(table), label_separator=";")
    assert "line 3: labelled 'a' here and 'a, b' in line 2" in str(error.value)
    assert "line 4: '1.png' has the label 'nan'; leave the field empty" in str(error.value)
    table.write_text("path,label\n0.png,\n1.png,;\n")
    with pytest.raises(DataError, match="no row has a label"):
        csv(str(table), label_separator=";")


def test_one_label_per_image_gives_a_target_matrix_too():
    images = LabelledImages.of(ImageArray(torch.zeros(3, 3, 1, 1)), [2, 0, 2])
    assert images.targets(3).tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("seed", range(20))
def test_a_cut_keeps_every_class_in_train_and_common_ones_in_each_part(seed):
    generator = np.random.default_rng(seed)
    num_classes, share = 12, generator.uniform(0.01, 0.5, 12)
    drawn = generator.random((150, num_classes)) < share
    images = several([tuple(np.flatnonzero(row).tolist()) for row in drawn], num_classes)
    parts = cut_images(images, TRAIN_VAL_TEST, seed)
    assert sorted(p for part in parts for p in part) == list(range(150))
    train, val, test = (images.subset(part) for part in parts)
    for label in range(num_classes):
        total = held(images, label)
        assert held(train, label) >= (total > 0)
        if total >= 10:
            assert held(val, label) >= 1
            assert held(test, label) >= 1
    assert abs(len(val) - 0.15 * 150) < num_classes  # rounding, by the rarest class of an image


def test_a_class_that_is_nowhere_the_rarest_is_kept_in_train():
    # class 2 is held by one image each of the rarer 0 and 1, both of which a cut may take
    images = several([(0, 2), (0,), (1, 2), (1,), (), ()], 3)
    for seed in range(30):
        train, _ = (images.subset(part) for part in cut_images(images, (0.5, 0.5), seed))
        assert [held(train, label) > 0 for label in range(3)] == [True] * 3


def test_images_without_a_label_are_cut_too():
    images = several([()] * 20 + [(0,)] * 20, 1)
    parts = cut_images(images, TRAIN_VAL_TEST, 0)
    assert [sum(p < 20 for p in part) for part in parts] == [14, 3, 3]


def test_a_fraction_keeps_every_class_and_shots_are_refused():
    images = several([(0, 2), (0,), (1, 2), (1,)] * 10, 3)
    splits = Splits(("a", "b", "c"), images, None, None)
    for seed in range(20):
        train = limit_train(splits, None, 0.1, seed).train
        assert 4 <= len(train) <= 5  # 2 of 20 for class 0 and for 1, and one for 2 if need be
        assert [held(train, label) > 0 for label in range(3)] == [True] * 3
    with pytest.raises(ConfigError, match=r"data.shots=5: .*; type data.fraction=0.1"):
        limit_train(splits, 5, None, 0)


def test_chosen_classes_are_columns_of_the_targets():
    images = several([(0, 2), (0,), (1, 2), ()], 3)
    after = select_classes(Splits(("a", "b", "c"), images, images, None), ["c", "a"])
    assert after.classes == ("a", "c")
    assert after.train.targets(2).tolist() == images.targets(3)[:, [0, 2]].tolist()
    assert after.val.num_classes == 2


def test_metrics_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 5, generator=generator)
    targets = (torch.rand(60, 5, generator=generator) < 0.3).float()
    targets[:, 3] = 0  # a class without images
    metrics = MultilabelMetrics("val", 5)
    for start in (0, 25, 30):  # uneven batches
        stop = {0: 25, 25: 30, 30: 60}[start]
        metrics.update(logits[start:stop], targets[start:stop])
    present = [0, 1, 2, 4]
    precision = [average_precision_score(targets[:, k], logits[:, k]) for k in present]
    values = metrics.compute()
    assert values.keys() == {"val/loss", "val/map", "val/f1"}
    assert float(values["val/map"]) == pytest.approx(np.mean(precision), abs=1e-6)
    expected = f1_score(targets, logits > 0, average="macro", zero_division=0)
    assert float(values["val/f1"]) == pytest.approx(expected, abs=1e-6)
    share = logits.sigmoid()
    entropy = -(targets * share.log() + (1 - targets) * (1 - share).log())
    assert float(values["val/loss"]) == pytest.approx(float(entropy.mean()), abs=1e-6)
    per_class = metrics.per_class()
    assert per_class.pop(3) is None
    assert per_class == pytest.approx(precision, abs=1e-6)


def test_logits_between_0_and_1_are_logits():
    # torchmetrics takes such a batch for probabilities
    metrics = MultilabelMetrics("val", 2)
    metrics.update(torch.tensor([[0.1, 0.2], [0.3, 0.4]]), torch.ones(2, 2))
    assert float(metrics.compute()["val/f1"]) == 1


@pytest.fixture(scope="module")
def multilabel(tmp_path_factory):
    """A finished run; its table is labels.csv beside it."""
    folder = tmp_path_factory.mktemp("multilabel")
    table = write_table(folder)
    common = [o for o in SMALL if not o.startswith(("data", "epochs"))]
    return finish(
        folder / "run", *common, "data=csv", f"data.table={table}", "data.label_separator=;",
        "task=multilabel", "epochs=4", "optimizer.lr=0.02", "logger=csv", "data.cache=ram",
    )  # fmt: skip


def test_a_run_learns_and_tells_its_metrics(multilabel):
    facts = facts_of(multilabel)
    assert facts["data"]["classes"] == [*COLOURS]
    assert sum(facts["data"]["counts"].values()) == 48
    assert facts["best"]["monitor"] == "val/map"
    assert facts["best"]["value"] == max(series(multilabel, "val/map"))
    assert facts["test"].keys() == {"test/map", "test/f1", "test/loss"}
    assert facts["per_class_average_precision"]["test"].keys() == {*COLOURS}
    precision = facts["per_class_average_precision"]["test"].values()
    assert facts["test"]["test/map"] == pytest.approx(np.mean(list(precision)), abs=1e-6)
    losses = series(multilabel, "train/loss")
    assert losses[-1] < 0.5 < 0.6 < losses[0]  # log 2 is chance
    assert series(multilabel, "train/accuracy") == []
    assert checkpoint.read(checkpoint.best_path(multilabel)).task == "multilabel"


def test_evaluate_gives_the_metrics_of_the_run(command, multilabel, tmp_path):
    done = command("evaluate", f"run={multilabel}", "output=.", "trainer.accelerator=cpu")
    assert done.code == 0, done.err
    measured = json.loads((tmp_path / "metrics.json").read_text())
    for name, value in facts_of(multilabel)["test"].items():
        assert measured[name] == pytest.approx(value, abs=1e-5)
    assert measured["per_class_average_precision"].keys() == {*COLOURS}
    assert "average precision per class on test" in done.out


def test_predict_names_every_class_above_a_half(command, multilabel, tmp_path):
    done = command("predict", f"run={multilabel}", f"input={multilabel.parent}")
    assert done.code == 0, done.err
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(comma_separated.DictReader(file))
    assert len(rows) == 48
    model, transform, classes = finetune.load(multilabel)
    for row in rows:
        with torch.inference_mode():
            image = transform(read_image(multilabel.parent / row["path"]))
            shares = model(image.unsqueeze(0)).sigmoid()[0].tolist()
        above = [name for name, share in zip(classes, shares, strict=True) if share > 0.5]
        assert row["class"] == ";".join(above)
        assert float(row["probability"]) == pytest.approx(max(shares), abs=1e-4)
        assert len(row["top5"].split()) == 3
    assert len({row["class"] for row in rows}) > 2


def test_a_run_with_several_labels_is_the_pretraining_of_another(multilabel):
    theirs = finetune.load(multilabel).model.backbone.state_dict().values()
    assert all(map(torch.equal, run(str(multilabel)).state_dict().values(), theirs))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["task=multilabel"], "one label each; type task=classification, .* data.label_separator"),
        (["data=csv", "data.table={table}", "data.label_separator=';'"], "type task=multilabel"),
        (["data=csv", "data.table={table}", "task=multilabel"], "data.label_separator=';'"),
    ],
)
def test_a_task_that_does_not_fit_the_labels_is_refused(multilabel, overrides, said):
    table = multilabel.parent / "labels.csv"
    table = table if "label_separator" in str(overrides) else write_single(table)
    cfg = composed(*(o.format(table=table) for o in overrides))
    with pytest.raises(ConfigError, match=said):
        build.build_splits(cfg)


def write_single(table):
    """The same images with one label each."""
    path = table.parent / "single.csv"
    path.write_text("path,label\n" + "".join(f"{i}.png,{COLOURS[i % 3]}\n" for i in range(48)))
    return path


def test_the_loss_is_that_of_a_plain_loop():
    cfg = plain("data=csv", "data.table=x", "data.label_separator=';'", "task=multilabel",
                   *(o for o in SMALL if not o.startswith("data")))  # fmt: skip
    model = build.build_model(cfg, COLOURS)
    images = several([(0,), (1, 2), ()], 3)
    task = build.build_task(cfg, model, build.build_budget(cfg, 3), images)
    logits = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0], [0.2, 0.1, -4.0]])
    share = 1 / (1 + (-logits).exp())
    targets = torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0]])
    expected = -torch.where(targets == 1, share, 1 - share).log().sum() / 9
    assert torch.allclose(task.loss(logits, images.targets(3)), expected)

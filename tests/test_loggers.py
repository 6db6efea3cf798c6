"""What a run leaves for the eyes: metrics.csv and the pages of TensorBoard."""

import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import SMALL, facts_of, metrics_of, series
from finetune.loggers import MetricsFile, TensorBoard


def test_metrics_are_rows_that_stand_at_once(tmp_path):
    metrics = MetricsFile(tmp_path)
    metrics.log_metrics({"train/loss": 0.1, "lr/head": 0.01}, step=3)
    assert metrics_of(tmp_path) == [(3, "lr/head", 0.01), (3, "train/loss", 0.1)]


def test_a_resume_drops_what_it_will_log_again(tmp_path):
    first = MetricsFile(tmp_path)
    for step in range(6):
        first.log_metrics({"train/loss": float(step)}, step)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("6,train/lo")  # as a kill leaves it
    again = MetricsFile(tmp_path, resumed_at=4)
    for step in range(4, 8):
        again.log_metrics({"train/loss": float(step)}, step)
    assert metrics_of(tmp_path) == [(step, "train/loss", float(step)) for step in range(8)]


def test_a_fresh_start_begins_an_empty_file(tmp_path):
    (tmp_path / "metrics.csv").write_text("old")
    MetricsFile(tmp_path).log_metrics({"a": 1.0}, 0)
    assert metrics_of(tmp_path) == [(0, "a", 1.0)]


def test_a_number_comes_back_exactly(tmp_path):
    MetricsFile(tmp_path).log_metrics({"a": 1 / 3}, 0)
    assert metrics_of(tmp_path)[0][2] == 1 / 3


@pytest.fixture(scope="module")
def board_and_run(tmp_path_factory):
    from conftest import SMALL, composed
    from finetune.fit import fit

    run = tmp_path_factory.mktemp("board") / "run"
    typed = ["optimizer=sgd", "epochs=6", "trainer.log_every_n_steps=2"]
    fit(composed(*SMALL, *typed), run, typed, "as asked for")
    board = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0})
    return board.Reload(), run


def test_tensorboard_has_the_curves_of_metrics_csv(board_and_run):
    board, run = board_and_run
    expected = {}
    for step, name, value in metrics_of(run):
        expected.setdefault(name, []).append((step, pytest.approx(value, rel=1e-6)))
    curves = {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in expected}
    assert curves == expected
    wanted = "train/loss train/accuracy val/accuracy val/loss val/f1 val/ece test/accuracy"
    assert {*wanted.split(), "lr/head", "lr/layer0", "time/images_per_second"} <= {*expected}


def test_tensorboard_shows_training_images_and_the_confusion_of_val(board_and_run):
    board, _ = board_and_run
    assert set(board.Tags()["images"]) == {"train/augmented", "val/confusion_matrix"}
    (picture,) = board.Images("train/augmented")
    assert min(picture.width, picture.height) > 64


def test_the_hparams_tab_has_the_choices_and_the_test_metrics(board_and_run):
    board, run = board_and_run
    plugin = board.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    chosen = HParamsPluginData.FromString(plugin).session_start_info.hparams
    assert chosen["optimizer"].string_value == "sgd"
    assert chosen["epochs"].number_value == 6
    assert chosen["optimizer.lr"].number_value == facts_of(run)["config"]["optimizer"]["lr"]
    experiment = board.summary_metadata["_hparams_/experiment"].plugin_data.content
    infos = HParamsPluginData.FromString(experiment).experiment.metric_infos
    assert {info.name.tag for info in infos} == set(facts_of(run)["test"])


def test_images_per_second_is_in_run_json(board_and_run):
    facts = facts_of(board_and_run[1])
    assert facts["images_per_second"] > 0


def test_a_resume_purges_later_points_of_tensorboard(tmp_path):
    first = TensorBoard(tmp_path)
    for step in range(6):
        first.log_metrics({"train/loss": float(step)}, step)
    first.save()
    time.sleep(1.1)  # files are read in the order of the seconds in their names
    again = TensorBoard(tmp_path, resumed_at=4)
    for step in range(4, 8):
        again.log_metrics({"train/loss": 10.0 + step}, step)
    again.save()
    for logger in (first, again):
        logger.experiment.close()
    points = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [(e.step, e.value) for e in points] == [
        (0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 14.0), (5, 15.0), (6, 16.0), (7, 17.0),
    ]  # fmt: skip


def test_a_short_run_has_curves_too(train):
    run = train("max_steps=3", "trainer.log_every_n_steps=10")
    assert len(series(run, "train/loss")) == 1


def test_images_per_second_is_measured_where_an_epoch_is_one_batch(train):
    assert facts_of(train("batch_size=64", "epochs=25"))["images_per_second"] > 0


def test_a_model_that_was_not_trained_has_a_confusion_matrix(command, tmp_path):
    assert command("train", *SMALL, "max_steps=0", "hydra.run.dir=run").code == 0
    board = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0}).Reload()
    assert "val/confusion_matrix" in board.Tags()["images"]

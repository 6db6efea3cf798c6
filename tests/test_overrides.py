"""What is typed is held against conf/: every mistake at once, with a suggestion, before torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from finetune.errors import CheckpointError, ConfigError
from finetune.overrides import compose_jobs, quoted, signs_quoted, value_of, with_recorded

ROOT = Path(__file__).parents[1]


def refused(*arguments, command="train"):
    with pytest.raises(ConfigError) as error:
        compose_jobs(command, list(arguments))
    return str(error.value)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("model=resnet51", "model=resnet51: no such option in conf/model/; close: resnet50"),
        ("data=cifar", "close: cifar10, cifar100"),
        ("strategy=qqqq", "strategy=qqqq: no such option in conf/strategy/; there are: full, gra"),
        ("epoch=3", "epoch: no such key; close: epochs"),
        (
            "trainer.device=1",
            "trainer.device: no such key with trainer=default; close: trainer.devices",
        ),
        ("lr=0.1", "lr: no such key; close: optimizer.lr"),
        ("optimzer=adamw", "optimzer: no such key; close: optimizer"),
        ("model.nme=swin_t", "model.nme: no such key with model=tiny"),
        ("experiment=nothing", "experiment=nothing: no such option in conf/experiment/; there are"),
        (
            "strategy@strategy.then=layer_decay",
            "strategy@strategy.then: no such choice with strategy=full; options with it: gradual",
        ),
        ("epochs", "epochs: not of the form key=value"),
        ("epochs=[1", "not of the form key=value"),
        ("resume=Übung", "quoted: \"resume='Übung'\""),
        ("epochs=1,2", "epochs: several values are a sweep; add -m"),
    ],
)
def test_a_mistake_is_named_with_what_is_close(argument, said):
    assert said in refused(argument)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        (
            "strategy@strategy.then=layer_deca",
            "strategy@strategy.then=layer_deca: no such option in conf/strategy/; close: layer",
        ),
        ("strategy@strategy.thn=full", "strategy@strategy.thn: no such choice with strategy=lp_ft; "
         "close: strategy@strategy.then"),
        ("strategy@strategy.then.then=full", "strategy@strategy.then.then: no such choice"),
        ("strategy.then.decay=0.5", "strategy.then.decay: no such key with strategy=lp_ft"),
    ],
)  # fmt: skip
def test_a_mistake_inside_of_a_strategy_is_named_with_what_is_close(argument, said):
    assert said in refused("strategy=lp_ft", argument)


def test_strategies_compose():
    (job,) = compose_jobs("train", ["strategy=lp_ft"])
    assert job.strategy.then == {"_target_": "finetune.strategies.full.Full"}
    inside = ["strategy@strategy.then=layer_decay", "strategy.then.decay=0.5"]
    for typed in (["strategy=lp_ft", *inside], [*inside, "strategy=lp_ft"]):
        (job,) = compose_jobs("train", typed)
        assert (job.strategy.probe_epochs, job.strategy.then.decay) == (None, 0.5)
    (job,) = compose_jobs("train", ["strategy=gradual_unfreeze", "strategy@strategy.then=lp_ft",
                                    "strategy@strategy.then.then=layer_decay"])  # fmt: skip
    assert job.strategy.then.then.decay == 0.75
    jobs = compose_jobs("train", ["-m", "strategy=lp_ft,gradual_unfreeze",
                                  "strategy@strategy.then=full,layer_decay"])  # fmt: skip
    assert ["decay" in job.strategy.then for job in jobs] == [False, True, False, True]


def test_all_mistakes_are_told_at_once():
    message = refused("model=resnet51", "epoch=3", "data=cifr10", "optimizer.lrr=1", "seed")
    assert message.startswith("5 mistakes")
    for part in ("resnet50", "epochs", "cifar10", "optimizer.lr", "seed: not of the form"):
        assert part in message


def test_a_leaf_decides_which_keys_there_are():
    assert "data.root: no such key with data=digits" in refused("data.root=photos")
    jobs = compose_jobs("train", ["data=image_folder", "data.root=photos"])
    assert jobs[0].data.root == "photos"


def test_new_keys_can_be_added_on_purpose():
    (job,) = compose_jobs("train", ["+trainer.profiler=simple", "++epochs=3"])
    assert (job.trainer.profiler, job.epochs) == ("simple", 3)


def test_a_sweep_is_every_combination():
    jobs = compose_jobs("train", ["-m", "model=resnet18,resnet50", "optimizer.lr=0.1,0.2"])
    assert [(job.model.name, job.optimizer.lr) for job in jobs] == [
        ("resnet18", 0.1), ("resnet18", 0.2), ("resnet50", 0.1), ("resnet50", 0.2),
    ]  # fmt: skip
    jobs = compose_jobs("train", ["-m", "seed=range(0,3)"])
    assert [job.seed for job in jobs] == [0, 1, 2]


def test_a_sweep_over_options_checks_each():
    message = refused("-m", "model=resnet18,resnet51", "epoch=1,2")
    assert "model=resnet51" in message
    assert "epoch: no such key" in message


def test_a_folder_of_ones_own_adds_options(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(
        "defaults: [torchvision, _self_]\nname: resnext50_32x4d\n"
    )
    (job,) = compose_jobs("train", ["model=mine", "--config-dir", str(tmp_path)])
    assert job.model.name == "resnext50_32x4d"
    assert "close: mine" in refused("model=mime", "--config-dir", str(tmp_path))


def test_conf_local_sets_any_key_and_what_is_typed_stands_above_it(tmp_path):
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "default.yaml").write_text("batch_size: 7\ntrainer: {devices: 2}\n")
    folder = ["--config-dir", str(tmp_path)]
    (job,) = compose_jobs("train", folder)
    assert (job.batch_size, job.trainer.devices, job.trainer.accelerator) == (7, 2, "auto")
    (job,) = compose_jobs("train", [*folder, "batch_size=9"])
    assert job.batch_size == 9


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_other_commands_know_their_keys_too(command):
    message = refused("run=x", "inputs=y", "splitt=val", command=command)
    assert message.startswith("2 mistakes")
    assert "close: " in message


@pytest.mark.parametrize(
    "value", ["a b", "it's", "a,b", "a=b", "ü.jpg", "[x]", "{y}", "$z", "a\\b", "a\\", "a\\'b"]
)
def test_a_quoted_value_comes_back_as_it_was(value):
    (job,) = compose_jobs("train", ["data=image_folder", f"data.root={quoted(value)}"])
    assert job.data.root == value


@pytest.mark.parametrize("sign", [";", "|", ",", "&", "/"])
def test_a_separator_can_be_typed_as_it_is(sign):
    # data.label_separator=";", whose quotes the shell takes away
    typed = signs_quoted(["data=csv", f"data.label_separator={sign}", "-m", "seed=0,1", "a=''"])
    assert typed[0] + typed[2] + typed[3] + typed[4] == "data=csv-mseed=0,1a=''"
    (job,) = compose_jobs("train", typed[:2])
    assert job.data.label_separator == sign


def test_the_last_value_typed_counts():
    assert value_of("resume", ["resume=a", "x=1", "resume='b c'"]) == "b c"
    assert value_of("resume", ["resumed=a"]) is None
    assert value_of("resume", ["resume=null"]) is None


@pytest.fixture
def run(tmp_path):
    (tmp_path / ".hydra").mkdir()

    def write(*recorded):
        text = "".join(f"- {override}\n" for override in recorded)
        (tmp_path / ".hydra" / "overrides.yaml").write_text(text)
        return tmp_path

    return write


def test_a_resume_takes_what_was_recorded_and_what_is_typed_now(run):
    folder = run("epochs=3", "data=fake")
    arguments = with_recorded([f"resume={folder}", "epochs=5"])
    assert arguments[:2] == ["data=fake", "epochs=5"]
    assert f"hydra.run.dir={folder}" in arguments


def test_a_resume_takes_what_was_chosen_inside_of_a_strategy(run):
    folder = run("strategy=lp_ft", "strategy@strategy.then=layer_decay", "strategy.then.decay=0.5")
    (job,) = compose_jobs("train", with_recorded([f"resume={folder}"]))
    assert job.strategy.then.decay == 0.5


@pytest.mark.parametrize("key", ["+strategy._target_=os.abort", "++model={_target_:os.abort}"])
def test_a_recorded_target_is_refused(run, key):
    with pytest.raises(CheckpointError, match="asks for code to be called, which is refused"):
        with_recorded([f"resume={run('epochs=3', repr(key))}"])


def test_resume_is_not_a_sweep(run):
    with pytest.raises(ConfigError, match="leave out -m"):
        with_recorded(["-m", f"resume={run('epochs=3')}"])


def modules_after(code):
    """Names of the packages that a fresh Python has imported after code."""
    script = f"{code}\nimport sys\nprint(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}


@pytest.mark.parametrize(
    "call",
    [
        "compose_jobs('train', ['model=resnet50', 'data=cifar10', 'epochs=3'])",
        "compose_jobs('train', ['-m', 'optimizer.lr=0.1,0.2'])",
    ],
)
def test_what_was_typed_is_checked_before_torch_is_imported(call):
    modules = modules_after(
        f"import finetune.train, finetune.evaluate, finetune.predict\n"
        f"from finetune.overrides import compose_jobs\n{call}"
    )
    assert "hydra" in modules
    assert not modules & {"torch", "torchvision", "lightning", "matplotlib", "numpy", "PIL"}


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "layers"])
def test_help_answers_without_torch(command):
    script = (
        f"import sys\nsys.argv = ['x', '--help']\nfrom finetune.{command} import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code"
    )
    assert not modules_after(script) & {"torch", "torchvision", "lightning", "matplotlib"}

"""What is typed is held against conf/: every mistake at once, with a suggestion, before torch."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import initialize_config_dir

from finetune.errors import CheckpointError, ConfigError
from finetune.overrides import (
    CONF,
    compose_jobs,
    compose_run,
    help_asked_for,
    prepared,
    signs_quoted,
    value_of,
    with_recorded,
)
from finetune.typed import quoted

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
        ("strategy=qqqq", "strategy=qqqq: no such option in conf/strategy/; there are: auto, full"),
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
            "strategy@strategy.then: no such choice with strategy=auto; options with it: gradual",
        ),
        ("epochs", "epochs: not of the form key=value"),
        ("epochs=[1", "not of the form key=value"),
        ("resume=Übung", "quoted: \"resume='Übung'\""),
        ("epochs=1,2", "epochs: several values are a sweep; add -m"),
        ("=5", "=5: no key before the ="),
        ("data.name=a=b", "must be quoted: \"data.name='a=b'\""),
        ("data.name=it's", "must be quoted: \"data.name='it\\'s'\""),
        ("data.name=a(b", "must be quoted: \"data.name='a(b'\""),
        ("hydra.run.dir=a,b", "add -m; or, if it is one value: \"hydra.run.dir='a,b'\""),
        ("resume=a,b", "resume=a,b: one value only; if it is one: \"resume='a,b'\""),
        ("optimizer.lr=interval(0.1,1)", "a sweep needs its values; type -m optimizer.lr=0.1,"),
        ("hydra.rum.dir=x", "hydra.rum.dir: no such key; close: hydra.run.dir"),
        (
            "optimizer=null",
            "optimizer=null: one must be chosen; there are: adamw, auto, sgd",
        ),
        ("model=null", "model=null: one must be chosen; there are: "),
        ("~optimizer", "~optimizer: one must be chosen; type optimizer=NAME, one of adamw,"),
        ("~optimizer.lr", "~optimizer.lr: no key can be taken out; type optimizer.lr=VALUE"),
        ("~epochs", "~epochs: no key can be taken out; type epochs=VALUE"),
        ("~epocs", "epocs: no such key; close: epochs"),
        ("checkpoint=5", "checkpoint=5: checkpoint holds keys; type checkpoint.every_n_steps="),
        ("checkpoint=null", "checkpoint holds keys"),
        ("checkpoint={every:5}", "checkpoint.every: no such key; close: "),
        ("+epcohs=3", "epcohs: no such key; close: epochs"),
        ("++epcohs=3", "epcohs: no such key; close: epochs"),
        ("+checkpoint.every=3", "checkpoint.every: no such key"),
        ("+epochs=3", "+epochs=3: epochs is there already; type epochs=3"),
        ("+experiment=letters", "experiment is chosen already; type experiment=letters"),
        *(
            (f"{key}=", f"{key}= has no value (a shell variable that is not set?)")
            for key in ("resume", "model.weights", "hydra.run.dir")
        ),
    ],
)
def test_a_mistake_is_named_with_what_is_close(argument, said):
    message = refused(argument)
    assert said in message
    assert "mistakes" not in message


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-m", "--cfg", "job"], "--multirun and --cfg do not go together"),
        (["--resolve"], "--resolve goes with --cfg job"),
        (["-m", "resume=a,b"], "resume= goes on with one run; leave out -m"),
        (["-m", "optimizer=null,sgd"], "optimizer=null: one must be chosen"),
        (["--config-dir", "nowhere"], "--config-dir nowhere: no such folder"),
        (["data=image_folder", "data.root="], "data.root= has no value"),
        (["model=run", "model.path="], "model.path= has no value"),
        (["data=csv", "data.table=a b,c"], "one value: \"data.table='a b,c'\""),
    ],
)
def test_arguments_that_do_not_go_together(arguments, said):
    assert said in refused(*arguments)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("model=tiny", "finetune.evaluate takes the model of the run; there are: model.target"),
        ("+model=tiny", "finetune.evaluate takes the model of the run; there are: model.target"),
        ("optimizer=sgd", "finetune.evaluate takes the optimizer of the run"),
        ("data=fake", "there are: data.root, data.table"),
        ("+trainer.profiler=simple", "trainer.profiler: no such key"),
        ("target=my.Net", "target: no such key; close: model.target"),
        ("run=", "run= has no value"),
        ("output=a,b", "output=a,b: one value only"),
        ("-m", "takes one run at a time"),
    ],
)
def test_evaluate_chooses_nothing_that_the_run_chose(argument, said):
    assert said in refused(argument, command="evaluate")


def test_no_suggestion_is_a_key_that_nobody_types():
    for key in ("augment.target", "augment._targt_"):
        assert "._" not in refused(f"{key}=x").removeprefix(f"{key}:")


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


def test_a_resume_is_submitted_only_if_that_is_typed(run):
    folder = run("epochs=3", "launcher=slurm", "launcher.time=10")
    (here,) = compose_jobs("train", with_recorded([f"resume={folder}"]))
    assert not here.launcher
    typed = ["launcher=slurm", "launcher.time=20"]
    (there,) = compose_jobs("train", with_recorded([f"resume={folder}", *typed]))
    assert there.launcher.time == 20


def test_a_resume_takes_what_was_chosen_inside_of_a_strategy(run):
    folder = run("strategy=lp_ft", "strategy@strategy.then=layer_decay", "strategy.then.decay=0.5")
    (job,) = compose_jobs("train", with_recorded([f"resume={folder}"]))
    assert job.strategy.then.decay == 0.5


@pytest.mark.parametrize("key", ["+strategy._target_=os.abort", "++model={_target_:os.abort}"])
def test_a_recorded_target_is_refused(run, key):
    with pytest.raises(CheckpointError, match="asks for code to be called, which is refused"):
        with_recorded([f"resume={run('epochs=3', repr(key))}"])


def test_resume_is_not_a_sweep(run):
    arguments = with_recorded(["-m", f"resume={run('epochs=3')}"])
    assert "leave out -m" in refused(*prepared("train", arguments))


def test_a_name_of_digits_is_a_path_where_a_path_is_typed():
    arguments = ["data=image_folder", "data.root=2024_01", "hydra.run.dir=5", "seed=7"]
    ready = prepared("train", [*arguments, "-m"])
    assert ready[0] == "-m"
    assert prepared("train", ready) == ready
    (job,) = compose_jobs("train", ready)
    assert (job.data.root, job.seed) == ("2024_01", 7)
    assert value_of("hydra.run.dir", ready) == "5"
    ready = prepared("predict", ["run=5", "input=1e3", "output=true"])
    (job,) = compose_jobs("predict", ready)
    assert (job.run, job.input, job.output) == ("5", "1e3", "true")
    jobs = compose_jobs("train", prepared("train", ["-m", "data=image_folder", "data.root=1,2"]))
    assert [job.data.root for job in jobs] == ["1", "2"]
    assert prepared("train", ["resume=null"]) == ["resume=null"]


def test_null_is_for_a_group_that_is_null_anyway():
    assert prepared("train", ["experiment=null", "epochs=null"]) == ["epochs=null"]
    assert prepared("train", ["optimizer=null"]) == ["optimizer=null"]


def test_a_sweep_takes_options_by_pattern():
    jobs = compose_jobs("train", ["-m", "model=glob(convnext*)", "seed=1,1", "seed=3"])
    assert [job.model.name for job in jobs] == ["convnext_base", "convnext_small", "convnext_tiny"]
    assert {job.seed for job in jobs} == {3}


@pytest.mark.parametrize(
    ("folder", "arguments"),
    [
        ("run", ["hydra.run.dir={0}/run"]),
        ("run", ["++hydra.run.dir={0}/run"]),
        ("sgd/7", ["hydra.run.dir='{0}/${{hydra:runtime.choices.optimizer}}/${{seed}}'", "seed=7"]),
        ("sweep/1", ["-m", "hydra.sweep.dir={0}/sweep", "seed=1,2"]),
        ("sweep/sgd", ["-m", "hydra.sweep.dir={0}/sweep", "hydra.sweep.subdir=sgd"]),
        ("local/run", ["--config-dir", "{0}"]),
    ],
)  # fmt: skip
def test_the_directory_of_a_run_is_not_taken_by_another(tmp_path, folder, arguments):
    arguments = ["optimizer=sgd", *(argument.format(tmp_path) for argument in arguments)]
    (tmp_path / "local").mkdir()
    local = f"hydra: {{run: {{dir: {tmp_path}/local/run}}}}"
    (tmp_path / "local" / "default.yaml").write_text(local)
    run = tmp_path / folder
    run.mkdir(parents=True)
    compose_jobs("train", prepared("train", arguments))  # a folder alone is no run
    (run / "run.json").write_text("{}")
    message = refused(*prepared("train", arguments))
    assert f"{run} already holds a run. To go on with it, type resume={run}; " in message


def test_a_directory_that_is_taken_may_be_looked_at_and_resumed(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    compose_jobs("train", ["--cfg", "job", f"hydra.run.dir={tmp_path}"])
    compose_jobs("train", [f"resume={tmp_path}", f"hydra.run.dir={tmp_path}"])


def test_a_rank_that_was_started_from_outside_may_find_what_the_first_began(tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text("{}")
    monkeypatch.setenv("RANK", "1")
    compose_jobs("train", [f"hydra.run.dir={tmp_path}"])
    monkeypatch.setenv("RANK", "0")
    assert "already holds a run" in refused(f"hydra.run.dir={tmp_path}")


def test_two_jobs_of_a_sweep_do_not_share_a_directory():
    assert "two jobs of the sweep" in refused("-m", "hydra.sweep.subdir=same", "seed=1,2")


def test_a_key_that_the_data_of_a_run_lack_is_named(run):
    folder = run("data=fake", "epochs=3")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        with pytest.raises(ConfigError, match=r"data\.root, data\.table: the run has data=f"):
            compose_run(folder, ["data.root=x", "data.table=y"])
        assert compose_run(folder, ["data.num_images=50", "epochs=4"]).data.num_images == 50
        run("data=gone")
        with pytest.raises(ConfigError, match="does not fit conf/ here"):
            compose_run(folder, [])


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


def test_help_lists_choices_and_keys_but_nothing_that_is_not_typed(tmp_path):
    mine = tmp_path / "model"
    mine.mkdir()
    (mine / "mine.yaml").write_text("defaults: [tiny, _self_]\ninput_size: 12\n")
    text = help_asked_for("train", ["--help", f"--config-dir={tmp_path}", "model=mine", "seed=7"])
    assert "optimizer: adamw, auto, sgd\n" in text
    assert re.search(r"^model: .*, mine, .*, vit_b_16$", text, re.M)
    assert "\nseed: 7\n" in text
    assert "\n  input_size: 12\n" in text
    assert "_target_" not in text
    assert "hydra" not in text
    assert help_asked_for("train", ["seed=7"]) is None

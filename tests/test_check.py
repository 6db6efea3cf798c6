"""Types and ranges of all values are checked before anything is built, all at once."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
import torch
from omegaconf import OmegaConf

from conftest import composed
from finetune import build
from finetune.check import (
    PASSED_BY_BUILD,
    RANGES,
    check_all,
    fits,
    normal_devices,
    problems_of,
    spelled,
)
from finetune.errors import ConfigError
from finetune.machine import usable_cores


def problems(*overrides, command="train"):
    return list(problems_of(composed(*overrides, command=command)))


THEN = ("strategy=lp_ft", "strategy@strategy.then=layer_decay")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("epochs=-1", "epochs=-1: must be a whole number from 1, or null"),
        ("epochs=0", "epochs=0: must be a whole number from 1"),
        ("epochs=1.5", "epochs=1.5: must be a whole number"),
        ("epochs=ten", "epochs=ten: must be a whole number"),
        ("epochs=true", "epochs=true: must be a whole number"),
        ("max_steps=-1", "max_steps=-1: must be a whole number from 0"),
        ("batch_size=0", "batch_size=0: must be a whole number from 1"),
        ("batch_size=null", "batch_size=null: must be a whole number from 1"),
        ("num_workers=-1", "num_workers=-1"),
        ("num_workers=100000", "num_workers=100000: must be a whole number from 0 to"),
        ("seed=-1", "seed=-1"),
        ("seed=4294967296", "seed=4294967296: must be a whole number from 0 to 4294967295"),
        ("seed=99999999999999999999999999", "must be a whole number from 0 to 4294967295"),
        ("deterministic=null", "deterministic=null: must be true or false"),
        ("patience=0", "patience=0"),
        ("features.cache=disk", "features.cache=disk: must be auto or none"),
        ("features.views=0", "features.views=0: must be a whole number of views of each image"),
        ("deterministic=1", "deterministic=1: must be true or false"),
        ("checkpoint.every_n_steps=0", "checkpoint.every_n_steps=0"),
        ("monitor=test/accuracy", "monitor=test/accuracy: must be one of val/accuracy, val/f1"),
        ("data.balance=sample", "data.balance=sample: with task=classification it must be one of"),
        ("monitor=accuracy", "monitor=accuracy: must be one of val/accuracy"),
        ("data.shots=0", "data.shots=0: must be a whole number from 1"),
        ("data.fraction=0", "data.fraction=0: must be a number above 0"),
        ("data.fraction=1.1", "data.fraction=1.1"),
        ("data.classes=[cat]", "data.classes=[cat]: must be a list of two or more different"),
        ("data.classes=[cat,cat]", "data.classes=[cat,cat]: must be a list of two or more"),
        ("data.classes=cat", "data.classes=cat: must be a list of two or more"),
        ("data.classes=[1,1.5]", "data.classes=[1,1.5]: must be a list of two or more"),
        ("model.input_size=0", "model.input_size=0"),
        ("model.input_size=big", "model.input_size=big: must be a whole number or null"),
        ("model.weights=3", "model.weights=3: must be text or null"),
        ("optimizer.lr=0", "optimizer.lr=0: must be a number above 0"),
        ("optimizer.lr=-0.1", "optimizer.lr=-0.1"),
        ("optimizer.lr=nan", "optimizer.lr=nan: must be a number above 0"),
        ("optimizer.lr=inf", "optimizer.lr=inf: must be a number above 0"),
        ("optimizer.lr=fast", "optimizer.lr"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay=-1"),
        ("head.dropout=1", "head.dropout=1: must be a probability below 1, or null"),
        ("head.init=zeros", "head.init=zeros: must be one of random, zero, ridge or null"),
        ("schedule.warmup=1", "schedule.warmup=1: must be a share of the steps"),
        ("schedule.warmup=long", "schedule.warmup=long: must be a number"),
        ("mixup=-0.1", "mixup=-0.1: must be a number from 0, or null"),
        ("cutmix=much", "cutmix=much: must be a number from 0, or null"),
        ("ema=1", "ema=1: must be a number from 0, below 1, or null"),
        ("ema=-0.5", "ema=-0.5: must be a number from 0"),
        ("l2_sp=-1", "l2_sp=-1: must be a number from 0, or null"),
        ("task.label_smoothing=1", "task.label_smoothing=1: must be a share of the target"),
        ("task.label_smoothing=some", "task.label_smoothing=some: must be a number or null"),
        ("model.dropout=1", "model.dropout=1: must be a probability, from 0, below 1, or null"),
        ("model.drop_path=-0.1", "model.drop_path=-0.1: must be a probability"),
        ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches=0"),
        ("trainer.gradient_clip_val=0", "trainer.gradient_clip_val=0"),
        ("trainer.precision=17", "trainer.precision=17: must be one of"),
        ("trainer.devices=0", "trainer.devices=0: there are"),
        ("trainer.devices=9999", "trainer.devices=9999: there are"),
        ("trainer.devices='9999'", "trainer.devices=9999: there are"),
        ("trainer.devices=[0,1,2,3,4]", "a list numbers GPUs; on the CPU type how many, 1 to"),
        ("trainer.devices=-1", "trainer.devices=-1: means all GPUs"),
        ("trainer.devices=abc", "trainer.devices=abc: must be a whole number from 1 to"),
        ("trainer.devices=2.5", "trainer.devices=2.5: must be a whole number from 1 to"),
        ("trainer.devices=null", "trainer.devices=null: must be a whole number from 1 to"),
        ("trainer.devices=true", "trainer.devices=true: must be a whole number from 1 to"),
        ("trainer.strategy=dpp", "trainer.strategy=dpp: close: ddp; must be auto, ddp, fsdp, or"),
        ("trainer.strategy=fsdp_cpu_offload", "needs GPUs; on the CPU there is trainer=ddp_cpu"),
        ("trainer.accelerator=foo", "trainer.accelerator=foo: must be one of auto, cpu, gpu, cuda"),
        ("trainer.precision=17", "trainer.precision=17: must be one of 64, 32, 16, transformer"),
        ("optimizer.momentum=1", "optimizer.momentum=1: must be a number from 0, below 1"),
        ("+trainer.profilr=simple", "trainer.profilr: lightning.Trainer has no such argument; clo"),
        ("++data._target_=no.such.thing", "data._target_: no.such.thing cannot be imported"),
    ],
)
def test_a_value_that_cannot_work_is_named_once_with_what_may_stand(override, said):
    base = ("model=resnet18", "optimizer=sgd", "schedule=cosine", "trainer.accelerator=cpu")
    found = problems(*base, override)
    assert len(found) == 1
    assert said in found[0]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data=fake", "data.image_size=1000000000"], "data.image_size=1000000000: must be pixels"),
        (["data=fake", "data.seed=-1"], "data.seed=-1: must be a whole number from 0 to 42949672"),
        (["data=csv", "data.table=x", "data.split_seed=-1"], "data.split_seed=-1: must be a whole"),
        (
            ["data.fraction=0.1"],
            "data.shots=10 and data.fraction=0.1 both limit train; type data.",
        ),
        (
            ["data=torchvision", "data.name=mnist"],
            "no torchvision set 'mnist'; there are: cifar10",
        ),
        (["data=torchvision", "data.name=cifar"], "set 'cifar'; close: cifar10, cifar100"),
        (
            ["optimizer=adamw", "optimizer.betas=[2,0.9]"],
            "optimizer: AdamW does not take these va",
        ),
        (
            ["optimizer=sgd", "optimizer.nesterov=true", "optimizer.momentum=0"],
            "optimizer: SGD do",
        ),
        (
            ["model=torchvision", "model.name=resnet17"],
            "model.name: no torchvision classifier 're",
        ),
        (["model=resnet18", "model.weights=V3"], "model.weights: resnet18 has no weights 'V3'; ch"),
        (["model=resnet18", "model.weights=no.pt"], "model.weights: no such weights file: no.pt"),
        (["model=tiny", "model.weights=no.pt"], "model.weights: no such weights file: no.pt"),
        (["model=timm", "model.name=resnet17x"], "model.name: no timm model 'resnet17x'; close: "),
        (["model=run", "model.path=nowhere"], "model.path=nowhere is no run directory with weig"),
        (["model=module", "model.target=torch.nn.Line"], "model.target: cannot import 'torch.nn.L"),
        (["model=module", "model.target=torch.nn.Conv2d", "model.weights=a.pt"], "no such weights"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_would_be_refused_later_is_refused_at_once(overrides, said):
    (found,) = problems(*overrides)
    assert said in found


def test_all_that_would_be_refused_later_is_told_together(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "timm", None)
    found = problems(
        "model=timm", "model.name=x", "logger=wandb", "data.fraction=0.5", "trainer.strategy=dpp",
        "optimizer=adamw", "optimizer.betas=[2,0]", "trainer.precision=17", "seed=-1",
    )  # fmt: skip
    assert len(found) == 7
    assert any('pip install -e ".[timm]"' in problem for problem in found)
    assert any('pip install -e ".[wandb]"' in problem for problem in found)


def test_values_that_are_not_chosen_yet_are_not_tried():
    for optimizer in ("adamw", "sgd"):
        cfg = composed(f"optimizer={optimizer}", "optimizer.lr=null", "optimizer.weight_decay=null")
        assert not any("does not take these" in problem for problem in problems_of(cfg))


@pytest.mark.parametrize(
    ("group", "key"), [(g, k) for g in PASSED_BY_BUILD for k in PASSED_BY_BUILD[g]]
)
def test_what_build_sets_itself_is_refused_and_our_key_named(group, key):
    chosen = ("optimizer=sgd", "schedule=cosine", "augment=light", "trainer.accelerator=cpu")
    (found,) = problems(*chosen, f"+{group}.{key}=1")
    ours = PASSED_BY_BUILD[group][key]
    assert found.startswith(f"{group}.{key}: has no effect")
    assert (f"type {ours}=... instead" if ours else "leave it out") in found
    if ours and not ours.startswith("hydra."):
        known, missing = composed("optimizer=sgd"), object()
        assert OmegaConf.select(known, ours, default=missing) is not missing


def test_every_argument_that_build_passes_to_the_trainer_is_known(tmp_path):
    budget = build.Budget(epochs=2, steps_per_epoch=3, max_steps=None)
    typed = "+trainer.profiler=null"  # stands, but for what null and pytorch mean
    cfg = composed("++trainer._target_=builtins.dict", "trainer.accelerator=cpu", typed)
    passed = build.build_trainer(cfg, tmp_path, budget, [], [])
    assert passed.keys() - cfg.trainer.keys() == PASSED_BY_BUILD["trainer"].keys()


def test_a_type_with_choices_lists_each_once():
    (found,) = problems("trainer.precision=17", "trainer.accelerator=cpu")
    listed = found.partition("one of ")[2].removesuffix(" or null").split(", ")
    assert len(listed) == len({*listed})
    assert {"32", "16-mixed", "bf16-mixed"} <= {*listed}


@pytest.mark.parametrize(
    "override",
    [
        "epochs=1", "epochs=null", "max_steps=0", "batch_size=1", "num_workers=0", "data.shots=1",
        "data.fraction=1", "data.fraction=0.001", "data.classes=[a,3]", "optimizer.lr=1",
        "optimizer.lr=1e-5", "monitor=val/loss", "monitor=val/ece", "trainer.precision=bf16-mixed",
        "trainer.gradient_clip_val=1", "model.input_size=64", "schedule.warmup=0",
        "trainer.devices=1", "trainer.devices=auto", "trainer.devices='1'",
        "+trainer.profiler=simple", "trainer.strategy=ddp_find_unused_parameters_true",
        "seed=4294967295", "num_workers=8", "optimizer.nesterov=true",
        "freeze_until=3", "schedule=constant", "schedule=one_cycle", "augment=strong",
        "augment.scale=[0.5,1]",
        "mixup=0", "mixup=0.2", "cutmix=1", "ema=0", "ema=0.999", "l2_sp=0", "l2_sp=0.01",
        "task.label_smoothing=0.1", "model.dropout=0", "model.drop_path=0.3",
    ],
)  # fmt: skip
def test_a_value_that_works_is_let_pass(override):
    base = ("model=resnet18", "optimizer=sgd", "schedule=cosine", "augment=light",
            "trainer.accelerator=cpu", "data.shots=null")  # fmt: skip
    assert problems(*base, override) == []


def test_a_task_says_what_it_measures_and_how_it_is_balanced():
    assert problems("task=multilabel", "monitor=val/map", "data.balance=none") == []
    assert problems("task=multilabel", "monitor=val/accuracy", "data.balance=weights") == [
        "monitor=val/accuracy: must be one of val/map, val/f1, val/loss, or null",
        "data.balance=weights: with task=multilabel it must be none, or null",
    ]
    assert problems("data=csv", "data.table=x", "data.label_separator=''") == [
        "data.label_separator=: must be what stands between the labels, such as ';', or null"
    ]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("strategy=lp_ft", "strategy.probe_epochs=0"), "strategy.probe_epochs=0: must be a whole"),
        (("strategy=lp_ft", "strategy.probe_epochs=1.5"), "strategy.probe_epochs=1.5: must be"),
        (("strategy=lp_ft", "strategy.tune_lr=0"), "strategy.tune_lr=0: must be a factor"),
        (("strategy=layer_decay", "strategy.decay=0"), "strategy.decay=0: must be a number above"),
        (("strategy=layer_decay", "strategy.decay=1.1"), "strategy.decay=1.1: must be a number"),
        (("strategy=gradual_unfreeze", "strategy.every=0"), "strategy.every=0: must be a whole"),
        (("strategy=head_lr", "strategy.backbone=-1"), "strategy.backbone=-1: must be a factor"),
        (("freeze_until=-1",), "freeze_until=-1: must be a whole number of layers, from 0"),
        (("freeze_until=null",), "freeze_until=null: must be a whole number of layers, from 0"),
        # what is chosen inside of a strategy is held against its own signature and ranges
        ((*THEN, "strategy.then.decay=2"), "strategy.then.decay=2: must be a number above 0"),
        ((*THEN, "strategy.then.decay=x"), "strategy.then.decay=x: must be a number"),
        ((*THEN, "+strategy.then.dcay=1"), "has no such argument; close: strategy.then.decay"),
        (
            ("strategy=lp_ft", "strategy@strategy.then=gradual_unfreeze",
             "strategy@strategy.then.then=layer_decay", "strategy.then.then.decay=2"),
            "strategy.then.then.decay=2: must be a number above 0",
        ),
        (
            ("strategy=lp_ft", "strategy.then=layer_decay"),
            "must be Strategy; a choice of conf/strategy/ is typed "
            "strategy@strategy.then=layer_decay",
        ),
        (("strategy=lp_ft", "strategy.then=null"), "strategy.then=null: must be Strategy"),
    ],
)  # fmt: skip
def test_a_strategy_is_checked_with_what_is_inside_of_it(overrides, said):
    (found,) = problems("trainer.accelerator=cpu", *overrides)
    assert said in found


@pytest.mark.parametrize(
    ("option", "override", "said"),
    [
        ("schedule=staircase", "schedule.milestones=[0.6,0.3]", "must be shares of the steps"),
        ("augment=crop", "augment.margin=0.5", "must be a factor on the input size, from 1"),
    ],
)
def test_a_value_of_an_option_that_cannot_work_is_named_once(option, override, said):
    (found,) = problems(option, override)
    assert said in found


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("augment.num_ops=0", "augment.num_ops=0: must be a whole number from 1"),
        ("augment.magnitude=31", "augment.magnitude=31: must be a whole number from 0 to 30"),
        ("augment.magnitude=9.5", "augment.magnitude=9.5: must be a whole number"),
        ("augment.erase=2", "augment.erase=2: must be a probability, from 0 to 1"),
    ],
)
def test_a_value_of_randaugment_that_cannot_work_is_named_once(override, said):
    (found,) = problems("augment=randaugment", override)
    assert said in found


@pytest.mark.parametrize("key", ["ema", "l2_sp"])
def test_what_needs_whole_weights_is_refused_where_they_are_split(key, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpus = ("trainer.accelerator=gpu", "trainer.devices=2")
    (found,) = problems(*gpus, "trainer.strategy=fsdp", f"{key}=0.5")
    assert found == (
        f"{key}=0.5: needs the whole weights on every rank, which trainer.strategy=fsdp splits; "
        f"type trainer.strategy=ddp or {key}=null"
    )
    assert problems(*gpus, "trainer.strategy=fsdp", f"{key}=0") == []
    assert problems(*gpus, "trainer.strategy=ddp", f"{key}=0.5") == []


def test_a_head_that_cannot_be_is_told_with_what_to_type():
    (found,) = problems("head=mlp", "head.hidden=0")
    assert found == "head.hidden=0: must be a whole number from 1, or null"
    (found,) = problems("head=mlp", "head.init=ridge")
    assert found.startswith("head.init=ridge: ")
    assert found.endswith("head=linear")
    (found,) = problems("model=resnet18", "head=keep", "model.weights=null")
    assert found.startswith("model.weights=null: ")
    assert found.endswith("head=linear")
    assert problems("model=resnet18", "head=keep") == []
    assert not any("head" in p for p in problems("model=run", "model.path=x", "head=keep"))
    assert problems("head.init=ridge", "head.dropout=0.5") == []


def test_all_problems_are_told_at_once():
    first = composed("epochs=-1", "batch_size=0", "data=image_folder")
    second = composed("epochs=-1", "optimizer.lr=-1")
    with pytest.raises(ConfigError) as error:
        check_all([first, second])
    message = str(error.value)
    assert message.startswith("4 values cannot work")  # epochs=-1 once
    for part in ("epochs=-1", "batch_size=0", "data.root has no value; type data.root=", "lr=-1"):
        assert part in message


def test_one_problem_is_one_line():
    with pytest.raises(ConfigError, match=r"^epochs=-1"):
        check_all([composed("epochs=-1")])
    check_all([composed()])


def test_more_devices_than_there_are_is_told_with_their_number():
    cores = usable_cores()
    found = problems("trainer.accelerator=cpu", f"trainer.devices={cores + 1}")
    assert found == [
        f"trainer.devices={cores + 1}: there are {cores} CPU cores here; type 1 to {cores}"
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_a_gpu_that_is_not_there_is_told():
    (found,) = problems("trainer.accelerator=gpu")
    assert "no GPU that torch can use; type cpu" in found
    (found,) = problems("trainer=default", "trainer.strategy=fsdp")
    assert "trainer=ddp_cpu" in found


def test_other_commands_are_checked_too():
    found = problems("run=x", "split=train", command="evaluate")
    assert found == ["split=train: must be val or test"]
    found = problems("run=x", "input=y", "strict=maybe", "batch_size=0", command="predict")
    assert len(found) == 2
    found = problems("run=x", "input=null", "accelerator=gup", command="predict")
    assert found == ["accelerator=gup: must be auto, cpu or gpu", "input=null: must be a path"]
    (found,) = problems("run=x", "trainer.precision=17", command="evaluate")
    assert found.startswith("trainer.precision=17: must be one of")


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        (2, 2), ("2", 2), (-1, -1), ("-1", -1), ("auto", "auto"), ("0,2", [0, 2]), ("1,", [1]),
        ([0, 3], [0, 3]), ([], []), ("", None), ("abc", None), ("1,x", None), (1.5, None),
        (True, None), (None, None), ([0, "x"], None), ([-1], None),
    ],
)  # fmt: skip
def test_devices_are_read_as_lightning_reads_them(typed, read):
    assert normal_devices(typed) == read


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        ("[0,3]", None), ("'0,3'", None), ("-1", None), ("auto", None), ("4", None), ("'4'", None),
        ("[0,4]", "[0,4]: must be different numbers from 0 to 3"), ("[1,1]", "must be different"),
        ("[]", "must be different numbers"), ("5", "5: there are 4 GPUs here; type 1 to 4"),
        ("x", "x: must be a whole number from 1 to 4, or auto, or a list of GPUs such as [0,1]"),
    ],
)  # fmt: skip
def test_gpus_are_counted(monkeypatch, devices, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    found = problems("trainer.accelerator=gpu", f"trainer.devices={devices}")
    assert len(found) == (said is not None)
    if said:
        assert said in found[0]
    else:
        cfg = composed("trainer.accelerator=gpu", f"trainer.devices={devices}")
        assert build.num_devices(cfg) == (2 if "3" in devices else 4)


def test_every_range_belongs_to_a_key_that_some_config_has():
    configs = [composed(), composed("run=x", command="evaluate"),
               composed("run=x", "input=y", command="predict"), composed("data=fake"),
               composed("augment=strong", "optimizer=sgd", "schedule=cosine"),
               composed("data=csv", "data.table=x"), composed("schedule=one_cycle", *THEN),
               composed("strategy=layer_decay"),
               composed("strategy=gradual_unfreeze"), composed("strategy=head_lr"),
               composed("augment=randaugment", "optimizer=sgd", "schedule=cosine",
                        "model=resnet18"),
               composed("head=mlp"), composed("schedule=staircase"), composed("augment=crop"),
               composed("runs=[x]", command="soup"), composed("launcher=slurm"),
               composed("run=x", command="export")]  # fmt: skip
    missing = object()
    for key, *_ in RANGES:
        assert any(OmegaConf.select(c, key, default=missing) is not missing for c in configs), key


@pytest.mark.parametrize(
    ("value", "hint", "good"),
    [
        (1, int, True), (1.0, int, False), (True, int, False), (1, float, True),
        ("1", float, False), (None, int | None, True), ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False), ([1, 2.5], tuple[float, float], True),
        ([1], tuple[float, float], False), ([1, 2], tuple[int, ...], True),
        (["a"], tuple[int, ...], False), ([1], list[int], True), ("x", list[int], False),
        ([], Sequence[int], True), (3, Any, True), ("x", torch.device, False),
        ("x", torch.device | str, True), (1, Callable[[int], int], True),
    ],
)  # fmt: skip
def test_what_fits_a_type(value, hint, good):
    assert fits(value, hint) is good


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (int | None, "a whole number or null"),
        (tuple[float, float], "[a number, a number]"),
        (Literal["a", 3], "one of a, 3"),
        (list[int], "a list of a whole number"),
        (str | torch.device, "text"),
        (Literal[1, "a"] | Literal["1"] | None, "one of 1, a or null"),
    ],
)
def test_a_type_in_words(hint, text):
    assert spelled(hint) == text

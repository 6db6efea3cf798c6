"""Types and ranges of all values are checked before anything is built, all at once."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
import torch
from omegaconf import OmegaConf

from conftest import composed
from finetune.check import RANGES, check_all, fits, problems_of, spelled
from finetune.datamodule import usable_cores
from finetune.errors import ConfigError


def problems(*overrides, command="train"):
    return list(problems_of(composed(*overrides, command=command)))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("epochs=-1", "epochs=-1: must be a whole number from 1, or null"),
        ("epochs=0", "epochs=0: must be a whole number from 1"),
        ("epochs=1.5", "epochs=1.5: must be a whole number"),
        ("epochs=ten", "epochs=ten: must be a whole number"),
        ("epochs=true", "epochs=True: must be a whole number"),
        ("max_steps=-1", "max_steps=-1: must be a whole number from 0"),
        ("batch_size=0", "batch_size=0: must be a whole number from 1"),
        ("batch_size=null", "batch_size=None: must be a whole number from 1"),
        ("num_workers=-1", "num_workers=-1"),
        ("seed=-1", "seed=-1"),
        ("patience=0", "patience=0"),
        ("deterministic=1", "deterministic=1: must be true or false"),
        ("checkpoint.every_n_steps=0", "checkpoint.every_n_steps=0"),
        ("monitor=test/accuracy", "monitor=test/accuracy: must be one of val/accuracy, val/f1"),
        ("monitor=accuracy", "monitor=accuracy: must be one of val/accuracy"),
        ("data.shots=0", "data.shots=0: must be a whole number from 1"),
        ("data.fraction=0", "data.fraction=0: must be a number above 0"),
        ("data.fraction=1.1", "data.fraction=1.1"),
        ("model.input_size=0", "model.input_size=0"),
        ("model.input_size=big", "model.input_size='big': must be a whole number or null"),
        ("model.weights=3", "model.weights=3: must be text or null"),
        ("optimizer.lr=0", "optimizer.lr=0: must be a number above 0"),
        ("optimizer.lr=-0.1", "optimizer.lr=-0.1"),
        ("optimizer.lr=nan", "optimizer.lr=nan: must be a number above 0"),
        ("optimizer.lr=inf", "optimizer.lr=inf: must be a number above 0"),
        ("optimizer.lr=fast", "optimizer.lr"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay=-1"),
        ("head.dropout=1", "head.dropout=1: must be a probability below 1, or null"),
        ("head.init=zeros", "head.init='zeros': must be one of random, zero, ridge or null"),
        ("schedule.warmup=1", "schedule.warmup=1: must be a share of the steps"),
        ("schedule.warmup=long", "schedule.warmup='long': must be a number"),
        ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches=0"),
        ("trainer.gradient_clip_val=0", "trainer.gradient_clip_val=0"),
        ("trainer.precision=17", "trainer.precision=17: must be one of"),
        ("trainer.devices=0", "trainer.devices=0: there are"),
        ("trainer.devices=99", "trainer.devices=99: there are"),
        ("+trainer.profilr=simple", "trainer.profilr: lightning.Trainer has no such argument; clo"),
        ("++data._target_=no.such.thing", "data._target_: no.such.thing cannot be imported"),
    ],
)
def test_a_value_that_cannot_work_is_named_once_with_what_may_stand(override, said):
    found = problems("optimizer=sgd", "schedule=cosine", "trainer.accelerator=cpu", override)
    assert len(found) == 1
    assert said in found[0]


@pytest.mark.parametrize(
    "override",
    [
        "epochs=1", "epochs=null", "max_steps=0", "batch_size=1", "num_workers=0", "data.shots=1",
        "data.fraction=1", "data.fraction=0.001", "optimizer.lr=1", "optimizer.lr=1e-5",
        "monitor=val/loss", "monitor=val/ece", "trainer.precision=bf16-mixed",
        "trainer.gradient_clip_val=1", "model.input_size=64", "schedule.warmup=0",
        "trainer.devices=1", "trainer.devices=auto", "+trainer.profiler=simple",
        "schedule=constant", "augment=strong", "augment.scale=[0.5,1]",
    ],
)  # fmt: skip
def test_a_value_that_works_is_let_pass(override):
    base = ("optimizer=sgd", "schedule=cosine", "augment=light", "trainer.accelerator=cpu")
    assert problems(*base, override) == []


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
    assert problems("model=run", "model.path=logs/run", "head=keep") == []
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


def test_every_range_belongs_to_a_key_that_some_config_has():
    configs = [composed(), composed("run=x", command="evaluate"),
               composed("run=x", "input=y", command="predict"), composed("data=fake"),
               composed("augment=strong", "optimizer=sgd", "schedule=cosine"),
               composed("head=mlp")]  # fmt: skip
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
    ],
)
def test_a_type_in_words(hint, text):
    assert spelled(hint) == text

"""Each leaf of conf/data calls its function with exactly the keys that it takes."""

import importlib
import inspect
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from finetune.check import COMMON_DATA_KEYS

CONF = Path(__file__).parents[1] / "conf"
LEAVES = sorted(path.stem for path in CONF.glob("data/*.yaml") if path.stem != "base")


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_has_the_arguments_of_its_function_and_opens_with_what_it_is(leaf):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        keys = OmegaConf.to_container(compose("train", [f"data={leaf}"]).data)
    module, name = keys.pop("_target_").rsplit(".", 1)
    function = getattr(importlib.import_module(module), name)
    assert {*inspect.signature(function).parameters, *COMMON_DATA_KEYS} == set(keys)
    assert (CONF / "data" / f"{leaf}.yaml").read_text().startswith("# ")

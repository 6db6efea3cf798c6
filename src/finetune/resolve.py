"""Fills what a config leaves open, null or auto, by its recipe; what the user set stands."""

import logging
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from finetune import recipes
from finetune.backbones.base import kind_of, reordering_pays
from finetune.check import is_sharded, on_gpu, on_mps
from finetune.data.base import Splits
from finetune.data.cache import sizes_of_some
from finetune.model import Classifier
from finetune.overrides import CONF
from finetune.recipes import Choice, DataFacts, ModelFacts

log = logging.getLogger(__name__)

GROUPS = ("optimizer", "schedule", "strategy", "augment")  # those with an option auto
BUDGET = ("epochs", "max_steps")  # one of them is enough


def data_facts(cfg: DictConfig, splits: Splits, num_devices: int) -> DataFacts:
    """What a recipe must know of the data."""
    train = splits.train
    sizes = sizes_of_some(train)
    if not sizes:
        train[0]  # which says what is wrong with it
    return DataFacts(
        num_images=len(train),
        image_area=int(median(height * width for height, width in sizes)),
        batch=cfg.batch_size * num_devices,
        accumulate=cfg.trainer.accumulate_grad_batches,
        single_label=train.num_classes is None,
        bf16=on_gpu(cfg) and torch.cuda.is_bf16_supported(including_emulation=False),
    )


def model_facts(cfg: DictConfig, model: Classifier) -> ModelFacts:
    """What a recipe must know of the model."""
    net, size = model.backbone.net, model.input_spec.size
    # a network of one's own may take its order for granted, as .view does
    fixed = is_sharded(cfg) or on_mps(cfg) or class_name(cfg.model) == "module"
    return ModelFacts(
        kind=kind_of(net),
        pretrained="weights" not in cfg.model or cfg.model.weights is not None,
        num_parameters=model.backbone.num_parameters,
        linear_head=class_name(cfg.head) == "linear",
        probe=class_name(cfg.strategy) == "linearprobe",
        optimizer=class_name(cfg.optimizer),
        sharded=is_sharded(cfg),
        unordered=fixed or not (on_gpu(cfg) or reordering_pays(net, size)),
    )


def class_name(node: DictConfig) -> str | None:
    """What a node calls, without its modules and in lower case; None if that is open."""
    target = node.get("_target_")
    return target and str(target).rsplit(".", 1)[-1].lower()


def fill(cfg: DictConfig, choices: Sequence[Choice]) -> list[Choice]:
    """Set what is open in cfg, in place; the choices that were taken."""
    OmegaConf.set_struct(cfg, False)
    taken = []
    ours: set[str] = set()  # keys of options chosen here, whose values nobody else has set
    for choice in choices:
        if choice.key in GROUPS:
            if cfg[choice.key].get("_target_") is not None:
                continue
            asked = {name for name, value in cfg[choice.key].items() if value is not None}
            cfg[choice.key] = _with_asked(choice, cfg[choice.key])
            ours |= {f"{choice.key}.{name}" for name in cfg[choice.key] if name not in asked}
        elif choice.key in BUDGET and any(cfg[key] is not None for key in BUDGET):
            continue
        elif choice.key in ours or OmegaConf.select(cfg, choice.key, default="no such key") is None:
            OmegaConf.update(cfg, choice.key, choice.value)
            ours.discard(choice.key)
        else:
            continue
        taken.append(choice)
    return taken


def _with_asked(choice: Choice, asked: DictConfig) -> DictConfig:
    """conf/<group>/<option>.yaml, and what was set beside auto."""
    node = leaf(choice.key, choice.value)
    for key, value in asked.items():
        if value is None:
            continue
        if key in node:
            node[key] = value
        else:
            log.warning(
                "%s.%s=%s has no effect with %s=%s",
                choice.key, key, value, choice.key, choice.value,
            )  # fmt: skip
    return node


def leaf(group: str, option: str) -> DictConfig:
    """The config of conf/<group>/<option>.yaml, what it inherits included."""
    path, name = CONF / group / f"{option}.yaml", f"{group}/{option}"
    if path.exists():
        node: DictConfig = DictConfig(OmegaConf.load(path))
        if "defaults" not in node:  # a thirtieth of the time that Hydra takes
            return node
    if GlobalHydra.instance().is_initialized():
        node = compose(name)[group]
    else:  # in a rank that was started with a config
        with initialize_config_dir(str(CONF), version_base="1.3"):
            node = compose(name)[group]
    OmegaConf.set_struct(node, False)
    return node


def fill_plainly(cfg: DictConfig) -> None:
    """Set what is open to plain values, where nothing is trained."""
    data = DataFacts(num_images=1, image_area=1, batch=1)
    model = ModelFacts(kind="CNN", pretrained=True, num_parameters=1)
    fill(cfg, recipes.none(data, model))


def told(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """The choices for run.json."""
    return [{"key": c.key, "value": c.value, "why": c.why} for c in choices]


def is_open(key: str, now: Mapping[str, Any], chosen: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a flat key of a config is left to the recipe, which chose it or its group before."""
    keys = {choice["key"] for choice in chosen}
    return now.get(key) is None and bool(keys & {key, key.split(".", 1)[0]})

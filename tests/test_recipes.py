"""A recipe chooses what is open, says why, and lets stand what the user set, wherever it is set."""

from dataclasses import replace

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torchvision import models

from conftest import SMALL, composed, facts_of
from finetune import build, recipes, resolve
from finetune.backbones.base import kind_of, reordering_pays
from finetune.backbones.tiny import tiny
from finetune.overrides import CONF
from finetune.recipes import DataFacts, ModelFacts

PHOTOS = DataFacts(num_images=1020, image_area=500 * 375, batch=64)
RESNET = ModelFacts(kind="CNN with BatchNorm", pretrained=True, num_parameters=23_508_032)
VIT = ModelFacts(kind="transformer", pretrained=True, num_parameters=85_800_000)
OWN = ["model=module", "model.target=nets.Cnn", "model.input_size=8"]
EVERY = {name: getattr(recipes, name) for name in ("auto", "textbook", "bit", "none")}


def chosen(recipe, data=PHOTOS, model=RESNET):
    """Key to value; of two choices for a key the first is taken."""
    choices = recipe(data, None) + recipe(data, model)
    return {choice.key: choice.value for choice in reversed(choices)}


# Kolesnikov et al. 2020, Big Transfer, section 3.3, and the repository's bit_hyperrule.py
@pytest.mark.parametrize(
    ("num_images", "steps", "warmup", "milestones", "mixup"),
    [
        (1, 500, 100, [200, 300, 400], None),
        (19_999, 500, 100, [200, 300, 400], None),
        (20_000, 10_000, 500, [3000, 6000, 9000], 0.1),
        (499_999, 10_000, 500, [3000, 6000, 9000], 0.1),
        (500_000, 20_000, 500, [6000, 12_000, 18_000], 0.1),
    ],
)
def test_bit_has_the_published_budgets(num_images, steps, warmup, milestones, mixup):
    values = chosen(recipes.bit, replace(PHOTOS, num_images=num_images))
    assert values["max_steps"] == steps
    assert round(values["schedule.warmup"] * steps) == warmup
    assert [round(m * steps) for m in values["schedule.milestones"]] == milestones
    assert values["mixup"] == mixup


@pytest.mark.parametrize(
    ("area", "crop", "resize"),
    [(32 * 32, 128, 160), (96 * 96 - 1, 128, 160), (96 * 96, 480, 512), (500 * 375, 480, 512)],
)
def test_bit_has_the_published_resolutions(area, crop, resize):
    values = chosen(recipes.bit, replace(PHOTOS, image_area=area))
    assert values["model.input_size"] == crop
    assert round(crop * values["augment.margin"]) == resize


@pytest.mark.parametrize("batch", [64, 128, 512, 48])
def test_bit_takes_batches_of_512_or_scales_its_lr(batch):
    values = chosen(recipes.bit, replace(PHOTOS, batch=batch))
    images = batch * values["trainer.accumulate_grad_batches"]
    assert 512 <= images < 512 + batch
    assert values["optimizer.lr"] == pytest.approx(0.003 * images / 512)
    values = chosen(recipes.bit, replace(PHOTOS, batch=batch, accumulate=1))
    assert values["optimizer.lr"] == pytest.approx(0.003 * batch / 512)
    assert (values["optimizer"], values["optimizer.weight_decay"]) == ("sgd", 0.0)
    assert values["head.init"] == "zero"


def test_textbook_is_the_plainest():
    values = chosen(recipes.textbook)
    assert (values["optimizer"], values["optimizer.lr"]) == ("sgd", 0.001)
    assert (values["schedule"], values["strategy"], values["augment"]) == (
        "constant", "full", "none",
    )  # fmt: skip
    assert (values["optimizer.weight_decay"], values["schedule.warmup"]) == (0.0, 0.0)
    assert values["head.init"] == "random"
    off = {"mixup", "cutmix", "ema", "l2_sp", "task.label_smoothing", "trainer.gradient_clip_val"}
    assert not off & values.keys()


def test_hardware_decides_precision_in_auto_alone():
    assert chosen(recipes.auto, replace(PHOTOS, bf16=True))["trainer.precision"] == "bf16-mixed"
    assert chosen(recipes.textbook, replace(PHOTOS, bf16=True))["trainer.precision"] == "32-true"


@pytest.mark.parametrize("recipe", [recipes.auto, recipes.textbook, recipes.bit, recipes.none])
def test_every_recipe_takes_the_order_that_convolutions_are_fastest_in(recipe):
    small = replace(RESNET, num_parameters=300_000)
    for model in (RESNET, VIT, small, replace(RESNET, unordered=True)):
        assert chosen(recipe, PHOTOS, model).get("channels_last", False) == (model is RESNET)


def test_a_network_of_ones_own_keeps_its_memory_order():
    tiny_at_64 = ["model=tiny", "model.weights=null", "model.input_size=64"]
    for model, expected in ((tiny_at_64, False), (OWN, True)):
        cfg = composed(*(o for o in SMALL if not o.startswith("model")), *model)
        facts = resolve.model_facts(cfg, build.build_model(cfg, ("a", "b")))
        assert facts.unordered == expected


@pytest.mark.parametrize(
    ("name", "size", "pays"),
    [
        ("resnet18", 32, False), ("resnet18", 64, True), ("vgg11", 32, False),
        ("resnet50", 32, True), ("mobilenet_v3_small", 32, True),
    ],
)  # fmt: skip
def test_on_a_cpu_small_images_under_wide_kernels_keep_their_order(name, size, pays):
    with torch.device("meta"):
        assert reordering_pays(models.get_model(name), size) == pays


def test_auto_trains_longer_on_more_images():
    steps = [recipes.auto_steps(n) for n in (10, 300, 1020, 3000, 19_999, 20_000, 500_000)]
    assert steps == sorted(steps)
    assert steps[0] == 500
    assert steps[2] == 1530
    assert chosen(recipes.auto)["epochs"] == pytest.approx(1530 * 64 / 1020, rel=0.1)


def test_auto_tells_networks_apart():
    assert chosen(recipes.auto, model=RESNET)["optimizer"] == "sgd"
    assert chosen(recipes.auto, model=VIT)["optimizer"] == "adamw"
    assert chosen(recipes.auto, model=VIT)["strategy"] == "layer_decay"
    scratch = chosen(recipes.auto, model=replace(VIT, pretrained=False))
    assert scratch["strategy"] == "full"
    assert scratch.get("head.init") is None


def test_auto_smooths_the_labels_of_small_networks_and_keeps_averages_whole():
    small = replace(RESNET, num_parameters=300_000)
    assert chosen(recipes.auto, model=small)["task.label_smoothing"] == 0.1
    several = replace(PHOTOS, single_label=False)
    assert "task.label_smoothing" not in chosen(recipes.auto, several, small)
    assert chosen(recipes.auto)["ema"] == 0.999
    assert "ema" not in chosen(recipes.auto, model=replace(RESNET, sharded=True))


def test_auto_takes_the_lr_of_the_optimizer_that_was_asked_for():
    rows = recipes.ROWS["pretrained CNN with BatchNorm"].lr
    at_128 = replace(PHOTOS, batch=128)
    asked = chosen(recipes.auto, at_128, replace(RESNET, optimizer="adamw"))
    assert asked["optimizer.lr"] == rows["adamw"]
    assert chosen(recipes.auto, at_128)["optimizer.lr"] == rows["sgd"]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("model", [RESNET, VIT, replace(VIT, kind="CNN"), replace(
    RESNET, num_parameters=300_000), replace(RESNET, pretrained=False), replace(RESNET, probe=True),
])  # fmt: skip
def test_a_recipe_with_plain_values_below_leaves_nothing_open(name, model):
    cfg = composed("data=fake", "model=resnet18")
    resolve.fill(cfg, EVERY[name](PHOTOS, None))
    resolve.fill(cfg, EVERY[name](PHOTOS, model))
    resolve.fill(cfg, recipes.none(PHOTOS, model))
    for group in resolve.GROUPS:
        assert cfg[group]._target_
    for key in ("optimizer.lr", "optimizer.weight_decay", "schedule.warmup",
                "trainer.accumulate_grad_batches"):  # fmt: skip
        group, name = key.split(".")
        assert cfg[group][name] is not None
    assert cfg.epochs or cfg.max_steps


@pytest.mark.parametrize("name", EVERY)
def test_every_choice_has_a_reason(name):
    for choice in EVERY[name](PHOTOS, None) + EVERY[name](PHOTOS, RESNET):
        assert choice.why


def test_what_the_user_set_stands():
    cfg = composed(
        "data=fake", "optimizer.lr=0.5", "schedule=linear", "epochs=3", "augment.flip=false"
    )
    taken = resolve.fill(cfg, recipes.auto(PHOTOS, RESNET))
    assert cfg.optimizer.lr == 0.5
    assert cfg.schedule._target_ == "finetune.schedules.linear"
    assert (cfg.epochs, cfg.max_steps) == (3, None)
    assert (cfg.augment.flip, cfg.augment.scale) == (False, [0.2, 1.0])
    keys = {choice.key for choice in taken}
    assert not keys & {"optimizer.lr", "schedule", "epochs", "max_steps"}
    assert {"optimizer", "schedule.warmup", "augment"} <= keys


def test_what_an_experiment_sets_stands(tmp_path):
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [override /strategy: full]\noptimizer: {lr: 0.25}\n"
    )
    cfg = composed(
        "data=fake", f"hydra.searchpath=[{tmp_path}]", "experiment=mine", "model=resnet18"
    )
    resolve.fill(cfg, recipes.auto(PHOTOS, RESNET))
    assert cfg.optimizer.lr == 0.25
    assert cfg.strategy._target_.endswith("Full")


def test_a_value_that_the_chosen_option_does_not_take_warns(caplog):
    cfg = composed("data=fake", "augment.flip=false")
    resolve.fill(cfg, recipes.textbook(PHOTOS, RESNET))
    assert "augment.flip=False has no effect with augment=none" in caplog.text


def test_a_network_is_known_by_its_norm_and_its_attention():
    assert kind_of(tiny(weights=None).net) == "CNN with BatchNorm"
    assert kind_of(models.convnext_tiny()) == "CNN"
    assert kind_of(models.swin_t()) == "transformer"
    timm = pytest.importorskip("timm")
    assert kind_of(timm.create_model("vit_tiny_patch16_224")) == "transformer"
    assert kind_of(timm.create_model("convnext_atto")) == "CNN"


def test_the_choices_are_told_and_kept(command, tmp_path):
    small = [o for o in SMALL if o != "recipe=none"]
    done = command("train", *small, "hydra.run.dir=run", "logger=csv", "optimizer.lr=0.003")
    assert done.code == 0, done.err
    facts = facts_of(tmp_path / "run")
    told = {choice["key"]: choice for choice in facts["recipe"]}
    assert told["schedule"]["value"] == "cosine"
    assert f"recipe: schedule=cosine ({told['schedule']['why']})" in done.out
    assert "optimizer.lr" not in told
    assert facts["config"]["optimizer"]["lr"] == 0.003
    assert facts["config"]["schedule"]["warmup"] == told["schedule.warmup"]["value"]


def test_auto_starts_a_pretrained_network_as_a_linear_probe_and_averages_it():
    values = chosen(recipes.auto)
    assert (values["head.init"], values["ema"]) == ("ridge", 0.999)
    for other in (
        chosen(recipes.auto, model=replace(RESNET, pretrained=False)),
        chosen(recipes.auto, model=replace(RESNET, linear_head=False)),
        chosen(recipes.auto, replace(PHOTOS, single_label=False)),
    ):
        assert "head.init" not in other
    small = chosen(recipes.auto, model=replace(RESNET, num_parameters=300_000))
    assert not {"head.init", "ema"} & small.keys()


@pytest.mark.parametrize("group", resolve.GROUPS)
def test_what_a_recipe_takes_is_what_hydra_composes(group):
    options = [path.stem for path in sorted((CONF / group).glob("*.yaml"))]
    assert len(options) > 2
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for option in options:
            composed = compose(f"{group}/{option}")[group]
            taken = resolve.leaf(group, option)
            assert OmegaConf.to_container(taken) == OmegaConf.to_container(composed), option

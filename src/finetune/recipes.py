"""How to fine-tune, from what is known of data and model: the rules in one table, with reasons.

A recipe is a pure function of facts. What it chooses fills a key that is null in the config; what
the user set, wherever it is set, stands.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any

from finetune.backbones.base import Kind


@dataclass(frozen=True)
class DataFacts:
    """What is known before the model is built.

    num_images: for training. image_area: median of H * W, in pixels. batch: images per forward
    pass, all devices together. accumulate: batches per optimizer step; None is the recipe's choice.
    single_label: one class per image, whose head can be solved for. bf16: the device has it.
    """

    num_images: int
    image_area: int
    batch: int
    accumulate: int | None = None
    single_label: bool = True
    bf16: bool = False

    def epochs(self, steps: int, accumulate: int = 1) -> int:
        """Epochs that hold so many optimizer steps."""
        batches = ceil(self.num_images / self.batch)
        return ceil(steps / ceil(batches / accumulate))


@dataclass(frozen=True)
class ModelFacts:
    """The backbone, and what the user decided of it.

    optimizer: class name in lower case. sharded: no device holds all of the weights. unordered:
    the order of weights in memory must stay, or nothing is won by another.
    """

    kind: Kind
    pretrained: bool
    num_parameters: int
    probe: bool = False  # only the head trains
    linear_head: bool = True
    optimizer: str | None = None
    sharded: bool = False
    unordered: bool = False


@dataclass(frozen=True)
class Choice:
    """One decision. key: of the config, or a group. why: the reason and its source."""

    key: str
    value: Any
    why: str


# model: None before it is built, when only keys of model.* can still be chosen.
Recipe = Callable[[DataFacts, ModelFacts | None], list[Choice]]


@dataclass(frozen=True)
class Row:
    """How one kind of network is trained.

    lr: of the head, at a batch of 128; of each optimizer that may be asked for, the first being
    the default. strategy: with its one argument, a factor on the lr of the backbone's layers.
    """

    lr: dict[str, float]
    weight_decay: float
    strategy: tuple[str, str, float] | None
    source: str


# The table of recipe=auto. --------------------------------------------------------------------
BACKBONE = "strategy.backbone"
DECAY = "strategy.decay"
# fmt: off
ROWS: dict[str, Row] = {
    "pretrained CNN with BatchNorm": Row(
        {"sgd": 2e-2, "adamw": 1e-3}, 5e-4, ("head_lr", BACKBONE, 0.1), "Salman 2020, TLlib"),
    "pretrained CNN": Row(
        {"adamw": 1e-4, "sgd": 1e-2}, 1e-8, ("layer_decay", DECAY, 0.7), "ConvNeXt TRAINING.md"),
    "pretrained transformer": Row(
        {"adamw": 1e-4, "sgd": 1e-2}, 0.05, ("layer_decay", DECAY, 0.75), "MAE FINETUNE.md"),
    "small network": Row(
        {"adamw": 2e-3, "sgd": 5e-2}, 0.05, None, "measured on letters to digits"),
    "network from scratch": Row(
        {"adamw": 1.5e-3, "sgd": 1e-1}, 0.05, None, "nothing pretrained to keep"),
    "linear probe": Row(
        {"adamw": 1.5e-3, "sgd": 5e-2}, 0.0, None, "only the head trains"),
}
# fmt: on
SMALL_NETWORK = 1_000_000  # parameters
LARGE_DATA, LARGEST_DATA = 20_000, 500_000  # images, the thresholds of BiT


def auto_steps(num_images: int) -> int:
    """Optimizer steps: 500 for a few images, 1.5 per image up to 5,000, then BiT's."""
    if num_images >= LARGEST_DATA:
        return 20_000
    if num_images >= LARGE_DATA:
        return 10_000
    return min(5000, max(500, round(1.5 * num_images)))


def row_of(model: ModelFacts) -> str:
    """Name of the row for a network."""
    if model.probe:
        return "linear probe"
    if model.num_parameters < SMALL_NETWORK:
        return "small network"
    return f"pretrained {model.kind}" if model.pretrained else "network from scratch"


def memory_order(model: ModelFacts) -> list[Choice]:
    """Of every recipe: it changes how fast a network computes, not what."""
    ordered = model.kind == "transformer" or model.num_parameters < SMALL_NETWORK
    if ordered or model.unordered:
        return []
    return [Choice("channels_last", True, "the order that convolutions are fastest in")]


def auto(data: DataFacts, model: ModelFacts | None) -> list[Choice]:
    """The right recipe without hand-tuning: a row by the network, a budget by the images."""
    if model is None:
        return []
    name = row_of(model)
    row = ROWS[name]
    optimizer = model.optimizer if model.optimizer in row.lr else next(iter(row.lr))
    num, batch = data.num_images, data.batch * (data.accumulate or 1)
    # SGD's lr grows with the batch (Goyal 2017), Adam's with its root (Malladi 2022)
    scale = batch / 128 if optimizer == "sgd" else sqrt(batch / 128)
    steps = auto_steps(num)
    many = num >= LARGE_DATA
    about = f"{num:,} images, {name}"

    choices = [
        Choice("optimizer", optimizer, f"{name}: {row.source}"),
        Choice("optimizer.lr", float(f"{row.lr[optimizer] * scale:.3g}"),
               f"{row.lr[optimizer]:g} at a batch of 128, here {batch}"),
        Choice("optimizer.weight_decay", row.weight_decay, f"{name}: {row.source}"),
        Choice("schedule", "cosine", "Loshchilov & Hutter 2017"),
        Choice("schedule.warmup", 0.1, "a tenth of the steps: TLlib, AutoGluon"),
        Choice("epochs", data.epochs(steps, data.accumulate or 1), f"{about}: {steps:,} steps"),
    ]  # fmt: skip
    if row.strategy is None:
        choices += [Choice("strategy", "full", f"{name}: {row.source}")]
    else:
        strategy, key, argument = row.strategy
        choices += [
            Choice("strategy", strategy, f"{name}: {row.source}"),
            Choice(key, argument, f"what is pretrained moves slowly: {row.source}"),
        ]
    choices += [
        Choice("augment", "light", "random resized crop and flip: every recipe for few images"),
        Choice("mixup", 0.1 if many else None,
               f"{'from' if many else 'only from'} {LARGE_DATA:,} images on: BiT-HyperRule"),
        Choice("trainer.gradient_clip_val", 1.0, "a step is never wild: big_vision, AutoGluon"),
    ]  # fmt: skip
    choices += memory_order(model)
    if data.bf16:
        why = "this GPU computes in it: half of the time and memory, with the range of 32 bits"
        choices.append(Choice("trainer.precision", "bf16-mixed", why))
    if name == "small network":  # it learns a new head in a few steps: ridge and ema add nothing
        if data.single_label:
            choices.append(Choice("task.label_smoothing", 0.1, f"{name}: {row.source}, val"))
        return choices
    if not model.sharded:
        choices.append(Choice("ema", 0.999, "warmed up, so that it never lags behind a short run"))
    if data.single_label and model.linear_head and model.pretrained:
        choices.append(
            Choice("head.init", "ridge", "starts as a linear probe, bends no features: Kumar 2022")
        )
    return choices


def textbook(data: DataFacts, model: ModelFacts | None) -> list[Choice]:
    """The plainest: the last layer replaced, SGD 0.001 with momentum 0.9, everything trains."""
    if model is None:
        return []
    why = "as textbooks give it"
    return [
        Choice("optimizer", "sgd", why),
        Choice("optimizer.lr", 0.001, why),
        Choice("optimizer.weight_decay", 0.0, why),
        Choice("schedule", "constant", why),
        Choice("schedule.warmup", 0.0, why),
        Choice("strategy", "full", why),
        Choice("augment", "none", why),
        *none(data, model),
    ]


def bit(data: DataFacts, model: ModelFacts | None) -> list[Choice]:
    """The BiT-HyperRule, exactly. Source: Kolesnikov et al. 2020, Big Transfer, section 3.3."""
    small_images = data.image_area < 96**2
    area = f"images of {'less' if small_images else 'at least'} 96 x 96 pixels"
    if model is None:
        size, resize = (128, 160) if small_images else (480, 512)
        return [Choice("model.input_size", size, f"{area}: resized to {resize}, cropped to {size}")]
    num = data.num_images
    accumulate = data.accumulate or ceil(512 / data.batch)
    batch = data.batch * accumulate
    if num < LARGE_DATA:
        regime, steps, warmup, milestones = "fewer than 20k", 500, 100, (200, 300, 400)
    elif num < LARGEST_DATA:
        regime, steps, warmup, milestones = "20k to 500k", 10_000, 500, (3000, 6000, 9000)
    else:
        regime, steps, warmup, milestones = "from 500k", 20_000, 500, (6000, 12_000, 18_000)
    images = f"{num:,} images, {regime}"
    return [
        Choice("trainer.accumulate_grad_batches", accumulate, f"batches of {data.batch} to 512"),
        Choice("optimizer", "sgd", "momentum 0.9"),
        Choice("optimizer.lr", 0.003 * batch / 512, "0.003 at a batch of 512"),
        Choice("optimizer.weight_decay", 0.0, "none"),
        Choice("max_steps", steps, images),
        Choice("schedule", "staircase", f"divided by 10 at steps {milestones}"),
        Choice("schedule.warmup", warmup / steps, f"{warmup} steps"),
        Choice("schedule.milestones", [m / steps for m in milestones], images),
        Choice("strategy", "full", "everything trains"),
        Choice("augment", "crop", f"{area}: random crop and flip"),
        Choice("augment.margin", 1.25 if small_images else 512 / 480, area),
        Choice("mixup", 0.1 if num >= LARGE_DATA else None, images),
        Choice("head.init", "zero", "a zero head"),
        *memory_order(model),
    ]


def none(data: DataFacts, model: ModelFacts | None) -> list[Choice]:
    """No advice: plain values for what must have one, and everything else off."""
    if model is None:
        return []
    why = "plain"
    steps = 500
    epochs = max(10, data.epochs(steps, data.accumulate or 1))
    return [
        Choice("optimizer", "sgd", why),
        Choice("optimizer.lr", 0.01 if (model.optimizer or "sgd") == "sgd" else 0.0001, why),
        Choice("optimizer.weight_decay", 0.0, why),
        Choice("schedule", "cosine", why),
        Choice("schedule.warmup", 0.1, why),
        Choice("strategy", "full", why),
        Choice("augment", "light", why),
        Choice("trainer.accumulate_grad_batches", 1, why),
        Choice("trainer.precision", "32-true", why),
        *memory_order(model),
        Choice("head.init", "random", why),
        Choice("epochs", epochs, f"10, or what {steps} steps need"),
    ]  # fmt: skip

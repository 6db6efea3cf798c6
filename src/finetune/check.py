"""A config against the signatures it will call and the ranges of its values: all at once."""

import difflib
import inspect
import math
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from finetune.datamodule import usable_cores
from finetune.errors import ConfigError

HYDRA_KEYS = ("_target_", "_partial_", "_convert_")
# null in conf/, and filled by a recipe before anything is called
OPEN = (
    "optimizer.lr", "optimizer.weight_decay", "schedule.warmup", "trainer.accumulate_grad_batches",
)  # fmt: skip
# taken out by build before the dataset is called
COMMON_DATA_KEYS = ("shots", "fraction", "classes", "balance")


def check_all(jobs: Sequence[DictConfig]) -> None:
    """Raise ConfigError that lists what is wrong in any of the jobs' configs."""
    problems = list(dict.fromkeys(problem for cfg in jobs for problem in problems_of(cfg)))
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        one, several = problems[0], f"{len(problems)} values cannot work\n{listed}"
        raise ConfigError(one if len(problems) == 1 else several)


def problems_of(cfg: DictConfig) -> Iterator[str]:
    """What is wrong in the config of one job, a line each."""
    missing = OmegaConf.missing_keys(cfg)
    yield from (f"{key} has no value; type {key}=..." for key in sorted(missing))
    seen: set[str] = set()  # keys of the wrong type: their range need not be told too
    for group in sorted(str(key) for key in cfg):
        node = cfg[group] if not OmegaConf.is_missing(cfg, group) else None
        if _is_call(node):
            for problem in _call_problems(group, node, missing):
                seen.add(problem.split("=")[0])
                yield problem
    yield from (p for p in _range_problems(cfg) if p.split("=")[0] not in seen)
    if "task" in cfg:
        yield from _task_problems(cfg)
    if "head" in cfg:
        yield from _head_problems(cfg)
    if "trainer" in cfg:
        yield from _device_problems(cfg)
        yield from _shard_problems(cfg)


def _call_problems(group: str, node: DictConfig, missing: set[str]) -> Iterator[str]:
    """What the signature behind a node's _target_ does not take."""
    try:
        target = get_object(node._target_)
    except Exception as error:  # whatever importing somebody's module raises
        yield f"{group}._target_: {node._target_} cannot be imported: {error}"
        return
    parameters = inspect.signature(target).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    hints = _hints(target)
    for key in map(str, node):
        if key in HYDRA_KEYS or (group == "data" and key in COMMON_DATA_KEYS):
            continue
        full = f"{group}.{key}"
        if key not in parameters:
            if not open_ended:
                close = difflib.get_close_matches(key, list(parameters), n=3)
                hint = ", ".join(f"{group}.{name}" for name in close or parameters)
                yield f"{full}: {node._target_} has no such argument; close: {hint}"
        elif full not in missing and _is_call(node[key]):
            yield from _call_problems(full, node[key], missing)
        elif full not in missing and key in hints:
            value = node[key]
            if value is None and full in OPEN:
                continue
            if OmegaConf.is_config(value):
                value = OmegaConf.to_container(value, resolve=True)
            if not fits(value, hints[key]):
                top = group.partition(".")[0]
                a_choice = isinstance(value, str) and _is_runtime_class(hints[key])
                typed = f"; a choice of conf/{top}/ is typed {top}@{full}={value}" * a_choice
                yield f"{full}={value!r}: must be {spelled(hints[key])}{typed}"


def _is_call(node: Any) -> TypeGuard[DictConfig]:
    return isinstance(node, DictConfig) and bool(node.get("_target_"))


def _hints(target: Any) -> dict[str, Any]:
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return get_type_hints(inspect.unwrap(function))
    except (NameError, TypeError):  # annotations that only a type checker can resolve
        return {}


def fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value may stand for a parameter of this type; what cannot be told is True."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if hint is None or hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    if origin in (list, tuple) or getattr(origin, "__name__", "") in ("Sequence", "Iterable"):
        if not isinstance(value, list | tuple):
            return False
        if origin is tuple and arguments and arguments[-1] is not Ellipsis:
            return len(value) == len(arguments) and all(map(fits, value, arguments))
        return all(fits(item, arguments[0]) for item in value) if arguments else True
    return not _is_runtime_class(hint)


def spelled(hint: Any) -> str:
    """A type for a person: 'int or null', '[number, number]'."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        named = [a for a in arguments if a is type(None) or not _is_runtime_class(a)]
        return " or ".join(dict.fromkeys(spelled(argument) for argument in named))
    if origin is Literal:
        return "one of " + ", ".join(str(argument) for argument in arguments)
    if origin is tuple:
        return "[" + ", ".join(spelled(a) for a in arguments) + "]"
    if origin is list:
        return "a list of " + " or ".join(spelled(a) for a in arguments)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return "null" if hint is type(None) else names.get(hint, getattr(hint, "__name__", str(hint)))


def _is_runtime_class(hint: Any) -> bool:
    """A class of which YAML cannot give an instance."""
    return inspect.isclass(hint) and hint.__module__ != "builtins" and hint is not Any


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= least


def _number(test: Callable[[float], bool]) -> Callable[[Any], bool]:
    def allowed(v: Any) -> bool:
        is_number = isinstance(v, int | float) and not isinstance(v, bool)
        return is_number and math.isfinite(v) and test(v)

    return allowed


SHARE = _number(lambda v: 0 <= v <= 1)
BELOW_1 = _number(lambda v: 0 <= v < 1)
FROM_0 = _number(lambda v: v >= 0)


# key, whether null may stand, test, what is allowed
RANGES: list[tuple[str, bool, Callable[[Any], bool], str]] = [
    ("epochs", True, _whole(1), "a whole number from 1, or null"),
    ("max_steps", True, _whole(0), "a whole number from 0, or null"),
    ("batch_size", False, _whole(1), "a whole number from 1"),
    ("num_workers", True, _whole(0), "a whole number from 0, or null"),
    ("seed", False, _whole(0), "a whole number from 0"),
    ("patience", True, _whole(1), "a whole number from 1, or null"),
    ("freeze_until", False, _whole(0), "a whole number of layers, from 0"),
    ("strategy.probe_epochs", True, _whole(1), "a whole number from 1, or null"),
    ("strategy.tune_lr", False, _number(lambda v: v > 0), "a factor on the base lr, above 0"),
    ("strategy.decay", False, _number(lambda v: 0 < v <= 1), "a number above 0, at most 1"),
    ("strategy.every", True, _whole(1), "a whole number of epochs from 1, or null"),
    ("strategy.backbone", False, _number(lambda v: v >= 0), "a factor on the base lr, from 0"),
    ("deterministic", False, lambda v: isinstance(v, bool), "true or false"),
    ("checkpoint.every_n_steps", False, _whole(1), "a whole number from 1"),
    ("mixup", True, FROM_0, "a number from 0, or null"),
    ("cutmix", True, FROM_0, "a number from 0, or null"),
    ("ema", True, BELOW_1, "a number from 0, below 1, or null"),
    ("l2_sp", True, FROM_0, "a number from 0, or null"),
    ("task.label_smoothing", True, BELOW_1, "a share of the target, from 0, below 1, or null"),
    ("data.shots", True, _whole(1), "a whole number from 1, or null"),
    ("data.fraction", True, _number(lambda v: 0 < v <= 1), "a number above 0, at most 1, or null"),
    ("data.classes", True, lambda v: OmegaConf.is_list(v) and len(v) == len({*v}) > 1
     and all(isinstance(name, str) or _whole(0)(name) for name in v),
     "a list of two or more different class names such as [cat,dog], or null"),
    ("data.label_separator", True, lambda v: isinstance(v, str) and v != "",
     "what stands between the labels, such as ';', or null"),
    ("data.num_images", True, _whole(1), "a whole number from 1"),
    ("data.num_classes", True, _whole(2), "a whole number from 2"),
    ("data.image_size", True, _whole(1), "pixels, from 1"),
    ("model.input_size", True, _whole(1), "pixels, from 1, or null"),
    ("model.dropout", True, BELOW_1, "a probability, from 0, below 1, or null"),
    ("model.drop_path", True, BELOW_1, "a probability, from 0, below 1, or null"),
    ("head.dropout", True, BELOW_1, "a probability below 1, or null"),
    ("head.hidden", True, _whole(1), "a whole number from 1, or null"),
    ("optimizer.lr", True, _number(lambda v: v > 0), "a number above 0, or null"),
    ("optimizer.momentum", False, BELOW_1, "a number from 0, below 1"),
    ("optimizer.weight_decay", True, FROM_0, "a number from 0, or null"),
    ("schedule.warmup", True, BELOW_1, "a share of the steps, from 0, below 1, or null"),
    ("schedule.start", False, SHARE, "a share of the base lr: from 0 to 1"),
    ("schedule.milestones", False, lambda v: [*v] == sorted(v) and all(map(SHARE, v)),
     "shares of the steps that grow, from 0 to 1"),
    ("schedule.final", False, SHARE, "a share of the base lr: from 0 to 1"),
    ("augment.scale", True, lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= 1,
     "two shares of the area, 0 < least <= most <= 1"),
    ("augment.margin", False, _number(lambda v: v >= 1), "a factor on the input size, from 1"),
    ("augment.num_ops", False, _whole(1), "a whole number from 1"),
    ("augment.magnitude", False, lambda v: _whole(0)(v) and v <= 30, "a whole number from 0 to 30"),
    ("augment.erase", False, SHARE, "a probability, from 0 to 1"),
    ("trainer.accumulate_grad_batches", True, _whole(1), "a whole number from 1"),
    ("trainer.gradient_clip_val", True, _number(lambda v: v > 0), "a number above 0, or null"),
    ("trainer.log_every_n_steps", False, _whole(1), "a whole number from 1"),
    ("trainer.num_nodes", False, _whole(1), "a whole number from 1"),
    ("alpha", True, lambda v: v == "auto" or _number(lambda a: 0 <= a <= 1)(v),
     "a number from 0 to 1, auto, or null"),
    ("split", False, lambda v: v in ("val", "test"), "val or test"),
    ("strict", False, lambda v: isinstance(v, bool), "true or false"),
]  # fmt: skip


def _range_problems(cfg: DictConfig) -> Iterator[str]:
    missing = object()
    for rule, may_be_null, test, allowed in RANGES:
        for key in _places(cfg, rule):
            try:
                value = OmegaConf.select(cfg, key, default=missing)
            except Exception:  # a value of a parent that is no node, reported elsewhere
                continue
            if value is missing or (value is None and may_be_null):
                continue
            try:
                good = test(value)
            except TypeError:
                good = False
            if not good:
                yield f"{key}={value}: must be {allowed}"


def _places(cfg: DictConfig, key: str) -> Iterator[str]:
    """The key itself, and where it stands in the calls inside of its own: strategy.then.decay."""
    yield key
    group, _, name = key.rpartition(".")
    try:
        node = OmegaConf.select(cfg, group) if group else None
    except Exception:  # likewise
        return
    if _is_call(node):
        for inner in map(str, node):
            if not OmegaConf.is_missing(node, inner) and _is_call(node[inner]):
                yield from _places(cfg, f"{group}.{inner}.{name}")


def _task_problems(cfg: DictConfig) -> Iterator[str]:
    """What the task does not measure, and how it cannot be balanced."""
    try:
        task = get_object(cfg.task._target_)
        monitors, balances = [f"val/{name}" for name in task.metric_names], task.balances
    except Exception:  # cannot be imported, which is told elsewhere, or is no class of ours
        return
    if cfg.get("monitor") not in (None, *monitors):
        yield f"monitor={cfg.monitor}: must be one of {', '.join(monitors)}, or null"
    balance = OmegaConf.select(cfg, "data.balance")
    if balance not in (None, *balances):
        one_of = "" if len(balances) == 1 else "one of "
        yield (
            f"data.balance={balance}: with task={task.task_name} it must be {one_of}"
            f"{', '.join(balances)}, or null"
        )


def _head_problems(cfg: DictConfig) -> Iterator[str]:
    """A closed form that is not there; weights to keep that are not there."""
    kind = str(cfg.head.get("_target_")).rpartition(".")[2]
    if cfg.head.get("init") == "ridge" and kind != "linear":
        yield f"head.init=ridge: the closed form is that of a linear layer, not {kind}; head=linear"
    if cfg.head.get("init") == "ridge" and str(cfg.task.get("_target_")).endswith("Multilabel"):
        yield "head.init=ridge: for one label per image; with task=multilabel type head.init=zero"
    if kind == "keep" and OmegaConf.select(cfg, "model.weights", default="") is None:
        yield "model.weights=null: no trained head for head=keep; type a file, or head=linear"


def _device_problems(cfg: DictConfig) -> Iterator[str]:
    """More devices than there are; a GPU where there is none."""
    import torch

    accelerator, devices = cfg.trainer.get("accelerator", "auto"), cfg.trainer.get("devices", 1)
    gpus = torch.cuda.device_count()
    if accelerator in ("gpu", "cuda") and gpus == 0:
        yield f"trainer.accelerator={accelerator}: no GPU that torch can use; type cpu"
        return
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and gpus > 0)
    available, kind = (gpus, "GPUs") if on_gpu else (usable_cores(), "CPU cores")
    if accelerator not in ("auto", "cpu", "gpu", "cuda"):
        return
    if isinstance(devices, int) and (devices == 0 or devices < -1 or devices > available):
        yield f"trainer.devices={devices}: there are {available} {kind} here; type 1 to {available}"
    if cfg.trainer.get("strategy") == "fsdp" and not on_gpu:
        yield "trainer.strategy=fsdp: needs GPUs; on the CPU there is trainer=ddp_cpu"


def _shard_problems(cfg: DictConfig) -> Iterator[str]:
    """What needs the whole weights on every rank, where each holds a part of them."""
    strategy = cfg.trainer.get("strategy")
    if "fsdp" not in str(strategy):
        return
    for key in ("ema", "l2_sp"):
        if cfg.get(key):
            yield (
                f"{key}={cfg[key]}: needs the whole weights on every rank, which "
                f"trainer.strategy={strategy} splits; type trainer.strategy=ddp or {key}=null"
            )

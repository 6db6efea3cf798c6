"""A config against the signatures it will call and the ranges of its values: all at once."""

import difflib
import inspect
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin, get_type_hints

import torch
from hydra.utils import get_object
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry
from omegaconf import DictConfig, OmegaConf

from finetune import loggers
from finetune.backbones import module, run, timm, tiny, torchvision
from finetune.data import torchvision as torchvision_sets
from finetune.data.split import check_limits
from finetune.errors import ConfigError, FinetuneError
from finetune.machine import usable_cores
from finetune.typed import shown

HYDRA_KEYS = ("_target_", "_partial_", "_convert_")
# null in conf/, and filled by a recipe before anything is called
OPEN = (
    "optimizer.lr", "optimizer.weight_decay", "schedule.warmup", "trainer.accumulate_grad_batches",
)  # fmt: skip
# taken out by build before the dataset is called
COMMON_DATA_KEYS = ("shots", "fraction", "classes", "balance", "cache")
SEEDS = 2**32 - 1  # the largest that numpy and Lightning take
COMPILE_MODES = ("reduce-overhead", "max-autotune")  # of torch.compile
MOST_WORKERS = max(8, 4 * usable_cores())

# arguments that build.py passes itself, and what is typed instead, if there is anything
PASSED_BY_BUILD: Mapping[str, Mapping[str, str | None]] = {
    "trainer": {
        "default_root_dir": "hydra.run.dir",
        "max_epochs": "epochs",
        "max_steps": "max_steps",
        "check_val_every_n_epoch": None,
        "callbacks": None,
        "logger": "logger",
        "plugins": None,
        "deterministic": "deterministic",
        "num_sanity_val_steps": None,
        "enable_checkpointing": "checkpoint.every_n_steps",
        "enable_model_summary": None,
        "enable_progress_bar": None,
        "use_distributed_sampler": None,
    },
    "optimizer": {"params": None},
    "schedule": {"step": None, "total": "max_steps"},
    "augment": {"spec": "model.input_size"},
    "logger": {"run": "hydra.run.dir", "resumed_at": None},
}

# what a call refuses before it does anything, with the messages that it has itself
CHECKS: Mapping[Callable[..., Any], Callable[..., None]] = {
    module.module: module.check,
    run.run: run.check,
    timm.timm: timm.check,
    tiny.tiny: tiny.check,
    torchvision.torchvision: torchvision.check,
    torchvision_sets.torchvision: torchvision_sets.check,
    loggers.wandb: loggers.check_wandb,
}


def check_all(jobs: Sequence[DictConfig]) -> None:
    """Raise ConfigError that lists what is wrong in any of the jobs' configs."""
    problems = list(dict.fromkeys(problem for cfg in jobs for problem in problems_of(cfg)))
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        one, several = problems[0], f"{len(problems)} values cannot work\n{listed}"
        raise ConfigError(one if len(problems) == 1 else several)


def problems_of(cfg: DictConfig) -> Iterator[str]:
    """What is wrong in the config of one job, a line each; of a key, the first problem only."""
    missing = OmegaConf.missing_keys(cfg)
    yield from (f"{key} has no value; type {key}=..." for key in sorted(missing))
    found: dict[str, str] = {}
    for checked in (
        _device_problems(cfg),
        _call_problems(cfg, missing),
        _range_problems(cfg),
        _task_problems(cfg),
        _head_problems(cfg),
        _shard_problems(cfg),
        _debug_problems(cfg),
    ):
        for key, problem in checked:
            found.setdefault(key, problem)
    yield from found.values()
    wrong = {key.partition(".")[0] for key in (*missing, *found)}
    yield from _refusals(cfg, without=wrong)


def _debug_problems(cfg: DictConfig) -> Iterator[tuple[str, str]]:
    """A replay without a run to repeat."""
    if cfg.get("debug") == "replay" and cfg.resume is None:
        yield "debug", "debug=replay repeats the step that ended a run; add resume=RUN"


def _call_problems(cfg: DictConfig, missing: set[str]) -> Iterator[tuple[str, str]]:
    """Keys and values that the signature behind a group's _target_ does not take."""
    for group in sorted(str(key) for key in cfg):
        node = cfg[group] if not OmegaConf.is_missing(cfg, group) else None
        if isinstance(node, DictConfig):
            yield from _one_call_problems(group, node, missing)


def _one_call_problems(
    group: str, node: DictConfig, missing: set[str]
) -> Iterator[tuple[str, str]]:
    # evaluate's trainer completes that of the run
    name = node.get("_target_", "lightning.Trainer" if group == "trainer" else None)
    if name is None:  # it only holds keys, or a recipe chooses it
        return
    try:
        target = get_object(name)
    except Exception as error:  # whatever importing somebody's module raises
        key = f"{group}._target_"
        yield key, f"{key}: {name} cannot be imported: {error}"
    else:
        yield from _signature_problems(group, node, target, name, missing)


def _signature_problems(
    group: str, node: DictConfig, target: Any, name: str, missing: set[str]
) -> Iterator[tuple[str, str]]:
    parameters = inspect.signature(target).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    passed = PASSED_BY_BUILD.get(group, {})
    hints = _hints(target)
    for key in map(str, node):
        if key in HYDRA_KEYS or (group == "data" and key in COMMON_DATA_KEYS):
            continue
        full = f"{group}.{key}"
        if key in passed:
            ours = passed[key]
            instead = f"type {ours}=... instead" if ours else "leave it out"
            yield full, f"{full}: has no effect, since it is set in build.py; {instead}"
        elif key not in parameters:
            if not open_ended:
                close = difflib.get_close_matches(key, list(parameters), n=3)
                hint = ", ".join(f"{group}.{name}" for name in close or parameters)
                yield full, f"{full}: {name} has no such argument; close: {hint}"
        elif full not in missing and _is_call(node[key]):
            yield from _one_call_problems(full, node[key], missing)
        elif full not in missing and key in hints:
            value = _plain(node[key])
            if value is None and full in OPEN:
                continue
            if not fits(value, hints[key]):
                top = group.partition(".")[0]
                a_choice = isinstance(value, str) and _is_runtime_class(hints[key])
                typed = f"; a choice of conf/{top}/ is typed {top}@{full}={value}" * a_choice
                yield full, f"{full}={shown(value)}: must be {spelled(hints[key])}{typed}"


def _is_call(node: Any) -> TypeGuard[DictConfig]:
    return isinstance(node, DictConfig) and bool(node.get("_target_"))


def _refusals(cfg: DictConfig, without: set[str]) -> Iterator[str]:
    """What the calls themselves would refuse, and values that do not go together."""
    for group in sorted({str(key) for key in cfg} - without):
        node = _plain(cfg[group])
        if not isinstance(node, dict) or node.get("_target_") is None:
            continue
        target = get_object(node["_target_"])
        arguments = {k: v for k, v in node.items() if k not in HYDRA_KEYS}
        try:
            if group == "data":
                common = {key: arguments.pop(key, None) for key in COMMON_DATA_KEYS}
                check_limits(common["shots"], common["fraction"])
            if target in CHECKS:
                CHECKS[target](**arguments)
        except FinetuneError as error:
            yield str(error)
        if inspect.isclass(target) and issubclass(target, torch.optim.Optimizer):
            yield from _optimizer_refusals(group, target, arguments)


def _optimizer_refusals(
    group: str, target: Callable[..., Any], arguments: dict[str, Any]
) -> Iterator[str]:
    try:
        target([torch.zeros(1)], **{k: v for k, v in arguments.items() if v is not None})
    except (ValueError, TypeError, RuntimeError) as error:
        yield f"{group}: {target.__name__} does not take these values: {error}"


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


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
    """A type for a person: 'a whole number or null', '[a number, a number]'."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        named = [a for a in arguments if not _is_runtime_class(a)]
        literals = [choice for a in named if get_origin(a) is Literal for choice in get_args(a)]
        others = [spelled(a) for a in named if get_origin(a) is not Literal]
        choices = [_one_of(literals)] if literals else []
        return " or ".join(sorted(dict.fromkeys([*choices, *others]), key="null".__eq__))
    if origin is Literal:
        return _one_of(arguments)
    if origin is tuple:
        return "[" + ", ".join(spelled(a) for a in arguments) + "]"
    if origin is list:
        return "a list of " + " or ".join(spelled(a) for a in arguments)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return "null" if hint is type(None) else names.get(hint, getattr(hint, "__name__", str(hint)))


def _one_of(choices: Sequence[Any]) -> str:
    return "one of " + ", ".join(dict.fromkeys(str(choice) for choice in choices))


def _is_runtime_class(hint: Any) -> bool:
    """A class of which YAML cannot give an instance."""
    return inspect.isclass(hint) and hint.__module__ != "builtins" and hint is not Any


def _whole(least: float, most: float = math.inf) -> Callable[[Any], bool]:
    def allowed(v: Any) -> bool:
        whole = isinstance(v, int) and not isinstance(v, bool)
        return whole and least <= v <= most

    return allowed


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
    ("num_workers", True, _whole(0, MOST_WORKERS),
     f"a whole number from 0 to {MOST_WORKERS} on these {usable_cores()} cores, or null"),
    ("seed", False, _whole(0, SEEDS), f"a whole number from 0 to {SEEDS}"),
    ("patience", True, _whole(1), "a whole number from 1, or null"),
    ("freeze_until", False, _whole(0), "a whole number of layers, from 0"),
    ("strategy.probe_epochs", True, _whole(1), "a whole number from 1, or null"),
    ("strategy.tune_lr", False, _number(lambda v: v > 0), "a factor on the base lr, above 0"),
    ("strategy.decay", False, _number(lambda v: 0 < v <= 1), "a number above 0, at most 1"),
    ("strategy.every", True, _whole(1), "a whole number of epochs from 1, or null"),
    ("strategy.backbone", False, _number(lambda v: v >= 0), "a factor on the base lr, from 0"),
    ("features.cache", False, lambda v: v in ("auto", "none"), "auto or none"),
    ("features.views", True, _whole(1), "a whole number of views of each image from 1, or null"),
    ("features.dir", True, lambda v: isinstance(v, str), "a folder, or null"),
    ("channels_last", True, lambda v: isinstance(v, bool), "true or false, or null"),
    ("compile", False, lambda v: isinstance(v, bool) or v in COMPILE_MODES,
     f"true, false, {' or '.join(COMPILE_MODES)}"),
    ("deterministic", False, lambda v: isinstance(v, bool), "true or false"),
    ("checkpoint.every_n_steps", True, _whole(1), "a whole number from 1, or null"),
    ("mixup", True, FROM_0, "a number from 0, or null"),
    ("cutmix", True, FROM_0, "a number from 0, or null"),
    ("ema", True, BELOW_1, "a number from 0, below 1, or null"),
    ("l2_sp", True, FROM_0, "a number from 0, or null"),
    ("task.label_smoothing", True, BELOW_1, "a share of the target, from 0, below 1, or null"),
    ("launcher.gpus", True, _whole(0), "a whole number of GPUs of each node, or null"),
    ("launcher.cpus", True, _whole(1), "a whole number of cores of each task, or null"),
    ("launcher.grace", False, _whole(1), "seconds before the end, a whole number from 1"),
    ("data.shots", True, _whole(1), "a whole number from 1, or null"),
    ("data.fraction", True, _number(lambda v: 0 < v <= 1), "a number above 0, at most 1, or null"),
    ("data.classes", True, lambda v: OmegaConf.is_list(v) and len(v) == len({*v}) > 1
     and all(isinstance(name, str) or _whole(0)(name) for name in v),
     "a list of two or more different class names such as [cat,dog], or null"),
    ("data.label_separator", True, lambda v: isinstance(v, str) and v != "",
     "what stands between the labels, such as ';', or null"),
    ("data.num_images", True, _whole(1), "a whole number from 1"),
    ("data.num_classes", True, _whole(2), "a whole number from 2"),
    ("data.image_size", True, _whole(1, 1024), "pixels, from 1 to 1024"),
    ("data.seed", False, _whole(0, SEEDS), f"a whole number from 0 to {SEEDS}"),
    ("data.split_seed", False, _whole(0, SEEDS), f"a whole number from 0 to {SEEDS}"),
    ("data.on_bad", True, lambda v: v in ("error", "skip"), "error or skip"),
    ("data.max_pixels", True, _whole(1), "a whole number of pixels, from 1"),
    ("data.cache", False, lambda v: v in ("auto", "ram", "disk", "device", "none"),
     "auto, ram, disk, device or none"),
    ("data.rescan", True, lambda v: isinstance(v, bool), "true or false"),
    ("model.input_size", True, _whole(1, 8192), "pixels, from 1 to 8192, or null"),
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
    ("augment.magnitude", False, _whole(0, 30), "a whole number from 0 to 30"),
    ("augment.erase", False, SHARE, "a probability, from 0 to 1"),
    ("trainer.accumulate_grad_batches", True, _whole(1), "a whole number from 1"),
    ("trainer.gradient_clip_val", True, _number(lambda v: v > 0), "a number above 0, or null"),
    ("trainer.log_every_n_steps", False, _whole(1), "a whole number from 1"),
    ("trainer.val_check_interval", True, _whole(1), "a whole number of batches from 1, or null"),
    ("trainer.num_nodes", False, _whole(1), "a whole number from 1"),
    ("alpha", True, lambda v: v == "auto" or _number(lambda a: 0 <= a <= 1)(v),
     "a number from 0 to 1, auto, or null"),
    ("split", False, lambda v: v in ("val", "test"), "val or test"),
    ("format", False, lambda v: v == "safetensors", "safetensors"),
    ("strict", False, lambda v: isinstance(v, bool), "true or false"),
    ("accelerator", False, lambda v: v in ("auto", "cpu", "gpu", "cuda"), "auto, cpu or gpu"),
    *((key, key not in ("run", "input"), lambda v: isinstance(v, str), "a path")
      for key in ("run", "input", "output", "resume", "data.root", "data.table")),
    ("model.target", True, lambda v: isinstance(v, str), "package.module.Class, or null"),
    ("debug", True, lambda v: v == "replay", "replay, with resume=RUN, or null"),
]  # fmt: skip


def _range_problems(cfg: DictConfig) -> Iterator[tuple[str, str]]:
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
                yield key, f"{key}={shown(_plain(value))}: must be {allowed}"


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


def _task_problems(cfg: DictConfig) -> Iterator[tuple[str, str]]:
    """What the task does not measure, and how it cannot be balanced."""
    try:
        task = get_object(cfg.task._target_)
        monitors, balances = [f"val/{name}" for name in task.metric_names], task.balances
    except Exception:  # cannot be imported, which is told elsewhere, or is no class of ours
        return
    if cfg.get("monitor") not in (None, *monitors):
        yield (
            "monitor",
            f"monitor={shown(cfg.monitor)}: must be one of {', '.join(monitors)}, or null",
        )
    balance = OmegaConf.select(cfg, "data.balance")
    if balance not in (None, *balances):
        one_of = "" if len(balances) == 1 else "one of "
        yield (
            "data.balance",
            f"data.balance={shown(balance)}: with task={task.task_name} it must be {one_of}"
            f"{', '.join(balances)}, or null",
        )


def _head_problems(cfg: DictConfig) -> Iterator[tuple[str, str]]:
    """A closed form that is not there; weights to keep that are not there."""
    if "head" not in cfg:
        return
    kind, key = str(cfg.head.get("_target_")).rpartition(".")[2], "head.init"
    if cfg.head.get("init") == "ridge" and kind != "linear":
        yield (
            key,
            f"{key}=ridge: the closed form is that of a linear layer, not {kind}; head=linear",
        )
    elif cfg.head.get("init") == "ridge" and str(cfg.task.get("_target_")).endswith("Multilabel"):
        yield key, f"{key}=ridge: for one label per image; with task=multilabel type {key}=zero"
    if kind == "keep" and OmegaConf.select(cfg, "model.weights", default="") is None:
        yield (
            "model.weights",
            "model.weights=null: no trained head for head=keep; type a file, or head=linear",
        )


def _shard_problems(cfg: DictConfig) -> Iterator[tuple[str, str]]:
    """What needs the whole weights on every rank, where each holds a part of them."""
    if "trainer" not in cfg or not is_sharded(cfg):
        return
    for key in ("ema", "l2_sp"):
        if cfg.get(key):
            yield (
                key,
                f"{key}={cfg[key]}: needs the whole weights on every rank, which "
                f"trainer.strategy={cfg.trainer.strategy} splits; type trainer.strategy=ddp or "
                f"{key}=null",
            )
    if cfg.trainer.get("val_check_interval"):
        yield (
            "trainer.val_check_interval",
            "trainer.val_check_interval: the weights must be whole at the end of each epoch, where "
            f"trainer.strategy={cfg.trainer.strategy} validates; leave it out",
        )


def _device_problems(cfg: DictConfig) -> Iterator[tuple[str, str]]:
    """More devices than there are; a GPU where there is none; no such accelerator or strategy."""
    if "accelerator" in cfg:  # of predict, which has no trainer
        yield from _gpu_problems("accelerator", cfg.accelerator)
    if "trainer" not in cfg or cfg.get("launcher"):  # which has other devices than are here
        return
    accelerator, key = cfg.trainer.get("accelerator", "auto"), "trainer.accelerator"
    known = ["auto", "cpu", "gpu", *sorted(AcceleratorRegistry.available_accelerators() - {"cpu"})]
    if accelerator not in known:
        yield key, f"{key}={shown(accelerator)}: must be one of {', '.join(known)}"
        return
    yield from _strategy_problems(cfg)
    if problems := [*_gpu_problems(key, accelerator)]:
        yield from problems
    elif accelerator in ("auto", "cpu", "gpu", "cuda"):
        yield from _count_problems(cfg)
    elif not AcceleratorRegistry[accelerator]["accelerator"].is_available():
        yield key, f"{key}={accelerator}: there is none here; type auto"


def _gpu_problems(key: str, accelerator: str) -> Iterator[tuple[str, str]]:
    if accelerator in ("gpu", "cuda") and torch.cuda.device_count() == 0:
        yield key, f"{key}={accelerator}: no GPU that torch can use; type cpu"


def _strategy_problems(cfg: DictConfig) -> Iterator[tuple[str, str]]:
    strategy, key = cfg.trainer.get("strategy", "auto"), "trainer.strategy"
    others = sorted({*StrategyRegistry.available_strategies()} - {"ddp", "fsdp"})
    if strategy not in ("auto", "ddp", "fsdp", *others):
        close = difflib.get_close_matches(str(strategy), ["auto", "ddp", "fsdp", *others], n=2)
        hint = f"close: {', '.join(close)}; " if close else ""
        families = ", ".join(sorted({name.partition("_")[0] for name in others} - {"ddp", "fsdp"}))
        allowed = f"auto, ddp, fsdp, or another name that Lightning knows ({families}, ...)"
        yield key, f"{key}={shown(strategy)}: {hint}must be {allowed}"
    elif is_sharded(cfg) and not on_gpu(cfg):
        yield key, f"{key}={strategy}: needs GPUs; on the CPU there is trainer=ddp_cpu"


def _count_problems(cfg: DictConfig) -> Iterator[tuple[str, str]]:
    key, typed = "trainer.devices", _plain(cfg.trainer.get("devices", 1))
    devices, gpu = normal_devices(typed), on_gpu(cfg)
    most, kind = (torch.cuda.device_count(), "GPUs") if gpu else (usable_cores(), "CPU cores")
    said = f"{key}={shown(typed)}:"
    if devices is None:
        lists = ", or a list of GPUs such as [0,1]" if gpu else ""
        yield key, f"{said} must be a whole number from 1 to {most}, or auto{lists}"
    elif isinstance(devices, list):
        if not gpu:
            yield key, f"{said} a list numbers GPUs; on the CPU type how many, 1 to {most}"
        elif not devices or len({*devices}) < len(devices) or not {*devices} <= {*range(most)}:
            yield key, f"{said} must be different numbers from 0 to {most - 1}"
    elif isinstance(devices, int):
        if devices == -1 and not gpu:
            yield key, f"{said} means all GPUs, and there are none here; type auto, or 1 to {most}"
        elif devices != -1 and not 1 <= devices <= most:
            yield key, f"{said} there are {most} {kind} here; type 1 to {most}"


def is_sharded(cfg: DictConfig) -> bool:
    """Whether trainer.strategy gives each device a part of the weights."""
    return "fsdp" in str(cfg.trainer.get("strategy"))


def on_gpu(cfg: DictConfig) -> bool:
    """Whether trainer.accelerator means GPUs on this machine."""
    accelerator = cfg.trainer.get("accelerator", "auto")
    return accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())


def on_mps(cfg: DictConfig) -> bool:
    """Whether it means a GPU of Apple."""
    accelerator = cfg.trainer.get("accelerator", "auto")
    mps = torch.backends.mps.is_available() and not torch.cuda.is_available()
    return accelerator == "mps" or (accelerator == "auto" and mps)


def normal_devices(devices: Any) -> int | list[int] | Literal["auto"] | None:
    """trainer.devices as Lightning reads it: how many, or which GPUs; None if it is neither.

    -1 is all GPUs. A text of digits is a number, and with commas a list.
    """
    if isinstance(devices, str):
        if devices == "auto":
            return "auto"
        try:
            numbers = [int(part) for part in devices.split(",") if part.strip()]
        except ValueError:
            return None
        return numbers if "," in devices else next(iter(numbers), None)
    if isinstance(devices, Sequence):
        return list(devices) if all(_whole(0)(device) for device in devices) else None
    return devices if _whole(-math.inf)(devices) else None

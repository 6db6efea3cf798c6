"""What was typed, held against conf/: all unknown groups, options and keys, before torch."""

import difflib
import itertools
import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from finetune.errors import CheckpointError, ConfigError

# the folder beside src/ in a checkout; the copy inside the package once it was built into a wheel
CONF = next(
    folder
    for folder in (Path(__file__).parents[2] / "conf", Path(__file__).parent / "conf")
    if folder.is_dir()
)
MOST_JOBS = 200  # of a sweep that are checked before it starts


def flags_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with -m before the overrides: behind them Hydra's parser does not take it."""
    flags = [a for a in arguments if a in ("-m", "--multirun")]
    return [*flags, *(a for a in arguments if a not in flags)]


def signs_quoted(arguments: Sequence[str]) -> list[str]:
    """The arguments with a value that is one sign in quotes: Hydra's grammar lacks ';'."""
    single = (re.fullmatch(r"([\w.@/+]+=)([^\w\s'\"])", argument) for argument in arguments)
    return [
        argument if found is None else found[1] + quoted(found[2])
        for argument, found in zip(arguments, single, strict=True)
    ]


def _parsed(arguments: Sequence[str]) -> Namespace:
    parser = get_args_parser()
    args, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        raise ConfigError(
            f"{' '.join(unknown)}: not understood; overrides are key=value, see --help"
        )
    return args


def asks_for_information(arguments: Sequence[str]) -> bool:
    """Whether the command line asks for help or for the config, and runs nothing."""
    args = _parsed(arguments)
    return bool(args.help or args.hydra_help or args.cfg or args.info or args.shell_completion)


def compose_jobs(command: str, arguments: Sequence[str]) -> list[DictConfig]:
    """The config of every job that the arguments ask for: one, or those of a sweep.

    Raises ConfigError that lists every override that does not parse, unknown group option and
    unknown key.
    """
    args = _parsed(arguments)
    if args.config_name or args.config_path:
        raise ConfigError("--config-name and --config-path are not for this command; see --help")
    search_path = (
        [] if args.config_dir is None else [f"hydra.searchpath=[{quoted(args.config_dir)}]"]
    )
    with initialize_config_dir(str(CONF), version_base="1.3"):
        typed, problems = _parse(args.overrides)
        swept = [o.get_key_element() for o in typed if o.is_sweep_override()]
        if swept and not args.multirun:
            problems += [f"{key}: several values are a sweep; add -m" for key in swept]
        groups = [o for o in typed if _is_group(o, command, search_path)]
        problems += [p for o in groups for p in _unknown_options(o, command, search_path)]
        if problems:
            problems += _unknown_keys(command, typed, groups, search_path, tolerant=True)
            raise ConfigError(_listed(problems))
        problems = _unknown_keys(command, typed, groups, search_path, tolerant=False)
        if problems:
            raise ConfigError(_listed(problems))
        try:
            return [
                compose(command, overrides=[*search_path, *job])
                for job in itertools.islice(_jobs(typed), MOST_JOBS)
            ]
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(_first_lines(error)) from error


def with_recorded(arguments: Sequence[str]) -> list[str]:
    """The arguments of a resume: what the run was started with, then what is typed now."""
    typed = [a for a in arguments if not a.startswith("resume=")]
    run = Path(value_of("resume", arguments) or "")
    if any(a in ("-m", "--multirun") for a in typed):
        raise ConfigError("resume= goes on with one run; leave out -m")
    recorded = recorded_overrides(run)
    keys = {_key(argument) for argument in typed}
    return [
        *(override for override in recorded if _key(override) not in keys),
        *typed,
        f"resume={quoted(str(run))}",
        f"hydra.run.dir={quoted(str(run))}",
        "hydra.output_subdir=null",  # what the run was started with stays as it is
    ]


def recorded_overrides(run: Path) -> list[str]:
    """What a run was started with. Raises CheckpointError if run is no run directory."""
    path = run / ".hydra" / "overrides.yaml"
    if not run.is_dir():
        raise CheckpointError(f"{run}: no such run directory. Runs lie below logs/")
    try:
        recorded = [str(o) for o in OmegaConf.load(path)]
    except Exception as error:
        raise CheckpointError(
            f"{run} is no run directory: {path} cannot be read ({error})"
        ) from error
    # a run directory is data: what it names is never called
    if code := [o for o in recorded if "_target_" in o]:
        raise CheckpointError(
            f"{path} asks for code to be called, which is refused: {', '.join(code)}"
        )
    return recorded


def value_of(key: str, arguments: Sequence[str]) -> str | None:
    """What was typed for a key, the last time; None if it was not, or null."""
    values = [a.removeprefix(f"{key}=") for a in arguments if a.startswith(f"{key}=")]
    value = values[-1] if values else "null"
    return None if value == "null" else value.strip("'\"")


def quoted(value: str) -> str:
    """A value for Hydra's override grammar, whatever characters it holds."""
    if re.fullmatch(r"[\w./:+-]+", value, re.ASCII):
        return value
    # a backslash stands for itself there, but before a quote
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + m[2].replace("'", "\\'"), value) + "'"


def _key(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+~")


def compose_run(run: Path, overrides: Sequence[str]) -> DictConfig:
    """The config that a run was started with, and overrides on top; within a Hydra command."""
    recorded = [o for o in recorded_overrides(run) if not o.startswith("resume=")]
    keys = {_key(override) for override in overrides}
    kept = [override for override in recorded if _key(override) not in keys]
    return compose("train", overrides=[*kept, *overrides])


def _parse(overrides: Sequence[str]) -> tuple[list[Override], list[str]]:
    parser = OverridesParser.create()
    typed, problems = [], []
    for text in overrides:
        try:
            typed.append(parser.parse_override(text))
        except HydraException as error:
            key, given, value = text.partition("=")
            hint = f'; quoted: "{key}={quoted(value)}"' if given and not value.isascii() else ""
            problems.append(f"{text}: not of the form key=value ({_first_lines(error)}){hint}")
    return typed, problems


def _is_group(override: Override, command: str, search_path: list[str]) -> bool:
    return bool(_options(override.key_or_group.lstrip("/"), command, search_path))


def _options(group: str, command: str, search_path: list[str]) -> list[str]:
    loader = GlobalHydra.instance().config_loader()
    options: list[str] = loader.get_group_options(
        group, ObjectType.CONFIG, config_name=command, overrides=search_path
    )
    return options


def _values(override: Override) -> list[str]:
    if override.is_sweep_override():
        return [str(value) for value in override.sweep_string_iterator()]
    return [str(override.value())]


def _unknown_options(override: Override, command: str, search_path: list[str]) -> Iterator[str]:
    if override.is_delete():
        return
    group = override.key_or_group.lstrip("/")
    options = _options(group, command, search_path)
    for value in _values(override):
        if value not in options and value != "None":
            yield (
                f"{_group_key(override)}={value}: no such option in conf/{group}/; "
                f"{_close(value, options) or 'there are: ' + ', '.join(options)}"
            )


def _group_key(override: Override) -> str:
    """Such as strategy, or strategy@strategy.then for the one inside of it."""
    group, place = override.key_or_group.lstrip("/"), override.package
    return group if place is None else f"{group}@{place}"


def _misplaced(command: str, job: list[str], search_path: list[str]) -> list[str]:
    """Choices for a place that is not there, such as strategy@strategy.then with strategy=full."""

    def choices(overrides: list[str]) -> dict[str, str]:
        try:
            cfg = compose(command, [*search_path, *overrides], return_hydra_config=True)
        except (HydraException, OmegaConfBaseException):
            return {}
        return dict(cfg.hydra.runtime.choices)

    kept = [o for o in job if "@" not in _key(o)]
    placed = [o for o in job if o not in kept]
    while fitting := [o for o in placed if _key(o) in choices(kept)]:  # one may be inside another
        kept += fitting
        placed = [o for o in placed if o not in fitting]
    known, problems = choices(kept), []
    for key in map(_key, placed):
        group = key.partition("@")[0]
        others = [o for o in kept if _key(o) != group]
        having = [
            option
            for option in _options(group, command, search_path)
            if key in choices([*others, f"{group}={option}"])
        ]
        hint = _close(key, list(known)) or f"options with it: {', '.join(having) or 'none'}"
        problems.append(f"{key}: no such choice with {group}={known.get(group)}; {hint}")
    return problems


def _unknown_keys(
    command: str,
    typed: list[Override],
    groups: list[Override],
    search_path: list[str],
    tolerant: bool,
) -> list[str]:
    """Keys that no job's config has. tolerant: groups whose option is unknown are left out."""
    if tolerant:
        groups = [o for o in groups if not list(_unknown_options(o, command, search_path))]
    group_keys = {id(o) for o in groups}
    problems: dict[str, str] = {}
    for job in itertools.islice(_jobs(groups), MOST_JOBS):
        try:
            cfg = compose(command, overrides=[*search_path, *job], return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            if tolerant:
                return []
            return _misplaced(command, job, search_path) or [_first_lines(error)]
        known = sorted(_keys(cfg))
        for override in typed:
            key = override.key_or_group
            if id(override) in group_keys or override.is_add() or override.is_force_add():
                continue
            if (
                key in known
                or key.startswith("hydra.")
                or _is_group(override, command, search_path)
            ):
                continue
            group, _, inner = key.partition(".")
            choice = cfg.hydra.runtime.choices.get(group)
            place = f" with {group}={choice}" if inner and choice else ""
            problems[key] = f"{key}: no such key{place}; {_close(key, known) or 'see --help'}"
    return list(problems.values())


def _keys(cfg: DictConfig) -> Iterator[str]:
    """Dotted keys of a config, those of inner nodes included; without hydra.*."""
    stack: list[tuple[str, Any]] = [("", {k: v for k, v in _plain(cfg).items() if k != "hydra"})]
    while stack:
        prefix, node = stack.pop()
        for key, value in node.items():
            yield f"{prefix}{key}"
            if isinstance(value, dict):
                stack.append((f"{prefix}{key}.", value))


def _plain(cfg: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(cfg)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _jobs(typed: Sequence[Override]) -> Iterator[list[str]]:
    """The overrides of each job: the product of all sweeps, as Hydra's basic sweeper makes it."""
    choices = []
    for override in typed:
        if override.is_sweep_override():
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([override.input_line or ""])
    for job in itertools.product(*choices):
        yield list(job)


def _close(name: str, known: Sequence[str]) -> str:
    last = {k.rsplit(".", 1)[-1]: k for k in known}
    close = difflib.get_close_matches(name, known, n=3) or [
        last[k] for k in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(last), n=3)
    ]
    return f"close: {', '.join(close)}" if close else ""


def _first_lines(error: BaseException) -> str:
    """The message of a Hydra error without its search path and type listings."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = itertools.takewhile(
        lambda line: not line.startswith(("full_key", "object_type", "Config search")), lines
    )
    return " ".join(kept) or type(error).__name__


def _listed(problems: Sequence[str]) -> str:
    unique = list(dict.fromkeys(problems))
    if len(unique) == 1:
        return unique[0]
    return f"{len(unique)} mistakes in what was typed\n" + "\n".join(f"  {p}" for p in unique)

"""What was typed, held against conf/: all unknown groups, options and keys, before torch."""

import difflib
import functools
import itertools
import re
import string
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from finetune.errors import CheckpointError, ConfigError
from finetune.machine import process_rank
from finetune.record import Record, has_record, taken
from finetune.typed import quoted, shown, to_type

# the folder beside src/ in a checkout; the copy inside the package once it was built into a wheel
CONF = next(
    folder
    for folder in (Path(__file__).parents[2] / "conf", Path(__file__).parent / "conf")
    if folder.is_dir()
)
MOST_JOBS = 200  # of a sweep that are checked before it starts
# what is typed for these is a path, whatever it looks like
PATHS = (
    *("resume", "sweep.resume", "data.root", "data.table", "model.path", "run", "input", "output"),
    *("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir"),
)


def parse_yaml_in_c() -> None:
    """Have OmegaConf parse with libyaml, where PyYAML has it: to compose takes half the time.

    It names yaml.SafeLoader, PyYAML's own in Python. The other reads the same, but no escapes of
    names that are no UTF-8, which Hydra writes: see _load.
    """
    module: Any = yaml  # it re-exports without __all__
    module.SafeLoader = getattr(module, "CSafeLoader", module.SafeLoader)


def _load(path: Path) -> Any:
    """What Hydra wrote of a run or a sweep."""
    module: Any = yaml
    before, module.SafeLoader = module.SafeLoader, module.loader.SafeLoader
    try:
        return OmegaConf.load(path)
    finally:
        module.SafeLoader = before


def prepared(command: str, arguments: Sequence[str]) -> list[str]:
    """The arguments as Hydra takes them.

    Flags stand before the overrides, since its parser does not take them behind. Folders and files
    with a name such as 2024 are quoted, since its grammar would make a number of them. A null for
    a group that is null anyway, such as experiment=null, is left out: it takes no null there.
    """
    typed = [a for a in arguments if not a.startswith("-") and ("=" in a or a.startswith("~"))]
    flags = [a for a in arguments if a not in typed]
    nulls = [a for a in typed if re.fullmatch(r"[\w/]+=null", a)]
    if nulls:
        with _conf(command, _parsed([*flags, *typed]).config_dir) as conf:
            nulls = [a for a in nulls if conf.is_null(_key(a)) and conf.options(_key(a))]
    return [*flags, *(_path_as_text(a) for a in typed if a not in nulls)]


def _path_as_text(argument: str) -> str:
    key, _, value = argument.partition("=")
    if _key(argument) in PATHS and re.fullmatch(r"[^'\"]*[\udc80-\udcff][^'\"]*", value):
        return f"{key}={quoted(value)}"  # bytes that are no UTF-8, which the grammar lacks
    if _key(argument) not in PATHS or not re.fullmatch(r"[\w./:+,-]+", value, re.ASCII):
        return argument
    parts = [part if part in ("", "null") else quoted(part) for part in value.split(",")]
    return f"{key}={','.join(parts)}"


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
    if args.config_name or args.config_path:
        raise ConfigError("--config-name and --config-path are not for this command; see --help")
    if args.config_dir and not Path(args.config_dir).is_dir():
        raise ConfigError(f"--config-dir {args.config_dir}: no such folder")
    modes = {"--multirun": args.multirun, "--run": args.run, "--cfg": args.cfg, "--info": args.info,
             "--shell-completion": args.shell_completion}  # fmt: skip
    chosen = [flag for flag, value in modes.items() if value]
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)} do not go together; leave out all but one")
    if args.resolve and not (args.cfg or args.help):
        raise ConfigError("--resolve goes with --cfg job; type both, or leave it out")
    return args


def asks_for_information(arguments: Sequence[str]) -> bool:
    """Whether the command line asks for help and the like, whatever else it holds."""
    args = _parsed(arguments)
    return bool(args.hydra_help or args.info or args.shell_completion)


def help_asked_for(command: str, arguments: Sequence[str]) -> str | None:
    """What --help shows, by the template of conf/<command>.yaml; None if it is not typed.

    Hydra's own help takes twice as long: it reads the config again for each group that it lists.
    """
    args = _parsed(arguments)
    if not args.help:
        return None
    with _conf(command, args.config_dir) as conf:
        cfg = conf.compose(args.overrides)
        template = cfg.hydra.help.template
        with open_dict(cfg):
            del cfg["hydra"]
        keys = OmegaConf.to_yaml(_to_be_typed(OmegaConf.to_container(cfg, resolve=args.resolve)))
    roots = [CONF, *([Path(args.config_dir)] if args.config_dir else [])]
    groups: dict[str, set[str]] = {}
    for root in roots:
        for path in root.glob("*/**/*.yaml"):
            group = path.parent.relative_to(root).as_posix()
            groups.setdefault(group, set()).add(path.stem)
    choices = [
        f"{group}: {', '.join(sorted(groups[group]))}"
        for group in sorted(groups)
        if not group.startswith("hydra")
    ]
    return string.Template(template).substitute(
        APP_CONFIG_GROUPS="\n".join(choices) + "\n", CONFIG=keys
    )


def _to_be_typed(node: Any) -> Any:
    """The same without _target_ and the like, and without what is empty then."""
    if not isinstance(node, dict):
        return node
    inner = {k: _to_be_typed(value) for k, value in node.items() if not k.startswith("_")}
    return {k: value for k, value in inner.items() if value != {}}


def asks_for_config(arguments: Sequence[str]) -> bool:
    """Whether the config is to be shown, and nothing runs."""
    return bool(_parsed(arguments).cfg)


def compose_jobs(command: str, arguments: Sequence[str]) -> list[DictConfig]:
    """The config of every job that the arguments ask for: one, or those of a sweep.

    Raises ConfigError that lists every override that does not parse, unknown group option and
    unknown key; or that names a directory of the jobs which holds a run.
    """
    args = _parsed(arguments)
    if args.multirun and command != "train":
        raise ConfigError(
            f"-m: finetune.{command} takes one run at a time; leave it out and call it for each"
        )
    with _conf(command, args.config_dir) as conf:
        typed, problems = _parse(args.overrides)
        sound = []  # what can be composed
        for override in typed:
            said = [*_sweep_problems(override, args.multirun, conf), *_value_problems(override)]
            said += _group_problems(override, conf)
            problems += said
            if not said and not override.is_delete():
                sound.append(override)
        groups = [o for o in sound if conf.options(o.key_or_group)]
        problems += _key_problems(typed, groups, conf, tolerant=bool(problems))
        if problems:
            raise ConfigError(_listed(problems))
        try:
            jobs = [conf.compose(job) for job in itertools.islice(_jobs(typed), MOST_JOBS)]
            if not args.cfg:
                _refuse_taken(jobs, args.multirun)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(_first_lines(error)) from error
    for job in jobs:
        with open_dict(job):
            del job["hydra"]
    return jobs


def with_recorded(arguments: Sequence[str]) -> list[str]:
    """The arguments of a resume: what the run was started with, then what is typed now."""
    typed = [a for a in arguments if _key(a) != "resume"]
    run = value_of("resume", arguments) or ""
    recorded = recorded_overrides(Path(run))
    if longer := _grown_epochs(Path(run)):
        typed = [*([] if "epochs" in map(_key, typed) else [longer]), *typed]
    keys = {_key(argument) for argument in typed}
    refuse_own_code(recorded, typed, Path(run))
    return [
        *(o for o in without_launcher(recorded) if _key(o) not in keys),
        *typed,
        *([] if "launcher" in keys else ["launcher=local"]),
        f"resume={quoted(run)}",
        f"hydra.run.dir={quoted(run)}",
        "hydra.output_subdir=null",  # what the run was started with stays as it is
    ]


def without_launcher(overrides: Sequence[str]) -> list[str]:
    """What a run is; not where it was started."""
    return [o for o in overrides if _key(o) != "launcher" and not _key(o).startswith("launcher.")]


def config_dir(arguments: Sequence[str]) -> list[str]:
    """--config-dir and its folder, from wherever it is read; empty if it is not typed."""
    folder = _parsed(arguments).config_dir
    return [] if folder is None else ["--config-dir", str(Path(folder).absolute())]


def _grown_epochs(run: Path) -> str | None:
    """The epochs that an earlier resume gave to a run, as an override; None if none did."""
    if not has_record(run):
        return None
    facts = Record.read(run).facts
    epochs = facts["config"].get("epochs")
    return f"epochs={epochs}" if facts.get("epochs_grown") else None


def recorded_overrides(run: Path) -> list[str]:
    """What a run was started with. Raises CheckpointError if run is no run directory."""
    path = run / ".hydra" / "overrides.yaml"
    if not run.is_dir():
        raise CheckpointError(f"{run}: no such run directory. Runs lie below logs/")
    try:
        recorded = [str(o) for o in _load(path)]
    except Exception as error:
        raise CheckpointError(
            f"{run} is no run directory: {path} cannot be read ({error})"
        ) from error
    refuse_code(recorded, path)
    return recorded


def refuse_own_code(recorded: Sequence[str], typed: Sequence[str], folder: Path) -> None:
    """Raise CheckpointError where a network of the user's own is recorded and not typed again."""
    own = [o.lstrip("+") for o in recorded if _key(o) == "model.target"]
    if own and "model.target" not in map(_key, typed):
        raise CheckpointError(
            f"{folder} trains a network of your own, and a run directory is data, of which no code "
            f"is called; if you trust it, type that too: {own[-1]}"
        )


def refuse_code(recorded: Sequence[str], path: Path) -> None:
    """Raise CheckpointError: a run directory is data, and what it names is never called."""
    # nor is an option put where another belongs: strategy.then is all that has a place of its own
    if code := [
        o
        for o in recorded
        if "_target_" in o
        or _key(o).startswith("hydra")
        or ("@" in _key(o) and not _key(o).startswith("strategy@strategy."))
    ]:
        raise CheckpointError(
            f"{path} asks for code to be called, which is refused: {', '.join(code)}"
        )


@dataclass(frozen=True)
class SweepJob:
    """A job of a sweep that was started before. arguments: what its own run is started with."""

    overrides: tuple[str, ...]
    run: Path
    cfg: DictConfig
    arguments: tuple[str, ...]


def recorded_sweep(arguments: Sequence[str]) -> list[SweepJob]:
    """The jobs of the sweep that sweep.resume= names, in their order.

    Raises ConfigError for anything else that is typed, but for a launcher, and where a job's
    directory holds the run of another job; CheckpointError if there is no sweep.
    """
    args = _parsed(arguments)
    folder = Path(value_of("sweep.resume", arguments) or "")
    launcher = [o for o in args.overrides if o not in without_launcher(args.overrides)]
    targets = [o for o in args.overrides if _key(o) == "model.target"]
    others = [
        o
        for o in without_launcher(args.overrides)
        if _key(o) not in ("sweep.resume", "model.target")
    ]
    for flag in ("cfg", "info", "run"):
        if getattr(args, flag):
            others.append(f"--{flag}")
    if others:
        raise ConfigError(
            f"{to_type('sweep.resume', str(folder))} goes on with what the sweep was started with; "
            f"leave out {' '.join(others)}"
        )
    recorded, subdir = _recorded_in_sweep(folder)
    refuse_own_code(recorded, targets, folder)
    if targets and targets != (own := [o for o in recorded if _key(o) == "model.target"]):
        raise ConfigError(f"{' '.join(targets)}: the sweep was started with {own or 'none'}")
    flags = [] if args.config_dir is None else ["--config-dir", args.config_dir]
    found = []
    with _conf("train", args.config_dir) as conf:
        parser = OverridesParser.create(config_loader=_loader())
        try:
            typed = parser.parse_overrides(recorded)
            for number, job in enumerate(map(without_launcher, _jobs(typed))):
                own = [*job, *launcher, f"hydra.sweep.dir={quoted(str(folder))}", *subdir]
                cfg = conf.compose(own)
                run = _run_directory(cfg, number)
                if not run.resolve().is_relative_to(folder.resolve()):
                    raise CheckpointError(f"{folder}: its job {number} would run elsewhere: {run}")
                if longer := _grown_epochs(run):
                    cfg = conf.compose([*own, longer])
                with open_dict(cfg):
                    del cfg["hydra"]
                found.append(
                    SweepJob(tuple(job), run, cfg, (*flags, *_arguments(job, run, launcher)))
                )
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(
                f"{folder}: what the sweep was started with does not fit conf/ here: "
                f"{_first_lines(error)}"
            ) from error
    return found


def _recorded_in_sweep(folder: Path) -> tuple[list[str], list[str]]:
    """What a sweep was started with, and the override of its jobs' directories, if there is one."""
    path = folder / "multirun.yaml"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such sweep directory. Sweeps lie in logs/sweeps/")
    try:
        content: Any = OmegaConf.to_container(_load(path), resolve=False)
        of_hydra, recorded = (
            [str(o) for o in content["hydra"]["overrides"][kind]] for kind in ("hydra", "task")
        )
    except Exception as error:  # a damaged file fails in many ways
        raise CheckpointError(
            f"{folder} is no sweep: {path} cannot be read ({_first_lines(error)}). To go on with "
            f"one run: {to_type('resume', str(folder))}"
        ) from error
    refuse_code(recorded, path)
    return recorded, [o for o in of_hydra if _key(o) == "hydra.sweep.subdir"]


def _arguments(job: Sequence[str], run: Path, launcher: Sequence[str]) -> list[str]:
    """To start the run of a job, or to go on with it. Raises ConfigError if it is of another job.

    A run that was killed before its run.json was there starts anew: no more may be there.
    """
    if not has_record(run):
        return [*job, *launcher, f"hydra.run.dir={quoted(str(run))}"]
    parser = OverridesParser.create(config_loader=_loader())
    recorded = without_launcher(recorded_overrides(run))
    here = {o.get_key_element(): o for o in parser.parse_overrides(recorded)}
    asked = {o.get_key_element(): o for o in parser.parse_overrides(list(job))}
    differing = [
        f"{(here[key] if key in here else asked[key]).input_line} "
        f"{'is not of the sweep' if key in here else 'is missing there'}"
        for key in dict.fromkeys([*here, *asked])
        if key not in here or key not in asked or here[key].value() != asked[key].value()
    ]
    if differing:
        raise ConfigError(f"{run} holds the run of another job: {', '.join(differing)}")
    targets = [o for o in job if _key(o) == "model.target"]  # as typed again for the sweep
    return with_recorded([f"resume={quoted(str(run))}", *launcher, *targets])


def value_of(key: str, arguments: Sequence[str]) -> str | None:
    """The text typed for a key, the last time; None if it was not, or is no text, such as null."""
    given = [a for a in arguments if _key(a) == key and "=" in a]
    try:
        value = OverridesParser.create().parse_override(given[-1]).value() if given else None
    except HydraException:  # told by compose_jobs
        return None
    return value if isinstance(value, str) else None


def _key(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+~")


def compose_run(run: Path, overrides: Sequence[str]) -> DictConfig:
    """The config that a run was started with, and overrides on top; within a Hydra command.

    Raises ConfigError for a key of the data that the data of the run do not have.
    """
    recorded = [o for o in recorded_overrides(run) if _key(o) != "resume"]
    keys = {_key(override) for override in overrides}
    kept = [override for override in recorded if _key(override) not in keys]
    try:
        if about_data := [key for key in sorted(keys) if key.startswith("data.")]:
            cfg = compose("train", overrides=recorded, return_hydra_config=True)
            if unknown := [key for key in about_data if key not in _nodes(cfg)]:
                data = cfg.hydra.runtime.choices.data
                raise ConfigError(
                    f"{', '.join(unknown)}: the run has data={data}, which has no such key; "
                    "leave it out"
                )
        return compose("train", overrides=[*kept, *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(
            f"{run}: what it was started with does not fit conf/ here: {_first_lines(error)}"
        ) from error


class _Conf:
    """conf/ as one command composes it. search_path: an override that adds a folder to it."""

    def __init__(self, command: str, search_path: list[str]) -> None:
        self.command, self.search_path = command, search_path
        self._options: dict[str, list[str]] = {}

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """With the node hydra."""
        return compose(
            self.command, overrides=[*self.search_path, *overrides], return_hydra_config=True
        )

    def options(self, group: str) -> list[str]:
        """Of a group; none if it is a key."""
        group = group.lstrip("/")
        if group not in self._options:
            self._options[group] = self._files.get_group_options(group, ObjectType.CONFIG)
        return self._options[group]

    @functools.cached_property
    def _files(self) -> Any:
        """What Hydra finds the files in; its own get_group_options makes one for each question."""
        return _loader()._parse_overrides_and_create_caching_repo(self.command, self.search_path)[1]

    @functools.cached_property
    def defaults(self) -> DictConfig:
        """What is composed if nothing is typed."""
        return self.compose([])

    def is_null(self, group: str) -> bool:
        """Whether nothing is chosen of a group if nothing is typed."""
        return self.defaults.hydra.runtime.choices.get(group, "") is None


@contextmanager
def _conf(command: str, folder: str | None) -> Iterator[_Conf]:
    """folder: of --config-dir."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield _Conf(command, [] if folder is None else [f"hydra.searchpath=[{quoted(folder)}]"])


@dataclass(frozen=True)
class _Known:
    """What can be typed in one job. nodes: dotted keys to values, those of inner nodes included."""

    nodes: Mapping[str, Any]
    choices: Mapping[str, str | None]

    def close(self, key: str) -> str:
        """What a misspelt key may have meant; nothing that is not meant to be typed."""
        inside = key.startswith("hydra.")
        names = [n for n in self.nodes if n.startswith("hydra.") == inside and "._" not in f".{n}"]
        return _close(key, sorted(names)) or "see --help"

    def may_be_added(self, key: str) -> bool:
        """Whether something reads a new key: Hydra, or the signature behind a _target_."""
        top, _, inner = key.partition(".")
        node = self.nodes.get(top)
        return top == "hydra" or bool(inner and isinstance(node, dict) and "_target_" in node)

    def inside(self, key: str) -> list[str]:
        """Keys straight under a key, to be typed."""
        node = self.nodes.get(key)
        return [f"{key}.{n}" for n in node if n[0] != "_"] if isinstance(node, dict) else []


def _loader() -> Any:
    return GlobalHydra.instance().config_loader()


def _parse(overrides: Sequence[str]) -> tuple[list[Override], list[str]]:
    parser = OverridesParser.create(config_loader=_loader())
    typed, problems = [], []
    for text in overrides:
        key, given, value = text.partition("=")
        try:
            typed.append(parser.parse_override(text))
        except HydraException:
            hint = ""
            if given and _parses(parser, f"{key}={quoted(value)}"):
                hint = f"; its value must be quoted: {to_type(key, value)}"
            problems.append(f"{text}: not of the form key=value{hint}")
        else:
            typed[-1].config_loader = parser.config_loader  # for glob(...)
            if not typed[-1].key_or_group:
                typed.pop()
                problems.append(f"{text}: no key before the =")
    return typed, problems


def _parses(parser: OverridesParser, text: str) -> bool:
    try:
        parser.parse_override(text)
    except HydraException:
        return False
    return True


def _sweep_problems(override: Override, multirun: bool, conf: _Conf) -> Iterator[str]:
    """Several values where there can be one, and an interval where there must be values."""
    key, text = override.key_or_group, override.input_line
    if key == "resume" and multirun and override.value() is not None:
        yield "resume= goes on with one run; leave out -m"
    elif override.is_interval_sweep():
        yield f"{text}: a sweep needs its values; type -m {key}=0.1,0.5,1 or the like"
    elif override.is_sweep_override() and not multirun:
        as_one = to_type(key, override.get_value_string()) if key in PATHS else ""
        if key == "resume" or conf.command != "train":
            yield f"{text}: one value only" + (f"; if it is one: {as_one}" if as_one else "")
        else:
            hint = f"; or, if it is one value: {as_one}" if as_one else ""
            yield f"{key if not as_one else text}: several values are a sweep; add -m{hint}"


def _value_problems(override: Override) -> Iterator[str]:
    """An empty path: what a shell makes of a variable that is not set."""
    key = override.key_or_group
    if override.value() == "" and key in (*PATHS, "model.weights"):
        yield f"{key}= has no value (a shell variable that is not set?); type one or leave it out"


def _values(override: Override) -> list[str]:
    if override.is_sweep_override():
        return [str(value) for value in override.sweep_string_iterator()]
    return [shown(override.value())]


def _group_problems(override: Override, conf: _Conf) -> Iterator[str]:
    """Options that there are not, and groups that this command does not choose from."""
    group, text = override.key_or_group.lstrip("/"), override.input_line
    options = conf.options(group)
    if not options or override.is_delete() or override.is_interval_sweep():
        return
    added = override.is_add() or override.is_force_add()
    if (added or conf.command != "train") and not override.package:
        known = _known(conf.defaults)
        if group not in known.choices and {"run", "runs"} & known.nodes.keys():
            hint = f"; there are: {', '.join(known.inside(group))}" if known.inside(group) else ""
            yield f"{text}: finetune.{conf.command} takes the {group} of the run{hint}"
            return
        if group in known.choices and added:
            yield f"{text}: {group} is chosen already; type {(text or '').lstrip('+')}"
            return
    for value in _values(override):
        if value not in options:
            problem = (
                "one must be chosen" if value == "null" else f"no such option in conf/{group}/"
            )
            yield (
                f"{_group_key(override)}={value}: {problem}; "
                f"{_close(value, options) or 'there are: ' + ', '.join(options)}"
            )


def _group_key(override: Override) -> str:
    """Such as strategy, or strategy@strategy.then for the one inside of it."""
    group, place = override.key_or_group.lstrip("/"), override.package
    return group if place is None else f"{group}@{place}"


def _misplaced(job: list[str], conf: _Conf) -> list[str]:
    """Choices for a place that is not there, such as strategy@strategy.then with strategy=full."""

    def choices(overrides: list[str]) -> dict[str, str]:
        try:
            return dict(conf.compose(overrides).hydra.runtime.choices)
        except (HydraException, OmegaConfBaseException):
            return {}

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
            for option in conf.options(group)
            if key in choices([*others, f"{group}={option}"])
        ]
        hint = _close(key, list(known)) or f"options with it: {', '.join(having) or 'none'}"
        problems.append(f"{key}: no such choice with {group}={known.get(group)}; {hint}")
    return problems


def _key_problems(
    typed: list[Override], groups: list[Override], conf: _Conf, tolerant: bool
) -> list[str]:
    """Keys that the config of some job does not have, a line each. groups: what decides them."""
    problems: dict[str, str] = {}
    for job in itertools.islice(_jobs(groups), MOST_JOBS):
        try:
            known = _known(conf.compose(job) if job else conf.defaults)
        except (HydraException, OmegaConfBaseException) as error:
            return [] if tolerant else _misplaced(job, conf) or [_first_lines(error)]
        for override in typed:
            options = conf.options(override.key_or_group)
            if problem := _key_problem(override, options, known):
                problems.setdefault(override.input_line or "", problem)
    return list(problems.values())


def _key_problem(override: Override, options: list[str], known: _Known) -> str | None:
    key, text = override.key_or_group, override.input_line
    if override.is_delete() and options:
        return f"{text}: one must be chosen; type {key}=NAME, one of {', '.join(options)}"
    if options:
        return None
    added = override.is_add() or override.is_force_add()
    value = override.value()
    for name in _typed_keys(key, value):
        if name not in known.nodes and not (added and known.may_be_added(name)):
            group, _, inner = name.partition(".")
            choice = known.choices.get(group)
            place = f" with {group}={choice}" if inner and choice else ""
            return f"{name}: no such key{place}; {known.close(name)}"
    if override.is_delete():
        there = known.inside(key) or [key]
        return f"{text}: no key can be taken out; type {there[0]}=VALUE"
    if key in known.nodes and override.is_add():
        return f"{text}: {key} is there already; type {(text or '').lstrip('+')}"
    swept = override.is_sweep_override()
    if known.inside(key) and (swept or not isinstance(value, dict)):
        return f"{text}: {key} holds keys; type {' or '.join(f'{n}=' for n in known.inside(key))}"
    return None


def _typed_keys(key: str, value: Any) -> Iterator[str]:
    """A key, and those in its value if that is a mapping."""
    yield key
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _typed_keys(f"{key}.{name}", inner)


def _known(cfg: DictConfig) -> _Known:
    return _Known(_nodes(cfg), cfg.hydra.runtime.choices)


def _nodes(cfg: DictConfig) -> dict[str, Any]:
    """Dotted keys of a config to their values, those of inner nodes included."""
    found: dict[str, Any] = {}
    stack: list[tuple[str, Any]] = [("", OmegaConf.to_container(cfg))]
    while stack:
        prefix, node = stack.pop()
        for key, value in node.items():
            found[f"{prefix}{key}"] = value
            if isinstance(value, dict):
                stack.append((f"{prefix}{key}.", value))
    return found


def _jobs(typed: Sequence[Override]) -> Iterator[list[str]]:
    """The overrides of each job: the product of all sweeps, as Hydra's basic sweeper makes it."""
    choices: dict[str, list[str]] = {}  # of a key that is typed twice, the last counts
    for override in typed:
        key = override.get_key_element()
        if override.is_sweep_override():
            choices[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            choices[key] = [override.input_line or ""]
    for job in itertools.product(*choices.values()):
        yield list(job)


def _refuse_taken(jobs: Sequence[DictConfig], multirun: bool) -> None:
    """Raise ConfigError if a job would start in the directory of a run, or of another job.

    Before Hydra writes: it would put other overrides there, and the run could not be resumed.
    """
    if any("resume" not in job or job.resume is not None for job in jobs):
        return  # it writes no run directory, or goes on in its own
    if process_rank() > 0:
        return  # the first rank, which torchrun or SLURM started with this one, may be there
    found: set[Path] = set()
    for number, job in enumerate(jobs):
        OmegaConf.copy_cache(jobs[0], job)  # of ${now:}, as Hydra does for a sweep
        run = _run_directory(job, number if multirun else None)
        if has_record(run):
            raise taken(run)
        if run in found:
            raise ConfigError(
                f"{run}: two jobs of the sweep would run there; leave out hydra.sweep.subdir, or "
                "put ${hydra:job.num} into it"
            )
        found.add(run)


def _run_directory(job: DictConfig, number: int | None) -> Path:
    """Where Hydra will run a job. number: of the job in a sweep."""
    before = HydraConfig.instance().cfg
    if number is not None:
        with open_dict(job):
            job.hydra.job.num, job.hydra.job.id = number, str(number)
    try:
        HydraConfig.instance().set_config(job)  # what ${hydra:...} looks into
        if number is None:
            return Path(job.hydra.run.dir)
        return Path(job.hydra.sweep.dir, job.hydra.sweep.subdir)
    finally:
        HydraConfig.instance().cfg = before


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

"""How a value is typed: quoted where Hydra or a shell would take it for something else."""

import re
import shlex
from collections.abc import Mapping
from typing import Any

# what Hydra's grammar reads as a number or a constant, such as 2024, 2024_01 or 1e3
_NO_TEXT = re.compile(
    r"[+-]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(e[+-]?\d[\d_]*)?|[+-]?(inf|nan)|null|true|false", re.I
)


def quoted(value: str) -> str:
    """A text for Hydra's override grammar, whatever characters it holds."""
    if re.fullmatch(r"[\w./:+-]+", value, re.ASCII) and not _NO_TEXT.fullmatch(value):
        return value
    # a backslash stands for itself there, but before a quote
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + m[2].replace("'", "\\'"), value) + "'"


def overrides_of(values: Mapping[str, Any]) -> list[str]:
    """key=value of each value that is not None; a text stays one, whatever it looks like."""
    return [
        f"{key}={quoted(value) if isinstance(value, str) else value}"
        for key, value in values.items()
        if value is not None
    ]


def to_type(key: str, value: str) -> str:
    """key=value as a person types it in a shell: path=runs/1, "path='my runs/1'"."""
    override = f"{key}={quoted(value)}"
    if shlex.quote(override) == override:
        return override
    special = set(override) & set('"$`!') or "\\\\" in override  # also between double quotes
    return shlex.quote(override) if special else f'"{override}"'


def shown(value: Any) -> str:
    """A value as it is typed: null and true, not None and True; lists without spaces."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(shown, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{shown(item)}' for key, item in value.items())}}}"
    return str(value)

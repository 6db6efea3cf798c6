"""Images listed in a table: their paths, labels and, if it says so, splits."""

import csv as comma_separated
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune.data.base import ImageFiles, LabelledImages, Splits
from finetune.data.paths import existing_folder, printable
from finetune.data.split import SPLIT_NAMES, cut_splits, listed
from finetune.errors import DataError

log = logging.getLogger(__name__)

_MOST_SHOWN = 20


@dataclass(frozen=True)
class _Row:
    line: int
    path: str  # absolute, normalised
    label: str
    split: str  # train, val or test; "" in a table without splits


def csv(table: str, root: str | None = None, split_seed: int = 0) -> Splits:
    """Columns path,label[,split] with a header; others are ignored. UTF-8, commas.

    Paths are relative to root, by default the table's folder, and must stay inside it. Classes are
    the labels in alphabetical order. Without split, it is cut 70 / 15 / 15 by split_seed.
    DataError lists all bad rows at once.
    """
    file = Path(table).expanduser()
    if not file.is_file():
        here = printable(file.absolute())
        what = "is a folder, not a table" if file.is_dir() else "does not exist"
        raise DataError(f"data.table={table}: {here} {what}")
    folder = file.parent if root is None else existing_folder(root, "The table is data.table")

    rows = _rows(file, folder.resolve())
    classes = tuple(sorted({row.label for row in rows}))
    index = {name: label for label, name in enumerate(classes)}
    splits = {
        split: LabelledImages.of(
            ImageFiles([Path(row.path) for row in chosen]), [index[row.label] for row in chosen]
        )
        for split in ("", "train", "val", "test")
        if (chosen := [row for row in rows if row.split == split])
    }
    if "" in splits:
        return cut_splits(splits[""], classes, split_seed)
    if "train" not in splits:
        raise DataError(f"{printable(file)}: no row has split train; it has {listed(list(splits))}")
    return Splits(classes, splits["train"], splits.get("val"), splits.get("test"))


def _rows(table: Path, root: Path) -> list[_Row]:
    """All rows, double ones once; DataError where any of them is bad."""
    rows: dict[str, _Row] = {}
    problems: list[tuple[int, str]] = []
    stripped = doubled = 0
    # os.path where a row is concerned: pathlib would take seconds for a million of them
    for line, fields in _records(table):
        row = _Row(
            line,
            os.path.normpath(os.path.join(root, fields["path"])),  # noqa: PTH118
            fields["label"].strip(),
            SPLIT_NAMES.get(fields["split"].strip().lower(), "") if "split" in fields else "",
        )
        stripped += row.label != fields["label"]
        earlier = rows.get(row.path)
        if problem := _problem(row, fields, root) or (earlier and _conflict(row, earlier)):
            problems.append((line, problem))
        doubled += earlier is not None
        rows.setdefault(row.path, row)
    if problems:
        shown = "\n".join(f"  line {line}: {problem}" for line, problem in problems[:_MOST_SHOWN])
        more = len(problems) - _MOST_SHOWN
        raise DataError(
            f"{printable(table)}: {len(problems)} bad rows (paths relative to {printable(root)}, "
            f"or to data.root=FOLDER)\n{shown}" + (f"\n  and {more} more" if more > 0 else "")
        )
    if not rows:
        raise DataError(f"{printable(table)} has a header but no rows")
    if stripped:
        log.warning("%s: spaces around %d labels were stripped", printable(table), stripped)
    if doubled:
        log.warning("%s: %d rows stand there twice and count once", printable(table), doubled)
    return list(rows.values())


def _records(table: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and fields by column of each row that is not blank."""
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader = comma_separated.reader(file, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            if missing := [name for name in ("path", "label") if name not in header]:
                hint = "; separate the columns by commas" if len(header) == 1 else ""
                raise DataError(
                    f"{printable(table)} lacks the columns {listed(missing)}: its first line must "
                    f"be path,label[,split] but is {','.join(header)!r}{hint}"
                )
            for fields in reader:
                if len(fields) == len(header):
                    yield reader.line_num, dict(zip(header, fields, strict=True))
                elif fields:
                    raise DataError(
                        f"{printable(table)}, line {reader.line_num}: {len(fields)} fields where "
                        f"the header has {len(header)}; quote a field that holds a comma"
                    )
        except UnicodeDecodeError as error:
            raise DataError(
                f"{printable(table)} is not UTF-8 ({error}); save it as UTF-8"
            ) from error
        except comma_separated.Error as error:
            raise DataError(f"{printable(table)}, line {reader.line_num}: {error}") from error


def _problem(row: _Row, fields: dict[str, str], root: Path) -> str | None:
    if not fields["path"]:
        return "no path"
    if not row.label or row.label.lower() == "nan":
        return f"{fields['path']!r} has no label ({fields['label']!r})"
    if "split" in fields and not row.split:
        return f"unknown split {fields['split']!r}: one of train, val, test"
    if not row.path.startswith(os.path.join(root, "")):  # noqa: PTH118
        return f"{fields['path']!r} is outside the folder"
    if not os.path.isfile(row.path):  # noqa: PTH113
        return f"{fields['path']!r} does not exist"
    return None


def _conflict(row: _Row, earlier: _Row) -> str | None:
    """What two rows of one file contradict each other in."""
    if row.label != earlier.label:
        return f"labelled {row.label!r} here and {earlier.label!r} in line {earlier.line}"
    if row.split != earlier.split:
        return f"in {row.split} here and in {earlier.split} in line {earlier.line}"
    return None

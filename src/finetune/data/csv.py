"""Images listed in a table: their paths, labels and, if it says so, splits."""

import csv as comma_separated
import logging
import os
from collections.abc import Iterator, Sequence
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
    labels: tuple[str, ...]  # one, or any number if the table has a separator
    split: str  # train, val or test; "" in a table without splits


def csv(
    table: str, root: str | None = None, split_seed: int = 0, label_separator: str | None = None
) -> Splits:
    """Columns path,label[,split] with a header; others are ignored. UTF-8, commas.

    Paths are relative to root, by default the table's folder, and must stay inside it. Classes are
    the labels in alphabetical order. Without split, it is cut 70 / 15 / 15 by split_seed.
    label_separator: stands between the labels of an image, which may have several or, with an
    empty field, none; None for one label each. DataError lists all bad rows at once.
    """
    file = Path(table).expanduser()
    if not file.is_file():
        here = printable(file.absolute())
        what = "is a folder, not a table" if file.is_dir() else "does not exist"
        raise DataError(f"data.table={table}: {here} {what}")
    folder = file.parent if root is None else existing_folder(root, "The table is data.table")

    rows = _rows(file, folder.resolve(), label_separator)
    classes = tuple(sorted({label for row in rows for label in row.labels}))
    if not classes:
        raise DataError(f"{printable(file)}: no row has a label")
    index = {name: label for label, name in enumerate(classes)}

    def labelled(chosen: Sequence[_Row]) -> LabelledImages:
        images = ImageFiles([Path(row.path) for row in chosen])
        if label_separator is None:
            return LabelledImages.of(images, [index[row.labels[0]] for row in chosen])
        labels = [tuple(index[label] for label in row.labels) for row in chosen]
        return LabelledImages.of(images, labels, num_classes=len(classes))

    splits = {
        split: labelled(chosen)
        for split in ("", "train", "val", "test")
        if (chosen := [row for row in rows if row.split == split])
    }
    if "" in splits:
        return cut_splits(splits[""], classes, split_seed)
    if "train" not in splits:
        raise DataError(f"{printable(file)}: no row has split train; it has {listed(list(splits))}")
    return Splits(classes, splits["train"], splits.get("val"), splits.get("test"))


def _rows(table: Path, root: Path, separator: str | None) -> list[_Row]:
    """All rows, double ones once; DataError where any of them is bad."""
    rows: dict[str, _Row] = {}
    problems: list[tuple[int, str]] = []
    stripped = doubled = 0
    # os.path where a row is concerned: pathlib would take seconds for a million of them
    for line, fields in _records(table):
        row = _Row(
            line,
            os.path.normpath(os.path.join(root, fields["path"])),  # noqa: PTH118
            _labels(fields["label"], separator),
            SPLIT_NAMES.get(fields["split"].strip().lower(), "") if "split" in fields else "",
        )
        stripped += separator is None and row.labels != (fields["label"],)
        earlier = rows.get(row.path)
        problem = _problem(row, fields, root, separator)
        if earlier and not problem:
            problem = _conflict(row, earlier)
        if problem:
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


def _labels(field: str, separator: str | None) -> tuple[str, ...]:
    """The one label of a field; or all of them, sorted, each once."""
    if separator is None:
        return (field.strip(),)
    return tuple(sorted({label.strip() for label in field.split(separator)} - {""}))


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


def _problem(row: _Row, fields: dict[str, str], root: Path, separator: str | None) -> str | None:
    if not fields["path"]:
        return "no path"
    if "" in row.labels or (separator is None and row.labels[0].lower() == "nan"):
        return f"{fields['path']!r} has no label ({fields['label']!r})"
    if any(label.lower() == "nan" for label in row.labels):
        return f"{fields['path']!r} has the label 'nan'; leave the field empty for no label"
    if "split" in fields and not row.split:
        return f"unknown split {fields['split']!r}: one of train, val, test"
    if not row.path.startswith(os.path.join(root, "")):  # noqa: PTH118
        return f"{fields['path']!r} is outside the folder"
    if not os.path.isfile(row.path):  # noqa: PTH113
        return f"{fields['path']!r} does not exist"
    return None


def _conflict(row: _Row, earlier: _Row) -> str | None:
    """What two rows of one file contradict each other in."""
    if row.labels != earlier.labels:
        here, there = (", ".join(labels) for labels in (row.labels, earlier.labels))
        return f"labelled {here!r} here and {there!r} in line {earlier.line}"
    if row.split != earlier.split:
        return f"in {row.split} here and in {earlier.split} in line {earlier.line}"
    return None

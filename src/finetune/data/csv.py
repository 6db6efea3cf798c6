"""Images listed in a table: their paths, labels and, if it says so, splits."""

import codecs
import csv as comma_separated
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.data.base import ImageFiles, LabelledImages, Splits
from finetune.data.paths import existing_folder, printable, text_of
from finetune.data.read import MAX_PIXELS, BadImage
from finetune.data.scan import SKIP, BadData, OnBad, Problem, Scan, skipped
from finetune.data.split import SPLIT_NAMES, cut_splits, listed, warn_of_case
from finetune.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Row:
    line: int
    typed: str
    path: str  # absolute, normalised
    labels: tuple[str, ...]  # one, or any number if the table has a separator
    split: str  # train, val or test; "" in a table without splits


_Found = tuple[int, Problem]  # line


def csv(
    table: str,
    root: str | None = None,
    split_seed: int = 0,
    label_separator: str | None = None,
    on_bad: OnBad = "error",
    max_pixels: int = MAX_PIXELS,
    rescan: bool = False,
) -> Splits:
    """Columns path,label[,split] with a header; others are ignored. UTF-8, commas.

    Paths are relative to root, by default the table's folder, and must stay inside it. Classes are
    the labels in alphabetical order. Without split, it is cut 70 / 15 / 15 by split_seed.
    label_separator: stands between the labels of an image, which may have several or, with an
    empty field, none; None for one label each. on_bad, rescan: as in image_folder. BadData lists
    all bad rows and images at once; on_bad=skip leaves images out, never rows.
    """
    file = Path(table).expanduser()
    if not file.is_file():
        here = printable(file.absolute())
        what = "is a folder, not a table" if file.is_dir() else "does not exist"
        raise DataError(f"data.table={printable(table)}: {here} {what}")
    given = file.parent if root is None else existing_folder(root, "The table is data.table")
    folder = given.resolve()

    rows, problems = _rows(file, folder, label_separator)
    with Scan(f"csv {file.absolute()}", folder, max_pixels, rescan) as scan:
        doubles = _scan_rows(scan, rows)
    bad = {row.path: (row, scan.bad[row.path]) for row in rows if row.path in scan.bad}
    gone = {path for path, (_, error) in bad.items() if error.kind == "missing"}
    problems += [(row.line, _missing(row)) for path, (row, _) in bad.items() if path in gone]
    unread = {path: error for path, (_, error) in bad.items() if path not in gone}
    advice = f"Paths are relative to {printable(folder)}, or to data.root=FOLDER"
    if not problems:
        advice = SKIP
    if on_bad == "error":
        problems += [
            (bad[path][0].line, Problem(error.kind, str(error))) for path, error in unread.items()
        ]
    if problems:
        place = printable(file) + ", " if len(problems) == 1 else ""
        told = [
            Problem(problem.kind, f"{place}line {line}: {problem.what}")
            for line, problem in sorted(problems, key=lambda found: found[0])
        ]
        raise BadData(printable(file), told, advice)
    if not rows:
        raise DataError(f"{printable(file)} has a header but no rows")
    left_out = skipped(printable(file), unread)
    splits = _splits(file, rows, unread, label_separator is not None, split_seed, max_pixels)
    return replace(splits, skipped=left_out, doubles=doubles)


def _scan_rows(scan: Scan, rows: Sequence[_Row]) -> tuple[tuple[str, ...], ...]:
    """Read the images of all rows; paths of those with the same bytes."""
    by_folder: dict[str, list[str]] = {}
    for row in rows:
        parent, _, name = row.path.rpartition(os.sep)
        by_folder.setdefault(parent or os.sep, []).append(name)
    folders = [scan.folder(parent, names) for parent, names in by_folder.items()]
    scan.look(folders)
    return scan.doubles(folders)


def _splits(
    table: Path,
    rows: Sequence[_Row],
    bad: Mapping[str, BadImage],
    several: bool,
    seed: int,
    max_pixels: int,
) -> Splits:
    """The rows whose image is not bad. several: labels per image."""
    classes = tuple(sorted({label for row in rows for label in row.labels}))
    if not classes:
        raise DataError(f"{printable(table)}: no row has a label")
    index = {name: label for label, name in enumerate(classes)}

    def labelled(split: str, chosen: Sequence[_Row]) -> LabelledImages:
        kept = [row for row in chosen if row.path not in bad] if bad else chosen
        emptied = {name for row in chosen for name in row.labels}
        if emptied := emptied - {name for row in kept for name in row.labels}:
            example = next(row.path for row in chosen if emptied & {*row.labels})
            raise DataError(
                f"{printable(table)}: data.on_bad=skip would leave {split or 'it'} without an "
                f"image of {listed(sorted(emptied))}, since none can be read, such as "
                f"{bad[example]}"
            )
        images = ImageFiles((row.path for row in kept), max_pixels)
        if not several:
            return LabelledImages.of(images, [index[row.labels[0]] for row in kept])
        labels = [tuple(index[label] for label in row.labels) for row in kept]
        return LabelledImages.of(images, labels, num_classes=len(classes))

    splits = {
        split: labelled(split, chosen)
        for split in ("", "train", "val", "test")
        if (chosen := [row for row in rows if row.split == split])
    }
    warn_of_case(classes)
    if "" in splits:
        return cut_splits(splits[""], classes, seed)
    if "train" not in splits:
        raise DataError(
            f"{printable(table)}: no row has split train; it has {listed(list(splits))}"
        )
    return Splits(classes, splits["train"], splits.get("val"), splits.get("test"))


def _rows(table: Path, root: Path, separator: str | None) -> tuple[list[_Row], list[_Found]]:
    """Rows whose image lies in root, double ones once; and what is wrong with any row."""
    rows: dict[str, _Row] = {}
    problems: list[_Found] = []
    stripped = doubled = 0
    # os.path where a row is concerned: pathlib would take seconds for a million of them
    for line, fields in _records(table):
        row = _Row(
            line,
            fields["path"],
            os.path.normpath(os.path.join(root, fields["path"])),  # noqa: PTH118
            _labels(fields["label"], separator),
            SPLIT_NAMES.get(fields["split"].strip().lower(), "") if "split" in fields else "",
        )
        # a link in root that leads out of it is its owner's own wish
        is_inside = row.path.startswith(os.path.join(root, ""))  # noqa: PTH118
        earlier = rows.get(row.path)
        problem = _problem(row, fields, is_inside, separator)
        if earlier and not problem:
            problem = _conflict(row, earlier)
        if problem:
            problems.append((line, problem))
        else:
            stripped += separator is None and fields["label"].strip() != fields["label"]
            doubled += earlier is not None
        if is_inside and "\0" not in row.path:
            rows.setdefault(row.path, row)
    if stripped:
        log.warning("%s: spaces around %d labels were stripped", printable(table), stripped)
    if doubled:
        log.warning("%s: %d rows stand there twice and count once", printable(table), doubled)
    return list(rows.values()), problems


def _labels(field: str, separator: str | None) -> tuple[str, ...]:
    """The one label of a field; or all of them, sorted, each once."""
    if separator is None:
        return (text_of(field.strip()),)
    return tuple(sorted({text_of(label.strip()) for label in field.split(separator)} - {""}))


def _records(table: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and fields by column of each row that is not blank."""
    with table.open("rb") as raw:
        if raw.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
            log.warning("%s begins with a byte order mark, which is passed over", printable(table))
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


def _problem(
    row: _Row, fields: dict[str, str], is_inside: bool, separator: str | None
) -> Problem | None:
    if not row.typed:
        return Problem("no path", "no path")
    if "" in row.labels or (separator is None and row.labels[0].lower() == "nan"):
        return Problem("no label", f"{row.typed!r} has no label ({fields['label']!r})")
    if any(label.lower() == "nan" for label in row.labels):
        return Problem(
            "no label", f"{row.typed!r} has the label 'nan'; leave the field empty for no label"
        )
    if "split" in fields and not row.split:
        return Problem(
            "unknown split", f"unknown split {fields['split']!r}: one of train, val, test"
        )
    if not is_inside:
        return Problem("path outside the folder", f"{row.typed!r} is outside the folder")
    return _missing(row) if "\0" in row.path else None


def _missing(row: _Row) -> Problem:
    return Problem("missing file", f"{row.typed!r} does not exist")


def _conflict(row: _Row, earlier: _Row) -> Problem | None:
    """What two rows of one file contradict each other in."""
    if row.labels != earlier.labels:
        here, there = (", ".join(labels) for labels in (row.labels, earlier.labels))
        return Problem(
            "contradiction", f"labelled {here!r} here and {there!r} in line {earlier.line}"
        )
    if row.split != earlier.split:
        return Problem(
            "contradiction", f"in {row.split} here and in {earlier.split} in line {earlier.line}"
        )
    return None

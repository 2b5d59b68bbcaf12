"""The official data layout, its check, and the command line of everything about data.

    <root>/<NAME>/{train,val|dev,test}_clean.csv      columns text,label,mental_prompt
    <root>/<NAME>/cold_start.jsonl                    {"text", "label", "mental_prompt", "stages" or "completion"}

    python -m crpo_fast.data synth <root> [--seed N] [--rows N]
    python -m crpo_fast.data check <root>
    python -m crpo_fast.data convert imhi --task sad <source> <root>

Labels are compared exactly after stripping white space. A row with an empty text is kept, because the
published sets have such rows, and ``check`` counts it. No row is ever dropped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from crpo_fast.batch import Row
from crpo_fast.data_tables import (
    LABEL_SETS,
    OFFICIAL_EIGHT,
    DataError,
    Record,
    load_table,
    nearest,
    quoted,
    read_csv,
    read_jsonl,
    require_columns,
    where,
)

__all__ = [
    "LABEL_SETS",
    "OFFICIAL_EIGHT",
    "CheckReport",
    "DataError",
    "check",
    "load_cold_start",
    "load_official",
    "load_table",
    "main",
]

SPLITS = ("train", "val", "test")
_FILES = {"train": ("train",), "val": ("val", "dev"), "test": ("test",)}
_COLUMNS = ("text", "label", "mental_prompt")


def label_problem(label: str, name: str) -> str | None:
    """What is wrong with a label of the data set ``name``, or None."""
    labels = LABEL_SETS[name]
    if label in labels:
        return None
    close = nearest(label, labels)
    same = "; it differs in case only" if close.casefold() == label.casefold() else ""
    return (
        f"expected one of {quoted(labels)}, got {label!r}. The nearest valid label is {close!r}{same}. "
        "Correct the cell or remove the row."
    )


def _split_name(split: str) -> str:
    name = "val" if split == "dev" else split
    if name not in SPLITS:
        raise DataError(f"split: expected one of {quoted(SPLITS)} (or 'dev'), got {split!r}. Name one of these.")
    return name


def find_datasets(root: str | Path, datasets: Sequence[str] | None = None) -> list[str]:
    """Names of the data sets under ``root``, in the order of LABEL_SETS (or as asked for).

    A folder counts when it has a known name or holds a ``*_clean.csv``.

    Raises:
        DataError: no root, no data set in it, an unknown folder (unless ``datasets`` picks others), a
            name in ``datasets`` that is unknown or has no folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(
            f"{root}: expected the folder of the data sets, found none. Check the path, or write made-up data "
            f"with: python -m crpo_fast.data synth {root}"
        )
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and (p.name in LABEL_SETS or any(p.glob("*_clean.csv"))))
    for name in folders if datasets is None else datasets:
        if name not in LABEL_SETS:
            raise DataError(
                f"{root / name}: expected the name of a known data set, got {name!r}. Known: {quoted(LABEL_SETS)}; "
                f"the nearest is {nearest(name, LABEL_SETS)!r}. Rename the folder, or name the data sets to use."
            )
        if name not in folders:
            raise DataError(f"{root / name}: expected the folder of {name}, found none. Present: {quoted(folders)}.")
    if not folders:
        raise DataError(
            f"{root}: expected <NAME>/train_clean.csv of at least one data set ({quoted(LABEL_SETS)}), found none. "
            f"Check the path, or write made-up data with: python -m crpo_fast.data synth {root}"
        )
    return list(datasets) if datasets is not None else [name for name in LABEL_SETS if name in folders]


def split_path(root: str | Path, name: str, split: str) -> Path:
    """The file of one split; ``val`` may be called ``dev_clean.csv``.

    Raises:
        DataError: the split is missing, or both names exist.
    """
    folder = Path(root) / name
    options = [folder / f"{stem}_clean.csv" for stem in _FILES[_split_name(split)]]
    found = [path for path in options if path.is_file()]
    if not found:
        present = quoted(sorted(p.name for p in folder.glob("*_clean.csv"))) or "nothing"
        raise DataError(
            f"{folder}: data root is missing a split: expected {' or '.join(p.name for p in options)}, found {present}. "
            f"Add the file, or leave {name} out of the data sets."
        )
    if len(found) > 1:
        raise DataError(f"{folder}: expected one of {quoted(p.name for p in found)}, found both. Remove one.")
    return found[0]


def _official_row(path: Path, name: str, record: Record) -> Row:
    label = record.cells["label"].strip()
    problem = label_problem(label, name)
    if problem:
        raise DataError(f"{where(path, record.row, record.line, 'label')}: {problem}")
    return Row(record.cells["text"], label, record.cells["mental_prompt"], name)


def _read_split(path: Path, name: str) -> tuple[list[Row], list[str]]:
    """Rows of one file and a message for each row that is refused."""
    rows: list[Row] = []
    problems: list[str] = []
    for record in read_csv(path, _COLUMNS):
        try:
            rows.append(_official_row(path, name, record))
        except DataError as error:
            problems.append(str(error))
    return rows, problems


def _raise_first(problems: list[str]) -> None:
    if problems:
        more = f" ({len(problems) - 1} more rows of this file are refused.)" if len(problems) > 1 else ""
        raise DataError(problems[0] + more)


def load_official(root: str | Path, split: str, datasets: Sequence[str] | None = None) -> list[Row]:
    """One split of all data sets under ``root``, concatenated.

    Args:
        root: folder with one folder per data set.
        split: "train", "val" (or "dev") or "test".
        datasets: names to load; None loads every folder and refuses unknown ones.

    Returns:
        Rows in file order; text and instruction exactly as written, ``dataset_id`` the data set's name.

    Raises:
        DataError: see the module's docstring; the message names file, row and column.
    """
    rows: list[Row] = []
    for name in find_datasets(root, datasets):
        found, problems = _read_split(split_path(root, name, split), name)
        _raise_first(problems)
        rows += found
    return rows


def _cold_start_row(path: Path, name: str, record: Record) -> Row:
    require_columns(path, list(record.cells), _COLUMNS, record.row)
    for column in (*_COLUMNS, "completion"):
        value = record.cells.get(column, "")
        if not isinstance(value, str):
            raise DataError(f"{where(path, record.row, record.line, column)}: expected text, got {value!r}. Write a string.")
    label = record.cells["label"].strip()
    problem = label_problem(label, name)
    if problem:
        raise DataError(f"{where(path, record.row, record.line, 'label')}: {problem}")
    stages, completion = record.cells.get("stages"), record.cells.get("completion")
    if (stages is None) == (completion is None):
        raise DataError(
            f"{where(path, record.row, record.line, 'stages')}: expected either 'stages' or 'completion', got "
            f"{'neither' if stages is None else 'both'}. Write one of them."
        )
    if stages is not None:
        _check_stages(path, record, stages)
    elif not completion.strip():
        raise DataError(f"{where(path, record.row, record.line, 'completion')}: expected a text, got an empty one. Fill it.")
    return Row(record.cells["text"], label, record.cells["mental_prompt"], name, completion=completion, stages=stages)


def _check_stages(path: Path, record: Record, stages: object) -> None:
    if not isinstance(stages, dict) or not stages:
        raise DataError(f"{where(path, record.row, record.line, 'stages')}: expected an object of stage -> text, got {stages!r}. Write one.")
    for stage, text in stages.items():
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f"{where(path, record.row, record.line, 'stages')}: expected a non-empty text for stage {stage!r}, got {text!r}. Fill it."
            )


def load_cold_start(root: str | Path, datasets: Sequence[str] | None = None) -> list[Row]:
    """The written rationales for the SFT cold start, of every data set that has some.

    Args:
        root: folder with one folder per data set.
        datasets: names to load; each must then have a ``cold_start.jsonl``.

    Raises:
        DataError: no such file, or a row that cannot be used.
    """
    rows: list[Row] = []
    for name in find_datasets(root, datasets):
        path = Path(root) / name / "cold_start.jsonl"
        if path.is_file():
            rows += [_cold_start_row(path, name, record) for record in read_jsonl(path)]
        elif datasets is not None:
            raise DataError(f"{path}: expected the written rationales of {name}, found no file. Add it or start without.")
    if not rows:
        raise DataError(
            f"{Path(root)}: expected <NAME>/cold_start.jsonl in at least one data set, found none. Add one "
            "(docs/data.md shows a line), or remove the sft phase from the config."
        )
    return rows


# ---------------------------------------------------------------------------- check


@dataclass
class CheckReport:
    """What ``check`` found. ``labels[name][split]`` counts labels, ``notes`` never make it fail."""

    labels: dict[str, dict[str, Counter[str]]] = field(default_factory=dict)
    cold_start: dict[str, int] = field(default_factory=dict)
    empty_texts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()


def _numbers(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")


def _note_duplicates(report: CheckReport, place: str, rows: list[Row]) -> None:
    first: dict[str, int] = {}
    again: list[int] = []
    empty = 0
    for number, row in enumerate(rows, start=1):
        text = _normal(row.text)
        if not text:
            empty += 1
        elif first.setdefault(text, number) != number:
            again.append(number)
    if again:
        report.notes.append(f"{place}: {len(again)} rows repeat the text of an earlier row (rows {_numbers(again)})")
    if empty:
        report.empty_texts[place] = empty
        report.notes.append(f"{place}: {empty} rows with an empty text; they are kept")


def _note_overlaps(report: CheckReport, rows: dict[tuple[str, str], list[Row]]) -> None:
    """The same post in one set's train and in a set's test: joint training would see the test posts."""
    texts = {key: {_normal(row.text) for row in part} - {""} for key, part in rows.items()}
    for (train_name, split), train in texts.items():
        for (test_name, other), test in texts.items():
            shared = len(train & test)
            if split == "train" and other == "test" and shared:
                report.notes.append(
                    f"{shared} posts are in {train_name}/train and in {test_name}/test: training on both leaks the test"
                )


def check(root: str | Path, datasets: Sequence[str] | None = None) -> CheckReport:
    """Reads everything under ``root`` and reports counts, duplicates, overlaps and every refusal."""
    report = CheckReport()
    try:
        names = find_datasets(root, datasets)
    except DataError as error:
        report.refusals.append(str(error))
        return report
    rows: dict[tuple[str, str], list[Row]] = {}
    for name in names:
        for split in SPLITS:
            try:
                rows[name, split], problems = _read_split(split_path(root, name, split), name)
            except DataError as error:
                report.refusals.append(str(error))
                continue
            report.refusals += problems
            report.labels.setdefault(name, {})[split] = Counter(row.label for row in rows[name, split])
            _note_duplicates(report, f"{name}/{split}", rows[name, split])
        if (Path(root) / name / "cold_start.jsonl").is_file():
            try:
                report.cold_start[name] = len(load_cold_start(root, [name]))
            except DataError as error:
                report.refusals.append(str(error))
    _note_overlaps(report, rows)
    return report


def format_report(report: CheckReport) -> str:
    """The report as lines for a terminal."""
    lines = []
    for name, splits in report.labels.items():
        for split, counts in splits.items():
            shares = "  ".join(f"{label} {counts[label]}" for label in LABEL_SETS[name])
            lines.append(f"{name:<12}{split:<6}{sum(counts.values()):>7} rows   {shares}")
        if name in report.cold_start:
            lines.append(f"{name:<12}cold  {report.cold_start[name]:>7} rows")
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"refused: {message}" for message in report.refusals]
    lines.append(f"{len(report.refusals)} refused" if report.refusals else "everything can be loaded")
    return "\n".join(lines)


# ---------------------------------------------------------------------------- command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m crpo_fast.data", description="Write, check and convert data.")
    commands = parser.add_subparsers(dest="command", required=True)
    synth = commands.add_parser("synth", help="write made-up data of all eight tasks")
    synth.add_argument("root", type=Path)
    synth.add_argument("--seed", type=int, default=0)
    synth.add_argument("--rows", type=int, default=200, help="training rows of each data set (default 200)")
    checked = commands.add_parser("check", help="read everything, report counts, duplicates and refusals")
    checked.add_argument("root", type=Path)
    convert = commands.add_parser("convert", help="turn a published layout into the official one")
    convert.add_argument("layout", choices=["imhi"])
    convert.add_argument("--task", choices=["sad"], required=True)
    convert.add_argument("source", type=Path)
    convert.add_argument("root", type=Path)
    return parser


def _synth(arguments: argparse.Namespace) -> str:
    from crpo_fast.synthetic import write_corpus

    rows = arguments.rows
    sizes = {"train": rows, "val": max(8, rows // 8), "test": max(8, rows // 5), "cold_start": 5 * rows}
    return json.dumps(write_corpus(arguments.root, seed=arguments.seed, **sizes))


def _convert(arguments: argparse.Namespace) -> str:
    from crpo_fast.data_convert import convert_imhi_sad

    return convert_imhi_sad(arguments.source, arguments.root).summary()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (1 when data was refused)."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "check":
            report = check(arguments.root)
            print(format_report(report))
            return 1 if report.refusals else 0
        print(_synth(arguments) if arguments.command == "synth" else _convert(arguments))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

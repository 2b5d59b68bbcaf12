"""The official data layout.

    <root>/<NAME>/{train,val|dev,test}_clean.csv      columns text,label,mental_prompt
    <root>/<NAME>/cold_start.jsonl      {"text", "label", "mental_prompt", "stages" or "completion"}

Labels are compared exactly after stripping white space. A row with an empty text is kept, because
the published sets have such rows. No row is ever dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crpo_fast.batch import Row
from crpo_fast.data_tables import (
    LABEL_SETS,
    DataError,
    Record,
    nearest,
    quoted,
    read_csv,
    read_jsonl,
    require_columns,
    shown,
    where,
)

SPLITS = ("train", "val", "test")
_FILES = {"train": ("train",), "val": ("val", "dev"), "test": ("test",)}
_COLUMNS = ("text", "label", "mental_prompt")


def label_problem(label: str, name: str) -> str | None:
    """What is wrong with a label of the data set ``name``, or None."""
    labels = LABEL_SETS[name]
    if label in labels:
        return None
    if not label:
        return f"expected one of {quoted(labels)}, got an empty cell. Fill it or remove the row."
    close = nearest(label, labels)
    same = "; it differs in case only" if close.casefold() == label.casefold() else ""
    return (
        f"expected one of {quoted(labels)}, got {shown(label)}. The nearest valid label is "
        f"{close!r}{same}. "
        "Correct the cell or remove the row."
    )


def _split_name(split: str) -> str:
    name = "val" if split == "dev" else split
    if name not in SPLITS:
        raise DataError(
            f"split: expected one of {quoted(SPLITS)} (or 'dev'), got {split!r}. Name one of these."
        )
    return name


def find_datasets(root: str | Path, datasets: Sequence[str] | None = None) -> list[str]:
    """Names of the data sets under ``root``, in the order of LABEL_SETS (or as asked for).

    A folder counts when it has a known name or holds a ``*_clean.csv``.

    Raises:
        DataError: no root, no data set in it, an unknown folder (unless ``datasets`` picks others),
            a name in ``datasets`` that is unknown or has no folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(
            f"{root}: expected the folder of the data sets, found none. Check the path, or write "
            "made-up data "
            f"with: python -m crpo_fast.data synth {root}"
        )
    folders = sorted(
        p.name
        for p in root.iterdir()
        if p.is_dir() and (p.name in LABEL_SETS or any(p.glob("*_clean.csv")))
    )
    for name in folders if datasets is None else datasets:
        if name not in LABEL_SETS:
            raise DataError(
                f"{root / name}: expected the name of a known data set, got {name!r}. Known: "
                f"{quoted(LABEL_SETS)}; "
                f"the nearest is {nearest(name, LABEL_SETS)!r}. Rename the folder, or name the "
                "data sets to use."
            )
        if name not in folders:
            raise DataError(
                f"{root / name}: expected the folder of {name}, found none. Present: "
                f"{quoted(folders)}."
            )
    if not folders:
        raise DataError(
            f"{root}: expected <NAME>/train_clean.csv of at least one data set "
            f"({quoted(LABEL_SETS)}), found none. "
            f"Check the path, or write made-up data with: python -m crpo_fast.data synth {root}"
        )
    return (
        list(datasets) if datasets is not None else [name for name in LABEL_SETS if name in folders]
    )


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
            f"{folder}: data root is missing a split: expected "
            f"{' or '.join(p.name for p in options)}, found {present}. "
            f"Add the file, or leave {name} out of the data sets."
        )
    if len(found) > 1:
        raise DataError(
            f"{folder}: expected one of {quoted(p.name for p in found)}, found both. Remove one."
        )
    return found[0]


def _official_row(path: Path, name: str, record: Record) -> Row:
    label = record.cells["label"].strip()
    problem = label_problem(label, name)
    if problem:
        raise DataError(f"{where(path, record.row, record.line, 'label')}: {problem}")
    return Row(record.cells["text"], label, record.cells["mental_prompt"], name)


def read_split(path: Path, name: str) -> tuple[list[Row], list[str]]:
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
        more = (
            f" ({len(problems) - 1} more rows of this file are refused.)"
            if len(problems) > 1
            else ""
        )
        raise DataError(problems[0] + more)


def load_official(root: str | Path, split: str, datasets: Sequence[str] | None = None) -> list[Row]:
    """One split of all data sets under ``root``, concatenated.

    Args:
        root: folder with one folder per data set.
        split: "train", "val" (or "dev") or "test".
        datasets: names to load; None loads every folder and refuses unknown ones.

    Returns:
        Rows in file order; text and instruction exactly as written, ``dataset_id`` the data set's
        name.

    Raises:
        DataError: see the module's docstring; the message names file, row and column.
    """
    rows: list[Row] = []
    for name in find_datasets(root, datasets):
        found, problems = read_split(split_path(root, name, split), name)
        _raise_first(problems)
        rows += found
    return rows


def _cold_start_row(path: Path, name: str, record: Record) -> Row:
    require_columns(path, list(record.cells), _COLUMNS, record)
    for column in (*_COLUMNS, "completion"):
        value = record.cells.get(column, "")
        if not isinstance(value, str):
            raise DataError(
                f"{where(path, record.row, record.line, column)}: expected text, got "
                f"{shown(value)}. Write a string."
            )
    label = record.cells["label"].strip()
    problem = label_problem(label, name)
    if problem:
        raise DataError(f"{where(path, record.row, record.line, 'label')}: {problem}")
    stages, completion = record.cells.get("stages"), record.cells.get("completion")
    if (stages is None) == (completion is None):
        raise DataError(
            f"{where(path, record.row, record.line, 'stages')}: expected either 'stages' or "
            "'completion', got "
            f"{'neither' if stages is None else 'both'}. Write one of them."
        )
    if stages is not None:
        _check_stages(path, record, stages)
    elif not (completion or "").strip():
        raise DataError(
            f"{where(path, record.row, record.line, 'completion')}: expected a text, got an empty "
            "one. Fill it."
        )
    return Row(
        record.cells["text"],
        label,
        record.cells["mental_prompt"],
        name,
        completion=completion,
        stages=stages,
    )


def _check_stages(path: Path, record: Record, stages: object) -> None:
    if not isinstance(stages, dict) or not stages:
        raise DataError(
            f"{where(path, record.row, record.line, 'stages')}: expected an object of stage -> "
            f"text, got {type(stages).__name__ if stages else 'nothing'}. Write one."
        )
    for stage, text in stages.items():
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f"{where(path, record.row, record.line, 'stages')}: expected a non-empty text for "
                f"stage {stage!r}, got {shown(text)}. Fill it."
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
            raise DataError(
                f"{path}: expected the written rationales of {name}, found no file. Add it or "
                "start without."
            )
    if not rows:
        raise DataError(
            f"{Path(root)}: expected <NAME>/cold_start.jsonl in at least one data set, found "
            "none. Add one "
            "(docs/data.md shows a line), or remove the sft phase from the config."
        )
    return rows

"""Reads a whole data root and says what is in it and what is wrong with it.

Posts are never printed, only row numbers: they may be real people's words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from crpo_fast.batch import Row
from crpo_fast.data_official import (
    SPLITS,
    find_datasets,
    load_cold_start,
    read_split,
    split_path,
)
from crpo_fast.data_tables import LABEL_SETS, DataError


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
        report.notes.append(
            f"{place}: {len(again)} rows repeat the text of an earlier row (rows {_numbers(again)})"
        )
    if empty:
        report.empty_texts[place] = empty
        report.notes.append(f"{place}: {empty} rows with an empty text; they are kept")


def _note_overlaps(report: CheckReport, rows: dict[tuple[str, str], list[Row]]) -> None:
    """Posts of one set's train that are in a set's test: joint training would see them."""
    texts = {key: {_normal(row.text) for row in part} - {""} for key, part in rows.items()}
    for (train_name, split), train in texts.items():
        for (test_name, other), test in texts.items():
            shared = len(train & test)
            if split == "train" and other == "test" and shared:
                report.notes.append(
                    f"{shared} posts are in {train_name}/train and in {test_name}/test: training "
                    "on both leaks the test"
                )


def check(root: str | Path, datasets: Sequence[str] | None = None) -> CheckReport:
    """Reads everything under ``root``: counts, duplicates, overlaps and every refusal."""
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
                rows[name, split], problems = read_split(split_path(root, name, split), name)
            except DataError as error:
                report.refusals.append(str(error))
                continue
            report.refusals += problems
            report.labels.setdefault(name, {})[split] = Counter(
                row.label for row in rows[name, split]
            )
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
    lines.append(
        f"{len(report.refusals)} refused" if report.refusals else "everything can be loaded"
    )
    return "\n".join(lines)

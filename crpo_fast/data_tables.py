"""Tables from disk: strict CSV, JSON lines and Parquet, and the label sets of the known tasks.

Every refusal is a ``DataError`` that names the file, the row (data rows count from 1, the header is
not one), the line where it differs, the column, and what to do. Nothing is repaired and nothing is
dropped.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crpo_fast.batch import Row

YES_NO = ("Yes", "No")
LABEL_SETS: dict[str, tuple[str, ...]] = {
    "Dreaddit": YES_NO,
    "DATD": YES_NO,
    "SDCNL": YES_NO,
    "FIG": YES_NO,
    "DepSeverity": ("Minimum", "Mild", "Moderate", "Severe"),
    "LT-EDI": ("Not depressed", "Moderately depressed", "Severely depressed"),
    "RSD": ("Indicator", "Ideation", "Behavior", "Attempt"),
    "LID": ("[1-2]", "[2-3]", "[3-4]", "[4-5]"),
    "SAD": (
        "School",
        "Financial problem",
        "Family issues",
        "Social relationships",
        "Work",
        "Health issues",
        "Emotional turmoil",
        "Everyday decision making",
        "Other",
    ),
}
OFFICIAL_EIGHT = tuple(name for name in LABEL_SETS if name != "SAD")


class DataError(ValueError):
    """Data that cannot be used; the message names file, row, column and the remedy."""


@dataclass(frozen=True, slots=True)
class Record:
    """One data row: cells by column, number (from 1), and first line where that says more."""

    cells: dict[str, Any]
    row: int
    line: int | None = None


def where(
    path: Path, row: int | None = None, line: int | None = None, column: str | None = None
) -> str:
    """``file, row 3 (line 7), column 'label'``: the start of every message."""
    text = str(path)
    if row is not None:
        text += f", row {row}" + (f" (line {line})" if line is not None else "")
    return text + (f", column {column!r}" if column is not None else "")


def nearest(value: str, options: Iterable[str]) -> str:
    """The option most like ``value``, ignoring case."""
    by_case = {option.casefold(): option for option in options}
    found = difflib.get_close_matches(value.casefold(), list(by_case), n=1, cutoff=0.0)
    return by_case[found[0]]


def shown(value: object) -> str:
    """A cell for a message: a label or a constant as it is, never what may be (part of) a post."""
    if isinstance(value, str):
        return (
            repr(value)
            if len(value.split()) <= 4 and len(value) <= 40
            else (f"a text of {len(value)} characters")
        )
    return repr(value) if value is None or isinstance(value, bool) else type(value).__name__


def quoted(values: Iterable[str]) -> str:
    """The values in quotes, between commas."""
    return ", ".join(repr(value) for value in values)


def has_escape(text: str) -> bool:
    """Whether ``text`` holds a byte that was not UTF-8 (kept by ``surrogateescape``)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def read_text(path: Path) -> str:
    """The file as text; a byte that is not UTF-8 becomes a lone surrogate, a leading BOM goes.

    Raises:
        DataError: no such file, or UTF-16.
    """
    if not path.is_file():
        raise DataError(f"{path}: expected a file, found none. Check the path.")
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path}: expected UTF-8, found UTF-16. Save the file as UTF-8.")
    return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="surrogateescape")


def _refuse_escapes(path: Path, record: Record) -> None:
    for column, cell in record.cells.items():
        if isinstance(cell, str) and has_escape(cell):
            bad = next(c for c in cell if "\udc80" <= c <= "\udcff")
            raise DataError(
                f"{where(path, record.row, record.line, column)}: expected UTF-8, got the byte "
                f"0x{ord(bad) - 0xDC00:02x}. Save the file as UTF-8 (for example: iconv -f cp1252 "
                "-t utf-8)."
            )


def read_csv(path: Path, required: Sequence[str]) -> list[Record]:
    """All rows of an RFC-4180 file with a header: quoted line breaks, doubled quotes, CRLF, BOM.

    Cells are returned as written, blank lines between rows are no rows.

    Raises:
        DataError: a required column is missing, a row has too few or too many cells, a quote is not
            closed, a byte is not UTF-8, or the file has no row.
    """
    text = read_text(path)
    old_limit = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        records = _csv_records(path, reader, required)
    finally:
        csv.field_size_limit(old_limit)
    if not records:
        raise DataError(
            f"{path}: expected at least one row below the header, got none. Fill the file or "
            "leave it out."
        )
    for record in records:
        _refuse_escapes(path, record)
    return records


def _csv_records(path: Path, reader: Any, required: Sequence[str]) -> list[Record]:
    records: list[Record] = []
    header: list[str] | None = None
    start = 1  # the line on which the present row starts
    try:
        for cells in reader:
            if header is None and cells:
                header = _checked_header(path, cells, required)
            elif header is not None and cells:
                records.append(_csv_record(path, header, cells, len(records) + 1, start))
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{where(path, len(records) + 1, start)}: expected RFC-4180 CSV, got an error "
            f"({error}). "
            "Quote every cell that holds a comma, a quote or a line break, and double the quotes "
            'inside it ("").'
        ) from error
    if header is None:
        raise DataError(
            f"{path}: expected a header line, got an empty file. Columns needed: "
            f"{quoted(required)}."
        )
    return records


def _checked_header(path: Path, header: list[str], required: Sequence[str]) -> list[str]:
    doubled = next((name for name in header if header.count(name) > 1), None)
    if doubled is not None:
        raise DataError(
            f"{where(path, column=doubled)}: expected one column of that name, got several. "
            "Rename them."
        )
    require_columns(path, header, required)
    return header


def require_columns(
    path: Path, found: Sequence[str], required: Sequence[str], record: Record | None = None
) -> None:
    """Refuses a missing column, naming the ones that are there.

    Raises:
        DataError: a required column is not among ``found``.
    """
    for name in required:
        if name not in found:
            close = difflib.get_close_matches(name, found, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            row, line = (record.row, record.line) if record else (None, None)
            raise DataError(
                f"{where(path, row, line, name)}: expected a column of that name, found "
                f"{quoted(found)}.{hint} "
                "Rename the column in the file, or name the right one."
            )


def _csv_record(path: Path, header: list[str], cells: list[str], row: int, line: int) -> Record:
    shown = None if line == row + 1 else line  # below a one-line header, row n is on line n + 1
    if len(cells) != len(header):
        column = header[len(cells)] if len(cells) < len(header) else header[-1]
        raise DataError(
            f"{where(path, row, shown, column)}: expected {len(header)} cells, got {len(cells)}. "
            "Quote every cell that holds a comma, a quote or a line break."
        )
    return Record(dict(zip(header, cells, strict=True)), row, shown)


def read_jsonl(path: Path) -> list[Record]:
    """All objects of a JSON-lines file; blank lines are no rows.

    Raises:
        DataError: a line is not a JSON object, a byte is not UTF-8, or the file has no row.
    """
    records: list[Record] = []
    for line, text in enumerate(read_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        row = len(records) + 1
        record_line = None if line == row else line
        place = where(path, row, record_line)
        if has_escape(text):
            raise DataError(
                f"{place}: expected UTF-8, got another encoding. Save the file as UTF-8."
            )
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{place}: expected one JSON object, got an error ({error}). Correct that line."
            ) from error
        if not isinstance(value, dict):
            raise DataError(
                f"{place}: expected one JSON object, got {type(value).__name__}. Write {{...}} on "
                "every line."
            )
        records.append(Record(value, row, record_line))
    if not records:
        raise DataError(
            f"{path}: expected at least one row, got none. Fill the file or leave it out."
        )
    return records


def read_parquet(path: Path) -> list[Record]:
    """All rows of a Parquet file, when pyarrow is installed.

    Raises:
        DataError: pyarrow is missing, the file cannot be read, or it has no row.
    """
    if not path.is_file():
        raise DataError(f"{path}: expected a file, found none. Check the path.")
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{path}: expected pyarrow for Parquet, found none. Type: pip install pyarrow"
        ) from error
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path}: expected a Parquet file, got an error ({error}). Write it again."
        ) from error
    if not rows:
        raise DataError(
            f"{path}: expected at least one row, got none. Fill the file or leave it out."
        )
    return [Record(cells, number) for number, cells in enumerate(rows, start=1)]


def _cell_text(path: Path, record: Record, column: str) -> str:
    """A prompt, an answer or a completion: text, or a number written as text; never empty."""
    require_columns(path, list(record.cells), [column], record)
    value = record.cells[column]
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = json.dumps(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{where(path, record.row, record.line, column)}: expected a non-empty text or a "
            f"number, got {shown(value)}. "
            "Fill that cell or remove the row."
        )
    return value


def _stage_texts(path: Path, record: Record, column: str) -> dict[str, str]:
    require_columns(path, list(record.cells), [column], record)
    value = record.cells[column]
    if (
        not isinstance(value, dict)
        or not value
        or not all(isinstance(v, str) and v.strip() for v in value.values())
    ):
        raise DataError(
            f"{where(path, record.row, record.line, column)}: expected an object of stage name -> "
            "non-empty text, "
            f"got {type(value).__name__}{' with an empty or missing text' if value else ''}. "
            "Write every stage, or leave the column out."
        )
    return dict(value)


_READERS = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".csv": lambda path: read_csv(path, ()),
    ".parquet": read_parquet,
}


def load_table(
    path: str | Path,
    prompt: str,
    answer: str,
    completion: str | None = None,
    dataset_id: str | None = None,
    stages: str | None = None,
) -> list[Row]:
    """Anybody's own task: JSONL, CSV or Parquet with a prompt column and an answer column.

    Args:
        path: the file; its ending (.jsonl .ndjson .csv .parquet) says how it is read.
        prompt: name of the column that becomes ``Row.text`` (the instruction is empty).
        answer: name of the column with the gold answer.
        completion: name of the column with a whole written answer for the SFT phase.
        dataset_id: the name all rows get for balance weights and metrics (default "default").
        stages: name of a column with an object of stage name -> text (JSONL, Parquet).

    Returns:
        One Row per data row, in order. All other columns are in ``Row.columns``, values that are
        not text as JSON text.

    Raises:
        DataError: file, column or cell that cannot be used.
    """
    path = Path(path)
    if path.suffix.lower() not in _READERS:
        raise DataError(
            f"{path}: expected a file that ends in {quoted(_READERS)}, got {path.suffix!r}. "
            "Convert it."
        )
    records = _READERS[path.suffix.lower()](path)
    named = {column for column in (prompt, answer, completion, stages) if column is not None}
    for column in sorted(named):
        require_columns(path, list(records[0].cells), [column])
    return [
        Row(
            text=_cell_text(path, record, prompt),
            label=_cell_text(path, record, answer).strip(),
            dataset_id=dataset_id or "default",
            completion=_cell_text(path, record, completion) if completion else None,
            stages=_stage_texts(path, record, stages) if stages else None,
            columns={
                key: value
                if isinstance(value, str)
                else json.dumps(value, ensure_ascii=False, default=str)
                for key, value in record.cells.items()
                if key not in named
            },
        )
        for record in records
    ]

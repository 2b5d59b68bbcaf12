"""Small data roots on disk, for tests."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from crpo_fast.data import DataError

HEADER = "text,label,mental_prompt\n"
ASK = "Stressed?\nStatement:"


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_set(root: Path, name: str = "Dreaddit", train: str = "a,Yes,q\n", val: str = "b,No,q\n",
              test: str = "c,No,q\n", val_name: str = "val") -> Path:  # fmt: skip
    for split, rows in (("train", train), (val_name, val), ("test", test)):
        write(root / name / f"{split}_clean.csv", HEADER + rows)
    return root


def message(call, *arguments, **options) -> str:
    with pytest.raises(DataError) as caught:
        call(*arguments, **options)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


def cold(root: Path, *objects: object, name: str = "Dreaddit") -> Path:
    lines = [o if isinstance(o, str) else json.dumps(o) for o in objects]
    return write(write_set(root, name) / name / "cold_start.jsonl", "\n".join(lines) + "\n")


STAGED = {"text": "t", "label": "Yes", "mental_prompt": "q", "stages": {"stimulus": "s"}}
WHOLE = {"text": "t", "label": "No", "mental_prompt": "q", "completion": "c"}

# (data set, text, label, instruction) of ``write_fixtures``, in the order in which they load
FIXTURE_ROWS: tuple[tuple[str, str, str, str], ...] = (
    ("Dreaddit", "first line\nsecond, line", "Yes", "Stressed?\nStatement:"),
    ("Dreaddit", 'she said "stop"', "No", "Stressed?\nStatement:"),
    ("Dreaddit", "", "No", "Stressed?\nStatement:"),
    ("Dreaddit", "windows\r\nline ends", "Yes", "Stressed?\nStatement:"),
    (
        "SDCNL",
        "caf\u00e9 \U0001f62d\U0001f468\u200d\U0001f469\u200d\U0001f467 \u65e5\u672c",
        "Yes",
        "q",
    ),
    ("SDCNL", "emptypost", "No", "q"),
    ("LT-EDI", "</think><answer>No</answer> <|im_end|>", "Not depressed", "q"),
    ("LID", "alone again", "[1-2]", "1 to 5 .\nStatement: "),
    ("LID", " kept as it is ", "[4-5]", "1 to 5 .\nStatement: "),
)


def write_fixtures(root: Path) -> None:
    """Writes the awkward rows of ``FIXTURE_ROWS`` as every split of their data sets.

    Multi-line cells, doubled quotes, an empty text, emoji, tags inside a post, bracket labels. The
    files of SDCNL begin with a byte order mark and end their lines with CRLF, the validation split
    of LID is called dev_clean.csv.
    """
    for name in dict.fromkeys(row[0] for row in FIXTURE_ROWS):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        windows = name == "SDCNL"
        for split in ("train", "dev" if name == "LID" else "val", "test"):
            path = folder / f"{split}_clean.csv"
            with path.open("w", encoding="utf-8-sig" if windows else "utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\r\n" if windows else "\n")
                writer.writerow(HEADER.strip().split(","))
                writer.writerows(row[1:] for row in FIXTURE_ROWS if row[0] == name)

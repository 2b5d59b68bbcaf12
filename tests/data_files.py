"""Small data roots on disk, for tests."""

from __future__ import annotations

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

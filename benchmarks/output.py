"""Where results go and how progress is said."""

from __future__ import annotations

import json
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def say(line: str) -> None:
    """Progress on the terminal."""
    print(line, file=sys.stderr, flush=True)


def write_json(path: Path, report: dict) -> None:
    """A result file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

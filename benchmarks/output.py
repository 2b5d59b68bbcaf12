"""Where results go and how progress is said."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def say(line: str) -> None:
    """Progress on the terminal."""
    print(line, file=sys.stderr, flush=True)


def new_file(text: str) -> Path:
    """A result file from the command line, that can be written: asked before minutes of work.

    Raises:
        argparse.ArgumentTypeError: it is a folder, or its folder cannot be made or written to.
    """
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"expected a file that can be written, got {text!r} ({error.strerror}). Name one in a "
            "folder of yours, e.g. out.json."
        ) from error
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        why = "a folder" if path.is_dir() else "no permission"
        raise argparse.ArgumentTypeError(
            f"expected a file that can be written, got {text!r} ({why}). Name one in a folder of "
            "yours, e.g. out.json."
        )
    return path


def positive(text: str) -> int:
    """A whole number above 0 from the command line.

    Raises:
        argparse.ArgumentTypeError: something else.
    """
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}. Write 2.")
    return int(text)


def out_folder(text: str) -> Path:
    """A folder from the command line, made where it is not there: asked before minutes of work.

    Raises:
        argparse.ArgumentTypeError: it cannot be made or written to.
    """
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
        why = "" if os.access(path, os.W_OK) else "no permission"
    except OSError as error:
        why = error.strerror or type(error).__name__
    if why:
        raise argparse.ArgumentTypeError(
            f"expected a folder that can be written to, got {text!r} ({why}). Name one of yours, "
            "e.g. results."
        )
    return path


def positive_seconds(text: str) -> float:
    """Seconds above 0 from the command line.

    Raises:
        argparse.ArgumentTypeError: something else.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}. Write 60.")
    return value


def write_json(path: Path, report: dict) -> None:
    """A result file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

"""Draw result files again: `python -m benchmarks plot [file.json ...]`, by default all committed.

Beside each JSON file: the Markdown page, the picture(s) in SVG, the numbers as CSV. What draws a
report is the module of its kind, with `page(report)`, `svg(report)` and `csv_rows(report)`.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
from pathlib import Path
from typing import Any

from .gpu_gate.report import plain
from .machine import place as place
from .output import RESULTS, out_folder, write_json

DRAWERS = {  # kind of a report -> the module that draws it
    "loss": "losses.plot",
    "score": "losses.plot",
    "growth": "growth.plot",
    "memory": "memory.plot",
    "step": "step.plot",
    "rollout": "rollout.plot",
    "gpu-gate": "gpu_gate.command",
}


class NoDrawing(ValueError):
    """A file that cannot be drawn; the text says why and what to type."""


def write(report: dict[str, Any], stem: Path) -> list[Path]:
    """The report as JSON and what is drawn of it: `<stem>.json`, .md, .svg, .csv."""
    report = plain(report)
    file = stem.with_suffix(".json")
    write_json(file, report)
    return [file, *draw(report, stem)]


def publish(report: dict[str, Any], stem: Path) -> None:
    """Write the report and what is drawn of it, print the page, say where the files are."""
    files = write(report, stem)
    print(drawer(report).page(report))
    print("written:", *files)


def draw(report: dict[str, Any], stem: Path) -> list[Path]:
    """All but the JSON; a picture of further shapes only where there are some.

    All is made before anything is written: a report that lacks something leaves no files.
    """
    module = drawer(report)
    shapes = stem.with_name(f"{stem.name}_shapes.svg")
    pictures = {stem.with_suffix(".svg"): module.svg(report)}
    pictures[shapes] = module.svg_of_shapes(report) if hasattr(module, "svg_of_shapes") else None
    texts = {stem.with_suffix(".md"): module.page(report), **pictures}
    rows = module.csv_rows(report)
    for path, text in texts.items():
        if text:
            path.write_text(text, encoding="utf-8")
        else:
            path.unlink(missing_ok=True)  # of an earlier run that had something to draw there
    table = stem.with_suffix(".csv")
    write_csv(table, rows)
    return [*(path for path, text in texts.items() if text), table]


def drawer(report: dict[str, Any]) -> Any:
    """The module that draws a report.

    Raises:
        NoDrawing: no module draws this kind.
    """
    kind = report.get("kind")
    if kind not in DRAWERS:
        known = ", ".join(DRAWERS)
        raise NoDrawing(f"expected a report with a kind among {known}, got {kind!r}")
    return importlib.import_module(f".{DRAWERS[kind]}", __package__)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows under the names that any of them has; an absent value is empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def committed() -> list[Path]:
    """The result files that can be drawn."""
    files = sorted(RESULTS.glob("*.json"))
    return [f for f in files if json.loads(f.read_text("utf-8")).get("kind") in DRAWERS]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("files", nargs="*", type=Path, metavar="file.json", help="result files")
    parser.add_argument(
        "--out", type=out_folder, help="folder of what is drawn (default: the file's)"
    )


def run(options: argparse.Namespace, command: str) -> int:  # noqa: ARG001
    """Draw each file; 2 when one cannot be drawn."""
    status = 0
    for file in options.files or committed():
        try:
            report = read(file)
            folder = options.out or file.parent
            folder.mkdir(parents=True, exist_ok=True)
            print("written:", *draw(report, folder / file.stem))
        except NoDrawing as reason:
            print(refusal(file, str(reason)))
            status = 2
        except (LookupError, TypeError, AttributeError) as reason:
            print(refusal(file, f"expected a whole report, got {type(reason).__name__}: {reason}"))
            status = 2
    return status


def refusal(file: Path, reason: str) -> str:
    """What is wrong with a file and what to type."""
    return f"plot: {file}: {reason}. Type python -m benchmarks plot <a .json of a measurement>."


def read(file: Path) -> dict[str, Any]:
    """A report.

    Raises:
        NoDrawing: it cannot be read, or is none.
    """
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as reason:
        raise NoDrawing(f"expected a result file, got {reason}") from reason
    if not isinstance(report, dict):
        raise NoDrawing(f"expected an object, got {type(report).__name__}")
    return report

"""Draw result files again: `python -m benchmarks plot [file.json ...]`, by default all committed.

Beside each JSON file: the Markdown page, the picture(s) in SVG, the numbers as CSV. What draws a
report is the module of its kind, with `page(report)`, `svg(report)` and `csv_rows(report)`.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
from html import escape
from pathlib import Path
from typing import Any

from .gpu_report import plain
from .machine import place as place
from .output import RESULTS, write_json

DRAWERS = {  # kind of a report -> the module that draws it
    "loss": "loss_plot",
    "score": "loss_plot",
    "growth": "growth_plot",
    "memory": "growth_plot",
    "step": "step_plot",
    "rollout": "rollout_plot",
    "gpu-gate": "gpu_gate",
}


class NoDrawing(ValueError):
    """A file that cannot be drawn; the text says why and what to type."""


def write(report: dict[str, Any], stem: Path) -> list[Path]:
    """The report as JSON and what is drawn of it: `<stem>.json`, .md, .svg, .csv."""
    report = plain(report)
    file = stem.with_suffix(".json")
    write_json(file, report)
    return [file, *draw(report, stem)]


def draw(report: dict[str, Any], stem: Path) -> list[Path]:
    """All but the JSON; a picture of further shapes only where there are some."""
    module = drawer(report)
    shapes = stem.with_name(f"{stem.name}_shapes.svg")
    pictures = {stem.with_suffix(".svg"): module.svg(report)}
    pictures[shapes] = module.svg_of_shapes(report) if hasattr(module, "svg_of_shapes") else None
    texts = {stem.with_suffix(".md"): module.page(report), **pictures}
    for path, text in texts.items():
        if text:
            path.write_text(text, encoding="utf-8")
        elif path == shapes:
            path.unlink(missing_ok=True)  # of an earlier run with more shapes
    table = stem.with_suffix(".csv")
    write_csv(table, module.csv_rows(report))
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
    parser.add_argument("--out", type=Path, help="folder of what is drawn (default: the file's)")


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
            print(
                f"plot: {file}: {reason}. Type python -m benchmarks plot <a .json that a "
                "measurement wrote>."
            )
            status = 2
    return status


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


BAR, GAP, LABEL, WIDTH = 22, 10, 280, 860
OURS, OTHERS, FLOOR = "#0072b2", "#d55e00", "#7f7f7f"
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1f2328}.title{font-size:15px;font-weight:600}"
    ".page{fill:#fff}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.page{fill:#0d1117}}"
)


def table(report: dict) -> str:
    """The rows of a report as Markdown; seconds and GB of a CPU, milliseconds and MiB of a GPU."""
    is_gpu = "gpu" in report["machine"]
    columns = [
        *("", "ms" if is_gpu else "s", "/ products", "% of floor"),
        *(["/ products, fp32 out"] if is_gpu else []),
        *("/ plain torch", "peak MiB" if is_gpu else "extra GB"),
        *(["workspace MiB"] if is_gpu else []),
        *(["targets"] if is_gpu else []),
        *("d_weight error", "d_hidden error", "logprob error (nats)", "note"),
    ]
    lines = [f"| {' | '.join(columns).strip()} |", "|" + " --- |" * len(columns)]
    for row in report["rows"]:
        if "missing" in row:
            empty = " - |" * (len(columns) - 2)
            lines.append(f"| {row['title']} |{empty} {row['missing']} |")
        else:
            lines.append("| " + " | ".join(cells(row, is_gpu=is_gpu)) + " |")
    return "\n".join(lines)


def cells(row: dict, *, is_gpu: bool) -> list[str]:
    """One row. The floor is the bare products that the candidate cannot do without."""
    found, seconds, ratio = row["errors"], row["seconds"]["median"], row.get("over_products")
    scale, digits = (2**20, 0) if is_gpu else (1e9, 2)
    is_floor = row["key"].startswith("products")
    sizes = [row["extra_bytes"], *([row["workspace_bytes"]] if is_gpu else [])]
    times = [
        f"{1e3 * seconds:.2f}" if is_gpu else f"{seconds:.2f}",
        _ratio(ratio),
        "-" if ratio is None else f"{100 / ratio:.0f}",
        *([_ratio(row.get("over_products_fp32"))] if is_gpu else []),
        _ratio(row.get("over_naive")),
    ]
    return [
        row["title"] + (f" {row['version']}" if row.get("version") else ""),
        *("-" if row.get("has_no_claim") else time for time in times),
        *("-" if is_floor else f"{size / scale:.{digits}f}" for size in sizes),
        *([row.get("target", "-")] if is_gpu else []),
        _error(found.get("d_weight_rel_rms")),
        _error(found.get("d_hidden_rel_rms")),
        _error(found.get("logprobs_rms")),
        row["note"],
    ]


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def method(report: dict) -> str:
    """How the numbers came about."""
    rows = report["error_rows"]
    if "gpu" in report["machine"]:
        return (
            "ms: median of interleaved rounds by CUDA events, after warm-up, inputs larger than "
            "the cache or in turn. Floor: the bare products (bf16 out) that a candidate cannot do "
            "without, measured in the same rounds. Peak: allocated bytes beyond the inputs; "
            "workspace: without the gradients that are returned. Errors: rms against fp64 on "
            f"{rows} rows, gradients relative."
        )
    return (
        "Seconds: median of interleaved rounds, forward and backward. % of floor: the three bare "
        "products of the same run over a row's seconds. Extra GB: peak of live "
        "tensor bytes beyond the inputs, both gradients included, in a run of its own. Errors: rms "
        f"against fp64 on {rows} rows, gradients relative; on a CPU every bf16 "
        "product is rounded to bf16, which is most of each error. Products may be 5 "
        "times faster on another CPU: compare ratios of one run."
    )


def page(report: dict) -> str:
    """The whole Markdown page of a run."""
    machine = report["machine"]
    where = "a GPU" if "gpu" in machine else "a CPU"
    low, high = report["entropy_quantiles"]
    inputs = (
        f"One product: {report['product_tflops']:.2f} TFLOP/s. "
        f"Inputs: entropy {low:.1f} .. {high:.1f} nats (10 % .. 90 % of rows)."
    )
    lines = [
        f"# Fused loss on {where}: {report['case']}",
        f"`{report['command']}`, {machine['date']}, commit {machine['commit']}. {place(machine)}",
        inputs,
        table(report),
        target_table(report["targets"]),
        method(report),
    ]
    return "\n\n".join(lines) + "\n"


MET = {True: "yes", False: "**no**", None: "no claim"}


def target_table(targets: list[dict]) -> str:
    """Limits and what was measured."""
    lines = [
        f"| {target['text']} | {target['limit']} | "
        f"{'-' if target['met'] is None else round(target['value'], 2)} | {MET[target['met']]} |"
        for target in targets
    ]
    return "\n".join(["| target | limit | measured | met |", "| --- | --- | --- | --- |", *lines])


def bars(report: dict) -> str:
    """Seconds of every candidate, with three products as the floor."""
    rows = [row for row in report["rows"] if "missing" not in row]
    is_gpu = "gpu" in report["machine"]
    device = report["machine"]["gpu"]["name"] if is_gpu else report["machine"]["cpu"]
    longest = max(row["seconds"]["median"] for row in rows)
    height = 58 + len(rows) * (BAR + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(report['case'])}: seconds, forward and backward</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}"/>',
        f'<text class="title" x="16" y="24">{escape(report["case"])}: seconds (extra GB)</text>',
        f'<text x="16" y="42">{escape(device)}</text>',
    ]
    for index, row in enumerate(rows):
        y = 54 + index * (BAR + GAP)
        seconds = row["seconds"]["median"]
        length = seconds / longest * (WIDTH - LABEL - 150)
        ours = OURS if row["title"].startswith("crpo_kernels") else OTHERS
        colour = FLOOR if row["key"].startswith("products") else ours
        text = f"{1e3 * seconds:.2f} ms" if is_gpu else f"{seconds:.2f} s"
        if colour != FLOOR:
            text += f" ({row['extra_bytes'] / 1e9:.2f} GB)"
        parts += [
            f'<text x="{LABEL - 8}" y="{y + 15}" text-anchor="end">{escape(row["title"])}</text>',
            f'<rect x="{LABEL}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{colour}"/>',
            f'<text x="{LABEL + length + 6:.1f}" y="{y + 15}">{text}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])

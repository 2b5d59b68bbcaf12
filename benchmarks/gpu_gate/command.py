"""The gate of one GPU: correctness, precision, memory, graphs, then the targets' table.

    python -m benchmarks gpu-gate --json out.json       on a CUDA or ROCm device, under 9 minutes
    python -m benchmarks gpu-gate --rehearse            on a CPU: every part, tiny, interpreted

Exit status: 0 all checks hold, 1 one failed or time was too short for one (a missed time target
alone only with --gate), 2 it cannot run here. The JSON is written after each part, so that a run
that is cut short leaves what it found.
"""

from __future__ import annotations

import argparse
import gc
import os
import shlex
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import plot
from benchmarks.deadline import LATE, OutOfTime, at_most_seconds
from benchmarks.drawing import bars
from benchmarks.losses import plot as loss_plot
from benchmarks.machine import gpu_name, machine
from benchmarks.output import new_file, positive_seconds, say, write_json
from crpo_kernels.support import INTERPRETER, asks_for_interpreter, triton_obstacle

from . import behaviour, precision, scorers, scoring, table
from .report import Part, plain
from .scale import Scale, real_scale, rehearsal_scale
from .table import NO_CLAIM

TOTAL_SECONDS = 510  # of the nine minutes; the rest is start and end
GRACE = 20  # seconds that a part may go on when it has begun something


@dataclass(frozen=True)
class Entry:
    """A part of the gate: what it runs, its share of the time, and whether it must be complete."""

    run: Callable[[Part, Scale], None]
    seconds: float
    is_vital: bool = True


ENTRIES = {
    "ceilings": Entry(table.ceilings, 20, is_vital=False),
    "precision": Entry(precision.precision, 60),
    "wrap": Entry(behaviour.wrap, 50),
    "nan": Entry(behaviour.nan, 30),
    "repeatability": Entry(behaviour.repeatability, 20),
    "memory": Entry(behaviour.memory, 20),
    "graphs": Entry(behaviour.graphs, 20),
    "scoring": Entry(scoring.scoring, 60),
    "options": Entry(precision.options, 40),
    "presets": Entry(precision.presets, 100),
    "table": Entry(table.table, 180, is_vital=False),
    "scorers": Entry(scorers.scorers, 150, is_vital=False),
    "sweep": Entry(table.sweep, 90, is_vital=False),
}
TUNING = ("scorers", "sweep")  # data, no verdict: only where they are asked for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--json", type=new_file, help="result file; without it nothing is written")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, interpreted, tiny")
    parser.add_argument("--only", nargs="+", choices=list(ENTRIES), help="parts to run")
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="also data for tuning: other tiles, warps, chunks, both scorers",
    )
    parser.add_argument("--gate", action="store_true", help="exit 1 when a time target is missed")
    parser.add_argument(
        "--seconds",
        type=positive_seconds,
        default=TOTAL_SECONDS,
        help=f"in all (default {TOTAL_SECONDS})",
    )


def run(options: argparse.Namespace, command: str) -> int:
    """Run the parts, print and write what they found."""
    if options.rehearse and not asks_for_interpreter():
        return rehearse_in_a_process(command)
    if not options.rehearse and not torch.cuda.is_available():
        print(
            f"gpu-gate: expected a CUDA or ROCm device, got none (torch {torch.__version__} sees "
            "no device). Type python -m benchmarks gpu-gate --rehearse to run every part on this "
            "CPU, tiny and without any claim about time."
        )
        return 2
    if not options.rehearse and asks_for_interpreter():
        print(
            f"gpu-gate: expected compiled kernels, got {INTERPRETER} on. Type "
            f"unset {INTERPRETER}, or add --rehearse."
        )
        return 2
    device = torch.device("cpu")
    if not options.rehearse:
        device = torch.device("cuda", torch.cuda.current_device())
    obstacle = triton_obstacle(device, torch.float32)
    if obstacle is not None:
        why = f"{obstacle.reason}. {obstacle.remedy}."
        print(f"gpu-gate: expected the Triton kernels to run on {device}, got: {why}")
        return 2
    scale = rehearsal_scale() if options.rehearse else real_scale(device)
    names = options.only or [name for name in ENTRIES if name not in TUNING or options.sweep]
    report = run_parts(names, scale, options, command)
    print(page(report))
    missed = [t for found in tables(report) for t in found["targets"] if t["met"] is False]
    has_failed = any(part["has_failed"] for part in report["parts"].values())
    return 1 if has_failed or (options.gate and missed) else 0


def rehearse_in_a_process(command: str) -> int:
    """The same command where Triton's functions are interpreted from their import on."""
    environment = {
        **os.environ,
        INTERPRETER: "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    return subprocess.run(
        [sys.executable, *shlex.split(command)[1:]], env=environment, check=False
    ).returncode


def run_parts(names: list[str], scale: Scale, options: argparse.Namespace, command: str) -> dict:
    """All parts within the time; the report."""
    begin = time.monotonic()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if scale.device.type == "cuda":
        torch.cuda.init()
    report: dict[str, Any] = {
        "command": command,
        "kind": "gpu-gate",
        "note": NO_CLAIM if scale.is_rehearsal else "",
        "device": "",
        "machine": machine(scale.device),
        "parts": {},
    }
    report["device"] = gpu_name(report["machine"]) or report["machine"]["cpu"]
    ordered = [name for name in ENTRIES if name in names]
    for name in ordered:
        left = options.seconds - (time.monotonic() - begin)
        part = run_part(name, scale, left)
        report["parts"][name] = part.record()
        report["seconds"] = round(time.monotonic() - begin, 1)
        say(f"{part.line()} ({time.monotonic() - part.begin:.1f} s)")
        if options.json is not None:
            write_json(options.json, plain(report))
        gc.collect()
    if scale.device.type == "cuda":
        report["machine_after"] = machine(scale.device)["gpu"]["clocks_and_power"]
    if options.json is not None:
        write_json(options.json, plain(report))
    return report


def run_part(name: str, scale: Scale, left: float) -> Part:
    """One part; what breaks it off is in its record."""
    entry = ENTRIES[name]
    part = Part(name, min(entry.seconds, left), entry.is_vital)
    say(f"== {name}" + f" ({NO_CLAIM})" * scale.is_rehearsal)
    if left <= 0:
        part.skip(f"all of {name}", LATE)
        return part
    try:
        with at_most_seconds(part.seconds + GRACE):
            entry.run(part, scale)
    except OutOfTime as reason:
        part.skip(f"the rest of {name} ({reason})", LATE)
    except Exception:
        part.error = traceback.format_exc()[-4000:]
    return part


def tables(report: dict) -> list[dict]:
    """The tables of a report."""
    return report["parts"].get("table", {}).get("tables", [])


def page(report: dict) -> str:
    """The report for a terminal, as Markdown."""
    where = report["machine"]
    lines = [
        f"# GPU gate: {report['device']}",
        f"`{report['command']}`, {where['date']}, commit {where['commit']}. {plot.place(where)}",
    ]
    if report["note"]:
        lines.append(f"**{report['note']}**")
    for found in tables(report):
        title = f"## {found['stands_for']}"
        if found["stands_for"] != found["case"]:
            title += f" (stood for by {found['case']}; {NO_CLAIM})"
        lines += [title, loss_plot.table(found), loss_plot.target_table(found["targets"])]
    for name in ("launches", "chunks", "scoring"):
        rows = report["parts"].get("sweep", {}).get(name, [])
        lines += [f"## sweep: {name}", sweep_table(rows)] if rows else []
    found = [line for part in report["parts"].items() for line in states(*part)]
    failed = [name for name, part in report["parts"].items() if part["has_failed"]]
    verdict = f"FAILED: {', '.join(failed)}" if failed else f"Passed in {report['seconds']} s."
    return "\n\n".join([*lines, "\n".join(found), verdict])


def svg(report: dict) -> str:
    """The tables as bars; nothing of a rehearsal, whose times mean nothing."""
    return "" if report["note"] or not tables(report) else bars.document(report, tables(report))


def csv_rows(report: dict) -> list[dict]:
    """The rows of the tables, flat."""
    return loss_plot.csv_rows({**report, "cases": tables(report)})


def sweep_table(rows: list[dict]) -> str:
    """Fastest first."""
    keys = [key for key in rows[0] if key != "seconds"]
    lines = []
    for row in sorted(rows, key=lambda r: (str(r[keys[0]]), r["seconds"]["median"])):
        cells = [f"{row[k]:.3g}" if isinstance(row[k], float) else str(row[k]) for k in keys]
        lines.append([*cells, f"{1e3 * row['seconds']['median']:.4f}"])
    return loss_plot.markdown([*keys, "ms"], lines)


def states(name: str, part: dict) -> list[str]:
    """What a part found, with everything that failed or was not run."""
    failed = [check for check in part["checks"] if not check["is_met"]]
    state = "FAILED" if part["has_failed"] else "passed"
    counts = f"{len(part['checks'])} checks, {len(failed)} failed"
    lines = [f"- {state} {name}: {counts}, {part['seconds']} s"]
    for check in failed:
        why = check.get("error") or f"{check['value']}, limit {check['limit']}"
        lines.append(f"  - failed: {check['name']}: {why}")
    lines += [f"  - not run: {item['name']}: {item['why']}" for item in part["not_run"]]
    if part["error"]:
        lines.append(f"  - error: {part['error'].strip().splitlines()[-1]}")
    return lines

"""Every measurement for one device, within ten minutes: `python -m benchmarks --device cpu`.

The parts are the commands of their names, each with a share of the time; what a part leaves unused
goes to the next ones. What would come too late is dropped, with that reason in its file. A part
that fails ends neither the others nor their files; the exit status is then 1.

A part is a module with `add_arguments` and `measure_<part>(options, deadline) -> report`, where
``deadline`` is a value of `time.monotonic()` after which nothing new begins.
"""

from __future__ import annotations

import argparse
import gc
import time
import traceback
from typing import Any

import torch

from . import against, plot
from .commands import command_module
from .deadline import OutOfTime, at_most_seconds
from .losses.plot import markdown
from .machine import machine
from .options import absent_device
from .output import RESULTS, out_folder, positive, positive_seconds, say, write_json

SHARES = {  # of the time
    "loss": 0.41,
    "score": 0.1,
    "memory": 0.06,
    "growth": 0.15,
    "rollout": 0.11,
    "step": 0.17,
}
SECONDS = 540.0  # of the ten minutes; the rest is the start, and what is under way at the end
GRACE = 15.0  # seconds after the end of all when a part is broken off with its results
OVERRUN = 1.5  # times its share, and GRACE, when that happens to the others


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=list(SHARES), help="parts to run")
    parser.add_argument("--threads", type=positive, help="torch threads (default: of each command)")
    parser.add_argument(
        "--seconds", type=positive_seconds, default=SECONDS, help=f"in all (default {SECONDS:g})"
    )
    parser.add_argument(
        "--against",
        type=against.old_report,
        nargs="+",
        default=[],
        metavar="OLD.json",
        help="earlier files: each is compared with the part of its kind",
    )
    parser.add_argument("--out", type=out_folder, default=RESULTS, help="folder of the files")


def run(options: argparse.Namespace, command: str) -> int:
    """Run the parts, write their files and a summary; 1 when a part failed."""
    if reason := absent_device(options.device):
        print(reason)
        return 2
    names = [name for name in SHARES if options.only is None or name in options.only]
    for old in options.against:
        if old.get("kind") not in names:
            expected = f"expected files of {', '.join(names)}, the parts of this run"
            print(f"--against: {expected}, got one of {old.get('kind')!r} ({old['file']}).")
            return 2
    begin = time.monotonic()
    states: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(names):
        left = options.seconds - (time.monotonic() - begin)
        seconds = left * SHARES[name] / sum(SHARES[other] for other in names[number:])
        say(f"== {name}: at most {seconds:.0f} s")
        most = min(OVERRUN * seconds, left) + GRACE
        states[name] = run_part(name, options, command, (seconds, most))
        say(f"== {name}: {states[name]['state']} in {states[name]['seconds']} s")
        gc.collect()
    where = machine(torch.device(options.device))
    report: dict[str, Any] = {"command": command, "kind": "all", "machine": where, "parts": states}
    report["seconds"] = round(time.monotonic() - begin, 1)
    write_json(options.out / f"all_{options.device}.json", report)
    print(summary(report))
    return 1 if any(state["state"] != "done" for state in states.values()) else 0


def run_part(
    name: str, options: argparse.Namespace, command: str, limits: tuple[float, float]
) -> dict:
    """One part and its files; what breaks it off is in what is returned.

    Args:
        name: of the part.
        options: of `all`.
        command: as typed.
        limits: seconds after which the part begins nothing, and those after which it is broken off.
    """
    seconds, most = limits
    begin, threads = time.monotonic(), torch.get_num_threads()
    state: dict[str, Any] = {"state": "done", "why": "", "files": []}
    worst = 0
    try:
        if seconds <= 0:
            raise OutOfTime("no time was left")
        module = command_module(name)
        with at_most_seconds(most):
            report = getattr(module, f"measure_{name}")(
                options_of(module, options), begin + seconds
            )
        files = plot.write({**report, "command": command}, options.out / f"{name}_{options.device}")
        state["files"] = [file.name for file in files]
        for old in options.against:
            if old.get("kind") == report["kind"]:
                worst = max(worst, against.check(report, old))
        if worst:
            state |= {"state": "FAILED", "why": f"--against: status {worst}, see above"}
    except OutOfTime as reason:
        state |= {"state": "FAILED", "why": f"out of time: {reason}"}
    except Exception as reason:
        say(traceback.format_exc())
        state |= {"state": "FAILED", "why": f"{type(reason).__name__}: {str(reason)[:300]}"}
    finally:
        torch.set_num_threads(threads)
    return state | {"seconds": round(time.monotonic() - begin, 1), "limit": round(seconds, 1)}


def options_of(module: Any, options: argparse.Namespace) -> argparse.Namespace:
    """A command's own options: its defaults for this device."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    known = {action.dest for action in parser._actions}
    words = ["--device", options.device] if "device" in known else []
    if options.threads is not None and "threads" in known:
        words += ["--threads", str(options.threads)]
    if "out" in known:
        words += ["--out", str(options.out)]
    return parser.parse_args(words)


def summary(report: dict) -> str:
    """Seconds by part, for a terminal."""
    lines = [
        [
            name,
            f"{part['seconds']:.1f}",
            f"{part['limit']:.0f}",
            part["state"],
            part["why"] or ", ".join(part["files"]),
        ]
        for name, part in report["parts"].items()
    ]
    failed = [name for name, part in report["parts"].items() if part["state"] != "done"]
    end = f"FAILED: {', '.join(failed)}" if failed else "All parts are done"
    head = ["part", "seconds", "limit", "state", "files or reason"]
    return f"{markdown(head, lines)}\n\n{end} in {report['seconds']} s."

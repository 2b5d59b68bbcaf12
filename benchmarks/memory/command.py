"""Peak bytes of every candidate by shape, against the bound of the design.

Measured on the device at its own numbers of rows; values do not matter to memory, so the head is
zeros. Beside them, clearly apart, what a call of a GPU's size asks for: the package's own code on
fake tensors (`planned`), which measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from dataclasses import replace
from typing import Any

import torch

from benchmarks import against, plot
from benchmarks.deadline import LATE, OutOfTime, at_most_seconds
from benchmarks.growth.sweeps import memory_reason
from benchmarks.live_bytes import memory_of
from benchmarks.losses.baselines import Candidate
from benchmarks.losses.candidates import loss_candidates, score_candidates
from benchmarks.losses.cases import DTYPES, GPU_ROWS, SHAPES, Case, Inputs
from benchmarks.losses.measure import HIDDEN, release, sizes_of
from benchmarks.machine import machine
from benchmarks.options import DEVICES, absent_device, cases_of
from benchmarks.output import RESULTS, out_folder, positive, positive_seconds, say

from .planned import KEYS, TITLES, bound_bytes, constant_inputs, planned_bytes

SECONDS = {"cpu": 150.0, "cuda": 300.0}
PEER_SECONDS = 90.0
SHORTEST_LIMIT = 2.0  # seconds for whoever has begun
FIRST_SHARE = 4.0  # of the time: the first case counts for so many of the others
BOUNDS = {  # keys of ours -> whose bound
    "one_pass": "one_pass",
    "two_pass": "two_pass",
    "recompute": "recompute",
    "scored": "scored",
    "scored_fused": "scored",
}
ORDER = ("floor", "ours", "plain", "peer")
LEFT_OUT = ("one_pass_eager", "compiled")  # the same bytes, eager code; compiles for minutes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), help="named shapes; else all")
    parser.add_argument("--rows", type=positive, help="rows T: a shape of one's own, or of --shape")
    parser.add_argument("--vocab", type=positive, help="vocabulary V, in the same way")
    parser.add_argument("--dim", type=positive, help="hidden size D, in the same way")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["bfloat16"])
    parser.add_argument("--only", nargs="+", help="keys of candidates")
    parser.add_argument("--threads", type=positive, default=2, help="torch threads (default 2)")
    parser.add_argument("--seconds", type=positive_seconds, help="limit: what is late is dropped")
    parser.add_argument("--out", type=out_folder, default=RESULTS, help="folder of the files")
    against.add_argument(parser, "memory")


def run(options: argparse.Namespace, command: str) -> int:
    """Measure, print the page, write the files; 1 when a bound is exceeded."""
    if reason := absent_device(options.device):
        print(reason)
        return 2
    unknown = set(options.only or ()) - set(candidates_of(cases_of(options)[0], options))
    if unknown:
        known = ", ".join(candidates_of(cases_of(options)[0], options))
        print(f"--only: expected keys among {known}, got {', '.join(sorted(unknown))}.")
        return 2
    seconds = options.seconds or SECONDS[options.device]
    report = {**measure_memory(options, time.monotonic() + seconds), "command": command}
    plot.publish(report, options.out / f"memory_{options.device}")
    status = against.check(report, options.against, options.only)
    return status or (1 if any(row.get("met") is False for row in all_rows(report)) else 0)


def all_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Measured and planned rows of all shapes."""
    return [row for case in report["cases"] for row in (*case["rows"], *case["planned"])]


def measure_memory(options: Any, deadline: float) -> dict[str, Any]:
    """A report of kind "memory".

    Args:
        options: of the command.
        deadline: `time.monotonic()` after which nothing new is measured.
    """
    begin, device = time.monotonic(), torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    cases = cases_of(options)
    found = []
    for place, case in enumerate(cases):
        others, first = len(cases) - place - 1, 1.0 if place else FIRST_SHARE
        share = (deadline - time.monotonic()) * first / (first + others)
        found.append(one_case(case, device, options, time.monotonic() + share))
        release(device)
    report = {"kind": "memory", "command": "", "machine": machine(device), "cases": found}
    return {**report, "seconds": round(time.monotonic() - begin, 1)}


def candidates_of(case: Case, options: Any) -> dict[str, Candidate]:
    """Who is measured, by key; ours first, in case that time is short."""
    device = torch.device(options.device)
    made = [*loss_candidates(case, device, ["auto"]), *score_candidates(case, device, ["auto"])]
    made.sort(key=lambda c: ORDER.index(c.kind))
    return {c.key: c for c in made if not c.is_floor and c.key not in LEFT_OUT}


def one_case(case: Case, device: torch.device, options: Any, deadline: float) -> dict[str, Any]:
    """Every candidate of a shape; planned calls of the same head with a GPU's rows."""
    say(f"{case.shape}: {case.name}")
    chosen = candidates_of(case, options)
    only = getattr(options, "only", None)
    rows = []
    inputs: Inputs | None = None
    for candidate in chosen.values():
        if only is not None and candidate.key not in only:
            continue
        why: str | None = candidate.missing(case, device) or None
        if why is None and time.monotonic() >= deadline:
            why = LATE
        if why is None and candidate.kind == "plain" and candidate.num_products > 1:
            why = memory_reason(case, device)
        if why is None and inputs is None:
            inputs = plain_inputs(case, device)
        left = max(SHORTEST_LIMIT, deadline - time.monotonic())
        rows.append(one_row(candidate, case, inputs, why, min(PEER_SECONDS, left)))
    large = replace(case, num_rows=options.rows or max(GPU_ROWS, case.num_rows))
    return {
        **sizes_of(case),
        "rows": rows,
        "planned_case": large.name,
        "planned": [planned_row(key, large) for key in KEYS],
    }


def plain_inputs(case: Case, device: torch.device) -> Inputs:
    """Inputs of a case with a head of zeros: made at once."""
    made = {"dtype": case.dtype, "device": device, "requires_grad": True}
    hidden = torch.ones(case.num_rows, case.dim, **made)
    weight = torch.zeros(case.vocab_size, case.dim, **made)
    return constant_inputs(case, hidden, weight, device)


def one_row(
    candidate: Candidate,
    case: Case,
    inputs: Inputs | None,
    why: str | None,
    seconds: float = PEER_SECONDS,
) -> dict[str, Any]:
    """Bytes of a candidate, or the reason why there are none; others have so many ``seconds``."""
    row = {
        "key": candidate.key,
        "title": candidate.title,
        "kind": candidate.kind,
        "note": candidate.note,
        "version": "" if why else candidate.version(),
    }
    if why is not None or inputs is None:
        say(f"{candidate.title}: {why}")
        return {**row, "missing": why}
    is_gpu = inputs.hidden.is_cuda
    given = candidate.inputs_of(inputs)
    is_guarded = candidate.kind != "ours" or candidate.may_refuse
    try:
        with at_most_seconds(seconds) if is_guarded else contextlib.nullcontext():
            if is_gpu:
                candidate.step(given)  # libraries allocate their own at the first call
            sizes = memory_of(candidate, given)
    except (Exception, OutOfTime) as reason:
        if not is_guarded:
            raise
        words = (str(reason).splitlines() or ["no message"])[0][:200]
        say(f"{candidate.title} cannot run: {words}")
        return {**row, "missing": f"{type(reason).__name__}: {words}"}
    if not sizes["peak_bytes"]:
        return {**row, "missing": HIDDEN}
    say(f"{candidate.title}: {sizes['peak_bytes'] / 2**20:.1f} MiB beyond inputs and outputs")
    return {**row, **sizes, **bounded(candidate.key, case, sizes["extra_bytes"], is_gpu=is_gpu)}


def bounded(key: str, case: Case, extra: int, *, is_gpu: bool) -> dict[str, Any]:
    """The bound of ours, and whether it is kept."""
    if key not in BOUNDS:
        return {}
    bound = bound_bytes(case, BOUNDS[key], is_gpu=is_gpu)
    return {"bound": bound, "met": extra <= bound}


def planned_row(key: str, case: Case) -> dict[str, Any]:
    """Bytes that a call of a GPU's size asks for."""
    kind = "plain" if key == "naive" else "ours"
    sizes = planned_bytes(case, key)
    row = {"key": key, "title": TITLES[key], "kind": kind, **sizes}
    return {**row, **bounded(key, case, sizes["extra_bytes"], is_gpu=True)}

"""Sweeps of what a user may set (workspace_bytes) and of what the plan sets (rows of a chunk)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence

from benchmarks.losses.baselines import Candidate, fused
from benchmarks.losses.cases import Inputs, make_inputs
from benchmarks.memory.planned import TITLES, row_bytes
from benchmarks.output import say

from .sizes import Sizes
from .sweeps import Series, Watch, cost_of, held, late_reason, ring_of, sweep_json, time_point

MODES = ("one_pass", "two_pass")
Found = tuple[list[dict], list[dict]]
Step = Callable[[Inputs], object]


def settings_sweep(
    name: str,
    x: str,
    sizes: Sizes,
    watch: Watch,
    values: Sequence[float],
    run_at: Callable[[str, float], tuple[Candidate, contextlib.AbstractContextManager]],
    fixed: str,
    first: float = 0.0,
) -> list[dict]:
    """Bytes and seconds of both modes against a setting; bytes are fitted from ``first`` on.

    ``run_at(mode, value)`` gives the candidate and what must hold around its call.
    """
    inputs = make_inputs(sizes.fixed, device=watch.device)
    is_gpu, end = watch.device.type == "cuda", watch.deadline
    found = []
    for unit, expected in (("bytes", 1.0), ("s", 0.0)):
        watch.deadline = end - (0.5 * watch.left if unit == "bytes" else 0.0)
        begin_at = first if unit == "bytes" else 0.0
        lines = {mode: Series(mode, TITLES[mode], expected, begin_at) for mode in MODES}
        for value in values:
            for mode, line in lines.items():
                reason = late_reason(line, value, watch)
                if reason is not None:
                    line.dropped.append({"x": value, "reason": reason})
                    continue
                candidate, around = run_at(mode, value)
                begin = time.monotonic()
                with around:
                    if unit == "s":
                        point = time_point(
                            lambda c=candidate: c.step(inputs), watch, is_first=not line.points
                        )
                    else:
                        point = held(candidate, inputs, sizes.fixed, is_gpu=is_gpu)
                line.points.append({"x": value, **point, "cost": cost_of(point, begin)})
                say(f"{x} {value:g}: {line.title}: {point['y']:.4g} {unit}")
        kind = "seconds" if unit == "s" else "bytes"
        found.append(sweep_json(f"{name}_{kind}", x, unit, fixed, lines.values()))
    return found


def workspace_sweep(sizes: Sizes, watch: Watch, fixed: str) -> Found:
    """Against workspace_bytes; every point must keep it."""

    def run_at(mode: str, mib: float) -> tuple[Candidate, contextlib.AbstractContextManager]:
        step = fused(mode, workspace_bytes=int(mib * 2**20))
        return Candidate(mode, TITLES[mode], step), contextlib.nullcontext()

    x = "workspace MiB"
    sweeps = settings_sweep("workspace", x, sizes, watch, sizes.workspace, run_at, fixed)
    case, checks = sizes.fixed, []
    for line in sweeps[0]["series"]:
        if not line["points"]:
            continue
        allowed = 4 * case.vocab_size * case.dim + row_bytes(case, line["key"]) * case.num_rows
        rest = [
            (p["extra_bytes"] - p["output_bytes"] - allowed) / (p["x"] * 2**20)
            for p in line["points"]
        ]
        worst = max(rest)
        text = f"Bytes held against workspace ({fixed}): {line['title']}: bytes of logits and "
        text += "gradient factors / workspace_bytes, the largest"
        checks.append({"text": text, "limit": 1.0, "value": worst, "met": worst <= 1.0})
    return sweeps, checks


def chunk_sweep(sizes: Sizes, watch: Watch, fixed: str) -> Found:
    """Against the most fp32 rows of logits; a CPU, whose rows are in bf16, has twice as many."""

    def run_at(mode: str, rows: float) -> tuple[Candidate, contextlib.AbstractContextManager]:
        return Candidate(mode, TITLES[mode], fused(mode)), ring_of(int(rows))

    x, first = "rows of a chunk", float(sizes.chunk[-2:][0])  # below, blocks of scratch weigh more
    sweeps = settings_sweep("chunk", x, sizes, watch, sizes.chunk, run_at, fixed, min(512.0, first))
    return sweeps, []

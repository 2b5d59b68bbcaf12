"""How time and memory grow: `python -m benchmarks growth --device cpu`.

Against rows T, vocabulary V, hidden size D, workspace_bytes, rows of a chunk, GRPO's group size
and ranks: log-log plots with exponents fitted by least squares, what is expected beside them, and
checks that nothing of size rows x V grows with the rows beyond the bound of the design. `--only`
takes parts, `--rows 256 1024` other sizes. Writes `<out>/growth_<device>.json`, `.md`, `.svg`,
`.csv`; about 100 seconds on two cores. Exits with 1 when a check of memory or of equality fails;
times are shown, not judged.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks import against, plot
from benchmarks.clock import Clock
from benchmarks.deadline import LATE
from benchmarks.losses.cases import Case
from benchmarks.machine import machine
from benchmarks.memory.planned import KEYS, TITLES, planned_bytes
from benchmarks.options import absent_device
from benchmarks.output import RESULTS, out_folder, positive, positive_seconds, say

from .ranks import measure_ranks
from .sizes import PARTS, Sizes, add_sizes, chosen_sizes
from .steps import chunk_sweep, workspace_sweep
from .sweeps import (
    ROUNDING,
    Series,
    Watch,
    flat_from,
    held_point,
    memory_checks,
    one_code,
    sweep,
    sweep_json,
    with_rows,
)

SECONDS = {"cpu": 150.0, "cuda": 240.0}
SHARES = {  # of the time, of those parts that are left; what a part does not need goes on
    "planned": 8.0,
    "ranks": 8.0,
    "rows": 12.0,
    "vocab": 4.0,
    "dim": 4.0,
    "workspace": 2.0,
    "chunk": 2.0,
}
PLANNED = Case(0, 131_072, 4096, torch.bfloat16)
PLANNED_ROWS = (256, 1024, 4096, 8192, 16_384, 32_768, 65_536)
Found = tuple[list[dict], list[dict]]  # sweeps, checks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts to measure")
    add_sizes(parser)
    parser.add_argument("--threads", type=positive, default=2, help="torch threads (default 2)")
    parser.add_argument("--seconds", type=positive_seconds, help="limit: what is late is dropped")
    parser.add_argument("--out", type=out_folder, default=RESULTS)
    against.add_argument(parser, "growth")


def run(options: argparse.Namespace, command: str) -> int:
    """Measure, print the page, write the files; 1 when a check fails or --against finds worse."""
    if reason := absent_device(options.device):
        print(reason)
        return 2
    seconds = options.seconds or SECONDS[options.device]
    report: dict[str, Any] = measure_growth(options, time.monotonic() + seconds)
    report["command"] = command
    plot.publish(report, options.out / f"growth_{options.device}")
    status = against.check(report, options.against)
    return status or int(any(check["met"] is False for check in report["checks"]))


def measure_growth(options: Any, deadline: float) -> dict[str, Any]:
    """A report of kind "growth".

    Args:
        options: of the command; what it lacks has the device's defaults.
        deadline: `time.monotonic()` after which no point begins.
    """
    begin = time.monotonic()
    device = torch.device(getattr(options, "device", "cpu"))
    if device.type == "cpu":
        torch.set_num_threads(getattr(options, "threads", None) or 2)
    sizes = chosen_sizes(options)
    names = [n for n in PARTS if getattr(options, "only", None) is None or n in options.only]
    report: dict[str, Any] = {"kind": "growth", "command": "", "machine": machine(device)}
    report |= {"sweeps": [], "checks": [], "ranks": None, "dropped": {}}
    for number, name in enumerate(names):
        left = deadline - time.monotonic()
        if left <= 0:
            report["dropped"][name] = LATE
            say(f"{name}: {LATE}")
            continue
        share = left * SHARES[name] / sum(SHARES[other] for other in names[number:])
        watch = Watch(Clock(device), sizes.rounds, time.monotonic() + share)
        say(f"-- {name}: at most {share:.0f} s")
        if name == "ranks":
            report["ranks"], sweeps, checks = measure_ranks(sizes.ranks, sizes.group, left * 0.5)
        else:
            sweeps, checks = MEASURES[name](sizes, watch)
        report["sweeps"] += sweeps
        report["checks"] += checks
    return {**report, "seconds": round(time.monotonic() - begin, 1)}


def lines_of(
    keys: tuple[str, ...], expected: float | None, first: float = 0.0
) -> dict[str, Series]:
    """A line for each key."""
    return {key: Series(key, TITLES[key], expected, first) for key in keys}


def planned(sizes: Sizes, watch: Watch) -> Found:
    """Bytes of calls of a GPU's size, by the package's own code on fake tensors."""
    case = replace(PLANNED, dtype=sizes.timed.dtype)
    lines = {
        key: Series(key, TITLES[key], 1.0 if key == "naive" else 0.0, first_of(case, key, True))
        for key in KEYS
    }
    for rows, sized in with_rows(case, PLANNED_ROWS):
        for key, line in lines.items():
            if watch.left <= 0:
                line.dropped.append({"x": rows, "reason": LATE})
                continue
            sizes_ = planned_bytes(sized, key)
            line.points.append({"x": rows, **held_point(sized, key, sizes_, is_gpu=True)})
    note = (
        "Planned on fake tensors, not measured: the bytes that the code asks for on a GPU whose "
        "memory is free."
    )
    fixed = f"PLANNED for a GPU: {fixed_of(case)}"
    found = sweep_json("planned_bytes", "rows T", "bytes", fixed, lines.values(), note)
    return [found], memory_checks(found, case, flat_from(case, "two_pass", is_gpu=True))


def first_of(case: Case, key: str, is_gpu: bool) -> float:
    """Where the fit of bytes against rows begins."""
    naive_from = 1024.0 if case.dim < 1024 else 4096.0  # below, d_weight is most of it
    return naive_from if key == "naive" else float(flat_from(case, key, is_gpu=is_gpu))


def fit_from(first: float, xs: Sequence[int]) -> float:
    """Where a fit of seconds begins: at ``first``, or earlier where that leaves fewer than two."""
    return min(first, float(xs[-2])) if len(xs) > 1 else first


def fixed_of(case: Case, *but: str) -> str:
    """The sizes of a case that are not swept."""
    parts = {"T": case.num_rows, "V": case.vocab_size, "D": case.dim}
    sizes = [f"{name} {size}" for name, size in parts.items() if size and name not in but]
    return ", ".join([*sizes, str(case.dtype).removeprefix("torch.")])


def rows(sizes: Sizes, watch: Watch) -> Found:
    """Against T: bytes, then seconds."""
    is_gpu = watch.device.type == "cuda"
    end = watch.deadline
    watch.deadline -= 0.5 * watch.left  # the other half is for the seconds
    held = {
        k: Series(k, TITLES[k], 1.0 if k == "naive" else 0.0, first_of(sizes.held, k, is_gpu))
        for k in KEYS
    }
    sweep("T", with_rows(sizes.held, sizes.rows), "bytes", held, watch)
    watch.deadline = end
    times = lines_of(KEYS, 1.0, first=fit_from(1024.0, sizes.rows))
    with one_code():
        sweep("T", with_rows(sizes.timed, sizes.rows), "s", times, watch)
    kinds = (("s", sizes.timed, times), ("bytes", sizes.held, held))
    seconds, size = (
        sweep_json(
            f"rows_{'seconds' if u == 's' else u}", "rows T", u, fixed_of(c, "T"), x.values()
        )
        for u, c, x in kinds
    )
    first = flat_from(sizes.held, "two_pass", is_gpu=is_gpu)
    slack = ROUNDING if is_gpu else 0.0
    return [seconds, size], memory_checks(size, sizes.held, first, slack)


def along(
    name: str,
    x: str,
    cases: list[tuple[float, Case]],
    watch: Watch,
    expected: tuple[float | None, float | None],
    first: float = 0.0,
) -> Found:
    """Seconds and bytes against V or D."""
    letter, case = x.split()[-1], cases[0][1]
    times, held = lines_of(KEYS, expected[0], first), lines_of(KEYS, expected[1])
    end = watch.deadline
    watch.deadline -= 0.5 * watch.left
    sweep(letter, cases, "bytes", held, watch)
    watch.deadline = end
    with one_code():
        sweep(letter, cases, "s", times, watch)
    fixed = fixed_of(case, letter)
    seconds = sweep_json(f"{name}_seconds", x, "s", fixed, times.values())
    size = sweep_json(f"{name}_bytes", x, "bytes", fixed, held.values())
    return [seconds, size], memory_checks(size, case, 0.0)


def vocab(sizes: Sizes, watch: Watch) -> Found:
    """Against V: both grow with it, memory by the ring of about 1024 fp32 rows."""
    cases = [(float(n), replace(sizes.across, vocab_size=n)) for n in sizes.vocab]
    return along("vocab", "vocabulary V", cases, watch, (1.0, 1.0))


def dim(sizes: Sizes, watch: Watch) -> Found:
    """Against D: the row work does not know it, so the fit begins where products outweigh it."""
    cases = [(float(n), replace(sizes.along, dim=n)) for n in sizes.dim]
    first = fit_from(1024.0, sizes.dim)
    return along("dim", "hidden size D", cases, watch, (1.0, None), first)


def workspace(sizes: Sizes, watch: Watch) -> Found:
    """Against workspace_bytes: the memory follows it, the time should hardly."""
    return workspace_sweep(sizes, watch, fixed_of(sizes.fixed))


def chunk(sizes: Sizes, watch: Watch) -> Found:
    """Against the rows of a chunk: what one product and one pass over logits work on."""
    return chunk_sweep(sizes, watch, fixed_of(sizes.fixed))


MEASURES: dict[str, Callable[[Sizes, Watch], Found]] = {
    "planned": planned,
    "rows": rows,
    "vocab": vocab,
    "dim": dim,
    "workspace": workspace,
    "chunk": chunk,
}

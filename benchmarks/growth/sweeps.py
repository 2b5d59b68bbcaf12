"""Sweeps of one size: seconds and held bytes of the fused loss, scoring and plain torch.

Bytes are what is held beyond the inputs, the gradients and (in one pass) the copy of d_hidden that
backward scales: logits, gradient factors, the fp32 sum of d_weight, vectors. On a CPU they are
counted in a run of their own, without generated code.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch

import crpo_kernels.compilation as compilation
from benchmarks.clock import Clock
from benchmarks.deadline import LATE
from benchmarks.live_bytes import memory_of
from benchmarks.losses.baselines import Candidate, fused, naive, scored
from benchmarks.losses.cases import Case, Inputs, make_inputs
from benchmarks.memory.planned import TITLES, bound_bytes, copy_bytes, planned_bytes, row_bytes
from benchmarks.output import say
from crpo_kernels import plan

from .fit import fit_exponent, flatness

ROUNDING = 64.0  # bytes a row: a CUDA allocator rounds large sizes up to 2 MiB
SHORT = 1.0  # seconds: a point that takes less is repeated
SHARE_OF_MEMORY = {"cpu": 1 / 3, "cuda": 0.9}  # of what is free, that plain torch may take
KINDS = {"s": "Seconds", "bytes": "Bytes held"}


@dataclass
class Watch:
    """The clock of a device, and until when new points may begin (`time.monotonic()`)."""

    clock: Clock
    rounds: int
    deadline: float

    @property
    def device(self) -> torch.device:
        """Of all tensors."""
        return self.clock.device

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()


@dataclass
class Series:
    """One line of a plot.

    Attributes:
        key: of `planned.KEYS` or a name of its own.
        title: for people.
        expected: the exponent that theory says, None where it says none.
        first, last: the range of the fit.
        points: x, y, low and high (the range of the repetitions) and what else is known.
        dropped: x and the reason.
    """

    key: str
    title: str
    expected: float | None
    first: float = 0.0
    last: float = float("inf")
    points: list[dict] = field(default_factory=list)
    dropped: list[dict] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """With the fit."""
        pairs = [(point["x"], point["y"]) for point in self.points]
        found = fit_exponent(pairs, self.first, self.last)
        return {
            "key": self.key,
            "title": self.title,
            "expected": self.expected,
            "fit": None if found is None else found.as_json(),
            "points": self.points,
            "dropped": self.dropped,
        }


def sweep_json(
    name: str, x: str, unit: str, fixed: str, series: Iterable[Series], note: str = ""
) -> dict[str, Any]:
    """One plot of a report."""
    return {
        "name": name,
        "title": f"{KINDS[unit]} against {x}",
        "x": x,
        "unit": unit,
        "fixed": fixed,
        "note": note,
        "series": [line.as_json() for line in series],
    }


def candidates() -> dict[str, Candidate]:
    """What is measured."""
    steps: dict[str, Callable] = {
        "one_pass": fused("one_pass"),
        "two_pass": fused("two_pass"),
        "scored": scored(),
        "naive": naive,
    }
    return {
        key: Candidate(
            key,
            TITLES[key],
            step,
            "plain" if key == "naive" else "ours",
            num_products=1 if key == "scored" else 3,
        )
        for key, step in steps.items()
    }


def time_point(step: Callable[[], object], watch: Watch, is_first: bool) -> dict[str, float]:
    """Seconds of a step: median, least and most of its repetitions; a long one runs once."""
    if is_first or watch.device.type == "cuda":
        step()  # code is generated, buffers are made
    values = [watch.clock.seconds(step)]
    if values[0] < SHORT:
        # anew: a size that was never met may generate code, too
        values = [watch.clock.seconds(step) for _ in range(watch.rounds)]
    values.sort()
    return {
        "y": statistics.median(values),
        "low": values[0],
        "high": values[-1],
        "count": len(values),
    }


def late_reason(series: Series, x: float, watch: Watch) -> str | None:
    """Why a point would come too late, by the time that the one before took; None if it fits."""
    last = series.points[-1] if series.points else {"x": x, "cost": 0.0}
    needed = last["cost"] * max(1.0, x / last["x"])
    if series.dropped:
        return series.dropped[-1]["reason"]
    if watch.left > needed:
        return None
    return f"{LATE}: about {needed:.0f} s needed, {max(watch.left, 0):.0f} s left"


def cost_of(point: dict, begin: float) -> float:
    """Seconds that a point took since ``begin``, without what is done at the first one alone."""
    runs = point.get("count")
    return round(time.monotonic() - begin if runs is None else point["y"] * (runs + 1), 4)


def memory_reason(case: Case, device: torch.device) -> str | None:
    """Why plain torch does not fit, by the bytes that it would ask for; None if it does."""
    needed = planned_bytes(case, "naive")["extra_bytes"]
    free, share = free_bytes(device), SHARE_OF_MEMORY[device.type]
    if needed <= share * free:
        return None
    return (
        f"does not fit: {needed / 2**30:.1f} GiB, of {free / 2**30:.1f} GiB that are free it may "
        f"take {share * free / 2**30:.1f}"
    )


def free_bytes(device: torch.device) -> int:
    """Memory that can be had: of the device, or what the system calls available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo", encoding="ascii") as file:
        lines = dict(line.split(":") for line in file)
    return int(lines["MemAvailable"].split()[0]) * 1024


@contextlib.contextmanager
def one_code() -> Iterator[None]:
    """Generate the row passes at every size, where that is possible: one code for all points."""
    with patch.object(compilation, "COMPILE_ELEMENTS", 0):
        yield


def sweep(
    x: str,
    cases: Sequence[tuple[float, Case]],
    unit: str,
    lines: dict[str, Series],
    watch: Watch,
) -> None:
    """Fill the lines: every x with its case, smallest first.

    ``x`` names it on the terminal.
    """
    chosen = {key: candidate for key, candidate in candidates().items() if key in lines}
    for value, case in cases:
        inputs: Inputs | None = None
        for key, candidate in chosen.items():
            line = lines[key]
            reason = late_reason(line, value, watch)
            if reason is None and key == "naive":
                reason = memory_reason(case, watch.device)
            if reason is not None:
                line.dropped.append({"x": value, "reason": reason})
                say(f"{x} {value:g}: {line.title}: {reason}")
                continue
            inputs = inputs or make_inputs(case, device=watch.device)
            given, begin = candidate.inputs_of(inputs), time.monotonic()
            if unit == "s":
                found = time_point(
                    lambda c=candidate, i=given: c.step(i), watch, is_first=not line.points
                )
            else:
                found = held(candidate, given, case, is_gpu=watch.device.type == "cuda")
            line.points.append({"x": value, **found, "cost": cost_of(found, begin)})
            say(f"{x} {value:g}: {line.title}: {found['y']:.4g} {unit}")


def held(candidate: Candidate, inputs: Inputs, case: Case, *, is_gpu: bool) -> dict[str, int]:
    """Bytes of one step: what it holds beyond the gradients, all of it, and the bound of all."""
    if is_gpu:
        candidate.step(inputs)  # libraries allocate their own at the first call
    return held_point(case, candidate.key, memory_of(candidate, inputs), is_gpu=is_gpu)


def held_point(case: Case, key: str, sizes: dict[str, int], *, is_gpu: bool) -> dict[str, int]:
    """A point of a sweep of bytes; plain torch's peak may come before its gradients exist."""
    extra = sizes["extra_bytes"]
    item, rows = case.dtype.itemsize, case.num_rows
    outputs = 0 if key == "scored" else item * case.dim * (rows + case.vocab_size)
    rest = max(1, extra - outputs - copy_bytes(case, key) * rows)
    rest = max(1, sizes["peak_bytes"]) if key == "naive" else rest
    found = {"y": rest, "low": rest, "high": rest, "extra_bytes": extra, "output_bytes": outputs}
    return found if key == "naive" else {**found, "bound": bound_bytes(case, key, is_gpu=is_gpu)}


def memory_checks(
    sweep_: dict[str, Any], case: Case, first: float, slack: float = 0.0
) -> list[dict]:
    """Every point within its bound, and nothing of size rows x V that grows with the rows.

    ``slack``: bytes a row, for an allocator that rounds sizes up.
    """
    checks = []
    where = f"{sweep_['title']} ({sweep_['fixed']})"
    for line in sweep_["series"]:
        if line["key"] == "naive" or not line["points"]:
            continue
        title = f"{where}: {line['title']}"
        worst = max(line["points"], key=lambda point: point["extra_bytes"] / point["bound"])
        checks.append(
            {
                "text": f"{title}: bytes / the bound, the largest, at {worst['x']:g}",
                "limit": 1.0,
                "value": worst["extra_bytes"] / worst["bound"],
                "met": worst["extra_bytes"] <= worst["bound"],
            }
        )
        if sweep_["x"] == "rows T":
            pairs = [(p["x"], p["extra_bytes"] - p["output_bytes"]) for p in line["points"]]
            allowed = row_bytes(case, line["key"]) + slack
            checks.append(flatness(title, pairs, first=first, allowed=allowed))
    return checks


def flat_from(case: Case, key: str, *, is_gpu: bool) -> int:
    """Rows from which on the design says that nothing of size rows x V grows."""
    item = case.dtype.itemsize
    if key == "scored":
        return 1024 if is_gpu else 4096 // item
    kept = 4 * case.dim // item
    if not is_gpu:
        return 2 * max(kept, 4096 // item)
    return kept + (4096 if key == "two_pass" else 2048)


def with_rows(case: Case, rows: Sequence[int]) -> list[tuple[float, Case]]:
    """A case at each T."""
    return [(float(n), replace(case, num_rows=n)) for n in rows]


@contextlib.contextmanager
def ring_of(rows: int) -> Iterator[None]:
    """Chunks of other sizes: ``rows`` of fp32 logits at most, groups twice as long."""
    with patch.multiple(plan, RING_ROWS=rows, GROUP_ROWS=2 * rows):
        yield

"""One case, all candidates: errors and memory first, then seconds in interleaved rounds."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

import crpo_kernels.call as kernel_call
from benchmarks.clock import NO_COLD, Clock, Times, is_vital, measure_seconds, summary
from benchmarks.deadline import LATE, OutOfTime, at_most_seconds
from benchmarks.drawing.bars import shortened
from benchmarks.live_bytes import memory_of
from benchmarks.output import say

from .accuracy import Truth
from .baselines import FLOORS, NAIVE, BareProducts, Candidate
from .cases import Case, Inputs, make_inputs

ERROR_ROWS, ERROR_COLUMNS = 32, 4096
UNSEEN = "not counted: generated code allocates where a counter of operations sees nothing"
NO_MEMORY = {"extra_bytes": 0, "peak_bytes": 0}  # bare products: their buffers exist already
HIDDEN = "its tensors are made inside an operation, where the counter of tensors sees none"
SHORTEST = 1e-9  # seconds: a clock that did not move must not end in a division by zero
LEAST_FLOORS = 3  # times the floor that a candidate takes at least: memory, one round, errors


@dataclass
class Measurements:
    """What was found so far, by key of the candidate, in at most so many ``rounds``."""

    rounds: int
    missing: dict[str, str] = field(default_factory=dict)
    errors: dict[str, dict[str, dict]] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    expected: dict[str, float] = field(default_factory=dict)  # seconds of a step, for deadlines
    times: Times = field(default_factory=dict)

    def row(self, candidate: Candidate, case: Case) -> dict:
        """One row of the table, or the reason why there is none."""
        key, products = candidate.key, candidate.num_products
        row = {
            "key": key,
            "title": candidate.title,
            "version": candidate.version(),
            "kind": candidate.kind,
            "num_products": products,
            "note": candidate.note,
        }
        if key in self.missing:
            return {**row, "missing": self.missing[key]}
        own, floor = self.median(key), FLOORS[products]
        row |= {
            "seconds": {kind: summary(found) for kind, found in self.times[key].items() if found},
            "all_seconds": self.times[key],
            "floor": floor,
            "tflops": products * case.product_flops / own / 1e12,
            **self.memory[key],
            "errors": finite(self.errors.get(key, {})),
            "lacks": {**self.not_measured(candidate), **candidate.lacks},
            "has_entropy_gradient": candidate.has_entropy_gradient,
            "wrong": self.wrong.get(key, ""),
        }
        others = {
            "over_products": floor,
            "over_products_fp32": f"{floor}_fp32",
            "over_naive": NAIVE[products],
        }
        row |= {name: own / self.median(o) for name, o in others.items() if self.has(o)}
        return row | ({"floor_share": self.median(floor) / own} if self.has(floor) else {})

    def not_measured(self, candidate: Candidate) -> dict[str, str]:
        """Columns that this run has nothing for, and why."""
        reasons = {}
        if not self.times[candidate.key]["cold"]:
            reasons["cold"] = NO_COLD
        wanted = self.rounds if candidate.rounds is None else min(candidate.rounds, self.rounds)
        if (count := len(self.times[candidate.key]["warm"])) < wanted:
            reasons["rounds"] = f"{count} of {wanted} rounds, the others {LATE}"
        memory = self.memory[candidate.key]
        if not candidate.is_floor and not memory.get("peak_bytes"):
            reasons["peak_bytes"] = HIDDEN if memory else UNSEEN
        return reasons

    def has(self, key: str) -> bool:
        """Whether it was timed."""
        return bool(self.times.get(key, {}).get("warm"))

    def median(self, key: str) -> float:
        """Seconds of a warm step."""
        return max(summary(self.times[key]["warm"])["median"], SHORTEST)


def measure(
    case: Case,
    candidates: list[Candidate],
    clock: Clock,
    rounds: int,
    *,
    until: float = math.inf,
    peer_seconds: float = 600.0,
    make: Callable[[Case, torch.device], Inputs] | None = None,
) -> dict:
    """A CASE of a report: every candidate on one case.

    Args:
        case: the shape.
        candidates: the bare products among them are the floor of the others.
        clock: of the device.
        rounds: timed at most.
        until: `time.monotonic` after which nothing begins; rounds are dropped first, then
            candidates, from the last one on.
        peer_seconds: limit for the first steps of another project, its compilation included.
        make: the inputs; None: those of the spectrum.
    """
    say(f"{case.shape} {case.name}: inputs")
    inputs = make_inputs(case, device=clock.device) if make is None else make(case, clock.device)
    truth = Truth(inputs, min(ERROR_ROWS, case.num_rows), ERROR_COLUMNS)
    found = Measurements(rounds, missing=absent(candidates, case, clock.device))
    for candidate in candidates:
        if candidate.key in found.missing:
            continue
        left = until - time.monotonic() - reserve(candidates, found, rounds)
        if left < LEAST_FLOORS * min(found.expected.values(), default=0.0):
            found.missing[candidate.key] = LATE
            say(f"{candidate.title}: {LATE}")
            continue
        say(f"errors and memory: {candidate.title}")
        try:  # what goes wrong with a peer is its row; bare products and ours must run
            if candidate.is_floor or (candidate.is_ours and not candidate.may_refuse):
                look_at(candidate, inputs, truth, found, clock)
            else:
                with at_most_seconds(min(peer_seconds, left)):
                    look_at(candidate, inputs, truth, found, clock)
        except (Exception, OutOfTime) as error:
            if candidate.is_floor or (candidate.is_ours and not candidate.may_refuse):
                raise
            found.missing[candidate.key] = f"{type(error).__name__}: {shortened(str(error), 200)}"
            say(f"{candidate.title} cannot run: {found.missing[candidate.key]}")
        release(clock.device)
    present = [candidate for candidate in candidates if candidate.key not in found.missing]
    found.times, late = measure_seconds(
        present, inputs, clock, rounds, say, expected=found.expected, until=until
    )
    clock.forget()
    BareProducts.buffers.clear()
    found.missing |= late
    return summarized(case, candidates, found) | {
        "entropy_quantiles": truth.entropy_quantiles,
        "error_rows": truth.few.labels.numel(),
        "cache_bytes": clock.cache_bytes,
        "rounds": rounds,
    }


def absent(candidates: list[Candidate], case: Case, device: torch.device) -> dict[str, str]:
    """Why candidates cannot run here, by key."""
    reasons = {c.key: c.missing(case, device) for c in candidates}
    return {key: why for key, why in reasons.items() if why}


def reserve(candidates: list[Candidate], found: Measurements, rounds: int) -> float:
    """Seconds that are kept for those looked at: all rounds of the vital ones, a step of others."""
    return sum(
        found.expected.get(c.key, 0.0) * (2 * rounds if is_vital(c) else 1)
        for c in candidates
        if c.key not in found.missing
    )


def look_at(
    candidate: Candidate, inputs: Inputs, truth: Truth, found: Measurements, clock: Clock
) -> None:
    """Errors and memory of one candidate; after it its code and buffers exist."""
    key = candidate.key
    if candidate.has_errors and not candidate.is_floor:
        found.errors[key], found.wrong[key] = truth.errors(candidate)
        if found.wrong[key]:
            say(f"{candidate.title} is wrong: {found.wrong[key]}")
    found.memory[key], found.expected[key] = prepare(candidate, inputs, clock)


def release(device: torch.device) -> None:
    """Give cached memory back: what one candidate leaves must not fail the next."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def prepare(candidate: Candidate, inputs: Inputs, clock: Clock) -> tuple[dict[str, int], float]:
    """The memory of a step, and about how long one takes; after it code and buffers exist.

    No code is generated under the counter of a CPU: ours runs as ordinary operations there, for
    others' compiled code there is no memory.
    """
    given, is_gpu = candidate.inputs_of(inputs), clock.device.type == "cuda"
    if candidate.is_floor:
        if is_gpu:
            candidate.step(given)
        return NO_MEMORY, clock.seconds(lambda: candidate.step(given))
    if is_gpu or candidate.needs.generates_code:
        candidate.step(given)
    if candidate.needs.generates_code and not is_gpu:
        return {}, clock.seconds(lambda: candidate.step(given))
    memory: list[dict[str, int]] = []
    seconds = clock.seconds(lambda: memory.append(memory_of(candidate, given)))
    if candidate.is_ours and generates_code(inputs.case, clock.device):
        candidate.step(given)
        seconds = clock.seconds(lambda: candidate.step(given))
    return memory[0], seconds


def generates_code(case: Case, device: torch.device) -> bool:
    """Whether the row passes of our CPU backend are compiled at this size."""
    like = torch.empty(0, dtype=case.dtype, device=device)
    return kernel_call.uncompiled_reason(like, case.num_rows, case.vocab_size) is None


def summarized(case: Case, candidates: list[Candidate], found: Measurements) -> dict:
    """Sizes, rows, and the rate of the bare products."""
    floors = [c for c in candidates if c.is_floor and found.has(c.key)]
    rate = None
    if floors:
        best = max(min(found.times[floors[0].key]["warm"]), SHORTEST)
        rate = case.product_flops * floors[0].num_products / best / 1e12
    rows = [found.row(candidate, case) for candidate in candidates]
    return {**sizes_of(case), "product_tflops": rate, "rows": rows}


def sizes_of(case: Case) -> dict:
    """What a CASE says of its shape."""
    return {
        "name": case.shape,
        "case": case.name,
        "rows_t": case.num_rows,
        "vocab": case.vocab_size,
        "dim": case.dim,
        "dtype": str(case.dtype).removeprefix("torch."),
        "inputs": case.inputs,
    }


def finite(found: dict[str, dict]) -> dict[str, dict]:
    """Errors for the JSON, which has no numbers for NaN and infinity: None."""
    return {
        quantity: {k: v if math.isfinite(v) else None for k, v in values.items()}
        for quantity, values in found.items()
    }

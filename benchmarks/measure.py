"""One case, all candidates: errors and memory first, then seconds in interleaved rounds."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .accuracy import errors, exact_result
from .baselines import FLOORS, NAIVE, Candidate, Result
from .cases import Case, Inputs, make_inputs
from .clock import Clock, measure_seconds, summary
from .deadline import LATE, OutOfTime, at_most_seconds
from .memory import memory_of
from .output import say

ERROR_ROWS, ERROR_COLUMNS = 32, 4096
NO_MEMORY = {"extra_bytes": 0, "workspace_bytes": 0}  # bare products: their buffers exist already


def never() -> bool:
    """No limit of time."""
    return False


@dataclass
class Measurements:
    """What was found so far, by key of the candidate."""

    missing: dict[str, str] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def row(self, candidate: Candidate) -> dict:
        """One row of the table, or the reason why there is none."""
        key = candidate.key
        row = {"key": key, "title": candidate.title, "note": candidate.note}
        if key in self.missing:
            return {**row, "missing": self.missing[key]}
        times = {name: summary(values) for name, values in self.seconds.items() if values}
        median, floor = times[key]["median"], FLOORS[candidate.num_products]
        row |= {
            "version": candidate.version(),
            "has_entropy_gradient": candidate.has_entropy_gradient,
            "floor": floor,
            "seconds": times[key],
            "all_seconds": self.seconds[key],
            **self.memory[key],
            "errors": self.errors.get(key, {}),
        }
        others = {
            "over_products": floor,
            "over_products_fp32": f"{floor}_fp32",
            "over_naive": NAIVE[candidate.num_products],
        }
        return row | {
            name: median / times[other]["median"]
            for name, other in others.items()
            if other in times
        }


def measure(
    case: Case,
    candidates: list[Candidate],
    clock: Clock,
    rounds: Callable[[Candidate], int],
    is_late: Callable[[], bool] = never,
    peer_seconds: float = 3600.0,
) -> dict:
    """A part of a report: every candidate on one case.

    Args:
        case: the shape.
        candidates: the bare products among them are the floor of the others.
        clock: of the device.
        rounds: how often a candidate is timed.
        is_late: asked before a candidate's first step; those that come too late are dropped.
        peer_seconds: limit for the first steps of another project, its compilation included.
    """
    say(f"{case.name}: inputs")
    inputs = make_inputs(case, device=clock.device)
    few = inputs.first(min(ERROR_ROWS, case.num_rows))
    columns = torch.randperm(case.vocab_size, device=clock.device)[:ERROR_COLUMNS]
    truths = {flag: exact_result(few, columns, flag) for flag in (True, False)}
    found = Measurements(missing={c.key: why for c in candidates if (why := c.missing())})
    for candidate in candidates:
        if candidate.key in found.missing:
            continue
        if is_late():
            found.missing[candidate.key] = LATE
            say(f"{candidate.title}: {LATE}")
            continue
        say(f"errors and memory: {candidate.title}")
        truth = truths[candidate.has_entropy_gradient]
        if candidate.is_ours or candidate.is_floor:
            look_at(candidate, inputs, few, (truth, columns), found, clock)
            continue
        try:  # what goes wrong with a peer is its row
            with at_most_seconds(peer_seconds):
                look_at(candidate, inputs, few, (truth, columns), found, clock)
        except (Exception, OutOfTime) as error:
            found.missing[candidate.key] = f"{type(error).__name__}: {str(error)[:200]}"
            say(f"{candidate.title} cannot run: {found.missing[candidate.key]}")
        release(clock.device)
    present = [candidate for candidate in candidates if candidate.key not in found.missing]
    found.seconds = measure_seconds(present, inputs, say, clock, rounds, is_late)
    return summarized(case, candidates, found) | {
        "entropy_quantiles": quantiles(truths[True].entropy),
        "error_rows": few.labels.numel(),
    }


def look_at(
    candidate: Candidate,
    inputs: Inputs,
    few: Inputs,
    truth: tuple[Result, Tensor],
    found: Measurements,
    clock: Clock,
) -> None:
    """Errors and memory of one candidate; after it its code and buffers exist."""
    if candidate.has_errors:
        found.errors[candidate.key] = errors(candidate, candidate.inputs_of(few), *truth)
    found.memory[candidate.key] = prepare(candidate, inputs, clock)


def release(device: torch.device) -> None:
    """Give cached memory back: what one candidate leaves must not fail the next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def prepare(candidate: Candidate, inputs: Inputs, clock: Clock) -> dict[str, int]:
    """The memory of a step; after it the candidate's code and buffers exist."""
    given, is_gpu = candidate.inputs_of(inputs), clock.device.type == "cuda"
    memory = NO_MEMORY
    if candidate.is_floor and is_gpu:
        candidate.step(given)
    elif not candidate.is_floor:
        if is_gpu:
            candidate.step(given)
        memory = memory_of(candidate, given)
        if candidate.key == "one_pass" and not is_gpu:
            candidate.step(given)  # no code was generated under the counter
    return memory


def summarized(case: Case, candidates: list[Candidate], found: Measurements) -> dict:
    """Rows, and the rate of the bare products."""
    floor = next(c for c in candidates if c.is_floor)
    rate = case.product_flops * floor.num_products / min(found.seconds[floor.key])
    return {
        "case": case.name,
        "product_tflops": rate / 1e12,
        "rows": [found.row(candidate) for candidate in candidates],
    }


def quantiles(entropy: Tensor | None) -> list[float]:
    """The tenth and the ninetieth percentile."""
    assert entropy is not None, "the truth has everything"
    return [float(q) for q in entropy.quantile(entropy.new_tensor([0.1, 0.9]))]

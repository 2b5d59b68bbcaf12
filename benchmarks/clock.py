"""Clocks: seconds of a step, on a CPU by the host's clock and on a GPU by events on its stream."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle

import torch

from .baselines import Candidate
from .cases import Inputs

MOST_COPIES = 16
FEWEST_ROUNDS = 3


class Clock:
    """Times steps on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, step: Callable[[], object]) -> float:
        """One run of ``step``, all its work on the device included."""
        if self.device.type != "cuda":
            begin = time.perf_counter()
            step()
            return time.perf_counter() - begin
        with torch.cuda.device(self.device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            step()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3

    @property
    def cache_bytes(self) -> int:
        """The last cache before the device's memory; 0 on a CPU, whose runs are seconds long."""
        if self.device.type != "cuda":
            return 0
        return torch.cuda.get_device_properties(self.device).L2_cache_size


def rotation(inputs: Inputs, cache_bytes: int) -> Iterator[Inputs]:
    """``inputs`` in turn with copies of them, as many as overflow the cache twice.

    Inputs that do so alone need no copy. Runs that follow each other then never find theirs.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in inputs.tensors())
    copies = max(0, min(MOST_COPIES, math.ceil(2 * cache_bytes / max(size, 1)) - 1))
    return cycle([inputs, *(inputs.copy() for _ in range(copies))])


def measure_seconds(
    candidates: list[Candidate],
    inputs: Inputs,
    say: Callable[[str], None],
    clock: Clock,
    rounds: Callable[[Candidate], int],
    is_late: Callable[[], bool] = lambda: False,
) -> dict[str, list[float]]:
    """Seconds of every timed step, in interleaved rounds so that drifts meet all candidates.

    When ``is_late`` says so, the third round is the last one.
    """
    times: dict[str, list[float]] = {candidate.key: [] for candidate in candidates}
    sets = rotation(inputs, clock.cache_bytes)
    for turn in range(max(map(rounds, candidates), default=0)):
        if turn >= FEWEST_ROUNDS and is_late():
            say(f"only {turn} rounds for lack of time")
            break
        for candidate in candidates:
            if turn < rounds(candidate):
                chosen = candidate.inputs_of(next(sets))
                seconds = clock.seconds(lambda c=candidate, i=chosen: c.step(i))
                times[candidate.key].append(seconds)
                say(f"round {turn + 1}: {candidate.title}: {seconds:.4g} s")
    return times


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}

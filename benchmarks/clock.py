"""Clocks: seconds of a step, on a CPU by the host's clock and on a GPU by events on its stream.

In a round every candidate takes two steps: a *cold* one after the last cache before the device's
memory was overwritten, and right after it a *warm* one, which finds there what its own last step
left. Rounds are interleaved, so that drifts of clocks and temperature meet all candidates.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from .deadline import LATE, OutOfTime, at_most_seconds
from .drawing.bars import shortened
from .losses.baselines import Candidate
from .losses.cases import Inputs

KINDS = ("warm", "cold")
VITAL = ("one_pass", "scored", "naive", "naive_scored")
NO_COLD = f"{LATE}; the warm step followed another candidate's instead of its own"
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
LONGEST_STEP = 300.0  # seconds after which a peer's step is broken off, whatever time there is
ASSUMED_CACHE = 256 << 20  # where a machine does not tell; more than the caches of most
Times = dict[str, dict[str, list[float]]]  # seconds by candidate, warm and cold


class Clock:
    """Times steps on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, step: Callable[[], object], *, cold: bool = False) -> float:
        """One run of ``step``, all its work on the device included; cold: nothing is cached."""
        if self.device.type != "cuda":
            if cold:
                self.flush()
            begin = time.perf_counter()
            step()
            return time.perf_counter() - begin
        with torch.cuda.device(self.device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            if cold:
                self.flush()
            begin.record()
            step()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3

    @cached_property
    def cache_bytes(self) -> int:
        """The last cache before the device's memory."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).L2_cache_size
        return cpu_cache_bytes()

    @cached_property
    def _flusher(self) -> Tensor:
        return torch.zeros(2 * self.cache_bytes // 4, device=self.device)

    def flush(self) -> None:
        """Overwrite the cache: write and read twice its size."""
        self._flusher.add_(1.0)

    def forget(self) -> None:
        """Give the memory of `flush` back."""
        self.__dict__.pop("_flusher", None)


def cpu_cache_bytes() -> int:
    """The largest cache that the first core reaches, `ASSUMED_CACHE` where nobody tells."""
    sizes = [
        int(found[1]) * UNITS[found[2]]
        for file in CACHES.glob("index*/size")
        if (found := re.match(r"(\d+)([KMG]?)", file.read_text("utf-8")))
    ]
    if not sizes and "SC_LEVEL3_CACHE_SIZE" in os.sysconf_names:
        sizes = [os.sysconf("SC_LEVEL3_CACHE_SIZE")]
    return max(sizes, default=0) or ASSUMED_CACHE


def measure_seconds(
    candidates: list[Candidate],
    inputs: Inputs,
    clock: Clock,
    rounds: int,
    say: Callable[[str], None],
    *,
    expected: dict[str, float],
    until: float = math.inf,
) -> tuple[Times, dict[str, str]]:
    """Seconds of every timed step in interleaved rounds, and why candidates have none.

    Args:
        candidates: in the order of a round.
        inputs: of all of them.
        clock: of the device.
        rounds: of candidates that do not want fewer.
        say: told of every step.
        expected: seconds of a step of each candidate, for `until`.
        until: `time.monotonic`; candidates that would not be done by then skip the round. First to
            go are further rounds of those that are not vital, then their cold steps, then they.
    """
    times: Times = {candidate.key: {kind: [] for kind in KINDS} for candidate in candidates}
    missing: dict[str, str] = {}
    for turn in range(rounds):
        for place, candidate in enumerate(candidates):
            key, wanted = candidate.key, rounds if candidate.rounds is None else candidate.rounds
            if key in missing or turn >= wanted:
                continue
            others = kept_for_others(candidates, place, expected, turn, rounds)
            left = until - time.monotonic()
            kinds = kinds_in_time(left, expected[key], others, turn)
            try:
                for kind in kinds:
                    left = until - time.monotonic()
                    seconds = timed(candidate, candidate.inputs_of(inputs), clock, kind, left)
                    times[key][kind].append(seconds)
                    say(f"round {turn + 1}: {candidate.title}: {kind} {seconds:.4g} s")
            except (Exception, OutOfTime) as error:
                if candidate.is_ours or candidate.is_floor:
                    raise
                missing[key] = f"{type(error).__name__}: {shortened(str(error), 200)}"
    late = {key: LATE for key, found in times.items() if not found["warm"]}
    return times, late | missing


def is_vital(candidate: Candidate) -> bool:
    """Whether the table says little without it: the floor, ours in its usual mode, plain torch."""
    return candidate.is_floor or candidate.key in VITAL


def kept_for_others(
    candidates: list[Candidate], place: int, expected: dict[str, float], turn: int, rounds: int
) -> float:
    """Seconds that are left to others when the candidate at ``place`` begins.

    Two steps of each vital one behind it, in the first round one of each other; where it is not
    vital itself, all further rounds of the vital ones.
    """
    kept = 0.0
    for candidate in candidates[place + 1 :]:
        steps = 2 if is_vital(candidate) else int(turn == 0)
        kept += steps * expected[candidate.key]
    if not is_vital(candidates[place]):
        vital = sum(expected[c.key] for c in candidates if is_vital(c))
        kept += 2 * (rounds - turn - 1) * vital
    return kept


def kinds_in_time(left: float, expected: float, others: float, turn: int) -> tuple[str, ...]:
    """The steps of a candidate in a round: both; in the first, when time is short, a single one.

    That one follows another candidate's step instead of its own.

    Args:
        left: seconds until the end.
        expected: seconds of a step.
        others: seconds that candidates without any step yet will take for one.
        turn: number of the round.
    """
    if left >= 2 * expected + others:
        return "cold", "warm"
    return ("warm",) if turn == 0 and left >= expected else ()


def timed(candidate: Candidate, given: Inputs, clock: Clock, kind: str, left: float) -> float:
    """One step; a peer's is broken off when time is out."""

    def step() -> object:
        return candidate.step(given)

    if candidate.is_ours or candidate.is_floor:
        return clock.seconds(step, cold=kind == "cold")
    with at_most_seconds(min(max(left, 1.0), LONGEST_STEP)):
        return clock.seconds(step, cold=kind == "cold")


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, the 20th and 80th percentile, and how many."""
    values = torch.tensor(seconds, dtype=torch.float64)
    low, median, high = values.quantile(values.new_tensor([0.2, 0.5, 0.8])).tolist()
    return {"median": median, "low": low, "high": high, "count": len(seconds)}

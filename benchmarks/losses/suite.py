"""A command over its cases: `loss` and `score` measure them in turn and write one report."""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks import against, plot
from benchmarks.clock import Clock
from benchmarks.deadline import LATE, OutOfTime
from benchmarks.machine import machine
from benchmarks.options import (
    add_case_arguments,
    backends_of,
    cases_of,
    device_of,
    refusal,
    rounds_of,
    seconds_of,
)
from benchmarks.output import say

from .baselines import Candidate
from .cases import DTYPES, Case, Inputs
from .measure import measure, release, sizes_of

FIRST_SHARE = 3.0  # of the time: the first case counts for so many of the others
# beside the floor and plain torch, at the further shapes of a CPU's whole run, which has minutes
NEAR = ("one_pass", "scored", "trl_scored")
QUICK_HEAD = 1 << 26  # parameters of a head that costs them little; they run there as well
ELSEWHERE = "in ten minutes on a CPU at the first and the smallest shape; --seconds 1200: at all"


@dataclass(frozen=True)
class Suite:
    """A command over cases.

    Attributes:
        kind: "loss" or "score".
        cpu_seconds: after which nothing begins on a CPU, where --seconds is not given.
        candidates: of a case, a device and the backends that are asked for.
        targets: of a measured case (its CASE of the report, the machine).
    """

    kind: str
    cpu_seconds: float
    candidates: Callable[[Case, torch.device, Sequence[str]], list[Candidate]]
    targets: Callable[[dict, dict], list[dict]]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The options of the command."""
        add_case_arguments(parser, self.cpu_seconds)
        against.add_argument(parser, self.kind)

    def run(self, options: argparse.Namespace, command: str) -> int:
        """Measure, print the table, write ``<kind>_<device>.json`` and what is drawn of it.

        Returns:
            0; 1 with ``--gate`` when a target is missed, with ``--against`` when something became
            worse; 2 when the options cannot be right.
        """
        reason = refusal(options)
        if reason is not None:
            print(reason)
            return 2
        deadline = time.monotonic() + seconds_of(options, self.cpu_seconds)
        try:
            report: dict[str, Any] = {"command": command, **self.measure(options, deadline)}
        except SystemExit as mistake:  # a key or a model that cannot be right; 1: a missed target
            print(mistake)
            return 2
        stem = "_".join([self.kind, options.device, *([options.name] if options.name else [])])
        plot.publish(report, options.out / stem)
        status = against.check(report, options.against, options.only)
        missed = [target["text"] for target in report["targets"] if target["met"] is False]
        return status or (1 if options.gate and missed else 0)

    def measure(self, options: argparse.Namespace, deadline: float) -> dict:
        """A report but for its command.

        Args:
            options: as of `options.add_case_arguments`.
            deadline: `time.monotonic` after which nothing begins; each case has its share of what
                is left.
        """
        begin = time.monotonic()
        torch.set_num_threads(options.threads)
        warnings.filterwarnings("ignore", category=FutureWarning)
        device, backends = device_of(options), backends_of(options)
        pairs, where = cases_with_inputs(options), machine(device)
        report: dict[str, Any] = {"kind": self.kind, "machine": where, "cases": [], "targets": []}
        for place, (case, make) in enumerate(pairs):
            left, others = deadline - time.monotonic(), len(pairs) - place - 1
            first = FIRST_SHARE if place == 0 else 1.0
            end = deadline if others == 0 else deadline - left * others / (others + first)
            chosen = wanted(self.candidates(case, device, backends), options.only)
            is_large = case.vocab_size * case.dim > QUICK_HEAD
            if place and is_large and device.type == "cpu" and is_whole(options):
                chosen = [as_further(candidate) for candidate in chosen]
            found = {**sizes_of(case), "missing": LATE, "rows": []}
            if left > 0:
                found = unless_stopped(
                    case,
                    lambda c=case, e=end, m=make, x=chosen: measure(
                        c, x, Clock(device), rounds_of(options), until=e, make=m
                    ),
                )
            report["cases"].append(found)
            if "missing" not in found:
                report["targets"] += self.targets(found, where)
            release(device)
            say(f"{case.shape}: done after {time.monotonic() - begin:.0f} s")
        return {**report, "seconds": round(time.monotonic() - begin, 1)}


def is_whole(options: argparse.Namespace) -> bool:
    """Whether all named shapes are measured, because nobody asked for anything else."""
    names = ("shape", "sizes", "rows", "vocab", "dim", "only", "inputs", "seconds")
    return not any(getattr(options, name) for name in names)


def as_further(candidate: Candidate) -> Candidate:
    """A candidate at the further shapes of a whole run on a CPU."""
    if candidate.kind not in ("ours", "peer") or candidate.key in NEAR:
        return candidate
    return replace(candidate, obstacle=candidate.obstacle or ELSEWHERE)


def unless_stopped(case: Case, run: Callable[[], dict]) -> dict:
    """A measured case, or a case without rows where a limit of time around the command stops it."""
    try:
        return run()
    except OutOfTime as reason:  # what the other cases found must not be lost
        say(f"{case.shape}: {reason}")
        return {**sizes_of(case), "missing": str(reason), "rows": []}


def cases_with_inputs(
    options: argparse.Namespace,
) -> list[tuple[Case, Callable[[Case, torch.device], Inputs] | None]]:
    """Every case and where its inputs come from, None for the spectrum.

    Raises:
        SystemExit: the model of --inputs cannot be used.
    """
    if options.inputs is None:
        return [(case, None) for case in cases_of(options)]
    from .checkpoint import checkpoint_case, checkpoint_inputs

    pairs: list[tuple[Case, Callable[[Case, torch.device], Inputs] | None]] = []
    for name in options.dtype:
        try:
            case, model, tokenizer = checkpoint_case(
                options.inputs, options.rows, options.device, DTYPES[name]
            )
        except ValueError as reason:
            raise SystemExit(f"--inputs: {str(reason).removeprefix('model.path: ')}") from reason
        make = partial(
            checkpoint_inputs,
            model=model,
            tokenizer=tokenizer,
            is_sampled=options.labels == "sampled",
        )
        pairs.append((case, make))
    return pairs


def wanted(candidates: list[Candidate], only: list[str] | None) -> list[Candidate]:
    """Those of ``--only``, with floors and plain torch.

    Raises:
        SystemExit: a key that nobody has.
    """
    if only is None:
        return candidates
    unknown = set(only) - {c.key for c in candidates}
    if unknown:
        known = ", ".join(c.key for c in candidates)
        raise SystemExit(f"--only: expected keys among {known}, got {', '.join(sorted(unknown))}.")
    return [c for c in candidates if c.is_floor or c.key in only or c.key.startswith("naive")]

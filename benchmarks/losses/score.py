"""Scoring without gradients, for old, reference and teacher logprobs: `python -m benchmarks score`.

Ours as dispatch picks it, its fused kernel and its fp8 head where they run, plain torch and the
peers that can, each beside one bare product. Shapes, inputs, files and deadline as in `loss`; on a
CPU within a minute.
"""

from __future__ import annotations

import argparse

from benchmarks import against
from benchmarks.options import add_case_arguments, backends_of, device_of

from .candidates import score_candidates
from .suite import measure_cases, run_suite

CPU_SECONDS = 70.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_case_arguments(parser, CPU_SECONDS)
    against.add_argument(parser, "score")


def run(options: argparse.Namespace, command: str) -> int:
    """Measure, print the table, write the files; with ``--gate`` 1 when a target is missed."""
    return run_suite("score", options, command, CPU_SECONDS, measure_score)


def measure_score(options: argparse.Namespace, deadline: float) -> dict:
    """A report but for its command; nothing begins after ``deadline`` (`time.monotonic`)."""
    device, backends = device_of(options), backends_of(options)
    return measure_cases(
        "score",
        options,
        deadline,
        lambda case: score_candidates(case, device, backends),
        score_targets,
    )


def score_targets(found: dict, machine: dict) -> list[dict]:  # noqa: ARG001
    """The usual way is no slower than those by force, and than plain torch."""
    ran = {row["key"]: row for row in found["rows"] if "missing" not in row}
    if "scored" not in ran:
        return []
    seconds = {key: row["seconds"]["warm"]["median"] for key, row in ran.items()}
    others = {
        "naive_scored": "plain torch",
        "scored_loop": "the chunk loop",
        "scored_fused": "the fused kernel",
    }
    return [
        {
            "case": found["name"],
            "text": f"scoring / {title}, time",
            "limit": 1.05,
            "value": (ratio := seconds["scored"] / seconds[key]),
            "met": ratio <= 1.05,
        }
        for key, title in others.items()
        if key in seconds
    ]

"""Scoring without gradients, for old, reference and teacher logprobs: `python -m benchmarks score`.

Ours as dispatch picks it, its fused kernel and its fp8 head where they run, plain torch and the
peers that can, each beside one bare product. Shapes, inputs, files and deadline as in `loss`; on a
CPU within a minute.
"""

from __future__ import annotations

from .candidates import score_candidates
from .suite import Suite

CPU_SECONDS = 70.0


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


SUITE = Suite("score", CPU_SECONDS, score_candidates, score_targets)
add_arguments, run, measure_score = SUITE.add_arguments, SUITE.run, SUITE.measure

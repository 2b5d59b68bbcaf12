"""What an eight-bit head costs in precision: its logprobs beside exact ones, on a few rows.

Passes without gradients (reference, old logprobs) may score with ``train.score_head`` "fp8". Some
rows of every micro-batch are then scored exactly as well; the differences are metrics, and the
first ones also a line on the screen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from crpo_fast.metrics import Metrics, Sums
from crpo_kernels import linear_logprobs

ERRORS = {"ref_logprobs": "ref_errors", "old_logprobs": "old_errors"}  # vectors of a micro-batch
NUM_ROWS = 16  # of a micro-batch that are also scored exactly
_NAME = "score_head"
_SQUARE = f"{_NAME}/rms"  # the mean of the squares until it is finished


def exact_differences(
    logprobs: Tensor,  # [R] as the eight-bit head says
    hidden: Tensor,  # [R, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [R]
    **options: Any,
) -> Tensor:  # [at most NUM_ROWS]
    """How far logprobs are from exact ones, nats, on rows spread over the micro-batch.

    Args:
        logprobs: by the eight-bit head.
        hidden: of all rows.
        weight: of the head.
        labels: of all rows.
        options: of the call that made ``logprobs``, but for the head's dtype and rows.
    """
    step = max(1, -(-labels.numel() // NUM_ROWS))
    few = labels[::step]
    exact = linear_logprobs(hidden[::step], weight, few, rows=range(few.numel()), **options)
    return logprobs[::step] - exact.logprobs


def add_errors(sums: Sums, vectors: Mapping[str, Tensor]) -> None:
    """Add the differences of one micro-batch, where there are any."""
    for name in ERRORS.values():
        if name in vectors:
            errors = vectors[name].double()
            sums.add(_SQUARE, errors.square().sum(), errors.numel())
            sums.add_extremes(_NAME, errors.abs())


def finish_errors(metrics: Metrics) -> None:
    """Turn the mean of the squares into its root."""
    if (square := metrics.get(_SQUARE)) is not None:
        metrics[_SQUARE] = math.sqrt(square)


def sentence(metrics: Metrics) -> str:
    """The errors of a step for the screen; empty where every head was exact."""
    rms, largest = metrics.get(_SQUARE), metrics.get(f"{_NAME}/max")
    if rms is None or largest is None:
        return ""
    return (
        f"train.score_head fp8: logprobs without gradients are off by {rms:.2g} nats (rms; at most "
        f"{largest:.2g}) on the rows that were also scored exactly. --train.score_head full "
        "scores all exactly"
    )

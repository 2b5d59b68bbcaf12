"""Measured times of both ways to score, by device: what `scorer` decides by where it has a row.

    python -m benchmarks gpu-gate --only scorers        measures both and prints rows to paste here

A row is one call of `linear_logprobs` without gradients: medians of interleaved rounds on inputs
with entropies as in sampled text. Empty: nothing was measured yet.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Measured(NamedTuple):
    """Both ways on one device and shape."""

    device: str  # as the driver names it
    dtype: str  # of the product's factors: "bfloat16", "float32", "float8_e4m3fn"
    num_rows: int  # T
    vocab_size: int  # V
    dim: int  # D
    chunk_ms: float  # the chunk loop
    fused_ms: float  # the fused kernel


TABLE: tuple[Measured, ...] = ()

FARTHEST = 3.0  # factors of 2 between a call and its nearest row, in T, V and D together


def nearest(
    table: tuple[Measured, ...], device: str, dtype: str, shape: tuple[int, int, int]
) -> Measured | None:
    """The row of this device and dtype that is nearest to ``shape`` (T, V, D), or None.

    Distance is the sum of |log2| of the three quotients: how many doublings lie between. A row
    farther than ``FARTHEST`` says nothing. Of equally near ones the first counts.
    """

    def distance(row: Measured) -> float:
        there = (row.num_rows, row.vocab_size, row.dim)
        return sum(abs(math.log2(max(1, a) / max(1, b))) for a, b in zip(shape, there, strict=True))

    rows = [row for row in table if (row.device, row.dtype) == (device, dtype)]
    best = min(rows, key=distance, default=None)
    return best if best is not None and distance(best) <= FARTHEST else None

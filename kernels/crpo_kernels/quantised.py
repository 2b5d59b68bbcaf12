"""A head in eight bits, for scoring: rows of weight and hidden as float8_e4m3fn with a scale each.

    scale_i = amax_j |x_ij| / 448,   q_ij = round(x_ij / scale_i),   z_ij = s_i s_j (q_i . q_j)

e4m3 has three bits of mantissa: a value is off by up to 1/16, a product of D of them by much less.
The fused kernel multiplies the eight-bit values themselves; everywhere else they are widened block
by block (exactly: bf16 and fp32 hold every e4m3), so all backends score the same numbers.

Nothing is kept between calls. A tensor's version counter does not tell that its values are those of
the last call (FSDP's all-gather and writes through ``.data`` leave it as it is), so each call
quantises the weight anew, the chunk loop even for each chunk, as it holds no copy of the weight:
V D elements read and, for the kernel, V D bytes written, which is worth it for many rows alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .products import is_wide, product

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
LEAST_SCALE = 2.0**-100  # of a row of zeros
CACHED_ELEMENTS = 1 << 19  # divided at once on a CPU, in fp32: 2 MiB
BLOCK_ELEMENTS = 1 << 24  # elsewhere, where a launch costs more: 64 MiB


class Quantised(NamedTuple):
    """Rows in eight bits."""

    values: Tensor  # [N, D] float8_e4m3fn
    scales: Tensor  # [N] fp32


def check_head_dtype(head_dtype: object, hidden: Tensor, needs_any: bool) -> None:
    """A quantised head, which only scores.

    Raises:
        ValueError: another dtype than the one there is, a gradient is asked for, or fp64 states.
    """
    if head_dtype is not FLOAT8:
        raise ValueError(
            f"head_dtype: expected None or torch.float8_e4m3fn, got {head_dtype!r}. Pass None for "
            "the head as it is."
        )
    if needs_any:
        raise ValueError(
            f"head_dtype: expected None where a gradient is asked for, got {head_dtype}. Call "
            "under torch.no_grad(), or pass head_dtype=None."
        )
    if hidden.dtype == torch.float64:
        raise ValueError(
            f"head_dtype: expected None for float64 tensors, which are for checking, got "
            f"{head_dtype}. Pass bfloat16 or float32 tensors, or head_dtype=None."
        )


def quantised(tensor: Tensor) -> Quantised:  # of [N, D]
    """Every row by its own largest value; NaN and infinities make their whole row NaN."""
    made = Quantised(
        torch.empty_like(tensor, dtype=FLOAT8, memory_format=torch.contiguous_format),
        tensor.new_empty(tensor.shape[0], dtype=torch.float32),
    )
    elements = BLOCK_ELEMENTS if is_wide(tensor) else CACHED_ELEMENTS
    for rows in blocks(tensor.shape[0], elements // max(1, tensor.shape[1])):
        part = tensor[rows]  # [b, D]
        low, high = part.aminmax(dim=1)
        largest = torch.maximum(-low, high).float()  # [b]
        made.scales[rows] = (largest / LARGEST).clamp(min=LEAST_SCALE)
        made.values[rows].copy_(part / made.scales[rows].unsqueeze(1))  # a quotient in fp32
    return made


def widened(tensor: Tensor) -> Tensor:  # [N, D] in its dtype's statistics: fp32
    """What the eight bits stand for, all at once: for the oracle."""
    values, scales = quantised(tensor)
    return values.float() * scales.unsqueeze(1)


def put_logits(hidden: Tensor, weight: Tensor, out: Tensor, slab_rows: int) -> None:
    """Raw products of the quantised rows, a slab of the vocabulary at a time.

    Args:
        hidden: ``[C, D]``.
        weight: ``[V, D]``, quantised here.
        out: ``[C, V]`` fp32, written.
        slab_rows: rows of the weight that are widened at once.
    """
    dtype = torch.bfloat16 if is_wide(hidden) else torch.float32
    states, scales = quantised(hidden)
    states = states.to(dtype)
    for slab in blocks(weight.shape[0], slab_rows):
        part = quantised(weight[slab])
        product(states, part.values.to(dtype).t(), out[:, slab])
        out[:, slab] *= part.scales
    out *= scales.unsqueeze(1)


def blocks(count: int, step: int) -> Iterator[slice]:
    """0..count in steps."""
    for start in range(0, count, max(1, step)):
        yield slice(start, min(start + max(1, step), count))

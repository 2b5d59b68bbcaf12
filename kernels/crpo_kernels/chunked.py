"""Chunks of rows: the products around the row work, for both modes.

    one_pass   for each chunk:  Z = hidden_c W^T;  stats;  objective;  dZ;  dH_c = dZ W
               one chunk:   keep dZ, and dW = dZ^T (hidden * grad_out) is one product in backward
               several:     dW accumulates over the chunks in fp32
    two_pass   score:  Z, stats for each chunk          (Z of a single chunk is kept)
               backprop:  Z again, dZ, dH_c, dW for each chunk

Shapes: T rows of ``hidden``, n <= T counted rows, C rows of a chunk. ``rows`` ``[n]`` are the
indices of the counted rows, None when all count; everything else per token is already compact,
``[n]``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .plan import Plan, raw_dtype
from .rows_compiled import CompiledRows
from .rows_torch import EagerRows, LogitView, RowStats
from .terms import Coefficients


@dataclass(frozen=True)
class Head:
    """One call of the head: everything but the three tensors that may need a gradient."""

    rows: Tensor | None  # [n] int64 counted rows of hidden, None: all
    labels: Tensor  # [n] int64
    view: LogitView
    plan: Plan
    needs_hidden: bool
    needs_weight: bool
    needs_bias: bool

    @property
    def needs_any(self) -> bool:
        """Whether anything upstream wants a gradient."""
        return self.needs_hidden or self.needs_weight or self.needs_bias


@dataclass
class Gradients:
    """What the backward pass of a head needs or already knows, for an upstream gradient of 1."""

    d_hidden: Tensor | None = None  # [T, D]
    d_weight: Tensor | None = None  # [V, D] accumulated, fp32 (fp64)
    d_bias: Tensor | None = None  # [V] fp32 (fp64)
    d_raw: Tensor | None = None  # [n, V] of a single chunk, instead of d_weight


def stats_dtype(tensor: Tensor) -> torch.dtype:
    """fp64 inputs are worked in fp64, everything else in fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Autocast off: the casts have been made, what follows says its dtypes itself."""
    return torch.autocast(tensor.device.type, enabled=False)


class Chunks:
    """The buffers of one call and the products around the row work."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, head: Head, kept_raw: Tensor | None = None
    ) -> None:
        self.hidden, self.weight, self.head = hidden, weight, head
        self.num_rows = head.labels.numel()
        self.is_kept = kept_raw is not None
        size = min(head.plan.chunk_rows, self.num_rows)
        if kept_raw is None:
            kept_raw = hidden.new_empty(size, weight.shape[0], dtype=raw_dtype(hidden))
        self.raw = kept_raw  # [C, V]
        in_place = not head.needs_any or self.raw.dtype == hidden.dtype
        self.d_raw = self.raw if in_place else hidden.new_empty(self.raw.shape)  # [C, V]
        dtype, plan = stats_dtype(hidden), head.plan
        self.work: CompiledRows | EagerRows
        if plan.is_compiled:
            self.work = CompiledRows(dtype)
        else:
            block_rows = max(1, min(plan.block_rows, size))
            self.work = EagerRows(block_rows, weight.shape[0], dtype, hidden)

    def __iter__(self) -> Iterator[slice]:
        """Slices of the counted rows."""
        step = self.head.plan.chunk_rows
        for start in range(0, self.num_rows, step):
            yield slice(start, min(start + step, self.num_rows))

    def hidden_of(self, rows: slice) -> Tensor:  # [C, D]
        """The hidden states of a chunk."""
        if self.head.rows is None:
            return self.hidden[rows]
        return self.hidden.index_select(0, self.head.rows[rows])

    def logits(self, rows: slice) -> Tensor:  # [C, V]
        """Raw products of a chunk, in the call's one buffer."""
        out = self.raw[: rows.stop - rows.start]
        if self.is_kept:
            return out
        if out.dtype == self.hidden.dtype:
            return torch.mm(self.hidden_of(rows), self.weight.t(), out=out)
        return torch.mm(self.hidden_of(rows), self.weight.t(), out_dtype=out.dtype, out=out)

    def stats(self, rows: slice, raw: Tensor) -> RowStats:
        """Statistics of a chunk."""
        return self.work.stats(raw, self.head.labels[rows], self.head.view.take(rows))

    def grad(self, rows: slice, raw: Tensor, stats: RowStats, coefficients: Coefficients) -> Tensor:
        """Gradient of the raw products of a chunk ``[C, V]``."""
        d_raw = self.d_raw[: raw.shape[0]]
        labels, view = self.head.labels[rows], self.head.view.take(rows)
        self.work.grad_(raw, d_raw, labels, view, stats, coefficients)
        return d_raw


def score(hidden: Tensor, weight: Tensor, head: Head) -> tuple[RowStats, Tensor | None]:
    """Statistics of all counted rows ``[n]``, and the raw products if one chunk held them all."""
    chunks = Chunks(hidden, weight, head)
    with without_autocast(hidden), torch.no_grad():
        parts = [chunks.stats(rows, chunks.logits(rows)) for rows in chunks]
    if not parts:
        return empty_stats(hidden), None
    stats = RowStats(*(torch.cat(values) for values in zip(*parts, strict=True)))
    return stats, chunks.raw if len(parts) == 1 else None


def empty_stats(hidden: Tensor) -> RowStats:
    """Statistics of no rows at all."""
    empty = hidden.new_empty(0, dtype=stats_dtype(hidden))
    return RowStats(empty, empty, empty, empty, empty.bool())


def one_pass(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    head: Head,
    objective: Callable[[slice, RowStats], Coefficients],
) -> Gradients:
    """Mode A: ``objective`` says the coefficients of a chunk while its logits are hot."""
    with without_autocast(hidden), torch.no_grad():
        return _run(hidden, weight, head, objective, kept_raw=None, stats=None)


def backprop(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    head: Head,
    stats: RowStats,  # of [n]
    coefficients: Coefficients,  # of [n]
    kept_raw: Tensor | None,  # [n, V], overwritten
) -> Gradients:
    """Mode B's second pass: gradients of all rows from known statistics and coefficients."""

    def take(rows: slice, _stats: RowStats) -> Coefficients:
        return coefficients.take(rows)

    with without_autocast(hidden), torch.no_grad():
        return _run(hidden, weight, head, take, kept_raw=kept_raw, stats=stats)


def _run(
    hidden: Tensor,
    weight: Tensor,
    head: Head,
    coefficients_of: Callable[[slice, RowStats], Coefficients],
    *,
    kept_raw: Tensor | None,
    stats: RowStats | None,
) -> Gradients:
    """The loop over chunks that both modes share."""
    gradients = Gradients()
    if head.needs_hidden:
        make = torch.empty_like if head.rows is None else torch.zeros_like
        gradients.d_hidden = make(hidden, memory_format=torch.contiguous_format)
    if head.needs_bias:
        gradients.d_bias = hidden.new_zeros(weight.shape[0], dtype=stats_dtype(hidden))
    chunks = Chunks(hidden, weight, head, kept_raw)
    is_single = head.plan.chunk_rows >= chunks.num_rows
    if head.needs_weight and not is_single:
        gradients.d_weight = weight.new_zeros(weight.shape, dtype=stats_dtype(hidden))
    for rows in chunks:
        raw = chunks.logits(rows)
        chunk_stats = chunks.stats(rows, raw) if stats is None else stats.take(rows)
        coefficients = coefficients_of(rows, chunk_stats)
        if not head.needs_any:
            continue
        d_raw = chunks.grad(rows, raw, chunk_stats, coefficients)
        _add_products(gradients, chunks, rows, d_raw)
    if head.needs_weight and is_single:
        gradients.d_raw = chunks.d_raw[: chunks.num_rows]
    return gradients


def _add_products(gradients: Gradients, chunks: Chunks, rows: slice, d_raw: Tensor) -> None:
    """The products of a chunk's gradient: d_hidden, d_bias and a share of d_weight."""
    head, weight = chunks.head, chunks.weight
    if gradients.d_bias is not None:
        gradients.d_bias += d_raw.sum(0, dtype=gradients.d_bias.dtype)
    if gradients.d_hidden is not None:
        if head.rows is None:
            torch.mm(d_raw, weight, out=gradients.d_hidden[rows])
        else:
            gradients.d_hidden.index_copy_(0, head.rows[rows], torch.mm(d_raw, weight))
    if gradients.d_weight is None:
        return
    hidden = chunks.hidden_of(rows)
    if gradients.d_weight.dtype == d_raw.dtype:
        gradients.d_weight.addmm_(d_raw.t(), hidden)
    else:  # each chunk's share is rounded once, the sum over chunks is not
        for start in range(0, weight.shape[0], head.plan.slab_rows):
            slab = slice(start, start + head.plan.slab_rows)
            gradients.d_weight[slab] += torch.mm(d_raw[:, slab].t(), hidden)


def d_weight_of(
    gradients: Gradients,
    hidden: Tensor | None,  # [T, D], with gradients.d_raw
    rows: Tensor | None,  # [n]
    grad_out: Tensor,  # []
    dtype: torch.dtype,
) -> Tensor:  # [V, D]
    """d_weight in ``dtype`` for the upstream gradient ``grad_out``; what is kept stays as it is."""
    if gradients.d_raw is None:
        assert gradients.d_weight is not None, "either d_raw is kept or d_weight accumulated"
        out = torch.empty_like(gradients.d_weight, dtype=dtype)
        return torch.mul(gradients.d_weight, grad_out, out=out)
    assert hidden is not None, "kept together with d_raw"
    counted = hidden if rows is None else hidden.index_select(0, rows)  # [n, D]
    with without_autocast(counted):
        return torch.mm(gradients.d_raw.t(), counted * grad_out)  # grad_out itself is not rounded

"""Chunks of rows: the products around the row work, for both modes.

    one_pass   for each group of G rows:
                   for each chunk of C rows:  Z = hidden_c W^T;  stats and objective;  dZ
                   d_hidden of the group = dZ W
               (an adapter adds states_c B^T to Z; d_states = dZ B, d_B = dZ^T states in fp32)
               one group:   keep dZ, and d_weight = dZ^T (hidden * grad_out) is one product in
                            backward
               several:     d_weight accumulates over the groups in fp32
    two_pass   score:  Z, stats for each chunk; kept are E = e^(z - m) of all rows where they fit
                       (on a CPU Z of a single chunk)
               backprop:  Z again, dZ (or dZ from what was kept, in place), d_hidden, d_weight

Shapes: T rows of ``hidden``, n <= T counted rows. ``rows`` ``[n]`` are the indices of the counted
rows, None when all count; everything else per token is already compact, ``[n]``. `plan` says C and
G, and where dZ overwrites Z.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .factors import NO_NEEDS, Factors, Needs
from .plan import SLAB_BYTES, Plan, is_separate, padded, product_rows, raw_dtype
from .products import add_product, product, scaled, without_autocast
from .quantised import put_logits
from .row_table import OUTPUTS, SUMS, Objective, RowTable, RowWork, exp_work
from .rows import LogitView, RowStats
from .rows_compiled import CompiledRows
from .rows_torch import EagerRows
from .terms import Coefficients
from .vocab_parallel import Shard, ShardedRows


@dataclass(frozen=True)
class Head:
    """One call of the head: everything but the factors, which may need a gradient."""

    rows: Tensor | None  # [n] int64 counted rows of hidden, None: all
    labels: Tensor  # [n] int64
    view: LogitView
    plan: Plan
    needs: Needs
    head_dtype: torch.dtype | None = None  # of a quantised head, which only scores
    shard: Shard | None = None  # of a vocabulary-parallel head; labels are local to it


@dataclass
class Gradients:
    """What the backward pass of a head needs or already knows, for an upstream gradient of 1."""

    d_hidden: Tensor | None = None  # [T, D]
    d_weight: Tensor | None = None  # [V, D] accumulated, fp32 (fp64)
    d_bias: Tensor | None = None  # [V] fp32 (fp64)
    d_raw: Tensor | None = None  # [n, V] of a single chunk, instead of d_weight
    d_states: Tensor | None = None  # [T, r]
    d_up: Tensor | None = None  # [V, r] accumulated, fp32 (fp64)


def stats_dtype(tensor: Tensor) -> torch.dtype:
    """fp64 inputs are worked in fp64, everything else in fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class Chunks:
    """The buffers of one call and the products around the row work."""

    def __init__(self, factors: Factors, head: Head, kept: Tensor | None = None) -> None:
        self.factors, self.head = factors, head
        self.hidden, self.weight = factors.hidden, factors.weight
        self.num_rows, plan = head.labels.numel(), head.plan
        self.is_kept = kept is not None
        size = min(plan.chunk_rows, self.num_rows)
        self.is_separate = is_separate(factors.hidden, plan.backend)
        self.has_exps = self.is_kept and self.is_separate
        if kept is None:
            is_wide = head.head_dtype is not None  # products of eight bits are fp32
            kept = self._buffer(
                size, torch.float32 if is_wide else raw_dtype(factors.hidden, plan.backend)
            )
        self.raw = kept  # [C, V]; of all rows where it was kept
        self.d_raw = self.raw  # [G, V]
        if self.is_separate and any(head.needs) and not self.is_kept:
            self.d_raw = self._buffer(min(plan.group_rows, self.num_rows), factors.hidden.dtype)
        self.work = self._row_work(size)

    def _buffer(self, num_rows: int, dtype: torch.dtype) -> Tensor:  # [num_rows, V]
        """Rows of logits; on a pitch that wide loads want where they are not updated in place."""
        vocab_size = self.weight.shape[0]
        pitch = padded(vocab_size) if self.is_separate else vocab_size
        return self.hidden.new_empty(num_rows, pitch, dtype=dtype)[:, :vocab_size]

    def _row_work(self, size: int) -> RowWork:
        work, shard = self._own_row_work(size), self.head.shard
        return work if shard is None else ShardedRows(work, shard, stats_dtype(self.hidden))

    def _own_row_work(self, size: int) -> RowWork:
        plan, dtype = self.head.plan, stats_dtype(self.hidden)
        if plan.backend == "triton":
            from .work_triton import TritonRows  # needs triton

            return TritonRows()
        if plan.is_compiled:
            return CompiledRows(dtype)
        block_rows = max(1, min(plan.block_rows, size))
        return EagerRows(block_rows, self.weight.shape[0], dtype, self.hidden)

    def groups(self) -> Iterator[list[slice]]:
        """The chunks of each group, as slices of the counted rows."""
        if self.is_kept and self.num_rows:
            yield [slice(0, self.num_rows)]
            return
        yield from self.head.plan.groups(self.num_rows)

    def of(self, tensor: Tensor, rows: slice) -> Tensor:  # [T, D] -> [C, D]
        """Some counted rows of ``tensor``."""
        if self.head.rows is None:
            return tensor[rows]
        return tensor.index_select(0, self.head.rows[rows])

    def logits(self, rows: slice) -> Tensor:  # [C, V]
        """Raw products of a chunk, in the call's one buffer."""
        out = self.raw[: rows.stop - rows.start]
        if self.is_kept:
            return out
        hidden = self.of(self.hidden, rows)  # [C, D]
        if self.head.head_dtype is not None:
            put_logits(hidden, self.weight, out, self.head.plan.slab_rows)
        else:
            product(hidden, self.weight.t(), out)
        _, _, _, states, up = self.factors
        if states is not None and up is not None:
            add_product(out, self.of(states, rows), up.t())
        return out

    def view_of(self, rows: slice) -> LogitView:
        """How the raw products of a chunk become logits."""
        return self.head.view.take(rows)

    def put_stats(self, rows: slice, raw: Tensor, table: RowTable) -> None:
        """Statistics of a chunk, into the table."""
        self.work.put_stats(raw, self.head.labels[rows], self.view_of(rows), table, rows)

    def join(self, table: RowTable, rows: slice) -> None:
        """Join the shards' sums of some rows in the table, where the vocabulary has shards."""
        if self.head.shard is not None:
            rounding = self.work.rounding(self.head.view)
            self.head.shard.join_table(table, rows, self.head.labels, rounding)

    def put_loss(
        self, rows: slice, raw: Tensor, table: RowTable, objective: Objective
    ) -> tuple[RowStats, Coefficients]:
        """Statistics, loss and slopes of a chunk."""
        labels = self.head.labels[rows]
        return self.work.put_loss(raw, labels, self.view_of(rows), table, rows, objective)

    def grad(
        self, rows: slice, first: int, raw: Tensor, stats: RowStats, coefficients: Coefficients
    ) -> None:
        """The gradient of a chunk's raw products, into the rows of its group from ``first`` on."""
        d_raw = self.d_raw[rows.start - first : rows.stop - first]
        labels, view = self.head.labels[rows], self.view_of(rows)
        if self.has_exps:
            exp_work(self.work).grad_of_exps_(raw, labels, view, stats, coefficients)
        else:
            self.work.grad_(raw, d_raw, labels, view, stats, coefficients)

    def new_exps(self) -> Tensor:  # [n, V]
        """Room for the exponentials of all rows, where dZ will be written over them."""
        return self._buffer(self.num_rows, self.hidden.dtype)

    def put_exps(self, rows: slice, raw: Tensor, exps: Tensor, table: RowTable) -> None:
        """The exponentials of a chunk whose statistics are in the table, into ``exps``."""
        maximum = table.column("maximum", rows)
        exp_work(self.work).put_exps(raw, exps[rows], self.view_of(rows), maximum)


def score(factors: Factors, head: Head) -> tuple[RowTable, Tensor | None]:
    """Statistics of all counted rows ``[n]``, and what the plan keeps for their gradient."""
    hidden, weight = factors[:2]
    if head.plan.mode == "fused":
        from .work_triton import fused_score  # needs triton

        with without_autocast(hidden), torch.no_grad():
            return fused_score(hidden, weight, head), None
    chunks = Chunks(factors, replace(head, needs=NO_NEEDS))
    table = RowTable((*SUMS, *OUTPUTS), chunks.num_rows, hidden, stats_dtype(hidden))
    kept = head.plan.kept if any(head.needs) and chunks.num_rows else None
    exps = chunks.new_exps() if kept == "exps" else None
    with without_autocast(hidden), torch.no_grad():
        for group in chunks.groups():
            for rows in group:
                raw = chunks.logits(rows)
                chunks.put_stats(rows, raw, table)
                if exps is not None:
                    chunks.join(table, rows)
                    chunks.put_exps(rows, raw, exps, table)
        if exps is None:
            chunks.join(table, slice(0, chunks.num_rows))
    return table, chunks.raw if kept == "logits" else exps


def one_pass(factors: Factors, head: Head, objective: Objective) -> tuple[Gradients, RowTable]:
    """one_pass: the objective says the coefficients of a chunk while its logits are hot."""
    hidden, chunks = factors.hidden, Chunks(factors, head)
    table = RowTable(chunks.work.loss_columns, chunks.num_rows, hidden, stats_dtype(hidden))

    def coefficients_of(rows: slice, raw: Tensor) -> tuple[RowStats, Coefficients]:
        return chunks.put_loss(rows, raw, table, objective)

    with without_autocast(hidden), torch.no_grad():
        return _run(chunks, coefficients_of), table


def backprop(
    factors: Factors,
    head: Head,
    stats: RowStats,  # of [n]
    coefficients: Coefficients,  # of [n]
    kept: Tensor | None,  # [n, V] as `score` left it, overwritten
) -> Gradients:
    """two_pass, the second one: gradients of all rows from known statistics and coefficients."""

    def take(rows: slice, _raw: Tensor) -> tuple[RowStats, Coefficients]:
        return stats.take(rows), coefficients.take(rows)

    with without_autocast(factors.hidden), torch.no_grad():
        return _run(Chunks(factors, head, kept), take)


def _run(
    chunks: Chunks,
    coefficients_of: Callable[[slice, Tensor], tuple[RowStats, Coefficients]],
) -> Gradients:
    """The loop over groups and chunks that both modes share."""
    head, gradients = chunks.head, _empty_gradients(chunks)
    has_gradient = any(head.needs)
    for group in chunks.groups():
        first = group[0].start
        for rows in group:
            raw = chunks.logits(rows)
            stats, coefficients = coefficients_of(rows, raw)
            if has_gradient:
                chunks.grad(rows, first, raw, stats, coefficients)
        if has_gradient:
            _add_products(gradients, chunks, slice(first, group[-1].stop))
    if head.needs.weight and gradients.d_weight is None:
        gradients.d_raw = chunks.d_raw[: chunks.num_rows]
    if head.shard is not None:
        head.shard.complete(gradients, chunks.hidden.dtype)
    return gradients


def _empty_gradients(chunks: Chunks) -> Gradients:
    """What the groups write or add to; of a single group dZ is kept instead of d_weight."""
    hidden, weight, _, states, up = chunks.factors
    needs, dtype, made = chunks.head.needs, stats_dtype(hidden), Gradients()
    make = torch.empty_like if chunks.head.rows is None else torch.zeros_like
    own = hidden.dtype if chunks.head.shard is None else dtype  # ranks add up their parts
    if needs.hidden:
        made.d_hidden = make(hidden, dtype=own, memory_format=torch.contiguous_format)
    if needs.bias:
        made.d_bias = hidden.new_zeros(weight.shape[0], dtype=dtype)
    if needs.weight and chunks.head.plan.group_rows < chunks.num_rows:
        made.d_weight = weight.new_empty(weight.shape, dtype=dtype)
    if needs.states and states is not None:
        made.d_states = make(states, dtype=own, memory_format=torch.contiguous_format)
    if needs.up and up is not None:
        made.d_up = up.new_zeros(up.shape, dtype=dtype)
    return made


def _add_products(gradients: Gradients, chunks: Chunks, rows: slice) -> None:
    """The products of a group's gradient: rows of d_hidden and d_states, shares of the others."""
    hidden, weight, _, states, up = chunks.factors
    d_raw = chunks.d_raw[: rows.stop - rows.start]  # [G, V]
    if gradients.d_bias is not None:
        _add_d_bias(gradients.d_bias, d_raw, chunks.head.plan.block_rows)
    if gradients.d_hidden is not None:
        _put_rows(gradients.d_hidden, chunks, rows, d_raw, weight)
    if gradients.d_states is not None and up is not None:
        _put_rows(gradients.d_states, chunks, rows, d_raw, up)
    if gradients.d_weight is not None:
        _add_share(gradients.d_weight, chunks, d_raw, chunks.of(hidden, rows), rows.start == 0)
    if gradients.d_up is not None and states is not None:
        _add_share(gradients.d_up, chunks, d_raw, chunks.of(states, rows), is_first=False)


def _add_d_bias(d_bias: Tensor, d_raw: Tensor, block_rows: int) -> None:
    """A group's share of d_bias ``[V]``; a CPU casts all that it sums in another dtype: blocks."""
    is_cast = d_raw.device.type == "cpu" and d_raw.dtype != d_bias.dtype
    step = block_rows if is_cast else max(1, d_raw.shape[0])
    for start in range(0, d_raw.shape[0], step):
        d_bias += d_raw[start : start + step].sum(0, dtype=d_bias.dtype)


def _put_rows(
    d_states: Tensor,  # [T, D]
    chunks: Chunks,
    rows: slice,
    d_raw: Tensor,  # [G, V]
    weight: Tensor,  # [V, D]
) -> None:
    """A group's rows of d_states = dZ W; on a GPU summed in fp32, split sums too, and cast once."""
    counted = chunks.head.rows
    if not chunks.is_separate and counted is None and d_states.dtype == d_raw.dtype:
        torch.mm(d_raw, weight, out=d_states[rows])
        return
    step = product_rows(weight.shape[1]) if chunks.is_separate else d_raw.shape[0]
    dtype = torch.float32 if chunks.is_separate else d_raw.dtype
    for start in range(0, d_raw.shape[0], step):
        part = d_raw[start : start + step]
        result = product(part, weight, part.new_empty(part.shape[0], weight.shape[1], dtype=dtype))
        own = slice(rows.start + start, rows.start + start + part.shape[0])
        if counted is None:
            d_states[own] = result
        else:
            d_states.index_copy_(0, counted[own], result.to(d_states.dtype))


def _add_share(
    d_weight: Tensor,  # [V, D]
    chunks: Chunks,
    d_raw: Tensor,  # [G, V]
    states: Tensor,  # [G, D]
    is_first: bool,
) -> None:
    """A group's share of d_weight = dZ^T states; the first one writes."""
    if chunks.is_separate or d_weight.dtype == d_raw.dtype:
        if is_first:
            product(d_raw.t(), states, d_weight)
        else:
            add_product(d_weight, d_raw.t(), states)
        return
    elements = chunks.head.plan.slab_rows * chunks.weight.shape[1]
    slab_rows = max(1, min(elements // states.shape[1], d_weight.shape[0]))
    buffer = d_raw.new_empty(slab_rows, states.shape[1])  # one for all: a new one costs its pages
    for slab in slabs(d_weight.shape[0], slab_rows):  # each share is rounded once, no sum is
        share = torch.mm(d_raw[:, slab].t(), states, out=buffer[: slab.stop - slab.start])
        if is_first:
            d_weight[slab] = share
        else:
            d_weight[slab] += share


def _scaled_to(total: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:  # [V, D]
    """``total * factor`` rounded once to ``dtype``; ``factor`` ``[]``."""
    out = torch.empty_like(total, dtype=dtype)
    if total.device.type != "cpu" or dtype == total.dtype:
        return torch.mul(total, factor, out=out)
    # a CPU casts the results of a product slowly, and a copy of what is cached fast
    row_bytes = total.shape[1] * total.element_size()
    slab_rows = max(1, min(SLAB_BYTES // row_bytes, total.shape[0] // 64))
    for slab in slabs(total.shape[0], slab_rows):
        out[slab] = total[slab] * factor
    return out


def slabs(num_rows: int, slab_rows: int) -> Iterator[slice]:
    """Blocks of rows."""
    for start in range(0, num_rows, slab_rows):
        yield slice(start, min(start + slab_rows, num_rows))


def d_weight_of(
    gradients: Gradients,
    hidden: Tensor | None,  # [T, D], with gradients.d_raw
    rows: Tensor | None,  # [n]
    grad_out: Tensor | None,  # [], None: 1
    dtype: torch.dtype,
) -> Tensor:  # [V, D]
    """d_weight in ``dtype`` for the upstream gradient ``grad_out``; what is kept stays as it is."""
    if gradients.d_raw is None:
        assert gradients.d_weight is not None, "either d_raw is kept or d_weight accumulated"
        if grad_out is None:
            return gradients.d_weight.to(dtype)
        return _scaled_to(gradients.d_weight, grad_out, dtype)
    assert hidden is not None, "kept together with d_raw"
    counted = hidden if rows is None else hidden.index_select(0, rows)  # [n, D]
    with without_autocast(counted):
        if grad_out is not None:
            counted = scaled(counted, grad_out)
        return torch.mm(gradients.d_raw.t(), counted)

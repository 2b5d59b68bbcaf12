"""What `chunked` asks of Triton: row work a chunk at a time, or all of scoring; into the table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import linear_triton
from .exps_triton import row_exp
from .quantised import quantised
from .row_table import COLUMNS, OUTPUTS, SUMS, TERMS, UNJOINED, RowTable
from .rows_triton import rounding, row_grad, row_stats
from .terms import Coefficients, evaluate
from .vocab_parallel import no_sums, put_sums

if TYPE_CHECKING:
    from .chunked import Head
    from .row_table import Objective
    from .rows import LogitView, RowStats


class TritonRows:
    """`row_table.RowWork` by the kernels, and what keeps exponentials instead of logits."""

    loss_columns: tuple[str, ...] = COLUMNS

    def sums(self, raw: Tensor, labels: Tensor, view: LogitView) -> Tensor:  # [4, C]
        """M, s, t and the label's logit of the rows of ``raw`` ``[C, V]``."""
        table = RowTable(UNJOINED, raw.shape[0], raw, torch.float32)
        row_stats(raw, labels, view, table, slice(None), is_shard=True)
        return table.values

    def rounding(self, view: LogitView) -> float:
        """How far `sums` may have a label's logit from m, as a part of it, where it is m."""
        return rounding(view)

    def put_stats(
        self,
        raw: Tensor,  # [C, V]
        labels: Tensor,  # [C]
        view: LogitView,
        table: RowTable,
        rows: slice,
    ) -> None:
        """Statistics, into the table."""
        row_stats(raw, labels, view, table, rows)

    def put_loss(
        self,
        raw: Tensor,  # [C, V]
        labels: Tensor,  # [C]
        view: LogitView,
        table: RowTable,
        rows: slice,
        objective: Objective,
    ) -> tuple[RowStats, Coefficients]:
        """Statistics and loss, into the table; what the gradient of the rows needs."""
        if objective.is_by_sequence:
            row_stats(raw, labels, view, table, rows)
            return self._put_sequences_loss(table, rows, objective.take(rows))
        inputs = objective.inputs.take(rows)
        row_stats(raw, labels, view, table, rows, objective.spec, inputs)
        d_lse = None if inputs.z_loss_weights is None else table.column("d_lse", rows)
        g = table.column("d_logprobs", rows)
        return table.stats(rows), Coefficients(g, inputs.entropy_weights, d_lse)

    def _put_sequences_loss(
        self, table: RowTable, rows: slice, objective: Objective
    ) -> tuple[RowStats, Coefficients]:
        """The loss of whole sequences, in torch on the vectors of their rows."""
        logprobs, entropy = table.column("logprobs", rows), table.column("entropy", rows)
        lse = table.column("lse", rows)
        result = evaluate(
            objective.spec, objective.inputs, logprobs, entropy, lse, objective.sequences
        )
        table.put(rows, result, names=TERMS)
        return table.stats(rows), result.coefficients

    def grad_(
        self,
        raw: Tensor,  # [C, V]
        d_raw: Tensor,  # [C, V] written
        labels: Tensor,  # [C]
        view: LogitView,
        stats: RowStats,
        coefficients: Coefficients,
    ) -> None:
        """Write d loss / d raw."""
        row_grad(raw, d_raw, labels, view, stats, coefficients)

    def put_exps(
        self,
        raw: Tensor,  # [C, V]
        exps: Tensor,  # [C, V] written
        view: LogitView,
        maximum: Tensor,  # [C]
    ) -> None:
        """Write e^(z - m): what `grad_of_exps_` needs of the logits."""
        row_exp(raw, exps, view, maximum)

    def grad_of_exps_(
        self,
        exps: Tensor,  # [C, V] from e^(z - m) to d loss / d raw
        labels: Tensor,  # [C]
        view: LogitView,
        stats: RowStats,
        coefficients: Coefficients,
    ) -> None:
        """Turn exponentials into d loss / d raw in place."""
        row_grad(exps, exps, labels, view, stats, coefficients, is_exp=True)


def fused_score(hidden: Tensor, weight: Tensor, head: Head) -> RowTable:
    """Statistics of all counted rows ``[n]`` by the kernel that writes no logits."""
    num_rows, is_shard = head.labels.numel(), head.shard is not None
    table = RowTable((*SUMS, *OUTPUTS), num_rows, hidden, torch.float32)
    if not weight.shape[0]:
        put_sums(table, slice(0, num_rows), no_sums(num_rows, torch.float32, hidden))
    columns = None if head.head_dtype is None or not num_rows else quantised(weight)
    for group in head.plan.groups(num_rows) if weight.shape[0] else ():
        for rows in group:
            counted = None if head.rows is None else head.rows[rows]
            states = hidden[rows] if counted is None else hidden.index_select(0, counted)
            where = (head.labels[rows], head.view.take(rows), table, rows)
            if columns is None:
                linear_triton.linear_stats(states, weight, *where, is_shard=is_shard)
                continue
            values, scales = quantised(states)
            scales = (scales, columns.scales)
            linear_triton.linear_stats(
                values, columns.values, *where, scales=scales, is_shard=is_shard
            )
    if head.shard is not None:
        head.shard.join_table(table, slice(0, num_rows), head.labels, rounding(head.view))
    return table

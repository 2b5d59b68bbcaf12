"""The row work in Triton, as `chunked` asks for it: a chunk at a time, results in the table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .exps_triton import row_exp
from .row_table import COLUMNS, TERMS, RowTable
from .rows_triton import row_grad, row_stats
from .terms import Coefficients, evaluate

if TYPE_CHECKING:
    from .row_table import Objective
    from .rows import LogitView, RowStats


class TritonRows:
    """`row_table.RowWork` by the kernels, and what keeps exponentials instead of logits."""

    loss_columns: tuple[str, ...] = COLUMNS

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

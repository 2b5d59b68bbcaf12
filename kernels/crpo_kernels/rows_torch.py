"""The row work in torch, block by block through the cache: `rows` has the formulas.

``raw = hidden @ weight.T`` ``[C, V]`` is read twice and written once. `EagerRows` uses ordinary
torch operations; `rows_compiled` has the same formulas as generated loops.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .host import is_fake
from .row_table import OUTPUTS, TERMS, Objective, RowTable
from .rows import LogitView, RowStats, finish_stats, row_factors
from .terms import Coefficients, evaluate

LOG2_E = math.log2(
    math.e
)  # torch.exp2 takes a third of torch.exp's time on a CPU; used after a shift


class TorchRows:
    """`row_table.RowWork` on top of ``stats``: the objective in torch, per chunk."""

    loss_columns: tuple[str, ...] = (*OUTPUTS, *TERMS)

    def sums(self, raw: Tensor, labels: Tensor, view: LogitView) -> Tensor:  # [4, C]
        """M, s, t and the label's logit of the rows of ``raw`` ``[C, V]``, which stays as it is."""
        raise NotImplementedError

    def rounding(self, view: LogitView) -> float:  # noqa: ARG002
        """How far `sums` may have a label's logit from m, as a part of it, where it is m."""
        return 0.0

    def stats(self, raw: Tensor, labels: Tensor, view: LogitView) -> RowStats:
        """Statistics of the rows of ``raw`` ``[C, V]``, which stays as it is."""
        return finish_stats(*self.sums(raw, labels, view).unbind(), rounding=self.rounding(view))

    def put_stats(
        self, raw: Tensor, labels: Tensor, view: LogitView, table: RowTable, rows: slice
    ) -> None:
        """Statistics, into the table."""
        table.put(rows, self.stats(raw, labels, view))

    def put_loss(
        self,
        raw: Tensor,
        labels: Tensor,
        view: LogitView,
        table: RowTable,
        rows: slice,
        objective: Objective,
    ) -> tuple[RowStats, Coefficients]:
        """Statistics and loss, into the table; what the gradient of the rows needs."""
        stats = self.stats(raw, labels, view)
        part = objective.take(rows)
        result = evaluate(
            part.spec, part.inputs, stats.logprobs, stats.entropy, stats.lse, part.sequences
        )
        table.put(rows, stats, result)
        return stats, result.coefficients


class EagerRows(TorchRows):
    """The row work block by block, in two scratch buffers of one block each."""

    def __init__(self, block_rows: int, vocab_size: int, dtype: torch.dtype, like: Tensor) -> None:
        self.x = like.new_empty(block_rows, vocab_size, dtype=dtype)  # [b, V]
        self.e = torch.empty_like(self.x)  # [b, V]

    def blocks(self, num_rows: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The blocks of a chunk of ``num_rows`` rows, with their part of both buffers.

        On fake tensors (who plans memory wants shapes, no values) the first stands for all.
        """
        step = self.x.shape[0]
        if is_fake(self.x):
            num_rows = min(num_rows, step)
        for start in range(0, num_rows, step):
            size = min(step, num_rows - start)
            yield slice(start, start + size), self.x[:size], self.e[:size]

    def sums(
        self,
        raw: Tensor,  # [C, V] stays as it is
        labels: Tensor,  # [C]
        view: LogitView,
    ) -> Tensor:  # [4, C]
        """M, s, t and the label's logit of the rows of ``raw``."""
        parts = self.x.new_empty(4, raw.shape[0])
        for rows, z, e in self.blocks(raw.shape[0]):
            view.take(rows).apply_(z.copy_(raw[rows]))
            maximum = torch.amax(z, dim=1, out=parts[0, rows])  # [b]
            parts[3, rows] = z.gather(1, labels[rows].unsqueeze(1)).squeeze(1)
            z.sub_(maximum.unsqueeze(1))
            torch.exp2(z.mul_(LOG2_E), out=e)
            torch.sum(e, dim=1, out=parts[1, rows])
            torch.sum(z.mul_(e), dim=1, out=parts[2, rows])
        parts[2].div_(LOG2_E)
        return parts

    def grad_(
        self,
        raw: Tensor,  # [C, V]
        d_raw: Tensor,  # [C, V] written; may be ``raw`` itself
        labels: Tensor,  # [C]
        view: LogitView,
        stats: RowStats,
        coefficients: Coefficients,
    ) -> None:
        """Write d loss / d raw."""
        a, b, label_grad = row_factors(view, stats, coefficients)
        for rows, z, p in self.blocks(raw.shape[0]):
            block_view = view.take(rows)
            block_view.apply_(z.copy_(raw[rows]))
            capped = None if view.inner is None else block_view.softcap_slope(z)  # [b, V]
            z.sub_(stats.maximum[rows].unsqueeze(1))
            torch.sub(z, stats.log_sum[rows].unsqueeze(1), out=p).mul_(LOG2_E).exp2_()
            if b is None:
                dz = p.mul_(a[rows].unsqueeze(1))
            else:
                dz = z.mul_(b[rows].unsqueeze(1)).add_(a[rows].unsqueeze(1)).mul_(p)
            d_raw[rows] = dz if capped is None else dz.mul_(capped)
        put_label_grad(d_raw, labels, label_grad)


def put_label_grad(
    d_raw: Tensor,  # [C, V] written
    labels: Tensor,  # [C]; below 0 where another shard of the vocabulary has the label
    label_grad: Tensor,  # [C]
) -> None:
    """The gradient of each row's label."""
    rows, own = torch.arange(d_raw.shape[0], device=d_raw.device), labels.clamp(min=0)
    values = torch.where(labels < 0, d_raw[rows, own], label_grad.to(d_raw.dtype))
    d_raw[rows, own] = values  # scatter_ would copy all of d_raw

"""The row work in torch: from raw products to log-softmax statistics, and to their gradient.

``raw = hidden @ weight.T`` ``[C, V]`` is read twice and written once:

    z = outer * tanh(inner * (raw + bias))  under a soft cap, else  outer * (raw + bias)
    row_stats   m = max z,  s = sum e^(z-m),  t = sum e^(z-m) (z-m)         nothing cancels
                logprob = (z_y - m) - log s,   lse = m + log s,   H = log s - t/s
    row_grad    p_j = e^(z_j - m - log s)
                dz_j = p_j (a + b (z_j - m))      a = l - g + q t/s,  b = -q     (terms.py: g, q, l)
                dz_y = g (1 - p_y) - p_y (q (logprob + H) - l)         1 - p_y = -expm1(logprob)
                d_raw_j = dz_j * slope * (1 - tanh^2)        slope = logit_scale / temperature

`EagerRows` goes through blocks of rows that fit the cache, with ordinary torch operations;
`rows_compiled` has the same formulas as generated loops. ``-inf`` logits become -1e30 (probability
0, every product with it finite); NaN stays NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .terms import Coefficients

LOWEST_LOGIT = -1e30  # stands for -inf
LOG2_E = math.log2(
    math.e
)  # torch.exp2 takes a third of torch.exp's time on a CPU; used after a shift


@dataclass(frozen=True)
class LogitView:
    """How raw products become logits; the same for all rows but the temperature.

    Attributes:
        bias: ``[V]`` in the dtype of the statistics, or None.
        inner: logit_scale / softcap, or None without a soft cap.
        outer: softcap / temperature (without a cap logit_scale / temperature): a float, or ``[C]``.
    """

    bias: Tensor | None
    inner: float | None
    outer: Tensor | float

    @classmethod
    def make(
        cls,
        bias: Tensor | None,  # [V]
        temperature: Tensor | float,  # [C] or one for all
        logit_scale: float,
        logit_softcap: float | None,
    ) -> LogitView:
        """From a call's options; ``bias`` and a tensor of temperatures in the statistics' dtype."""
        if logit_softcap is None:
            return cls(bias, None, logit_scale / temperature)
        return cls(bias, logit_scale / logit_softcap, logit_softcap / temperature)

    def take(self, rows: slice) -> LogitView:
        """The view of some rows."""
        if not isinstance(self.outer, Tensor):
            return self
        return LogitView(self.bias, self.inner, self.outer[rows])

    @property
    def slope(self) -> Tensor | float:
        """D logit / d raw without the soft cap: logit_scale / temperature, a float or ``[C]``."""
        return self.outer if self.inner is None else self.outer * self.inner

    def apply_(self, x: Tensor) -> Tensor:  # [C, V]
        """Turn raw products into logits in place."""
        if self.bias is not None:
            x.add_(self.bias)
        if self.inner is not None:
            x.mul_(self.inner).tanh_()
        if isinstance(self.outer, Tensor):
            x.mul_(self.outer.unsqueeze(1))
        elif self.outer != 1.0:
            x.mul_(self.outer)
        return x.clamp_(min=LOWEST_LOGIT)

    def softcap_slope(self, z: Tensor) -> Tensor:  # [C, V] or [C]
        """1 - tanh^2, the derivative of the soft cap, from finished logits."""
        outer = self.outer
        if isinstance(outer, Tensor) and z.dim() == 2:
            outer = outer.unsqueeze(1)
        return (z / outer).square_().neg_().add_(1.0)


class RowStats(NamedTuple):
    """Log-softmax statistics of C rows; `lse` and `entropy` follow from them."""

    logprobs: Tensor  # [C]
    maximum: Tensor  # [C] m
    log_sum: Tensor  # [C] log s
    mean_shift: Tensor  # [C] t / s = E[z] - m
    is_top1: Tensor  # [C] bool

    @property
    def lse(self) -> Tensor:
        """Log sum_j e^(z_j) ``[C]``."""
        return self.maximum + self.log_sum

    @property
    def entropy(self) -> Tensor:
        """- sum_j p_j log p_j ``[C]``."""
        return self.log_sum - self.mean_shift

    def take(self, rows: slice) -> RowStats:
        """The statistics of some rows."""
        return self._make(value[rows] for value in self)


def finish_stats(label_shift: Tensor, maximum: Tensor, s: Tensor, t: Tensor) -> RowStats:
    """From the row sums ``[C]`` to the statistics."""
    log_sum = s.log()
    return RowStats(label_shift - log_sum, maximum, log_sum, t / s, label_shift >= 0)


class RowFactors(NamedTuple):
    """What one row's gradient needs besides its logits, the slope of the logits included."""

    a: Tensor  # [C]
    b: Tensor | None  # [C], None without an entropy slope
    label_grad: Tensor  # [C] d loss / d raw_y


def row_factors(view: LogitView, stats: RowStats, coefficients: Coefficients) -> RowFactors:
    """a, b and d_raw_y of every row."""
    g, q, l = coefficients  # noqa: E741  (the names of the formula)
    p = stats.logprobs.exp()
    a, label_grad, b = -g, -torch.expm1(stats.logprobs) * g, None
    if q is not None:
        a, b = a + q * stats.mean_shift, -q * view.slope
        label_grad = label_grad - p * q * (stats.logprobs + stats.entropy)
    if l is not None:
        a, label_grad = a + l, label_grad + p * l
    if view.inner is not None:
        label_logit = stats.logprobs + stats.log_sum + stats.maximum  # [C]
        label_grad = label_grad * view.softcap_slope(label_logit)
    return RowFactors(a * view.slope, b, label_grad * view.slope)


class EagerRows:
    """The row work block by block, in two scratch buffers of one block each."""

    def __init__(self, block_rows: int, vocab_size: int, dtype: torch.dtype, like: Tensor) -> None:
        self.x = like.new_empty(block_rows, vocab_size, dtype=dtype)  # [b, V]
        self.e = torch.empty_like(self.x)  # [b, V]

    def blocks(self, num_rows: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The blocks of a chunk of ``num_rows`` rows, with their part of both buffers.

        On fake tensors (who plans memory wants shapes, no values) the first stands for all.
        """
        step = self.x.shape[0]
        if hasattr(self.x, "fake_mode"):
            num_rows = min(num_rows, step)
        for start in range(0, num_rows, step):
            size = min(step, num_rows - start)
            yield slice(start, start + size), self.x[:size], self.e[:size]

    def stats(
        self,
        raw: Tensor,  # [C, V] stays as it is
        labels: Tensor,  # [C]
        view: LogitView,
    ) -> RowStats:
        """Statistics of the rows of ``raw``."""
        parts = self.x.new_empty(4, raw.shape[0])  # z_y - m, m, s, t
        for rows, z, e in self.blocks(raw.shape[0]):
            view.take(rows).apply_(z.copy_(raw[rows]))
            maximum = torch.amax(z, dim=1, out=parts[1, rows])  # [b]
            z.sub_(maximum.unsqueeze(1))
            parts[0, rows] = z.gather(1, labels[rows].unsqueeze(1)).squeeze(1)
            torch.exp2(z.mul_(LOG2_E), out=e)
            torch.sum(e, dim=1, out=parts[2, rows])
            torch.sum(z.mul_(e), dim=1, out=parts[3, rows])
        parts[3].div_(LOG2_E)
        return finish_stats(*parts)

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
        d_raw.scatter_(1, labels.unsqueeze(1), label_grad.unsqueeze(1).to(d_raw.dtype))

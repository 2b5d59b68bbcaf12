"""The row work in torch: from raw products to log-softmax statistics, and to their gradient.

``raw = hidden @ weight.T`` ``[C, V]`` is read twice and written once:

    z = softcap(logit_scale * (raw + bias)) / temperature,  never below -1e30
    row_stats   m = max z,  s = sum e^(z-m),  t = sum e^(z-m) (z-m)         nothing cancels
                logprob = (z_y - m) - log s,   lse = m + log s,   H = log s - t/s
    row_grad    p_j = e^(z_j - m - log s)
                dz_j = p_j (a + b (z_j - m))      a = l - g + q t/s,  b = -q     (terms.py: g, q, l)
                dz_y = g (1 - p_y) - p_y (q (logprob + H) - l)         1 - p_y = -expm1(logprob)
                d_raw_j = dz_j * softcap'(.) * logit_scale / temperature

The two functions work through blocks of rows that fit the cache, with ordinary torch operations and
two scratch buffers. ``-inf`` logits become -1e30 (probability 0, every product with it finite); NaN
stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .terms import Coefficients

LOWEST_LOGIT = -1e30  # stands for -inf
BLOCK_ELEMENTS = (
    1 << 19
)  # of one fp32 scratch buffer: 2 MiB, so that a block's passes stay in the cache


@dataclass(frozen=True)
class LogitView:
    """How raw products become logits; the same for all rows but the temperature."""

    bias: Tensor | None  # [V] in the dtype of the statistics
    logit_scale: float
    logit_softcap: float | None
    temperature: Tensor | float  # [C] in the dtype of the statistics, or one for all

    def take(self, rows: slice | Tensor) -> LogitView:
        """The view of some rows."""
        if not isinstance(self.temperature, Tensor):
            return self
        return LogitView(self.bias, self.logit_scale, self.logit_softcap, self.temperature[rows])

    def column(self) -> Tensor | float:
        """The temperature as a float or ``[C, 1]``."""
        if isinstance(self.temperature, Tensor):
            return self.temperature.unsqueeze(1)
        return self.temperature

    def slope(self) -> Tensor | float:
        """D logit / d raw without the soft cap: a float or ``[C, 1]``."""
        return self.logit_scale / self.column()

    def apply_(self, x: Tensor) -> Tensor:  # [C, V]
        """Turn raw products into logits in place."""
        if self.bias is not None:
            x.add_(self.bias)
        if self.logit_softcap is not None:
            x.mul_(self.logit_scale / self.logit_softcap).tanh_()
            x.mul_(self.logit_softcap / self.column())
        elif isinstance(self.temperature, Tensor) or self.slope() != 1.0:
            x.mul_(self.slope())
        return x.clamp_(min=LOWEST_LOGIT)

    def softcap_slope(self, z: Tensor) -> Tensor:  # [C, V]
        """1 - tanh^2, the derivative of the soft cap, from finished logits."""
        assert self.logit_softcap is not None, "only called under a soft cap"
        tanh = z * (self.column() / self.logit_softcap)
        return tanh.square_().neg_().add_(1.0)


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
        return RowStats(*(value[rows] for value in self))


@dataclass(frozen=True)
class Scratch:
    """Two buffers of one block each, shared by all chunks of a call."""

    x: Tensor  # [b, V]
    e: Tensor  # [b, V]

    @staticmethod
    def block_rows(vocab_size: int, max_rows: int) -> int:
        """Rows of a block: as many as fit ``BLOCK_ELEMENTS``, at least 1."""
        return max(1, min(BLOCK_ELEMENTS // max(vocab_size, 1), max_rows))

    @classmethod
    def allocate(
        cls, rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device
    ) -> Scratch:
        """Both buffers for blocks of ``rows`` rows."""
        x = torch.empty(rows, vocab_size, dtype=dtype, device=device)
        return cls(x, torch.empty_like(x))


def row_stats(
    raw: Tensor, labels: Tensor, view: LogitView, scratch: Scratch
) -> RowStats:  # raw [C, V]
    """Statistics of the rows of ``raw``, which stays as it is."""
    num_rows = raw.shape[0]
    parts = scratch.x.new_empty(4, num_rows)  # z_y - m, m, s, t
    for start in range(0, num_rows, scratch.x.shape[0]):
        rows = slice(start, min(start + scratch.x.shape[0], num_rows))
        size = rows.stop - start
        z, e = scratch.x[:size], scratch.e[:size]  # [b, V]
        view.take(rows).apply_(z.copy_(raw[rows]))
        maximum = torch.amax(z, dim=1, out=parts[1, rows])  # [b]
        torch.exp(z.sub_(maximum.unsqueeze(1)), out=e)
        parts[0, rows] = z.gather(1, labels[rows].unsqueeze(1)).squeeze(1)
        torch.sum(e, dim=1, out=parts[2, rows])
        torch.sum(z.mul_(e), dim=1, out=parts[3, rows])
    return finish_stats(*parts)


def finish_stats(
    label_shift: Tensor, maximum: Tensor, s: Tensor, t: Tensor
) -> RowStats:  # [C] each
    """From the row sums to the statistics."""
    log_sum = s.log()
    return RowStats(label_shift - log_sum, maximum, log_sum, t / s, label_shift >= 0)


def row_grad_(
    raw: Tensor,  # [C, V]
    d_raw: Tensor,  # [C, V] written; may be ``raw`` itself on a CPU
    labels: Tensor,  # [C]
    view: LogitView,
    stats: RowStats,
    coefficients: Coefficients,
    scratch: Scratch,
) -> None:
    """Write d loss / d raw."""
    a, b, label_grad = row_coefficients(stats, coefficients)  # [C], [C] or None, [C]
    for start in range(0, raw.shape[0], scratch.x.shape[0]):
        rows = slice(start, min(start + scratch.x.shape[0], raw.shape[0]))
        z, p = scratch.x[: rows.stop - start], scratch.e[: rows.stop - start]  # [b, V]
        block_view = view.take(rows)
        block_view.apply_(z.copy_(raw[rows]))
        capped = None if view.logit_softcap is None else block_view.softcap_slope(z)  # [b, V]
        z.sub_(stats.maximum[rows].unsqueeze(1))
        torch.sub(z, stats.log_sum[rows].unsqueeze(1), out=p).exp_()
        if b is None:
            dz = p.mul_(a[rows].unsqueeze(1))
        else:
            dz = z.mul_(b[rows].unsqueeze(1)).add_(a[rows].unsqueeze(1)).mul_(p)
        dz.scatter_(1, labels[rows].unsqueeze(1), label_grad[rows].unsqueeze(1))
        if capped is not None:
            dz.mul_(capped)
        slope = block_view.slope()
        if isinstance(slope, Tensor) or slope != 1.0:
            dz.mul_(slope)
        d_raw[rows] = dz


def row_coefficients(
    stats: RowStats, coefficients: Coefficients
) -> tuple[Tensor, Tensor | None, Tensor]:
    """a, b and dz_y of every row, each ``[C]``; b is None without an entropy slope."""
    g, q, l = coefficients  # noqa: E741  (the names of the formula)
    p = stats.logprobs.exp()
    a, label_grad, b = -g, -torch.expm1(stats.logprobs) * g, None
    if q is not None:
        a, b = a + q * stats.mean_shift, -q
        label_grad = label_grad - p * q * (stats.logprobs + stats.entropy)
    if l is not None:
        a, label_grad = a + l, label_grad + p * l
    return a, b, label_grad

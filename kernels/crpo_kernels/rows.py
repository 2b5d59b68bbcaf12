"""A row of the head: how products become logits, their statistics, the gradient's factors.

    z = outer * tanh(inner * (raw + bias))  under a soft cap, else  outer * (raw + bias)
    m = max z,  s = sum e^(z-m),  t = sum e^(z-m) (z-m)         nothing cancels
    logprob = (z_y - m) - log s,   lse = m + log s,   H = log s - t/s
    d_raw_j = p_j (a + b (z_j - m)) (1 - tanh^2),  p_j = e^(z_j - m - log s);  the label's apart

``-inf`` logits become -1e30 (probability 0, every product with it finite); NaN stays NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .objective import row_factors as objective_factors
from .terms import Coefficients

LOWEST_LOGIT = -1e30  # stands for -inf


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
    is_top1: Tensor  # [C] bool, or 0 and 1

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


def finish_stats(
    maximum: Tensor, s: Tensor, t: Tensor, label_logit: Tensor, rounding: float = 0.0
) -> RowStats:
    """From the row sums ``[C]`` to the statistics.

    ``rounding`` is how far a label's logit that was computed apart may be from the maximum, as a
    part of it, and be the maximum still.
    """
    log_sum, shift = s.log(), label_logit - maximum
    is_top1 = shift >= -rounding * maximum.abs()
    return RowStats(torch.where(shift > 0, 0.0, shift) - log_sum, maximum, log_sum, t / s, is_top1)


class RowFactors(NamedTuple):
    """What one row's gradient needs besides its logits, the slope of the logits included."""

    a: Tensor  # [C]
    b: Tensor | None  # [C], None without an entropy slope
    label_grad: Tensor  # [C] d loss / d raw_y


def row_factors(view: LogitView, stats: RowStats, coefficients: Coefficients) -> RowFactors:
    """a, b and d_raw_y of every row."""
    g, q, l = coefficients  # noqa: E741  (the names of the formula)
    a, label_grad = objective_factors(g, q, l, stats.logprobs, stats.entropy, stats.mean_shift)
    b = None if q is None else -q * view.slope
    if view.inner is not None:
        label_logit = stats.logprobs + stats.log_sum + stats.maximum  # [C]
        label_grad = label_grad * view.softcap_slope(label_logit)
    return RowFactors(a * view.slope, b, label_grad * view.slope)

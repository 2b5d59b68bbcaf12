"""The formulas of `rows_torch` as loops that ``torch.compile`` generates: one pass each.

Rows, vocabulary size and temperatures are dynamic: another number of rows compiles nothing. What is
absent (bias, soft cap, entropy slope) is a variant of its own. On a row of a large vocabulary both
passes of the statistics hit the second-level cache.
"""

from __future__ import annotations

from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from .rows import LOWEST_LOGIT, LogitView, RowStats, row_factors
from .rows_torch import TorchRows, put_label_grad
from .terms import Coefficients


def _logits(
    raw: Tensor,  # [C, V] or [C, 1]
    bias: Tensor | None,  # [V] or [C, 1]
    inner: Tensor | None,  # []
    outer: Tensor,  # [C, 1]
) -> Tensor:  # [C, V]
    z = raw.to(outer.dtype)
    if bias is not None:
        z = z + bias
    if inner is not None:
        z = torch.tanh(z * inner)
    z = z * outer
    return torch.where(z < LOWEST_LOGIT, LOWEST_LOGIT, z)


def _stats(
    raw: Tensor,  # [C, V]
    bias: Tensor | None,  # [V]
    inner: Tensor | None,  # []
    outer: Tensor,  # [C, 1]
) -> tuple[Tensor, Tensor, Tensor]:  # [C] each
    z = _logits(raw, bias, inner, outer)
    maximum = z.amax(1, keepdim=True)  # [C, 1]
    shifted = z - maximum
    e = torch.exp(shifted)
    return maximum.squeeze(1), e.sum(1), (e * shifted).sum(1)


def _grad_(
    raw: Tensor,  # [C, V]
    d_raw: Tensor | None,  # [C, V] written; None: ``raw`` is
    logits: tuple[Tensor | None, Tensor | None, Tensor],  # bias, inner, outer of `_logits`
    columns: tuple[Tensor, Tensor, Tensor, Tensor | None],  # m, log s, a, b: [C, 1] each
) -> None:
    maximum, log_sum, a, b = columns
    z = _logits(raw, *logits)
    shifted = z - maximum
    p = torch.exp(shifted - log_sum)
    dz = p * (a if b is None else a + b * shifted)
    if logits[1] is not None:
        dz = dz * (1.0 - torch.square(z / logits[2]))
    (raw if d_raw is None else d_raw).copy_(dz)


@cache
def _compiled(function: Any, *variant: object) -> Any:
    """``function`` compiled for one variant; ``fullgraph``: it never falls back to op by op.

    torch.compile allows eight variants of one code object, so each variant has a copy of it.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{len(variant)}")
    copy = FunctionType(code, function.__globals__, function.__name__)
    return torch.compile(copy, dynamic=True, fullgraph=True)


def _arguments(view: LogitView, num_rows: int, like: Tensor) -> tuple:
    """(bias, inner, outer) of `_logits` as tensors: a new value compiles nothing."""
    inner = None if view.inner is None else like.new_tensor(view.inner)
    outer = view.outer
    column = outer if isinstance(outer, Tensor) else like.new_full((num_rows,), outer)
    return view.bias, inner, column.unsqueeze(1)


class CompiledRows(TorchRows):
    """The row work in generated loops, with statistics in ``dtype``."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def rounding(self, view: LogitView) -> float:
        """Generated code may round a tanh another way."""
        return 0.0 if view.inner is None else 2 * torch.finfo(self.dtype).eps

    def sums(
        self,
        raw: Tensor,  # [C, V] stays as it is
        labels: Tensor,  # [C]
        view: LogitView,
    ) -> Tensor:  # [4, C]
        """M, s, t and the label's logit of the rows of ``raw``."""
        like = raw.new_empty(0, dtype=self.dtype)
        bias, inner, outer = _arguments(view, raw.shape[0], like)
        maximum, s, t = _compiled(_stats, raw.dtype, bias is None, inner is None)(
            raw, bias, inner, outer
        )
        picked = raw.gather(1, labels.unsqueeze(1))  # [C, 1]
        label_bias = None if bias is None else bias[labels].unsqueeze(1)
        label_logits = _logits(picked, label_bias, inner, outer).squeeze(1)  # [C]
        return torch.stack((maximum, s, t, label_logits))

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
        columns = tuple(
            None if x is None else x.unsqueeze(1) for x in (stats.maximum, stats.log_sum, a, b)
        )
        arguments = _arguments(view, raw.shape[0], stats.logprobs)
        # two arguments of one memory would be one base with views to torch.compile, whose code for
        # chunks of several sizes may then name a size that it does not have (torch 2.13)
        target = None if raw.data_ptr() == d_raw.data_ptr() else d_raw
        variant = (raw.dtype, target is None, *(x is None for x in (*arguments, b)))
        _compiled(_grad_, *variant)(raw, target, arguments, columns)
        put_label_grad(d_raw, labels, label_grad)

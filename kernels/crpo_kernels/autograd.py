"""Where the fused loss meets autograd: three functions that differentiate once.

    OnePassLoss      hidden, weight, bias -> loss       gradients are made in forward, scaled later
    ChunkedLogprobs  hidden, weight, bias -> logprobs, entropy, lse          made in backward
    ObjectiveLoss    logprobs, entropy, lse -> loss             the objective's own slopes

one_pass is the first; two_pass is the second followed by the third. A second derivative is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunked import Gradients, Head, backprop, d_weight_of, one_pass, score
from .products import scaled
from .row_table import OUTPUTS, Objective, RowTable
from .rows import RowStats
from .spec import Logprobs
from .terms import Coefficients, LossRows, evaluate


class OnePassLoss(torch.autograd.Function):
    """Mode A. Keeps finished gradients (or the factor dZ of d_weight): backward needs no weight."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [T, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        head: Head,
        objective: Objective,
        tables: list[RowTable],
    ) -> Tensor:  # []
        """The loss; per-token results are appended to ``tables``."""
        gradients, table = one_pass(hidden, weight, head, objective)
        tables.append(table)
        kept = gradients.d_raw is not None
        ctx.save_for_backward(
            gradients.d_hidden,
            gradients.d_weight,
            gradients.d_bias,
            gradients.d_raw,
            hidden if kept else None,
            head.rows if kept else None,
        )
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.weight_dtype = weight.dtype
        return table.column("loss").sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple:
        """Everything times ``grad_out``; nothing that is kept is changed, so it can run again."""
        d_hidden, d_weight, d_bias, d_raw, hidden, rows = ctx.saved_tensors
        gradients = Gradients(d_hidden, d_weight, d_bias, d_raw)
        has_weight = d_weight is not None or d_raw is not None
        return (
            None if d_hidden is None else scaled(d_hidden, grad_out),
            d_weight_of(gradients, hidden, rows, grad_out, ctx.weight_dtype)
            if has_weight
            else None,
            None if d_bias is None else (d_bias * grad_out).to(ctx.bias_dtype),
            None,
            None,
            None,
        )


class ChunkedLogprobs(torch.autograd.Function):
    """Mode B. Keeps the statistics, and the exponentials (or logits) of all rows where they fit."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [T, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        head: Head,
    ) -> tuple[Tensor, ...]:  # [n] each
        """(logprobs, entropy, lse, is_top1) of the counted rows."""
        table, kept = score(hidden, weight, head)
        stats = table.stats()
        ctx.save_for_backward(hidden, weight, *stats)
        ctx.kept, ctx.head = kept, head
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        outputs = tuple(table.column(name).clone() for name in OUTPUTS)
        ctx.mark_non_differentiable(outputs[3])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        """Rows' gradients from what was kept the first time, recomputed after that."""
        hidden, weight, *values = ctx.saved_tensors
        stats = RowStats(*values)
        g, q, l = grads[:3]  # noqa: E741
        if g is None:
            g = torch.zeros_like(stats.logprobs)
        kept, ctx.kept = ctx.kept, None  # overwritten below
        gradients = backprop(hidden, weight, ctx.head, stats, Coefficients(g, q, l), kept)
        d_weight, d_bias = None, gradients.d_bias
        if ctx.head.needs_weight:
            d_weight = d_weight_of(gradients, hidden, ctx.head.rows, None, weight.dtype)
        return (
            gradients.d_hidden,
            d_weight,
            None if d_bias is None else d_bias.to(ctx.bias_dtype),
            None,
        )


class ObjectiveLoss(torch.autograd.Function):
    """The objective on logprobs, entropy and lse; its derivative are `objective`'s slopes."""

    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor,  # [n]
        entropy: Tensor,  # [n]
        lse: Tensor,  # [n]
        objective: Objective,
        results: list[LossRows],
    ) -> Tensor:  # []
        """The loss; per-token results are appended to ``results``."""
        result = evaluate(
            objective.spec, objective.inputs, logprobs, entropy, lse, objective.sequences
        )
        results.append(result)
        ctx.save_for_backward(*result.coefficients)
        return result.loss.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple:
        """The coefficients times ``grad_out``."""
        slopes = (None if slope is None else slope * grad_out for slope in ctx.saved_tensors)
        return (*slopes, None, None)


def head_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head
) -> tuple[Logprobs, Tensor]:
    """(logprobs, entropy, lse) and is_top1 of the counted rows, ``[n]``; scores without a graph."""
    if head.needs_any:
        *outputs, is_top1 = ChunkedLogprobs.apply(hidden, weight, bias, head)
        return Logprobs(*outputs), is_top1
    table, _ = score(hidden, weight, head)
    logprobs, entropy, lse, is_top1 = (table.column(name) for name in OUTPUTS)
    return Logprobs(logprobs, entropy, lse), is_top1

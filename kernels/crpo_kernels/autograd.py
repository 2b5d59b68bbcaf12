"""Where the fused loss meets autograd: three functions that differentiate once.

    OnePassLoss      factors -> loss                    gradients are made in forward, scaled later
    ChunkedLogprobs  factors -> logprobs, entropy, lse                       made in backward
    ObjectiveLoss    logprobs, entropy, lse -> loss             the objective's own slopes

`factors.Factors` are hidden, weight, bias and those of an adapter. one_pass is the first function;
two_pass is the second followed by the third. A second derivative is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunked import Gradients, Head, backprop, d_weight_of, one_pass, score
from .factors import Factors
from .products import scaled
from .row_table import OUTPUTS, Objective, RowTable
from .rows import RowStats
from .spec import Logprobs
from .terms import Coefficients, LossRows, evaluate

NUM_FACTORS = len(Factors._fields)


class OnePassLoss(torch.autograd.Function):
    """one_pass. Keeps gradients (or the factor dZ of d_weight): backward needs no weight."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [T, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        states: Tensor | None,  # [T, r]
        up: Tensor | None,  # [V, r]
        head: Head,
        objective: Objective,
        tables: list[RowTable],
    ) -> Tensor:  # []
        """The loss; per-token results are appended to ``tables``."""
        made, table = one_pass(Factors(hidden, weight, bias, states, up), head, objective)
        tables.append(table)
        kept = made.d_raw is not None
        ctx.save_for_backward(
            *(made.d_hidden, made.d_weight, made.d_bias, made.d_raw, made.d_states, made.d_up),
            hidden if kept else None,
            head.rows if kept else None,
        )
        ctx.dtypes = [None if x is None else x.dtype for x in (weight, bias, up)]
        return table.column("loss").sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple:
        """Everything times ``grad_out``; nothing that is kept is changed, so it can run again."""
        *values, hidden, rows = ctx.saved_tensors
        made = Gradients(*values)
        weight_dtype, bias_dtype, up_dtype = ctx.dtypes
        has_weight = made.d_weight is not None or made.d_raw is not None
        return (
            None if made.d_hidden is None else scaled(made.d_hidden, grad_out),
            d_weight_of(made, hidden, rows, grad_out, weight_dtype) if has_weight else None,
            None if made.d_bias is None else (made.d_bias * grad_out).to(bias_dtype),
            None if made.d_states is None else scaled(made.d_states, grad_out),
            None if made.d_up is None else (made.d_up * grad_out).to(up_dtype),
            None,
            None,
            None,
        )


class ChunkedLogprobs(torch.autograd.Function):
    """two_pass. Keeps statistics, and the exponentials (or logits) of all rows where they fit."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [T, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        states: Tensor | None,  # [T, r]
        up: Tensor | None,  # [V, r]
        head: Head,
    ) -> tuple[Tensor, ...]:  # [n] each
        """(logprobs, entropy, lse, is_top1) of the counted rows."""
        factors = Factors(hidden, weight, bias, states, up)
        table, kept = score(factors, head)
        stats = table.stats()
        ctx.save_for_backward(*factors, *stats)
        ctx.kept, ctx.head = kept, head
        ctx.set_materialize_grads(False)
        outputs = tuple(table.column(name).clone() for name in OUTPUTS)
        ctx.mark_non_differentiable(outputs[3])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        """Rows' gradients from what was kept the first time, recomputed after that."""
        saved = ctx.saved_tensors
        factors = Factors(*saved[:NUM_FACTORS])
        stats = RowStats(*saved[NUM_FACTORS:])
        g, q, l = grads[:3]  # noqa: E741
        if g is None:
            g = torch.zeros_like(stats.logprobs)
        kept, ctx.kept = ctx.kept, None  # overwritten below
        made = backprop(factors, ctx.head, stats, Coefficients(g, q, l), kept)
        return *finished(made, factors, ctx.head), None


def finished(made: Gradients, factors: Factors, head: Head) -> tuple[Tensor | None, ...]:
    """The gradient of every factor, in its dtype."""
    hidden, weight, bias, _, up = factors
    d_weight, d_bias, d_up = None, made.d_bias, made.d_up
    if head.needs.weight:
        d_weight = d_weight_of(made, hidden, head.rows, None, weight.dtype)
    if d_bias is not None and bias is not None:
        d_bias = d_bias.to(bias.dtype)
    if d_up is not None and up is not None:
        d_up = d_up.to(up.dtype)
    return made.d_hidden, d_weight, d_bias, made.d_states, d_up


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


def head_logprobs(factors: Factors, head: Head) -> tuple[Logprobs, Tensor]:
    """(logprobs, entropy, lse) and is_top1 of the counted rows, ``[n]``; scores without a graph."""
    if any(head.needs):
        *outputs, is_top1 = ChunkedLogprobs.apply(*factors, head)
        return Logprobs(*outputs), is_top1
    table, _ = score(factors, head)
    logprobs, entropy, lse, is_top1 = (table.column(name) for name in OUTPUTS)
    return Logprobs(logprobs, entropy, lse), is_top1

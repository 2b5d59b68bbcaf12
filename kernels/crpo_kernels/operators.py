"""The loss as operators of torch, each with what a tracer needs: shapes, and a backward.

    policy_loss            head, objective -> loss, statistics, gradients of the factors
    policy_loss_backward   those times the upstream gradient, rounded once
    logprobs               head -> logprobs, entropy, lse, what the gradient of a row needs
    logprobs_backward      gradients of the factors of a loss on the first three

`traced` says when they are used and what is different then. An operator's arguments are tensors,
numbers and strings: those of `HeadArguments`, then those of the objective.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autograd import finished
from .call import HeadCall
from .chunked import (
    Gradients,
    backprop,
    one_pass,
    score,
    stats_dtype,
)
from .dispatch import one_pass_reason
from .factors import NO_NEEDS, Adapter, Factors, Needs
from .products import product, scaled, without_autocast
from .row_table import OUTPUTS, Objective
from .rows import RowStats
from .spec import Logprobs, ObjectiveSpec, RunOptions, TokenInputs, TokenStats
from .terms import Coefficients, evaluate
from .validate import check_objective

HEAD_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, Tensor? states, Tensor? up, "
    "Tensor? rows, Tensor? temperatures, float temperature, float logit_scale, "
    "float? logit_softcap, str backend, str mode, SymInt? workspace_bytes, "
    "ScalarType? head_dtype, bool[] needs"
)
OBJECTIVE_SCHEMA = (
    "Tensor? token_weights, Tensor? advantages, Tensor? entropy_weights, Tensor? z_loss_weights, "
    "Tensor? old_logprobs, Tensor? rollout_logprobs, Tensor? ref_logprobs, Tensor? cu_seqlens, "
    "str policy, float clip_low, float clip_high, float kl_coef, str kl_estimator, str? rho_mode, "
    "float rho_cap, float rho_floor"
)
VECTORS = TokenInputs._fields[1:]  # in the order of the schema, as the fields of the spec are
KEPT = ("maximum", "log_sum", "mean_shift", "is_top1")  # of a row for its gradient


class HeadArguments(NamedTuple):
    """What both operators are told of the head; in the order of `HEAD_SCHEMA`."""

    hidden: Tensor  # [..., D]
    weight: Tensor  # [V, D]
    labels: Tensor  # [T]
    bias: Tensor | None  # [V]
    states: Tensor | None  # [..., r] of an adapter
    up: Tensor | None  # [V, r]
    rows: Tensor | None  # [n]
    temperatures: Tensor | None  # [T], instead of temperature
    temperature: float
    logit_scale: float
    logit_softcap: float | None
    backend: str
    mode: str
    workspace_bytes: int | None
    head_dtype: torch.dtype | None
    needs: Sequence[bool]  # which of `factors.Factors` need a gradient

    def call(self) -> HeadCall:
        """The checked call.

        Raises:
            ValueError: an argument that cannot be right.
        """
        temperature = self.temperature if self.temperatures is None else self.temperatures
        transform = (temperature, self.logit_scale, self.logit_softcap)
        adapter = None
        if self.states is not None and self.up is not None:
            adapter = Adapter(self.states, self.up)
        return HeadCall(
            self.hidden, self.weight, self.labels, self.bias, transform, self.rows, adapter,
            Needs(*self.needs),
        )  # fmt: skip

    @property
    def factors(self) -> Factors:
        """Those that may have a gradient."""
        return Factors(self.hidden, self.weight, self.bias, self.states, self.up)

    @property
    def run(self) -> RunOptions:
        """How it shall run."""
        return RunOptions(self.backend, self.mode, self.workspace_bytes, self.head_dtype)

    def num_rows(self) -> int:
        """T, of fake tensors a symbol."""
        return math.prod(self.hidden.shape[:-1])


OPERATOR_TAGS = (torch.Tag.cudagraph_unsafe,)
NUM_HEAD = len(HeadArguments._fields)
NUM_TENSORS = HeadArguments._fields.index("temperature")
PLACES = tuple(HeadArguments._fields.index(name) for name in Factors._fields)
GRADIENTS = ", ".join(["Tensor"] * len(PLACES))


def _policy_loss(*arguments: Any) -> tuple[Tensor, ...]:
    """Loss ``[]``, statistics ``[fields, T]``, gradients: of rows in their dtype, else in fp32."""
    head = HeadArguments(*arguments[:NUM_HEAD])
    num_tensors = NUM_HEAD + len(VECTORS)
    vectors = dict(zip(VECTORS, arguments[NUM_HEAD:num_tensors], strict=True))
    cu_seqlens, *options = arguments[num_tensors:]
    spec = ObjectiveSpec(*options)
    with torch.no_grad(), without_autocast(head.hidden):
        check_objective(spec, {**vectors, "cu_seqlens": cu_seqlens})
        call = head.call()
        objective = call.plan_loss(head.run, vectors, spec, cu_seqlens)
        loss, stats, made = _loss_and_gradients(call, objective)
        table = torch.stack([column.to(call.dtype) for column in stats])  # [fields, T]
        d_weight = _d_weight(call, made) if call.needs.weight else None
    found = (made.d_hidden, d_weight, made.d_bias, made.d_states, made.d_up)
    return loss, table, *_outputs(head, found)


def _loss_and_gradients(
    call: HeadCall, objective: Objective
) -> tuple[Tensor, TokenStats, Gradients]:
    """Both modes for an upstream gradient of 1, whatever the loss is multiplied with later."""
    factors, head = call.factors, call.head
    if head.plan.mode == "one_pass":
        gradients, table = one_pass(factors, head, objective)
        return (
            table.column("loss").sum(),
            call.token_stats(table.values, table.names),
            gradients,
        )
    table, kept = score(factors, head)
    logprobs, entropy, lse, is_top1 = (table.column(name) for name in OUTPUTS)
    result = evaluate(objective.spec, objective.inputs, logprobs, entropy, lse, objective.sequences)
    gradients = Gradients()
    if any(head.needs):
        gradients = backprop(factors, head, table.stats(), result.coefficients, kept)
    stats = call.two_pass_stats(Logprobs(logprobs, entropy, lse), is_top1, result)
    return result.loss.sum(), stats, gradients


def _outputs(head: HeadArguments, gradients: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Gradients in the shapes that the fake promises: empty where there is none."""
    return tuple(
        head.hidden.new_empty(0) if made is None or factor is None else made.view(factor.shape)
        for made, factor in zip(gradients, head.factors, strict=True)
    )


def _d_weight(call: HeadCall, gradients: Gradients) -> Tensor:  # [V, D] fp32 (fp64)
    """d_weight from what one pass kept: a sum over groups, or the factor of one product."""
    if gradients.d_weight is not None:
        return gradients.d_weight
    d_raw, counted = gradients.d_raw, call.hidden  # [n, V], [n, D]
    assert d_raw is not None, "either the factor is kept or d_weight accumulated"
    if call.rows is not None:
        counted = counted.index_select(0, call.rows)
    if d_raw.is_cuda:
        return product(
            d_raw.t(), counted, call.weight.new_empty(call.weight.shape, dtype=call.dtype)
        )
    return torch.mm(d_raw.t(), counted).to(call.dtype)  # what a CPU rounds it rounds in eager too


def _policy_loss_fake(*arguments: Any) -> tuple[Tensor, ...]:
    head = HeadArguments(*arguments[:NUM_HEAD])
    dtype, hidden = stats_dtype(head.hidden), head.hidden
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(len(TokenStats._fields), head.num_rows(), dtype=dtype),
        *_empty_like(head, (hidden.dtype, dtype, dtype, hidden.dtype, dtype)),
    )


def _empty_like(head: HeadArguments, dtypes: Sequence[torch.dtype | None]) -> list[Tensor]:
    """A gradient of every factor in a dtype (None: its own), empty where there is none."""
    return [
        factor.new_empty(factor.shape, dtype=dtype or factor.dtype)
        if is_needed and factor is not None
        else head.hidden.new_empty(0)
        for factor, dtype, is_needed in zip(head.factors, dtypes, head.needs, strict=True)
    ]


def _keep_gradients(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    head = HeadArguments(*inputs[:NUM_HEAD])
    ctx.needs, ctx.num_inputs = list(head.needs), len(inputs)
    ctx.dtypes = [head.weight.dtype if x is None else x.dtype for x in (head.bias, head.up)]
    ctx.dtypes.insert(0, head.weight.dtype)
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _policy_loss_backward(ctx: Any, grad_out: Tensor | None, *_unused: None) -> tuple:
    if grad_out is None:
        return (None,) * ctx.num_inputs
    made = policy_loss_backward_op(grad_out, *ctx.saved_tensors, *ctx.dtypes)
    return _placed(made, ctx.needs, ctx.num_inputs)


def _placed(
    gradients: Sequence[Tensor], needs: Sequence[bool], num_inputs: int
) -> tuple[Tensor | None, ...]:
    """The gradients that are needed, in the places of their factors among an operator's inputs."""
    found: list[Tensor | None] = [None] * num_inputs
    for place, made, is_needed in zip(PLACES, gradients, needs, strict=True):
        if is_needed:
            found[place] = made
    return tuple(found)


def _scale(
    grad_out: Tensor,  # []
    d_hidden: Tensor,  # [..., D]
    d_weight: Tensor,  # [V, D] fp32
    d_bias: Tensor,  # [V] fp32
    d_states: Tensor,  # [..., r]
    d_up: Tensor,  # [V, r] fp32
    *dtypes: torch.dtype,
) -> tuple[Tensor, ...]:
    """Everything times ``grad_out``, rounded once; ``dtypes``: of weight, bias and up."""
    d_weight, d_bias, d_up = (
        torch.mul(x, grad_out, out=torch.empty_like(x, dtype=dtype))
        for x, dtype in zip((d_weight, d_bias, d_up), dtypes, strict=True)
    )
    return scaled(d_hidden, grad_out), d_weight, d_bias, scaled(d_states, grad_out), d_up


def _scale_fake(_grad_out: Tensor, *gradients: Any) -> tuple[Tensor, ...]:
    d_hidden, d_weight, d_bias, d_states, d_up, *dtypes = gradients
    d_weight, d_bias, d_up = (
        torch.empty_like(x, dtype=dtype)
        for x, dtype in zip((d_weight, d_bias, d_up), dtypes, strict=True)
    )
    return torch.empty_like(d_hidden), d_weight, d_bias, torch.empty_like(d_states), d_up


def _logprobs(*arguments: Any) -> tuple[Tensor, ...]:
    """logprobs, entropy and lse ``[T]``, and what the gradient of a row needs ``[4, T]``."""
    head = HeadArguments(*arguments)
    with torch.no_grad(), without_autocast(head.hidden):
        call = head._replace(needs=NO_NEEDS).call()  # nothing is kept here for a backward
        call.plan_logprobs(head.run, any(head.needs))
        table, _ = score(call.factors, call.head)
        columns = [call.scatter(table.column(name)) for name in (*OUTPUTS[:3], *KEPT)]
        return *(column.clone() for column in columns[:3]), torch.stack(columns[3:])


def _logprobs_fake(*arguments: Any) -> tuple[Tensor, ...]:
    head = HeadArguments(*arguments)
    num_rows, dtype = head.num_rows(), stats_dtype(head.hidden)
    outputs = (head.hidden.new_empty(num_rows, dtype=dtype) for _ in range(3))
    return *outputs, head.hidden.new_empty(len(KEPT), num_rows, dtype=dtype)


def _keep_statistics(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.constants = inputs[NUM_TENSORS:]
    ctx.save_for_backward(*inputs[:NUM_TENSORS], output[0], output[3])
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)


def _logprobs_backward(ctx: Any, *grads: Tensor | None) -> tuple:
    *tensors, logprobs, kept = ctx.saved_tensors
    made = logprobs_backward_op(*tensors, *ctx.constants, logprobs, kept, *grads[:3])
    return _placed(made, ctx.constants[-1], NUM_HEAD)


def _backprop(*arguments: Any) -> tuple[Tensor, ...]:
    """The gradients of a loss on the outputs of `logprobs`."""
    head = HeadArguments(*arguments[:NUM_HEAD])
    logprobs, kept, *grads = arguments[NUM_HEAD:]
    with torch.no_grad(), without_autocast(head.hidden):
        call = head.call()
        call.plan(head.run, one_pass_reason(None, is_on_policy=True), may_keep=False)
        stats = RowStats(*(call.compact(column) for column in (logprobs, *kept)))
        g, q, l = (grad if grad is None else call.compact(grad) for grad in grads)  # noqa: E741
        if g is None:
            g = torch.zeros_like(stats.logprobs)
        made = backprop(call.factors, call.head, stats, Coefficients(g, q, l), None)
        found = finished(made, call.factors, call.head)
    return _outputs(head, found)


def _backprop_fake(*arguments: Any) -> tuple[Tensor, ...]:
    head = HeadArguments(*arguments[:NUM_HEAD])
    return tuple(_empty_like(head, [None] * len(head.factors)))


def _operator(name: str, schema: str, run: Any, fake: Any) -> Any:
    """An operator of ours; whoever captures CUDA graphs leaves it out, as it may synchronise."""
    made = torch.library.custom_op(
        f"crpo_kernels::{name}", run, mutates_args=(), schema=schema, tags=OPERATOR_TAGS
    )
    made.register_fake(fake)
    return made


policy_loss_op = _operator(
    "policy_loss",
    f"({HEAD_SCHEMA}, {OBJECTIVE_SCHEMA}) -> (Tensor, Tensor, {GRADIENTS})",
    _policy_loss,
    _policy_loss_fake,
)
policy_loss_backward_op = _operator(
    "policy_loss_backward",
    "(Tensor grad_out, Tensor d_hidden, Tensor d_weight, Tensor d_bias, Tensor d_states, "
    "Tensor d_up, ScalarType weight_dtype, ScalarType bias_dtype, ScalarType up_dtype) "
    f"-> ({GRADIENTS})",
    _scale,
    _scale_fake,
)
logprobs_op = _operator(
    "logprobs",
    f"({HEAD_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
    _logprobs,
    _logprobs_fake,
)
logprobs_backward_op = _operator(
    "logprobs_backward",
    f"({HEAD_SCHEMA}, Tensor logprobs, Tensor kept, Tensor? d_logprobs, Tensor? d_entropy, "
    f"Tensor? d_lse) -> ({GRADIENTS})",
    _backprop,
    _backprop_fake,
)
policy_loss_op.register_autograd(_policy_loss_backward, setup_context=_keep_gradients)
logprobs_op.register_autograd(_logprobs_backward, setup_context=_keep_statistics)

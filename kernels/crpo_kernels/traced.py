"""A call that `torch.compile` or `torch.export` is tracing: one operator in the graph, no break.

The operators of `operators` run the code of an eager call, so values and gradients are the same. A
graph needs shapes that do not depend on the labels, hence three differences:

    d_weight is made in forward, in fp32: V x D x 4 bytes are kept until backward, where an eager
    call keeps the factor dZ (counted rows x V, in the dtype of hidden) while that is smaller; until
    forward ends both exist
    the two passes of gspo both run in forward
    `linear_logprobs` scores by the fused kernel where an eager call without gradients would; with
    one it keeps no logits and no exponentials: backward makes the logits again, by which
    its gradients are those of an eager call up to the rounding of exponentials that one may keep

What is traced here reads no values. Arguments are checked when the operator runs, where a mistake
is the ValueError of an eager call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .call import cast_for_autocast
from .factors import Factors, needs_gradient
from .lora import with_adapter
from .operators import VECTORS, HeadArguments, logprobs_op, policy_loss_op
from .spec import OPTIONS, Logprobs, ObjectiveSpec, RunOptions, TokenStats
from .validate import check_objective, check_plain


class HeadInputs(NamedTuple):
    """The head's part of a public call, as the caller gave it."""

    hidden: Tensor  # [..., D]
    weight: Tensor  # [V, D]
    labels: Tensor  # [T]
    bias: Tensor | None  # [V]
    transform: tuple[Tensor | float, float, float | None]  # temperature, logit_scale, softcap
    rows: Tensor | Sequence[int] | None
    lora_head: Any = None  # (A, B, scaling)


def _head_arguments(
    inputs: HeadInputs,
    run: RunOptions,
) -> HeadArguments:
    hidden, weight, labels, bias, transform, rows, lora_head = inputs
    for name, tensor in (("hidden", hidden), ("weight", weight), ("labels", labels)):
        check_plain(name, tensor)
    if bias is not None:
        check_plain("bias", bias)
    needs = [needs_gradient(tensor) for tensor in (hidden, weight, bias)]
    hidden, weight = cast_for_autocast(hidden, weight)
    factors = with_adapter(Factors(hidden, weight, bias), lora_head)
    temperature, logit_scale, logit_softcap = transform
    is_number = not isinstance(temperature, Tensor)
    return HeadArguments(
        hidden,
        weight,
        labels,
        bias,
        factors.states,
        factors.up,
        rows if rows is None else torch.as_tensor(rows),
        None if is_number else temperature.detach(),
        float(temperature) if is_number else 1.0,
        float(logit_scale),
        None if logit_softcap is None else float(logit_softcap),
        *run,
        [*needs, *factors.needs()[3:]],
    )


def traced_policy_loss(
    inputs: HeadInputs,
    run: RunOptions,
    vectors: dict[str, Tensor | None],  # of [T], by their names in `VECTORS`
    spec: ObjectiveSpec,
    cu_seqlens: Tensor | None,  # [B + 1]
) -> tuple[Tensor, TokenStats]:
    """`linear_policy_loss` of a call that is being traced.

    Raises:
        ValueError: a tensor that is none, or is sharded; all else is checked when it runs.
    """
    if not isinstance(spec, ObjectiveSpec):
        check_objective(spec, {})
    for name, vector in vectors.items():
        if vector is not None:
            check_plain(name, vector)
    constants = [v if v is None else v.detach() for v in (vectors[name] for name in VECTORS)]
    if cu_seqlens is not None:
        cu_seqlens = torch.as_tensor(cu_seqlens)
    options = [getattr(spec, field) for field in OPTIONS]
    loss, table, *_ = policy_loss_op(
        *_head_arguments(inputs, run), *constants, cu_seqlens, *options
    )
    columns = dict(zip(TokenStats._fields, table.detach().unbind(), strict=True))
    flags = {name: columns[name] > 0 for name in ("is_clipped", "is_top1", "is_counted")}
    return loss, TokenStats(**{**columns, **flags})


def traced_logprobs(
    inputs: HeadInputs,
    run: RunOptions,
) -> Logprobs:
    """`linear_logprobs` of a call that is being traced.

    Raises:
        ValueError: a tensor that is none, or is sharded; all else is checked when it runs.
    """
    return Logprobs(*logprobs_op(*_head_arguments(inputs, run))[:3])

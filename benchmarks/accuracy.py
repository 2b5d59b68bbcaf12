"""Errors of a candidate against fp64, and when it is wrong.

Errors are those of a few rows whose entropy term weighs as much as their policy term, so that an
entropy gradient that is off shows in d_hidden and d_weight. Of d_weight two sets of tokens are
looked at: `d_weight`, the labels and the likeliest tokens of these rows, and `d_weight_tail`,
tokens drawn at random, whose probabilities are small: a filter that drops small probabilities
changes the first by a few percent and loses the second.

Per quantity: `max` and `rms` of the difference, for gradients relative to the rms of the truth, and
for gradients `bias`, the slope of a straight line through (truth, result) less 1: rounding errors
average out in it, a part of the gradient that is always missing does not.

A result is WRONG when one of these exceeds `TIMES` x that of plain torch in the same dtype on the
same rows, plus a floor (`FLOORS`), or is not finite. The floor is what TF32 products may cost, so
that fp32 inputs do not condemn them; a softmax of logits in bf16 is beyond it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .baselines import Result, objective
from .cases import ENTROPY_WEIGHT, Inputs

SLAB = 1 << 14  # rows of the head that are fp64 at once
TIMES = 5.0
FLOORS = {  # nats; gradients relative to their rms
    "logprobs": {"max": 2e-2, "rms": 5e-3},
    "entropy": {"max": 2e-2, "rms": 5e-3},
    "d_hidden": {"max": 5e-2, "rms": 5e-3, "bias": 1e-2},
    "d_weight": {"max": 5e-2, "rms": 5e-3, "bias": 1e-2},
    "d_weight_tail": {"max": 5e-1, "rms": 5e-2, "bias": 2e-2},
}
LIKELIEST = 4  # tokens of a row that count as its head
TINY = 1e-30


def error_inputs(inputs: Inputs, num_rows: int) -> Inputs:
    """About ``num_rows`` rows whose entropy terms weigh as much as their policy terms."""
    few = inputs.sample(num_rows)
    return replace(few, entropy_weights=few.entropy_weights / ENTROPY_WEIGHT)


def exact_results(
    inputs: Inputs, columns: Tensor | None = None, num_tail: int = 4096
) -> tuple[dict[bool, Result], Tensor, int]:
    """Everything in fp64, with and without the entropy term.

    The weight becomes fp64 in slabs: memory is some fp64 [T, V], whatever D is.

    Returns:
        By whether the entropy term is there; the tokens whose d_weight it has, ``columns`` if
        given, else the head of the rows and ``num_tail`` others; how many of them are the head.
    """
    hidden, weight = inputs.hidden.detach().double(), inputs.weight.detach()
    raw = exact_logits(hidden, weight).requires_grad_()  # [t, V]
    log_p = (raw / inputs.case.temperature).log_softmax(1)
    logprobs = log_p.gather(1, inputs.labels.unsqueeze(1)).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    losses = {
        flag: objective(inputs, logprobs, entropy if flag else None) for flag in (True, False)
    }
    d_raws = [torch.autograd.grad(loss, raw, retain_graph=True)[0] for loss in losses.values()]
    num_head = 0
    if columns is None:
        columns, num_head = chosen_columns(inputs.labels, log_p.detach(), num_tail)
    d_hidden = hidden.new_zeros(len(d_raws), *hidden.shape)
    for first in range(0, weight.shape[0], SLAB):
        slab = weight[first : first + SLAB].double()
        for d_raw, total in zip(d_raws, d_hidden, strict=True):
            total.addmm_(d_raw[:, first : first + SLAB], slab)
    values = logprobs.detach(), entropy.detach()
    results = {
        flag: Result(loss.detach(), total, d_raw[:, columns].t() @ hidden, *values)
        for (flag, loss), total, d_raw in zip(losses.items(), d_hidden, d_raws, strict=True)
    }
    return results, columns, num_head


def chosen_columns(labels: Tensor, log_p: Tensor, num_tail: int) -> tuple[Tensor, int]:
    """Labels and likeliest tokens of the rows, then some of the others; how many are the first."""
    likeliest = log_p.topk(min(LIKELIEST, log_p.shape[1]), 1).indices  # [t, 4]
    is_head = torch.zeros(log_p.shape[1], dtype=torch.bool, device=labels.device)
    is_head[labels] = True
    is_head[likeliest.flatten()] = True
    head, others = is_head.nonzero().squeeze(1), (~is_head).nonzero().squeeze(1)
    generator = torch.Generator(labels.device).manual_seed(0)
    order = torch.randperm(others.numel(), generator=generator, device=labels.device)
    return torch.cat([head, others[order[:num_tail]]]), head.numel()


def exact_result(inputs: Inputs, columns: Tensor, with_entropy: bool) -> Result:
    """Everything in fp64 for a few rows; d_weight only of the vocabulary's ``columns``."""
    return exact_results(inputs, columns)[0][with_entropy]


def exact_logits(hidden: Tensor, weight: Tensor) -> Tensor:  # [T, V]
    """``hidden`` ``[T, D]`` in fp64 times the head ``[V, D]`` of any dtype."""
    raw = hidden.new_empty(hidden.shape[0], weight.shape[0])
    for first in range(0, weight.shape[0], SLAB):
        raw[:, first : first + SLAB] = hidden @ weight[first : first + SLAB].double().t()
    return raw


def errors(got: Result, truth: Result, columns: Tensor, num_head: int) -> dict[str, dict]:
    """max, rms and for gradients bias of every quantity that a candidate tells."""
    pairs = {
        "logprobs": (got.logprobs, truth.logprobs),
        "entropy": (got.entropy, truth.entropy),
        "d_hidden": (got.d_hidden, truth.d_hidden),
    }
    if got.d_weight is not None and truth.d_weight is not None:
        rows = got.d_weight[columns]
        pairs["d_weight"] = (rows[:num_head], truth.d_weight[:num_head])
        pairs["d_weight_tail"] = (rows[num_head:], truth.d_weight[num_head:])
    return {
        name: differences(value, true, is_gradient=name.startswith("d_"))
        for name, (value, true) in pairs.items()
        if value is not None and true is not None and true.numel() > 0
    }


def differences(value: Tensor, truth: Tensor, *, is_gradient: bool) -> dict[str, float]:
    """Largest and root mean square difference; of gradients relative, and the bias."""
    difference = value.double() - truth
    largest, root = float(difference.abs().max()), float(difference.square().mean().sqrt())
    if not is_gradient:
        return {"max": largest, "rms": root}
    square = max(float(truth.square().mean()), TINY)
    slope = float((difference * truth).mean()) / square
    return {"max": largest / square**0.5, "rms": root / square**0.5, "bias": slope}


def what_is_wrong(found: dict[str, dict], rival: dict[str, dict], coarseness: float = 1.0) -> str:
    """The worst error beyond its limit with that limit, or "".

    Args:
        found: of the candidate, as from `errors`.
        rival: of plain torch, the same quantities.
        coarseness: times the limits.
    """
    worst, text = 1.0, ""
    for quantity, limits in FLOORS.items():
        for kind, floor in limits.items():
            value = found.get(quantity, {}).get(kind)
            if value is None:
                continue
            if not math.isfinite(value):
                return f"{quantity}: not finite"
            limit = coarseness * (TIMES * abs(rival.get(quantity, {}).get(kind, 0.0)) + floor)
            if abs(value) > worst * limit:
                worst = abs(value) / limit
                text = f"{quantity} {kind} {value:.2g}, limit {limit:.2g}"
    return text


def rms(value: Tensor, truth: Tensor, *, relative: bool) -> float:
    """Root mean square of the difference, or that over the root mean square of ``truth``."""
    return differences(value, truth, is_gradient=relative)["rms"]

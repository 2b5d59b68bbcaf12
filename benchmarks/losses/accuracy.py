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
from functools import cached_property

import torch
from torch import Tensor

from .baselines import (
    Candidate,
    Objective,
    Result,
    gradients,
    naive_logprobs,
    naive_scored,
    objective,
)
from .cases import ENTROPY_WEIGHT, Inputs

SLAB = 1 << 20  # elements of the head that are fp64 at once: they fit a cache
DIMS = 256  # columns of d_hidden that are looked at, evenly spread
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


class Exact:
    """Log-probabilities, entropies and gradients of a few rows in fp64.

    The weight becomes fp64 in slabs: memory is some fp64 [T, V], whatever D is. Of d_hidden there
    are about `DIMS` columns where ``columns`` is None: `every` th one.

    Args:
        inputs: the rows.
        columns: tokens whose d_weight is looked at; None: the head of the rows, and others.
        num_tail: how many others.
    """

    def __init__(self, inputs: Inputs, columns: Tensor | None = None, num_tail: int = 4096) -> None:
        self.inputs, self.hidden = inputs, inputs.hidden.detach().double()
        self.weight = inputs.weight.detach()
        self.raw = exact_logits(self.hidden, self.weight).requires_grad_()  # [t, V]
        log_p = (self.raw / inputs.case.temperature).log_softmax(1)
        self.logprobs = log_p.gather(1, inputs.labels.unsqueeze(1)).squeeze(1)
        self.entropy = -(log_p.exp() * log_p).sum(1)
        self.num_head, self.every = 0, 1
        if columns is None:
            self.every = -(-self.hidden.shape[1] // DIMS)
            columns, self.num_head = chosen_columns(inputs.labels, log_p.detach(), num_tail)
        self.columns = columns

    def result(self, with_entropy: bool, objective: Objective = objective) -> Result:
        """Of one objective; d_weight only of `columns`."""
        loss = objective(self.inputs, self.logprobs, self.entropy if with_entropy else None)
        (d_raw,) = torch.autograd.grad(loss, self.raw, retain_graph=True)
        d_hidden = torch.zeros_like(self.hidden[:, :: self.every])
        for slab in slabs_of(self.weight):
            d_hidden.addmm_(d_raw[:, slab], self.weight[slab, :: self.every].double())
        d_weight = d_raw[:, self.columns].t() @ self.hidden
        return replace(self.values(), loss=loss.detach(), d_hidden=d_hidden, d_weight=d_weight)

    def values(self) -> Result:
        """Without gradients."""
        return Result(logprobs=self.logprobs.detach(), entropy=self.entropy.detach())

    def errors(self, got: Result, truth: Result) -> dict[str, dict]:
        """max, rms and for gradients bias of every quantity that a candidate tells."""
        pairs = {
            "logprobs": (got.logprobs, truth.logprobs),
            "entropy": (got.entropy, truth.entropy),
        }
        if got.d_hidden is not None:
            pairs["d_hidden"] = (got.d_hidden[:, :: self.every], truth.d_hidden)
        if got.d_weight is not None and truth.d_weight is not None:
            rows, head = got.d_weight[self.columns], self.num_head
            pairs["d_weight"] = (rows[:head], truth.d_weight[:head])
            pairs["d_weight_tail"] = (rows[head:], truth.d_weight[head:])
        return {
            name: differences(value, true, is_gradient=name.startswith("d_"))
            for name, (value, true) in pairs.items()
            if value is not None and true is not None and true.numel() > 0
        }


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
    return Exact(inputs, columns).result(with_entropy)


class Truth:
    """What is right on a few rows of the inputs, and how far off plain torch is there."""

    def __init__(self, inputs: Inputs, num_rows: int, num_columns: int) -> None:
        self.few, self.num_columns = error_inputs(inputs, num_rows), num_columns
        self.exact: dict[bool, Exact] = {}
        self.known: dict[tuple, tuple[Result, dict[str, dict]]] = {}

    def exact_of(self, takes_temperature: bool) -> Exact:
        """Of the inputs as they are, or with hidden states that are divided by the temperature."""
        if takes_temperature not in self.exact:
            few = self.few if takes_temperature else self.few.at_temperature_one()
            self.exact[takes_temperature] = Exact(few, None, self.num_columns)
        return self.exact[takes_temperature]

    def errors(self, candidate: Candidate) -> tuple[dict[str, dict], str]:
        """Errors of a candidate, and what is wrong with them or ""."""
        exact = self.exact_of(candidate.takes_temperature)
        has_gradients, flag = candidate.num_products > 1, candidate.has_entropy_gradient
        kind = (flag, candidate.objective) if has_gradients else None
        key = candidate.takes_temperature, kind
        if key not in self.known:
            truth = exact.values() if kind is None else exact.result(*kind)
            rival = (
                naive_scored(exact.inputs) if kind is None else plain_result(exact.inputs, *kind)
            )
            self.known[key] = truth, exact.errors(rival, truth)
        truth, rival_errors = self.known[key]
        found = exact.errors(candidate.step(candidate.inputs_of(self.few)), truth)
        return found, what_is_wrong(found, rival_errors, candidate.coarseness)

    @cached_property
    def entropy_quantiles(self) -> list[float]:
        """The tenth and the ninetieth percentile in nats."""
        entropy = self.exact_of(True).entropy.detach()
        return entropy.quantile(entropy.new_tensor([0.1, 0.9])).tolist()


def plain_result(inputs: Inputs, with_entropy: bool, objective: Objective) -> Result:
    """Plain torch in the dtype of the inputs."""
    logprobs, entropy = naive_logprobs(inputs)
    loss = objective(inputs, logprobs, entropy if with_entropy else None)
    return Result(loss, *gradients(loss, inputs), logprobs.detach(), entropy.detach())


def slabs_of(weight: Tensor) -> list[slice]:
    """Rows of ``weight`` ``[V, D]`` that are taken at once."""
    size = max(1, SLAB // weight.shape[1])
    return [slice(first, first + size) for first in range(0, weight.shape[0], size)]


def exact_logits(hidden: Tensor, weight: Tensor) -> Tensor:  # [T, V]
    """``hidden`` ``[T, D]`` in fp64 times the head ``[V, D]`` of any dtype."""
    raw = hidden.new_empty(hidden.shape[0], weight.shape[0])
    for slab in slabs_of(weight):
        raw[:, slab] = hidden @ weight[slab].double().t()
    return raw


def differences(value: Tensor, truth: Tensor, *, is_gradient: bool) -> dict[str, float]:
    """Largest and root mean square difference; of gradients relative, and the bias."""
    difference = value.detach().double() - truth
    largest, root = float(difference.abs().max()), float(difference.square().mean().sqrt())
    if not is_gradient:
        return {"max": largest, "rms": root}
    square = max(float(truth.square().mean()), TINY)
    slope = float((difference * truth).mean()) / square
    return {"max": largest / square**0.5, "rms": root / square**0.5, "bias": slope}


def what_is_wrong(found: dict[str, dict], rival: dict[str, dict], coarseness: float = 1.0) -> str:
    """The worst error beyond its limit with that limit, or "".

    Args:
        found: of the candidate, as from `Exact.errors`.
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

"""Errors of a candidate against fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from .baselines import Candidate, Result, objective
from .cases import Inputs

SLAB = 1 << 14  # rows of the head that are fp64 at once


def exact_result(inputs: Inputs, columns: Tensor, with_entropy: bool) -> Result:
    """Everything in fp64 for a few rows; d_weight only of the vocabulary's ``columns``.

    The weight becomes fp64 in slabs: memory is some fp64 [T, V], whatever D is.
    """
    hidden, weight = inputs.hidden.detach().double(), inputs.weight.detach()
    raw = exact_logits(hidden, weight).requires_grad_()  # [t, V]
    log_p = (raw / inputs.case.temperature).log_softmax(1)
    logprobs = log_p.gather(1, inputs.labels.unsqueeze(1)).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    loss = objective(inputs, logprobs, entropy if with_entropy else None)
    (d_raw,) = torch.autograd.grad(loss, raw)
    d_hidden = torch.zeros_like(hidden)
    for first in range(0, weight.shape[0], SLAB):
        d_hidden.addmm_(d_raw[:, first : first + SLAB], weight[first : first + SLAB].double())
    d_weight = d_raw[:, columns].t() @ hidden
    return Result(loss.detach(), d_hidden, d_weight, logprobs.detach(), entropy.detach())


def exact_logits(hidden: Tensor, weight: Tensor) -> Tensor:  # [T, V]
    """``hidden`` ``[T, D]`` in fp64 times the head ``[V, D]`` of any dtype."""
    raw = hidden.new_empty(hidden.shape[0], weight.shape[0])
    for first in range(0, weight.shape[0], SLAB):
        raw[:, first : first + SLAB] = hidden @ weight[first : first + SLAB].double().t()
    return raw


def errors(candidate: Candidate, inputs: Inputs, truth: Result, columns: Tensor) -> dict:
    """Relative rms errors against fp64 on the rows of ``inputs``; absolute ones for nats."""
    got = candidate.step(inputs)
    d_weight = None if got.d_weight is None else got.d_weight[columns]
    values = {
        "d_hidden_rel_rms": (got.d_hidden, truth.d_hidden),
        "d_weight_rel_rms": (d_weight, truth.d_weight),
        "logprobs_rms": (got.logprobs, truth.logprobs),
        "entropy_rms": (got.entropy, truth.entropy),
    }
    return {
        name: rms(value, true, relative="rel" in name)
        for name, (value, true) in values.items()
        if value is not None and true is not None
    }


def rms(value: Tensor, truth: Tensor, *, relative: bool) -> float:
    """Root mean square of the difference, or that over the root mean square of ``truth``."""
    difference = (value.double() - truth).square().mean()
    return float((difference / truth.square().mean() if relative else difference).sqrt())

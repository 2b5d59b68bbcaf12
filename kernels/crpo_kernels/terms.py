"""The objective on torch vectors: from the head's per-row results to the loss and its three slopes.

    loss_t = token_weights_t * (rho_t * policy_term + kl_coef * kl)
             + entropy_weights_t * H_t + z_loss_weights_t * lse_t^2
    g_t = d loss_t / d logprob_t        q_t = d loss_t / d H_t        l_t = d loss_t / d lse_t

g, q and l are everything that the gradient of the head needs to know about a loss. one_pass
evaluates this per chunk while its logits are hot, two_pass and the oracle once for all rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .objective import lse_slope, row_loss, token_terms, weighted
from .spec import ObjectiveSpec, TokenInputs


class Coefficients(NamedTuple):
    """What a loss of (logprob, entropy, lse) says to a row of logits; None where all zero."""

    d_logprobs: Tensor  # [C] g
    d_entropy: Tensor | None  # [C] q
    d_lse: Tensor | None  # [C] l

    def take(self, rows: slice) -> Coefficients:
        """The coefficients of some rows."""
        return self._make(None if value is None else value[rows] for value in self)


class Sequences(NamedTuple):
    """Which rows belong together; how many there are is known without asking a device."""

    ids: Tensor  # [C] int64
    count: int  # B, empty ones included


@dataclass(frozen=True)
class LossRows:
    """The objective of C rows."""

    loss: Tensor  # [C] what each row adds
    coefficients: Coefficients
    token_loss: Tensor  # [C]
    ratio: Tensor  # [C]
    kl: Tensor  # [C]
    rho: Tensor  # [C]
    is_clipped: Tensor  # [C] bool


def evaluate(
    spec: ObjectiveSpec,
    inputs: TokenInputs,  # of [C]
    logprobs: Tensor,  # [C]
    entropy: Tensor,  # [C]
    lse: Tensor,  # [C]
    sequences: Sequences | None = None,  # of [C], for gspo
) -> LossRows:
    """Loss, slopes and statistics of some rows; for off-policy gspo of whole sequences."""
    old = inputs.old_logprobs
    log_ratio = logprobs - (logprobs if old is None else old)  # [C]; on-policy 0, and NaN stays
    if spec.policy == "gspo" and old is not None:
        assert sequences is not None, "gspo comes with its sequences"
        log_ratio = sequence_mean(log_ratio, sequences)
    advantages = torch.zeros_like(logprobs) if inputs.advantages is None else inputs.advantages
    log_rho = None
    if spec.rho_mode is not None:
        assert inputs.rollout_logprobs is not None, "rho_mode comes with rollout_logprobs"
        log_rho = (logprobs if old is None else old) - inputs.rollout_logprobs
    value, slope, ratio, kl, rho, is_clipped = token_terms(
        spec.policy, spec.kl_estimator, spec.rho_mode, spec.kl_coef != 0,
        logprobs, log_ratio, log_rho, advantages, inputs.ref_logprobs,
        spec.clip_low, spec.clip_high, spec.kl_coef, spec.rho_cap, spec.rho_floor,
    )  # fmt: skip
    d_entropy, z_weights = inputs.entropy_weights, inputs.z_loss_weights
    loss = row_loss(value, inputs.token_weights, entropy, d_entropy, lse, z_weights)  # [C]
    d_lse = None if z_weights is None else lse_slope(lse, z_weights)
    g = weighted(inputs.token_weights, slope)
    return LossRows(loss, Coefficients(g, d_entropy, d_lse), value, ratio, kl, rho, is_clipped)


def sequence_mean(x: Tensor, sequences: Sequences) -> Tensor:  # [C]
    """The mean of ``x`` over the rows of each row's own sequence; repeats bit by bit."""
    ids, num_sequences = sequences
    sums, counts = x.new_zeros(2, num_sequences).unbind()  # [B]
    for total, value in ((sums, x), (counts, torch.ones_like(x))):
        if x.device.type == "cpu":
            total.index_add_(0, ids, value)  # one thread, in order
        else:
            total.index_put_((ids,), value, accumulate=True)  # sorted; index_add_ has atomics
    return (sums / counts.clamp(min=1))[ids]

"""The objective compiled alone: each term of `crpo_kernels.objective` over plain vectors.

In the shipped kernels the objective shares its code with a running maximum, which may well be a
`max` instruction. Here nothing but the objective can be the reason for one.
"""

# ruff: noqa: ANN001, ANN201  (a jitted function; a branch may not need every option)
from __future__ import annotations

import triton
import triton.language as tl

from crpo_kernels import objective
from crpo_kernels.twin_triton import triton_twin

_twin = triton_twin(objective)
_policy_term, _kl_term = _twin.policy_term, _twin.kl_term
_rho_term, _weighted = _twin.rho_term, _twin.weighted


@triton.jit
def objective_kernel(
    values_ptr,  # [5, T] fp32: logprob, log ratio, advantage, reference logprob, log rho
    out_ptr,  # [4, T] fp32: loss, slope, ratio, is_clipped
    num_tokens,
    clip_low,
    clip_high,
    kl_coef,
    rho_cap,
    rho_floor,
    POLICY: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    RHO_MODE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Rho * policy term + kl_coef * kl per token, with its slope."""
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = offs_t < num_tokens
    logprob = tl.load(values_ptr + offs_t, mask)
    log_ratio = tl.load(values_ptr + num_tokens + offs_t, mask)
    advantages = tl.load(values_ptr + 2 * num_tokens + offs_t, mask)
    loss, slope, ratio, is_clipped = _policy_term(
        POLICY, logprob, log_ratio, advantages, clip_low, clip_high
    )
    if RHO_MODE is not None:
        log_rho = tl.load(values_ptr + 4 * num_tokens + offs_t, mask)
        rho = _rho_term(RHO_MODE, log_rho, rho_cap, rho_floor)
        loss = _weighted(rho, loss)
        slope = _weighted(rho, slope)
    if KL_ESTIMATOR is not None:
        ref_logprob = tl.load(values_ptr + 3 * num_tokens + offs_t, mask)
        kl, kl_slope = _kl_term(KL_ESTIMATOR, logprob, ref_logprob)
        loss += kl_coef * kl
        slope += kl_coef * kl_slope
    tl.store(out_ptr + offs_t, loss, mask)
    tl.store(out_ptr + num_tokens + offs_t, slope, mask)
    tl.store(out_ptr + 2 * num_tokens + offs_t, ratio, mask)
    tl.store(out_ptr + 3 * num_tokens + offs_t, is_clipped.to(tl.float32), mask)

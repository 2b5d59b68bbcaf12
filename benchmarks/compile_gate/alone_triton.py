"""The objective compiled alone, so that only the objective can be the reason for an instruction.

In `row_stats` it shares its code with a running maximum, which may well be a `max`. The kernel here
runs the epilogue of `row_stats` and the first lines of `row_grad` on rows whose statistics are
loaded, and nothing else.
"""

# ruff: noqa: ANN001, ANN201  (a jitted function has no types)
from __future__ import annotations

import triton
import triton.language as tl

from crpo_kernels.objective_triton import put_objective, twin

_row_factors = twin.row_factors


@triton.jit
def objective_kernel(
    values_ptr,  # [4, T] fp32: logprob, entropy, lse, mean_shift
    table_ptr,  # [columns, T] fp32, written
    factors_ptr,  # [2, T] fp32, written
    stride,  # of all three: T
    weights_ptr,  # [T] fp32, stands for every weight of a row
    advantages_ptr,  # [T] fp32
    old_logprobs_ptr,
    rollout_logprobs_ptr,
    ref_logprobs_ptr,
    clip_low,
    clip_high,
    kl_coef,
    rho_cap,
    rho_floor,
    POLICY: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    RHO_MODE: tl.constexpr,
    USES_KL: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Loss, slopes and factors of BLOCK_T rows."""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    logprob = tl.load(values_ptr + row)
    entropy = tl.load(values_ptr + stride + row)
    lse = tl.load(values_ptr + 2 * stride + row)
    mean_shift = tl.load(values_ptr + 3 * stride + row)
    put_objective(
        row, logprob, entropy, lse, table_ptr + row, stride,
        weights_ptr, advantages_ptr, weights_ptr, weights_ptr,
        old_logprobs_ptr, rollout_logprobs_ptr, ref_logprobs_ptr,
        clip_low, clip_high, kl_coef, rho_cap, rho_floor,
        POLICY, KL_ESTIMATOR, RHO_MODE, USES_KL,
    )  # fmt: skip
    weight = tl.load(weights_ptr + row)
    a, label_grad = _row_factors(weight, weight, weight, logprob, entropy, mean_shift)
    tl.store(factors_ptr + row, a)
    tl.store(factors_ptr + stride + row, label_grad)

"""The objective in a kernel: what `terms.evaluate` does on vectors, on the scalars of one row.

The arithmetic is `objective`'s own (``twin``); here are only the loads of a row's constants and the
stores of its results. Arguments that are None do not exist in the compiled kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import objective
from .launch_triton import constant
from .row_table import COLUMNS
from .twin_triton import triton_twin

twin = triton_twin(objective)
_token_terms = twin.token_terms
_row_loss = twin.row_loss
_lse_slope = twin.lse_slope
_weighted = twin.weighted

# columns of the table, read by kernels as globals
_TOKEN_LOSS = constant(COLUMNS.index("token_loss"))
_RATIO = constant(COLUMNS.index("ratio"))
_KL = constant(COLUMNS.index("kl"))
_RHO = constant(COLUMNS.index("rho"))
_IS_CLIPPED = constant(COLUMNS.index("is_clipped"))
_LOSS = constant(COLUMNS.index("loss"))
_D_LOGPROBS = constant(COLUMNS.index("d_logprobs"))
_D_LSE = constant(COLUMNS.index("d_lse"))


@triton.jit
def put_objective(
    row, logprob, entropy, lse, table_ptr, stride_table,
    token_weights_ptr, advantages_ptr, entropy_weights_ptr, z_loss_weights_ptr,
    old_logprobs_ptr, rollout_logprobs_ptr, ref_logprobs_ptr,
    clip_low, clip_high, kl_coef, rho_cap, rho_floor,
    POLICY: tl.constexpr, KL_ESTIMATOR: tl.constexpr, RHO_MODE: tl.constexpr, USES_KL: tl.constexpr,
):  # fmt: skip
    """`terms.evaluate` on one row: its loss, slopes and statistics, written to the table."""
    old = logprob
    if old_logprobs_ptr is not None:
        old = tl.load(old_logprobs_ptr + row)
    advantages = 0.0 * logprob
    if advantages_ptr is not None:
        advantages = tl.load(advantages_ptr + row)
    log_rho = None
    if RHO_MODE is not None:
        log_rho = old - tl.load(rollout_logprobs_ptr + row)
    ref_logprob = None
    if ref_logprobs_ptr is not None:
        ref_logprob = tl.load(ref_logprobs_ptr + row)
    value, slope, ratio, kl, rho, is_clipped = _token_terms(
        POLICY, KL_ESTIMATOR, RHO_MODE, USES_KL,
        logprob, logprob - old, log_rho, advantages, ref_logprob,
        clip_low, clip_high, kl_coef, rho_cap, rho_floor,
    )  # fmt: skip
    token_weight = tl.load(token_weights_ptr + row)
    entropy_weight = None
    if entropy_weights_ptr is not None:
        entropy_weight = tl.load(entropy_weights_ptr + row)
    z_weight = None
    if z_loss_weights_ptr is not None:
        z_weight = tl.load(z_loss_weights_ptr + row)
        tl.store(table_ptr + _D_LSE * stride_table, _lse_slope(lse, z_weight))
    loss = _row_loss(value, token_weight, entropy, entropy_weight, lse, z_weight)
    tl.store(table_ptr + _TOKEN_LOSS * stride_table, value)
    tl.store(table_ptr + _RATIO * stride_table, ratio)
    tl.store(table_ptr + _KL * stride_table, kl)
    tl.store(table_ptr + _RHO * stride_table, rho)
    tl.store(table_ptr + _IS_CLIPPED * stride_table, is_clipped.to(tl.float32))
    tl.store(table_ptr + _LOSS * stride_table, loss)
    tl.store(table_ptr + _D_LOGPROBS * stride_table, _weighted(token_weight, slope))

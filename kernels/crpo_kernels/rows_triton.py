"""The row work in Triton: one program a row, two streams over its logits.

    row_stats   z = view(raw);  m = max z,  s = sum e^(z-m),  t = sum e^(z-m) (z-m)
                epilogue on the row's scalars: logprob, entropy, lse, and the whole objective:
                ratio, clip, KL, rho, token and stage entropy weight -> loss, g, l, statistics
    row_grad    d_raw_j = p_j (a - q (z_j - m)) slope (1 - tanh^2),  g (1 - p_y) ... at y
                from raw products, or from e^(z-m) that `exps_triton` kept

Formulas as in `rows_torch`; the objective is `objective`'s own code (`twin_triton`). m, s and t are
kept per lane and joined once a row: with x = z - m, one exponential w = e^-|x| serves both cases,

    x <= 0:  s += w,  t += w x             x > 0:  s = s w + 1,  t = w (t - x s),  m = z

and starts from the finite -1e30, so that no inf - inf can appear. Full tiles load without a mask
(masked loads are not vectorised), the last one with. From fp32 products `row_grad` writes to
another buffer: in place, a thread's bf16 store would hit bytes that another has not loaded yet.
Rows are addressed in int64: row * V passes 2^31 at 14 134 rows of V = 151 936. Nothing is atomic:
results repeat bit by bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl
from torch import Tensor

from .launch_triton import constant, launch
from .logits_triton import load_logits, load_tile, logits_of
from .objective_triton import put_objective, twin
from .row_table import COLUMNS, RowTable
from .terms import Coefficients

if TYPE_CHECKING:
    from .rows import LogitView, RowStats
    from .spec import ObjectiveSpec, TokenInputs

BLOCK_V = 2048  # logits a program loads at once
NUM_WARPS = 8  # 8 fp32 logits a thread: two loads of 128 bits

_row_factors = twin.row_factors

ROUNDING, TANH_ROUNDING = 5.9e-8, 2.4e-7  # parts of the maximum

# read by kernels as globals: these, and columns of the table
_ROUNDING, _TANH_ROUNDING = constant(ROUNDING), constant(TANH_ROUNDING)
_LOGPROBS = constant(COLUMNS.index("logprobs"))
_ENTROPY = constant(COLUMNS.index("entropy"))
_LSE = constant(COLUMNS.index("lse"))
_IS_TOP1 = constant(COLUMNS.index("is_top1"))
_MAXIMUM = constant(COLUMNS.index("maximum"))
_LOG_SUM = constant(COLUMNS.index("log_sum"))
_MEAN_SHIFT = constant(COLUMNS.index("mean_shift"))

# pointers into the middle of vectors: their alignment must not make variants
_UNALIGNED = [
    "labels_ptr", "outer_ptr", "table_ptr", "token_weights_ptr", "advantages_ptr",
    "entropy_weights_ptr", "z_loss_weights_ptr", "old_logprobs_ptr", "rollout_logprobs_ptr",
    "ref_logprobs_ptr", "logprobs_ptr", "maximum_ptr", "log_sum_ptr", "mean_shift_ptr",
    "d_logprobs_ptr", "d_entropy_ptr", "d_lse_ptr",
]  # fmt: skip


@triton.jit
def _add_tile(z, mask, m, s, t):
    """One more logit on each lane; ``mask`` None where all lanes have one."""
    x = z - m
    is_up = x > 0
    w = tl.exp(-tl.abs(x))
    e = w if mask is None else tl.where(mask, w, 0.0)
    t = tl.where(is_up, w * (t - x * s), t + e * x)
    s = tl.where(is_up, s * w + 1.0, s + e)
    return tl.where(is_up, z, m), s, t


@triton.jit
def put_stats(
    label, label_logit, maximum, row_sum, weighted_sum, inner, table_ptr, stride_table, mask
):  # fmt: skip
    """Write the statistics of a row, or of a block of rows, from its sums.

    ``label_logit`` is NaN where the label is neither in the vocabulary nor -1; ``table_ptr`` are
    the rows in the first column, ``mask`` those that exist, None: all.
    """
    log_sum = tl.log(row_sum)
    mean_shift = weighted_sum / row_sum
    shift = tl.where(label == -1, -1e30, label_logit - maximum)  # -1: another shard has the label
    # A fused multiply-add may round the label's own logit another way, by half a unit in the last
    # place (a tanh by two): it is never above the maximum, and the top it stays. Its logprob is as
    # computed: another logit may be as near below as 2^-24 = 5.96e-8 of the maximum.
    rounding = _ROUNDING if inner is None else _TANH_ROUNDING
    is_top1 = shift >= -rounding * tl.abs(maximum)
    shift = tl.where(shift > 0.0, 0.0, shift)
    logprob = shift - log_sum
    entropy = log_sum - mean_shift
    lse = maximum + log_sum
    tl.store(table_ptr + _LOGPROBS * stride_table, logprob, mask)
    tl.store(table_ptr + _ENTROPY * stride_table, entropy, mask)
    tl.store(table_ptr + _LSE * stride_table, lse, mask)
    tl.store(table_ptr + _IS_TOP1 * stride_table, is_top1.to(tl.float32), mask)
    tl.store(table_ptr + _MAXIMUM * stride_table, maximum, mask)
    tl.store(table_ptr + _LOG_SUM * stride_table, log_sum, mask)
    tl.store(table_ptr + _MEAN_SHIFT * stride_table, mean_shift, mask)
    return logprob, entropy, lse


@triton.jit
def put_sums(maximum, row_sum, weighted_sum, label_logit, table_ptr, stride_table, mask):
    """Write the sums of a row, or of a block of rows, of one shard: to `row_table.UNJOINED`."""
    tl.store(table_ptr + _MAXIMUM * stride_table, maximum, mask)
    tl.store(table_ptr + _LOG_SUM * stride_table, row_sum, mask)
    tl.store(table_ptr + _MEAN_SHIFT * stride_table, weighted_sum, mask)
    tl.store(table_ptr + _LOGPROBS * stride_table, label_logit, mask)


# the table's stride is the number of rows, another in every call
@triton.jit(do_not_specialize=["stride_table"], do_not_specialize_on_alignment=_UNALIGNED)
def row_stats_kernel(
    raw_ptr,  # [C, V] fp32
    stride_raw,
    labels_ptr,  # [C] int64; -1: not in this shard; others outside [0, V) give NaN
    bias_ptr,  # [V] fp32 or None
    outer_ptr,  # [C] fp32 or None
    outer,  # fp32, where outer_ptr is None
    inner,  # fp32 or None: no soft cap
    vocab_size,
    table_ptr,  # [columns, C] of [columns, n] fp32, written
    stride_table,
    token_weights_ptr,  # [C] fp32; from here on None where not given
    advantages_ptr,
    entropy_weights_ptr,
    z_loss_weights_ptr,
    old_logprobs_ptr,
    rollout_logprobs_ptr,
    ref_logprobs_ptr,
    clip_low,
    clip_high,
    kl_coef,
    rho_cap,
    rho_floor,
    IS_SHARD: tl.constexpr,  # sums alone, to be joined with those of other columns
    POLICY: tl.constexpr,  # None: statistics alone
    KL_ESTIMATOR: tl.constexpr,
    RHO_MODE: tl.constexpr,
    USES_KL: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Statistics of one row, and in the epilogue its loss and slopes."""
    row = tl.program_id(0).to(tl.int64)
    raw_ptr += row * stride_raw
    table_ptr += row
    if outer_ptr is not None:
        outer = tl.load(outer_ptr + row)
    offs_v = tl.arange(0, BLOCK_V)
    m = tl.full([BLOCK_V], -1e30, tl.float32)
    s = tl.zeros([BLOCK_V], tl.float32)
    t = tl.zeros([BLOCK_V], tl.float32)
    num_full = vocab_size // BLOCK_V * BLOCK_V
    for start in range(0, num_full, BLOCK_V):
        z = load_logits(raw_ptr, bias_ptr, start, offs_v, None, inner, outer)
        m, s, t = _add_tile(z, None, m, s, t)
    if num_full < vocab_size:
        mask_v = num_full + offs_v < vocab_size
        z = load_logits(raw_ptr, bias_ptr, num_full, offs_v, mask_v, inner, outer)
        z = tl.where(mask_v, z, -1e30)
        m, s, t = _add_tile(z, mask_v, m, s, t)
    maximum = tl.max(m, 0)
    d = m - maximum
    w = tl.exp(d)
    row_sum = tl.sum(s * w, 0)
    weighted_sum = tl.sum(w * (t + d * s), 0)
    label = tl.load(labels_ptr + row)
    is_inside = (label >= 0) & (label < vocab_size)
    label_raw = tl.load(raw_ptr + label, mask=is_inside, other=float("nan"))
    label_bias = None
    if bias_ptr is not None:
        label_bias = tl.load(bias_ptr + label, mask=is_inside, other=0.0)
    label_logit = logits_of(label_raw, label_bias, inner, outer)
    if IS_SHARD:
        put_sums(maximum, row_sum, weighted_sum, label_logit, table_ptr, stride_table, None)
    else:
        logprob, entropy, lse = put_stats(
            label, label_logit, maximum, row_sum, weighted_sum, inner, table_ptr, stride_table, None
        )
        if POLICY is not None:
            put_objective(
                row, logprob, entropy, lse, table_ptr, stride_table,
                token_weights_ptr, advantages_ptr, entropy_weights_ptr, z_loss_weights_ptr,
                old_logprobs_ptr, rollout_logprobs_ptr, ref_logprobs_ptr,
                clip_low, clip_high, kl_coef, rho_cap, rho_floor,
                POLICY, KL_ESTIMATOR, RHO_MODE, USES_KL,
            )  # fmt: skip


@triton.jit
def _gradient(
    raw_ptr, bias_ptr, start, offs_v, mask_v,
    maximum, log_sum, a, q, slope, inner, outer, IS_EXP: tl.constexpr,
):  # fmt: skip
    """D loss / d raw of one tile of a row, but for the label."""
    if IS_EXP:
        e = load_tile(raw_ptr, start, offs_v, mask_v).to(tl.float32)
        shifted = tl.log(tl.where(e > 0, e, 1.0))  # finite where e underflowed: p is 0 there
        z = maximum + shifted
        p = e * tl.exp(-log_sum)
    else:
        z = load_logits(raw_ptr, bias_ptr, start, offs_v, mask_v, inner, outer)
        shifted = z - maximum
        p = tl.exp(shifted - log_sum)
    dz = a
    if q is not None:
        dz = a - q * shifted
    dz = p * dz * slope
    if inner is not None:
        tanh = z / outer
        dz *= 1.0 - tanh * tanh
    return dz


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def row_grad_kernel(
    raw_ptr,  # [C, V] fp32 raw products; with IS_EXP e^(z - m), and the same pointer as d_raw
    stride_raw,
    d_raw_ptr,  # [C, V] bf16, fp16 or fp32, written
    stride_d_raw,
    labels_ptr,  # [C] int64
    bias_ptr,  # [V] fp32 or None
    outer_ptr,  # [C] fp32 or None
    outer,  # fp32, where outer_ptr is None
    inner,  # fp32 or None: no soft cap
    vocab_size,
    logprobs_ptr,  # [C] fp32, as the following
    maximum_ptr,
    log_sum_ptr,
    mean_shift_ptr,
    d_logprobs_ptr,
    d_entropy_ptr,  # or None
    d_lse_ptr,  # or None
    IS_EXP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The gradient of one row of raw products from its statistics and g, q, l."""
    row = tl.program_id(0).to(tl.int64)
    raw_ptr += row * stride_raw
    d_raw_ptr += row * stride_d_raw
    if outer_ptr is not None:
        outer = tl.load(outer_ptr + row)
    slope = outer
    if inner is not None:
        slope = outer * inner
    logprob = tl.load(logprobs_ptr + row)
    maximum = tl.load(maximum_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    mean_shift = tl.load(mean_shift_ptr + row)
    q = None
    if d_entropy_ptr is not None:
        q = tl.load(d_entropy_ptr + row)
    d_lse = None
    if d_lse_ptr is not None:
        d_lse = tl.load(d_lse_ptr + row)
    g = tl.load(d_logprobs_ptr + row)
    a, label_grad = _row_factors(g, q, d_lse, logprob, log_sum - mean_shift, mean_shift)
    label_grad *= slope
    if inner is not None:
        tanh = (logprob + log_sum + maximum) / outer
        label_grad *= 1.0 - tanh * tanh
    label = tl.load(labels_ptr + row)
    offs_v = tl.arange(0, BLOCK_V)
    num_full = vocab_size // BLOCK_V * BLOCK_V
    for start in range(0, num_full, BLOCK_V):
        dz = _gradient(
            raw_ptr, bias_ptr, start, offs_v, None,
            maximum, log_sum, a, q, slope, inner, outer, IS_EXP,
        )  # fmt: skip
        dz = tl.where(start + offs_v == label, label_grad, dz)
        tl.store(d_raw_ptr + start + offs_v, dz.to(d_raw_ptr.dtype.element_ty))
    if num_full < vocab_size:
        mask_v = num_full + offs_v < vocab_size
        dz = _gradient(
            raw_ptr, bias_ptr, num_full, offs_v, mask_v,
            maximum, log_sum, a, q, slope, inner, outer, IS_EXP,
        )  # fmt: skip
        dz = tl.where(num_full + offs_v == label, label_grad, dz)
        tl.store(d_raw_ptr + num_full + offs_v, dz.to(d_raw_ptr.dtype.element_ty), mask=mask_v)


def rounding(view: LogitView) -> float:
    """How far a label's logit may be from the maximum, as a part of it, where it is the maximum."""
    return ROUNDING if view.inner is None else TANH_ROUNDING


def block(vocab_size: int) -> dict[str, int]:
    """The tile of a row: no wider than a small vocabulary needs."""
    return {"BLOCK_V": min(BLOCK_V, max(16, 1 << (vocab_size - 1).bit_length()))}


def _dense(vector: Tensor | None) -> Tensor | None:
    """Values side by side: a bias may be a view, and an expanded gradient has stride 0."""
    return None if vector is None else vector.contiguous()


def view_arguments(view: LogitView) -> dict[str, Any]:
    """What a kernel needs for `logits_triton.logits_of`."""
    outer = view.outer
    column = outer.contiguous() if isinstance(outer, Tensor) else None
    return {
        "bias_ptr": _dense(view.bias),
        "outer_ptr": column,
        "outer": 1.0 if isinstance(outer, Tensor) else float(outer),
        "inner": None if view.inner is None else float(view.inner),
    }


def row_stats(
    raw: Tensor,  # [C, V] fp32, any pitch
    labels: Tensor,  # [C] int64; -1 where another shard of the vocabulary has the label
    view: LogitView,
    table: RowTable,
    rows: slice,
    spec: ObjectiveSpec | None = None,
    inputs: TokenInputs | None = None,  # of [C], with spec
    *,
    is_shard: bool = False,
) -> None:
    """Write the statistics of ``raw`` to ``rows`` of the table; with ``spec`` the loss as well.

    ``is_shard``: sums instead, to `row_table.UNJOINED`.
    """
    names = (
        "token_weights", "advantages", "entropy_weights", "z_loss_weights", "old_logprobs",
        "rollout_logprobs", "ref_logprobs",
    )  # fmt: skip
    bounds = ("clip_low", "clip_high", "kl_coef", "rho_cap", "rho_floor")
    arguments = {
        "raw_ptr": raw,
        "stride_raw": raw.stride(0),
        "labels_ptr": labels.contiguous(),
        **view_arguments(view),
        "vocab_size": raw.shape[1],
        "table_ptr": table.values[:, rows],
        "stride_table": table.values.stride(0),
        **{
            f"{name}_ptr": None if inputs is None else _dense(getattr(inputs, name))
            for name in names
        },
        **{name: 0.0 if spec is None else float(getattr(spec, name)) for name in bounds},
        "IS_SHARD": is_shard,
        "POLICY": None if spec is None else spec.policy,
        "KL_ESTIMATOR": "k3" if spec is None else spec.kl_estimator,
        "RHO_MODE": None if spec is None else spec.rho_mode,
        "USES_KL": spec is not None and spec.kl_coef != 0,
        **block(raw.shape[1]),
    }
    launch(row_stats_kernel, (raw.shape[0],), arguments, num_warps=NUM_WARPS)


def row_grad(
    raw: Tensor,  # [C, V] fp32, any pitch
    d_raw: Tensor,  # [C, V] bf16, fp16 or fp32; another buffer unless is_exp
    labels: Tensor,  # [C] int64
    view: LogitView,
    stats: RowStats,  # of [C]
    coefficients: Coefficients,  # of [C]
    is_exp: bool = False,  # raw is d_raw and holds e^(z - m)
) -> None:
    """Write d loss / d raw to ``d_raw``."""
    vectors = {
        "logprobs_ptr": stats.logprobs,
        "maximum_ptr": stats.maximum,
        "log_sum_ptr": stats.log_sum,
        "mean_shift_ptr": stats.mean_shift,
        "d_logprobs_ptr": coefficients.d_logprobs,
        "d_entropy_ptr": coefficients.d_entropy,
        "d_lse_ptr": coefficients.d_lse,
    }
    arguments = {
        "raw_ptr": raw,
        "stride_raw": raw.stride(0),
        "d_raw_ptr": d_raw,
        "stride_d_raw": d_raw.stride(0),
        "labels_ptr": labels.contiguous(),
        **view_arguments(view),
        "vocab_size": raw.shape[1],
        **{name: _dense(vector) for name, vector in vectors.items()},
        "IS_EXP": is_exp,
        **block(raw.shape[1]),
    }
    num_warps = NUM_WARPS * raw.element_size() // 4  # of kept bf16, too, 128 bits at a time
    launch(row_grad_kernel, (raw.shape[0],), arguments, num_warps=num_warps)

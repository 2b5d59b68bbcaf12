"""What two_pass keeps: the exponentials of all rows, from which their gradient needs no logits.

    row_exp     E = e^(z - m) in hidden's dtype, while a chunk's logits are hot
    row_grad    (with IS_EXP)  p = E / s,  z - m = log E,  and E becomes d loss / d raw in place

E is kept rather than logits: its error is relative (bf16: 2^-9), so is that of the probabilities,
while a bf16 logit of 20 is wrong by .06 and its probability by 6 %. What underflows to 0 had a
probability below 1e-38, and its gradient is 0. Sums of rows, statistics and the label's gradient
stay those of the fp32 logits. bf16 has fp32's exponents: weights of 1 / N tokens lose no bits.

In place is safe here and is not from fp32 to bf16: E and the gradient are of one dtype, every
element is stored to the very bytes that it was loaded from, and its value needs no other element.
So a store can only hit what the same thread has already used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from .launch_triton import launch
from .logits_triton import load_logits
from .rows_triton import NUM_WARPS, block, view_arguments

if TYPE_CHECKING:
    from .rows import LogitView


@triton.jit(do_not_specialize_on_alignment=["outer_ptr", "maximum_ptr"])
def row_exp_kernel(
    raw_ptr,  # [C, V] fp32
    stride_raw,
    exps_ptr,  # [C, V] bf16 or fp32, written
    stride_exps,
    bias_ptr,  # [V] fp32 or None
    outer_ptr,  # [C] fp32 or None
    outer,  # fp32, where outer_ptr is None
    inner,  # fp32 or None: no soft cap
    vocab_size,
    maximum_ptr,  # [C] fp32
    BLOCK_V: tl.constexpr,
):
    """e^(z - m) of one row."""
    row = tl.program_id(0).to(tl.int64)
    raw_ptr += row * stride_raw
    exps_ptr += row * stride_exps
    if outer_ptr is not None:
        outer = tl.load(outer_ptr + row)
    maximum = tl.load(maximum_ptr + row)
    offs_v = tl.arange(0, BLOCK_V)
    num_full = vocab_size // BLOCK_V * BLOCK_V
    for start in range(0, num_full, BLOCK_V):
        z = load_logits(raw_ptr, bias_ptr, start, offs_v, None, inner, outer)
        e = tl.exp(z - maximum)
        tl.store(exps_ptr + start + offs_v, e.to(exps_ptr.dtype.element_ty))
    if num_full < vocab_size:
        mask_v = num_full + offs_v < vocab_size
        z = load_logits(raw_ptr, bias_ptr, num_full, offs_v, mask_v, inner, outer)
        e = tl.exp(z - maximum)
        tl.store(exps_ptr + num_full + offs_v, e.to(exps_ptr.dtype.element_ty), mask=mask_v)


def row_exp(
    raw: Tensor,  # [C, V] fp32, any pitch
    exps: Tensor,  # [C, V] bf16 or fp32, any pitch
    view: LogitView,
    maximum: Tensor,  # [C]
) -> None:
    """Write e^(z - m) to ``exps``."""
    arguments = {
        "raw_ptr": raw,
        "stride_raw": raw.stride(0),
        "exps_ptr": exps,
        "stride_exps": exps.stride(0),
        **view_arguments(view),
        "vocab_size": raw.shape[1],
        "maximum_ptr": maximum.contiguous(),
        **block(raw.shape[1]),
    }
    launch(row_exp_kernel, (raw.shape[0],), arguments, num_warps=NUM_WARPS)

"""In a kernel: tiles of a row, and from raw products to tempered logits as `rows.LogitView` says.

z = outer * tanh(inner * (raw + bias))  under a soft cap, else  outer * (raw + bias)
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    """Odd, and without cancelling near 0, where 1 - e^-2|x| would."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    y = x * x
    near = 1.0 + y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835))))
    return tl.where(y < 0.0625, x * near, tl.where(x < 0, -far, far))


@triton.jit
def load_tile(row_ptr, start, offs_v, mask_v):
    """Elements ``start + offs_v`` of a row; ``mask_v`` None where all exist, for wide loads."""
    if mask_v is None:
        tile = tl.load(row_ptr + start + offs_v)
    else:
        tile = tl.load(row_ptr + start + offs_v, mask=mask_v, other=0.0)
    return tile


@triton.jit
def load_logits(raw_ptr, bias_ptr, start, offs_v, mask_v, inner, outer):
    """Tempered logits of a tile of a row of raw products."""
    raw = load_tile(raw_ptr, start, offs_v, mask_v)
    bias = None
    if bias_ptr is not None:
        bias = load_tile(bias_ptr, start, offs_v, mask_v)
    return logits_of(raw, bias, inner, outer)


@triton.jit
def logits_of(raw, bias, inner, outer):
    """Tempered logits from raw products; -1e30 stands for -inf, NaN stays."""
    z = raw.to(tl.float32)
    if bias is not None:
        z += bias
    if inner is not None:
        z = _tanh(z * inner)
    z *= outer
    return tl.where(z < -1e30, -1e30, z)

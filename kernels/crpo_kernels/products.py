"""Matrix products with fp32 results from bf16 factors, on each device its own way.

A GPU writes fp32 from bf16 factors (``out_dtype``). A CPU rounds the product of bf16 factors to
bf16; where fp32 is wanted there (Triton's interpreter, for checking) the factors are made fp32.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from .host import is_fake


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Autocast off: the casts have been made, what follows says its dtypes itself."""
    if not torch.amp.is_autocast_available(tensor.device.type):
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def is_wide(factor: Tensor) -> bool:
    """Whether products may be wider than their factors; a fake tensor stands for one on a GPU."""
    return factor.is_cuda or is_fake(factor)


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``a @ b`` into ``out``, which may be wider than the factors."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if is_wide(a):
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``total += a @ b`` for factors that may be narrower than ``total``."""
    if a.dtype == total.dtype:
        return total.addmm_(a, b)
    if is_wide(a):
        return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    return total.addmm_(a.to(total.dtype), b.to(total.dtype))


def scaled(tensor: Tensor, factor: Tensor) -> Tensor:
    """``tensor * factor`` in the dtype of ``tensor``; ``factor`` ``[]`` is not rounded to it first.

    A CPU multiplies bf16 with a fp32 number in fp32. A GPU would round a number without dimensions
    to bf16 before it multiplies (1/3 becomes .3340), so there it is given some.
    """
    if tensor.device.type == "cpu":
        return tensor * factor
    return torch.mul(tensor, factor.reshape((1,) * tensor.dim()), out=torch.empty_like(tensor))

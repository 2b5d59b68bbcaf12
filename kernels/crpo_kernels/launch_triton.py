"""The one place where Triton kernels start, so that a launch can also be looked at.

    launch(kernel, (num_rows,), {"z_ptr": z, "vocab_size": v, "BLOCK_V": 2048}, num_warps=8)

runs a kernel on the device of its tensors. Inside ``recording()`` it notes what would have run (the
compile gate feeds the real launchers with tensors on the device "meta"); with fake tensors, on
which memory is planned, it does nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .host import is_fake


@dataclass(frozen=True)
class Launch:
    """One launch that was noted instead of run.

    Attributes:
        kernel: the ``triton.jit`` function.
        grid: programs per axis.
        arguments: name -> tensor, number, None or the value of a constexpr.
        meta: num_warps and num_stages.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    meta: dict[str, int]


_records: list[list[Launch]] = []


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Note launches in the list it yields; nothing runs."""
    records: list[Launch] = []
    _records.append(records)
    try:
        yield records
    finally:
        _records.remove(records)


def is_recording() -> bool:
    """Whether launches are noted instead of run."""
    return bool(_records)


def launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], **meta: int) -> None:
    """Run ``kernel`` over ``grid`` on the device of its tensors; an empty grid runs nothing."""
    if 0 in grid:
        return
    if _records:
        _records[-1].append(Launch(kernel, grid, arguments, meta))
        return
    tensors = [getattr(v, "base", v) for v in arguments.values()]  # a descriptor's is its base
    tensors = [v for v in tensors if isinstance(v, Tensor)]
    if any(is_fake(tensor) for tensor in tensors):
        return
    tensor = tensors[0]
    with torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
        kernel[grid](**arguments, **meta)


@triton.jit
def _probe_kernel():
    pass


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: TRITON_INTERPRET=1 was set at their import."""
    return not isinstance(_probe_kernel, triton.runtime.JITFunction)


def constant(value: float | str) -> Any:
    """A module's constant as a kernel may read it: compiled ones want ``tl.constexpr``.

    The interpreter computes with plain numbers: a comparison of a constexpr with a block fails.
    """
    return value if is_interpreted() else tl.constexpr(value)

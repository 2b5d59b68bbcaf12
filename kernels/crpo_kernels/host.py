"""What the host may give to a device, and ask of it, without waiting for it.

A copy from ordinary memory of the host waits until the device has done everything that was queued
before. So numbers travel as arguments of fill kernels and larger things through pinned memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_FILLS = 16  # numbers of a list that are worth a fill kernel each


def on_device(
    name: str,
    values: Tensor | Sequence[float] | float,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``values`` on a device; numbers and short lists may be part of a captured CUDA graph.

    Args:
        name: of the argument, for the message.
        values: a tensor anywhere, numbers, or one number.
        device: where they are wanted.
        dtype: of the result; None: that of ``values``.

    Raises:
        ValueError: memory of the host would become part of a CUDA graph that is captured.
    """
    if isinstance(values, Tensor) and not values.dim() and is_readable(values):
        dtype, values = dtype or values.dtype, values.item()
    if device.type != "cpu" and not isinstance(values, Tensor):
        if isinstance(values, int | float):
            return torch.full((), values, dtype=dtype, device=device)
        if len(values) <= MAX_FILLS:
            dtype = dtype or torch.as_tensor(values).dtype
            filled = torch.empty(len(values), dtype=dtype, device=device)
            for place, value in zip(filled.unbind(), values, strict=True):
                place.fill_(value)
            return filled
    tensor = torch.as_tensor(values)
    tensor = tensor.to(dtype or tensor.dtype)
    if tensor.device.type != "cpu" or device.type == "cpu":
        return tensor.to(device)
    if device.type == "cuda":
        check_not_capturing(
            device, f"{name}: expected a tensor on {device} while a CUDA graph is captured, got "
            "values of the host, which a replay would not find again. Make the tensor before the "
            "capture.",
        )  # fmt: skip
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def is_readable(tensor: Tensor) -> bool:
    """Whether the values may be read here: no device is waited for, no graph is being traced."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" and not is_fake(tensor)


def is_fake(tensor: Tensor) -> bool:
    """Whether it has a shape and no values: who plans memory calls with such tensors."""
    return hasattr(tensor, "fake_mode")


def check_not_capturing(device: torch.device, message: str) -> None:
    """What cannot be part of a CUDA graph is not asked for while one is captured.

    Raises:
        ValueError: with ``message``.
    """
    if (
        device.type == "cuda"
        and torch.cuda.is_available()
        and torch.cuda.is_current_stream_capturing()
    ):
        raise ValueError(message)

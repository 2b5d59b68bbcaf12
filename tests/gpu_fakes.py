"""torch.cuda without a GPU: what is asked of it is noted, in order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch


def fake_cuda(
    patch: pytest.MonkeyPatch, log: list, milliseconds: float, **more: Callable[..., Any]
) -> None:
    """Events ``milliseconds`` apart, a device, synchronize, and ``more`` of torch.cuda's names."""

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return milliseconds

    fakes = {
        "device": lambda _: contextlib.nullcontext(),
        "Event": Event,
        "synchronize": lambda *_: log.append("synchronize"),
        **more,
    }
    for name, fake in fakes.items():
        patch.setattr(torch.cuda, name, fake)

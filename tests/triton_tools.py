"""What the tests of Triton kernels share: the interpreter's set-up, poisoned memory, canaries.

Without a CUDA device the kernels of this process run in Triton's interpreter. Triton reads
TRITON_INTERPRET where a function is decorated, so the variable is set only while triton and our
kernels are imported: processes that tests start, and backend="auto", see the user's environment.
With a device the same tests run the compiled kernels on it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
VARIABLE = "TRITON_INTERPRET"
NUM_GUARDS = 3  # rows and columns behind a buffer that nobody may touch
MARGIN = 64  # elements before and behind it; keeps the alignment


def why_no_triton() -> str | None:
    """Why kernels cannot run in this process, compiled or interpreted, or None."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    obstacle = importlib.import_module("crpo_kernels.support").triton_obstacle(
        device, torch.float32
    )
    return None if obstacle is None else obstacle.reason


@contextlib.contextmanager
def interpreting() -> Iterator[None]:
    """Functions that are decorated or imported inside are interpreted where there is no device."""
    asked = os.environ.get(VARIABLE)
    if not torch.cuda.is_available():
        os.environ[VARIABLE] = "1"
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if asked is not None:
            os.environ[VARIABLE] = asked


def jit(function: Callable) -> Any:
    """``triton.jit`` for kernels that tests define."""
    with interpreting():
        return importlib.import_module("triton").jit(function)


def import_interpreted() -> None:
    """Import triton and every ``crpo_kernels.*_triton`` so that their kernels are interpreted.

    Raises:
        RuntimeError: triton was imported before, so that its own functions cannot be interpreted.
    """
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    if "triton" in sys.modules:
        raise RuntimeError(
            "triton: expected to be imported by tests/conftest.py first, got an earlier import. "
            f"Set {VARIABLE}=1 for the whole run, or load that plugin later."
        )
    with interpreting():
        for name in ("triton.language", "triton.experimental.gluon"):  # the latter is loaded late
            importlib.import_module(name)
        package = importlib.import_module("crpo_kernels")
        for module in pkgutil.iter_modules(package.__path__):
            if module.name.endswith("_triton"):
                importlib.import_module(f"crpo_kernels.{module.name}")


def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill fresh memory with NaN or the largest integer: a result that nobody wrote shows."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args, **kwargs) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(_fresh(tensor.dtype))

        return made

    makers = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
    makers += [(Tensor, name) for name in ("new_empty", "new_empty_strided")]
    for owner, name in makers:
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


def guard_empty(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Poison fresh memory and put guards before and behind it.

    Returns:
        ``check()``, which fails when a guard was overwritten and returns how many buffers it
        looked at.
    """
    empty, buffers = torch.empty, []

    def guarded(*shape, dtype=None, device=None, **options) -> Tensor:
        sizes = torch.Size(shape[0] if shape and not isinstance(shape[0], int) else shape)
        dtype = dtype or torch.get_default_dtype()
        outer = empty(sizes.numel() + 2 * MARGIN, dtype=dtype, device=device, **options)
        outer.fill_(_guard(dtype))
        inside = outer[MARGIN : MARGIN + sizes.numel()].fill_(_fresh(dtype))
        buffers.append(outer)
        return inside.view(sizes)

    def like(tensor: Tensor, *shape, dtype=None, device=None, **options) -> Tensor:
        shape = shape or tensor.shape
        return guarded(
            *shape, dtype=dtype or tensor.dtype, device=device or tensor.device, **options
        )

    monkeypatch.setattr(torch, "empty", guarded)
    monkeypatch.setattr(torch, "empty_like", like)
    monkeypatch.setattr(Tensor, "new_empty", like)

    def check() -> int:
        for number, outer in enumerate(buffers):
            touched = outer != _guard(outer.dtype)
            touched[MARGIN : outer.numel() - MARGIN] = False
            first = touched.nonzero()[:1].flatten().tolist()
            what = f"buffer {number}, {outer.numel() - 2 * MARGIN} x {outer.dtype}"
            assert not first, f"{what}: element {first[0] - MARGIN} holds {outer[first[0]].item()}"
        return len(buffers)

    return check


class Guarded:
    """A tensor inside a larger one whose last rows and columns must stay as they are.

    ``tensor`` is ``[*shape]`` with the pitch of the larger buffer and holds NaN (integers: the
    largest value) until a kernel writes it; ``check()`` fails when anything around it changed.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> None:
        outer = [size + NUM_GUARDS for size in shape]
        self.value = _guard(dtype)
        self.buffer = torch.full(outer, self.value, dtype=dtype, device=device)
        self.inside = torch.zeros(outer, dtype=torch.bool, device=device)
        where = tuple(slice(0, size) for size in shape)
        self.inside[where] = True
        self.tensor = self.buffer[where]
        self.tensor.fill_(_fresh(dtype))

    def check(self) -> None:
        """Fail, naming the first guard that was overwritten."""
        touched = (self.buffer != self.value) & ~self.inside
        first = touched.nonzero()[:1].tolist()
        assert not first, f"guard {first[0]} holds {self.buffer[tuple(first[0])].item()}"


def _fresh(dtype: torch.dtype) -> float | int:
    """What unwritten memory holds."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return 1 if dtype == torch.bool else torch.iinfo(dtype).max


def _guard(dtype: torch.dtype) -> float | int:
    """What a guard holds."""
    return -77.0 if dtype.is_floating_point or dtype.is_complex else 77

"""The set-up itself: kernels of this process run, the environment is as it was, guards notice."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import children
import triton_tools
from triton_tools import Guarded


def test_the_variable_is_left_as_it_was():
    """A process that a test starts must see what the user's shell says."""
    code = "import os, sys; sys.path.insert(0, 'tests'); import conftest; print(dict(os.environ))"
    for value in (None, "1"):
        environment = children.environment()
        environment.pop(triton_tools.VARIABLE, None)
        environment |= {} if value is None else {triton_tools.VARIABLE: value}
        made = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            cwd=triton_tools.ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert made.returncode == 0, made.stderr
        expected = f"'{triton_tools.VARIABLE}': '{value}'"
        assert (expected in made.stdout) is (value is not None), made.stdout


def test_fresh_memory_is_poisoned(poisoned_empty):
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(2, dtype=torch.bfloat16)).isnan().all()
    assert torch.zeros(1).new_empty(4).isnan().all()
    assert torch.empty(2, dtype=torch.int32).tolist() == [2**31 - 1] * 2
    assert torch.empty_strided((2, 2), (4, 1)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_guards_notice_a_write_behind_the_last_row_or_column(dtype):
    guarded = Guarded((4, 5), dtype)
    assert guarded.tensor.stride() == (8, 1)
    guarded.tensor.fill_(1)
    guarded.check()
    for where, named in (((4, 0), r"\[4, 0\]"), ((0, 5), r"\[0, 5\]")):
        guarded.buffer[where] = 1
        with pytest.raises(AssertionError, match=f"guard {named} holds 1"):
            guarded.check()
        guarded.buffer[where] = guarded.value
    guarded.buffer[6, 7] = float("nan") if dtype.is_floating_point else 0
    with pytest.raises(AssertionError, match=r"guard \[6, 7\]"):
        guarded.check()


def test_guards_around_fresh_memory(monkeypatch):
    check = triton_tools.guard_empty(monkeypatch)
    made = torch.empty(2, 3)
    assert made.shape == (2, 3)
    assert made.isnan().all()
    assert torch.empty((4,), dtype=torch.int32).tolist() == [2**31 - 1] * 4
    assert torch.empty_like(made).shape == made.new_empty(2, 3).shape == (2, 3)
    assert made.new_empty((0,)).shape == (0,)
    assert check() == 5
    made.as_strided((7,), (1,))[6] = 0.5
    with pytest.raises(AssertionError, match=r"buffer 0, 6 x torch.float32: element 6 holds 0.5"):
        check()

"""The twin of a module in Triton: all of its functions, in one scope."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

import triton_tools
from crpo_kernels import objective

if reason := triton_tools.why_no_triton():
    pytest.skip(reason, allow_module_level=True)

import triton.language as tl

from crpo_kernels.twin_triton import triton_twin

MODULE = '''
"""Functions that call each other, with constants of every kind."""
import torch as ops

OFFSET = 0.5
TIMES = 3
MODE = "double"


def doubled(x):
    return x + x


def through_a_helper(x):
    return doubled(doubled(x)) + OFFSET


def chosen(mode, x):
    if mode == MODE:
        return doubled(x), ops.exp(x)
    return through_a_helper(x), TIMES * x
'''


@triton_tools.jit
def chosen_kernel(x_ptr, out_ptr, count, MODE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < count)
    first, second = _chosen(MODE, x)  # noqa: F821  (set by the test)
    tl.store(out_ptr + offsets, first, mask=offsets < count)
    tl.store(out_ptr + count + offsets, second, mask=offsets < count)


def load(tmp_path, text):
    path = tmp_path / "functions_of_ops.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("functions_of_ops", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_twin_rebuilds_every_function_of_a_module(tmp_path, device):
    """A helper of a helper, constants of three types, and torch's functions stay as they are."""
    module = load(tmp_path, MODULE)
    with triton_tools.interpreting():
        twin = triton_twin(module)
    assert set(vars(twin)) == {"doubled", "through_a_helper", "chosen"}
    chosen_kernel.fn.__globals__["_chosen"] = twin.chosen
    x = torch.linspace(-2, 2, 33)
    for mode in ("double", "other"):
        out = torch.full((2, 33), math.nan, device=device)
        chosen_kernel[(1,)](x.to(device), out, 33, mode, BLOCK=64)
        expected = torch.stack(module.chosen(mode, x))
        torch.testing.assert_close(out.cpu(), expected, rtol=5e-7, atol=0)
    assert module.doubled(2.5) == 5.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(x):\n    return x\n", "module: expected plain functions over the name ops, got"),
        ("import torch as ops\n\ndef f(x, y=1):\n    return x\n", "without defaults, got f"),
        ("import torch as ops\n\ndef f(x, *, y=1):\n    return x\n", "without defaults, got f"),
    ],
)
def test_what_has_no_twin_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        triton_twin(load(tmp_path, text))


def test_every_function_of_the_objective_has_a_twin():
    names = {n for n, f in vars(objective).items() if callable(f) and not n.startswith("_")}
    assert len(names) > 10
    with triton_tools.interpreting():
        assert set(vars(triton_twin(objective))) == names

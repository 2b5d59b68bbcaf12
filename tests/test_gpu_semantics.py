"""Where a GPU does otherwise than a CPU or Triton's interpreter, which therefore cannot show it.

Calls run on the device "meta": operations and launches are looked at, no values are there. Where a
compiled kernel matters, a process of its own imports triton for compiling.
"""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import children
import crpo_kernels as ck
from conftest import ROOT
from crpo_kernels.plan import RING_ROWS, default_workspace
from crpo_kernels.products import scaled
from meta_cases import ROWS, arguments, both_calls
from triton_tools import why_no_triton

needs_triton = pytest.mark.skipif(bool(why_no_triton()), reason=str(why_no_triton()))


class RoundedFactors(TorchDispatchMode):
    """Notes multiplications that would round a number without dimensions to a narrow dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if func.overloadpacket is torch.ops.aten.mul and len(tensors) == 2:
            for x, factor in (tensors, tensors[::-1]):
                if x.dim() and not factor.dim() and x.element_size() < factor.element_size():
                    self.found.append(f"{func} of {x.dtype} {list(x.shape)} and {factor.dtype} []")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["one_pass", "two_pass"])
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_the_upstream_gradient_is_not_rounded_to_bf16(backend, mode, noted_launches):
    for workspace in (None, 60_000):  # one group, several
        given = arguments("meta", True, torch.bfloat16)
        with RoundedFactors() as factors:
            both_calls(given, "crpo", backend=backend, mode=mode, workspace_bytes=workspace)
        assert not factors.found


def test_the_control_of_rounded_factors():
    with RoundedFactors() as factors:
        torch.ones(3, 2, dtype=torch.bfloat16, device="meta") * torch.ones((), device="meta")
    assert len(factors.found) == 1


def test_scaled_keeps_shape_and_dtype():
    x = torch.full((3, 2), 3.0, dtype=torch.bfloat16)
    third = torch.tensor(1 / 3)
    assert torch.equal(scaled(x, third), torch.ones_like(x))
    on_meta = scaled(x.to("meta"), third.to("meta"))
    assert on_meta.shape == x.shape
    assert on_meta.dtype == x.dtype
    assert scaled(x.to("meta")[:0], third.to("meta")).shape == (0, 2)


@pytest.mark.gpu
def test_scaled_on_a_gpu_is_what_it_is_on_a_cpu():
    x = torch.randn(64, 32).bfloat16()
    third = torch.tensor(1 / 3)
    assert torch.equal(scaled(x.cuda(), third.cuda()).cpu(), scaled(x, third))


@needs_triton
def test_numbers_of_numpy_reach_kernels_as_floats(noted_launches):
    """Triton's launcher refuses numpy.float32; the interpreter computes with it."""
    given = arguments("meta", True, torch.bfloat16)
    given |= {"temperature": np.float32(0.7), "logit_softcap": np.float32(30.0)}
    scale: dict[str, Any] = {"logit_scale": np.float32(2.0)}
    tensors = [given.pop(name) for name in ("hidden", "weight", "labels")]
    given.pop("cu_seqlens")
    ck.linear_policy_loss(*tensors, **given, **scale, rows=ROWS, backend="triton")
    values = [x for launch in noted_launches for x in launch.arguments.values()]
    numbers = [x for x in values if isinstance(x, np.generic)]
    assert noted_launches
    assert all(isinstance(x, float) for x in numbers), numbers


VARIANTS = """
from benchmarks.compile_gate.report import TARGETS, Job
from benchmarks.compile_gate.inspect_triton import specialisation_key
from benchmarks.compile_gate.shipped_calls import call_head
from crpo_kernels.launch_triton import recording
for mode in ("one_pass", "two_pass"):
    keys = {}
    for num_rows in (1, 3000, 3008):
        with recording() as launches:
            call_head(mode, (num_rows, 700))
        for x in launches:
            key = specialisation_key(Job("", x.kernel, x.arguments, x.meta), TARGETS["sm_90"])
            keys.setdefault(x.kernel.__name__, set()).add(key)
    assert keys and all(len(found) == 1 for found in keys.values()), keys
"""
OPTIONS = """
import importlib, pkgutil, crpo_kernels
from triton import JITFunction
from triton.backends.amd.compiler import HIPOptions
from triton.backends.nvidia.compiler import CUDAOptions
options = {"grid", "warmup", "device", "stream", *CUDAOptions.__dataclass_fields__}
options |= set(HIPOptions.__dataclass_fields__)
names = [x.name for x in pkgutil.iter_modules(crpo_kernels.__path__) if x.name.endswith("_triton")]
members = [x for n in names for x in vars(importlib.import_module("crpo_kernels." + n)).items()]
found = {n: x for n, x in members if n.endswith("_kernel") and isinstance(x, JITFunction)}
assert len(found) >= 5, found
for name, kernel in found.items():
    assert not options & set(kernel.arg_names), (name, options & set(kernel.arg_names))
"""


@needs_triton
@pytest.mark.parametrize("script", [VARIANTS, OPTIONS], ids=["variants", "options"])
def test_compiled_kernels(script):
    """The number of rows makes no variants, and no argument is named as an option of a launch.

    It changes with every batch, and a variant compiles for a second. An option of an argument's
    name would take its value: launches pass all by name.
    """
    environment = children.environment()
    environment.pop("TRITON_INTERPRET", None)
    made = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr


def test_the_default_workspace_is_half_of_what_is_free(monkeypatch):
    weight: Any = SimpleNamespace(
        device=torch.device("cuda", 0), numel=lambda: 1 << 20, shape=(1 << 10, 1 << 10)
    )
    figures = {"reserved_bytes": 5 << 20, "allocated_bytes": 3 << 20}
    stats = {name: {"all": {"current": value}} for name, value in figures.items()}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda _: stats, raising=False)
    for free, expected in ((2 << 20, 2 << 20), (1 << 40, (4 << 20) + 8 * RING_ROWS * 1024)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 1 << 40))
        assert default_workspace(weight) == expected

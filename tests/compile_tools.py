"""Shared by the tests of torch.compile: eager against compiled."""

from __future__ import annotations

import pytest
import torch

import crpo_kernels as ck
import triton_tools
from numerics import assert_near, make_problem, spec_of

SIZE = {"num_rows": 13, "vocab": 67, "dim": 8}
BACKENDS = ("torch", "triton")


def need(backend):
    reason = triton_tools.why_no_triton() if backend == "triton" else None
    if reason:
        pytest.skip(reason)


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def place(problem, device):
    for name in ("hidden", "weight", "labels", "bias", "temperature", "cu_seqlens"):
        setattr(problem, name, getattr(problem, name).to(device))
    problem.vectors = {k: v.to(device) for k, v in problem.vectors.items()}
    return problem


def problem_on(device, **changes):
    return place(make_problem(**{**SIZE, **changes}), device)


def results(function, leaves):
    """What ``function`` returns for fresh leaves, flat, and the gradients of its first result."""
    leaves = [leaf if leaf is None else leaf.detach().clone().requires_grad_() for leaf in leaves]
    loss, *others = function(*leaves)
    loss.backward()
    grads = [leaf.grad for leaf in leaves if leaf is not None]
    return [loss.detach(), *others, *grads]


def assert_same(function, leaves, tolerance=0.0):
    """Compiled and eager agree: to the bit where the operator runs the code of the eager call."""
    truth, value = results(function, leaves), results(compiled(function), leaves)
    for number, (want, got) in enumerate(zip(truth, value, strict=True)):
        assert got.dtype == want.dtype, number
        assert_near(got, want, tolerance, str(number))
    return truth


def loss_step(problem, preset, options, dtype):
    """A model that ends in the loss: (hidden, weight, bias) -> loss, all statistics, a metric."""
    options = dict(options)
    drop = options.pop("drop", ())
    vectors = {k: v.to(dtype) for k, v in problem.vectors.items() if k not in drop}
    if options.get("temperature") == "per token":
        options["temperature"] = problem.temperature.to(dtype)
    spec = spec_of(preset)

    def step(hidden, weight, bias):
        loss, stats = ck.linear_policy_loss(
            torch.tanh(hidden) * 2, weight, problem.labels, bias=bias, spec=spec,
            cu_seqlens=problem.cu_seqlens, **vectors, **options,
        )  # fmt: skip
        total, count = stats.sums()["entropy"]
        return loss * -0.37, *stats, total / count, stats.logprobs.exp().mean()

    return step

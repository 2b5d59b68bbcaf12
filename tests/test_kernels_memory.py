"""Extra memory in live tensor bytes: under workspace and gradients, and flat in T."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import crpo_kernels as ck
from benchmarks.live_bytes import LiveBytes
from crpo_kernels.plan import BYTES_OF_VECTORS, make_plan
from crpo_kernels.spec import ObjectiveSpec
from triton_tools import why_no_triton

needs_triton = pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))


def extra_bytes(num_rows, vocab, dim, dtype, *, ignored=False, frozen=False, **options):
    """(peak bytes beyond the inputs, bytes of the gradients) of forward and backward."""
    hidden = torch.randn(num_rows, dim).to(dtype).requires_grad_()
    weight = torch.randn(vocab, dim).to(dtype).requires_grad_(not frozen)
    labels = torch.randint(0, vocab, (num_rows,))
    if ignored:
        labels[::2] = ck.IGNORE_INDEX
    vectors = torch.randn(4, num_rows)
    with LiveBytes(hidden, weight, labels, vectors) as counter:
        loss, _ = ck.linear_policy_loss(
            hidden,
            weight,
            labels,
            advantages=vectors[0],
            token_weights=vectors[1],
            entropy_weights=vectors[2],
            ref_logprobs=vectors[3],
            spec=ObjectiveSpec.preset("crpo"),
            **options,
        )
        loss.backward()
    accumulator = 4 * vocab * dim if not frozen else 0
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    return counter.peak, gradients, accumulator


@pytest.mark.parametrize("mode", ["one_pass", "two_pass"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("workspace", [1 << 20, 6 << 20])
def test_extra_memory_is_under_workspace_and_gradients(mode, dtype, workspace):
    for ignored in (False, True):
        peak, gradients, accumulator = extra_bytes(
            1024, 3000, 32, dtype, mode=mode, workspace_bytes=workspace, ignored=ignored
        )
        scale = 2 if dtype == torch.float64 else 1
        assert peak <= workspace + gradients + scale * accumulator


@pytest.mark.parametrize("mode", ["one_pass", "two_pass"])
def test_extra_memory_is_flat_in_t_beyond_the_bound(mode):
    """Rows x V never beyond 1024 fp32 rows (D is small): what grows is O(T)."""
    vocab, dim = 2000, 32
    small, _, _ = extra_bytes(2048, vocab, dim, torch.float32, mode=mode)
    large, _, _ = extra_bytes(4096, vocab, dim, torch.float32, mode=mode)
    per_row = (large - small) / (4096 - 2048)
    assert per_row < 3 * 4 * dim + 160  # gradients, their copies and vectors, in bytes a row
    assert small < 1024 * vocab * 4 * 1.6


class CastSums(TorchDispatchMode):
    """Elements of the largest tensor that is summed in another dtype: a CPU copies all of it."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.sum.dim_IntList and (kwargs or {}).get("dtype") not in (
            None,
            args[0].dtype,
        ):
            self.largest = max(self.largest, args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["one_pass", "two_pass"])
def test_the_gradient_of_a_bias_copies_no_chunk(mode):
    hidden = torch.randn(300, 8).bfloat16().requires_grad_()
    weight = torch.randn(2000, 8).bfloat16().requires_grad_()
    bias = torch.randn(2000).bfloat16().requires_grad_()
    weights = torch.rand(300)
    sizes = {"backend": "torch", "mode": mode, "workspace_bytes": 2 << 20}
    with CastSums() as sums:
        loss, _ = ck.linear_policy_loss(
            hidden, weight, torch.arange(300), bias=bias, token_weights=weights,
            spec=ObjectiveSpec("sft"), **sizes,
        )  # fmt: skip
        loss.backward()
    p = (hidden.detach() @ weight.detach().t() + bias.detach()).float().softmax(1)
    truth = (weights[:, None] * (p - torch.eye(300, 2000))).sum(0)
    assert float((bias.grad - truth).norm() / truth.norm()) < 2e-2
    assert 0 < sums.largest <= (2 << 20) // 8 // 4


def test_a_dense_loss_needs_several_times_t_v_and_the_counter_sees_it():
    peak, _, _ = extra_bytes(512, 4000, 16, torch.float32, backend="dense")
    assert peak > 4 * 512 * 4000 * 4
    fused, _, _ = extra_bytes(512, 4000, 16, torch.float32)
    assert fused < peak / 3


def test_a_frozen_head_keeps_no_gradient_factors():
    frozen, gradients, _ = extra_bytes(4096, 3000, 32, torch.float32, frozen=True)
    assert frozen < 1024 * 3000 * 4 * 1.6 + 3 * gradients


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("torch", torch.float32),
        ("torch", torch.bfloat16),
        ("torch", torch.float64),
        pytest.param("triton", torch.float32, marks=needs_triton),
    ],
)
@pytest.mark.parametrize("function", ["loss", "logprobs"])
def test_the_smallest_workspace_works_row_by_row_and_one_byte_less_is_refused(
    backend, dtype, function
):
    num_rows, vocab, dim = 6, 700, 16
    hidden, weight = torch.randn(num_rows, dim).to(dtype), torch.randn(vocab, dim).to(dtype)
    labels = torch.arange(num_rows)

    def call(**options):
        if function == "logprobs":
            options |= {"mode": "two_pass"}  # the fused kernel needs no workspace
            return ck.linear_logprobs(hidden, weight, labels, **options).entropy
        options |= {"token_weights": torch.ones(num_rows), "spec": ObjectiveSpec("sft")}
        return ck.linear_policy_loss(hidden, weight, labels, **options)[0]

    with pytest.raises(ValueError, match=r"workspace_bytes: .* got 1\. Pass") as refusal:
        call(backend=backend, workspace_bytes=1)
    least = int(re.search(r"expected at least (\d+)", str(refusal.value))[1])
    assert vocab * hidden.element_size() < least < 4 * vocab * 8
    with pytest.raises(ValueError, match=f"at least {least}, .* got {least - 1}"):
        call(backend=backend, workspace_bytes=least - 1)
    found = call(backend=backend, workspace_bytes=least)
    torch.testing.assert_close(found, call(backend="dense"), rtol=2e-2, atol=1e-5)
    if function == "loss" and backend == "torch":
        options = {"backend": backend, "workspace_bytes": least}
        peak, gradients, accumulator = extra_bytes(num_rows, vocab, dim, dtype, **options)
        vectors = BYTES_OF_VECTORS * num_rows
        assert peak <= least + vectors + gradients + accumulator * hidden.element_size() / 4 * 2


@pytest.mark.parametrize("needs_weight_grad", [True, False])
def test_chunks_follow_the_bound_of_the_design(needs_weight_grad):
    def rows(num_rows, vocab, dim, dtype=torch.bfloat16, workspace=None):
        return make_plan(
            torch.empty(1, dim, dtype=dtype, device="meta"),
            torch.empty(vocab, dim, dtype=dtype, device="meta"),
            num_rows,
            backend="torch",
            mode="one_pass",
            workspace_bytes=workspace,
            needs_weight_grad=needs_weight_grad,
            is_compiled=False,
        ).chunk_rows

    assert rows(2048, 151936, 1024) == 2048  # one chunk: 622 MB of bf16 within 1 GiB
    assert rows(100_000, 1000, 4096) <= (8192 if needs_weight_grad else 2048)
    assert rows(100_000, 1000, 64, torch.float32) <= 1024
    with pytest.raises(ValueError, match=r"workspace_bytes: expected at least 10512, .* got 10511"):
        rows(10, 1000, 64, workspace=10_511)
    assert rows(10, 1000, 64, workspace=10_512) == 1
    assert rows(0, 1000, 64) == 1

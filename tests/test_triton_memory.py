"""Memory of the Triton loop at real shapes, counted on fake tensors: kernels are left out."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import crpo_kernels as ck
import triton_tools
from benchmarks.gpu_gate.targets import TARGETS
from benchmarks.live_bytes import LiveBytes
from triton_cases import peaks

if reason := triton_tools.why_no_triton():
    pytest.skip(reason, allow_module_level=True)

GIB = 2**30
PADDED = 151936 + 7  # a vocabulary whose rows are padded


@pytest.mark.parametrize("shape", TARGETS, ids=str)
def test_targets_of_the_design(shape):
    for target in TARGETS[shape]:
        if target.gib is not None:
            needs_weight = target.key != "frozen"
            forward, backward = peaks(*shape, needs_weight=needs_weight)
            d_hidden = 2 * shape[0] * shape[2]
            d_weight = 2 * shape[1] * shape[2] * needs_weight
            used = max(forward - d_hidden, backward - d_hidden - d_weight)
            assert used <= target.gib * GIB, (target.key, used / GIB)


@pytest.mark.parametrize("mode", ["one_pass", "two_pass"])
@pytest.mark.parametrize("ignored", [False, True])
def test_a_workspace_bounds_logits_and_gradient_factors(mode, ignored):
    """What is beyond it: gradients (d_hidden also scaled), and a sum of d_weight in fp32."""
    for num_rows, vocab, dim in ((4096, PADDED, 1024), (20_000, 32_003, 512), (700, 131_072, 4096)):
        for workspace in (100 << 20, 500 << 20, 3 << 30):
            found = peaks(
                num_rows, vocab, dim, ignored=ignored, mode=mode, workspace_bytes=workspace
            )
            gradients = 2 * num_rows * dim * 2 + vocab * dim * (2 + 4)
            assert max(found) <= workspace + gradients, (num_rows, vocab, workspace)


@pytest.mark.parametrize("mode", ["one_pass", "two_pass"])
def test_memory_is_flat_in_t(mode):
    """Beyond some thousand rows only vectors and d_hidden grow, a few bytes a row."""
    vocab, dim = 131_072, 1024
    small, large = (max(peaks(n, vocab, dim, mode=mode)) for n in (16_384, 65_536))
    per_row = (large - small) / (65_536 - 16_384)
    assert per_row <= 2 * 2 * dim + 256, "d_hidden twice and vectors"
    logits = 4 * 16_384 * vocab
    assert small < logits / 3, "never the logits of all rows"


def test_a_frozen_head_keeps_no_gradient_factors():
    vocab, dim = 131_072, 4096
    for num_rows in (4096, 32_768):
        found = max(peaks(num_rows, vocab, dim, needs_weight=False))
        assert found <= 1024 * vocab * (4 + 2) + (1 << 25) + num_rows * (4 * dim + 256)


@pytest.mark.parametrize("mode", ["fused", "two_pass"])
def test_scoring_keeps_one_ring_or_no_logits_at_all(mode):
    vocab, dim = 131_072, 1024
    with FakeTensorMode(allow_non_fake_inputs=True):
        hidden = torch.empty(50_000, dim, dtype=torch.bfloat16)
        weight = torch.empty(vocab, dim, dtype=torch.bfloat16)
    with LiveBytes(hidden, weight) as counter, torch.no_grad():
        labels = torch.zeros(50_000, dtype=torch.int64)
        ck.linear_logprobs(hidden, weight, labels, backend="triton", mode=mode)
    ring = 0 if mode == "fused" else 1024 * vocab * 4
    assert ring <= counter.peak <= ring + 50_000 * 256

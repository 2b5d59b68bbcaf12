"""What needs a device: CUDA graphs, no waiting, real offsets and peaks; products on any device."""

from __future__ import annotations

import pytest
import torch

import crpo_kernels as ck
import triton_tools
from benchmarks.live_bytes import CudaBytes
from crpo_kernels.products import add_product, product
from numerics import assert_near, make_problem, spec_of
from triton_cases import each_way, peaks, shrink

if reason := triton_tools.why_no_triton():
    pytest.skip(reason, allow_module_level=True)

GIB = 2**30


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_are_fp32_in_rows_of_any_pitch(dtype, device):
    """Results wider than their factors, into padded rows, from transposed and padded factors."""
    a = torch.randn(24, 32, device=device).to(dtype)
    b = torch.randn(40, 32, device=device).to(dtype)
    padded = torch.full((24, 48), -77.0, device=device)
    out = padded[:, :40]
    assert product(a, b.t(), out).data_ptr() == padded.data_ptr()
    exact = a.double() @ b.double().t()
    assert_near(out, exact, 1e-6)
    assert (padded[:, 40:] == -77.0).all()
    d_raw = torch.full((24, 48), torch.nan, device=device, dtype=dtype)[:, :40]
    d_raw.copy_(torch.randn(24, 40, device=device))
    total = torch.full((40, 32), torch.nan, device=device)
    product(d_raw.t(), a, total)  # the first group writes
    add_product(total, d_raw.t(), a)
    assert_near(total, 2 * (d_raw.double().t() @ a.double()), 1e-6)


def leaves_of(problem, dtype=torch.bfloat16):
    """Inputs of a call as tensors that a captured graph may read again."""
    hidden, weight, _ = problem.leaves(dtype)
    return hidden, weight, problem.labels, {k: v.float() for k, v in problem.vectors.items()}


@each_way
@pytest.mark.gpu
def test_a_cuda_graph_replays_on_other_values(way, monkeypatch):
    """Bit by bit what an ordinary call gives; ``rows`` on the device, sizes from a workspace."""
    shrink(monkeypatch)
    problems = [make_problem(num_rows=32, vocab=48, dim=16, ignored=0, seed=s) for s in (0, 1)]
    first, second = (leaves_of(p.rounded(torch.bfloat16, "cuda")) for p in problems)
    rows = torch.arange(0, 32, 2, device="cuda")
    options = {"spec": spec_of("crpo"), "backend": "triton", "rows": rows}
    options |= {"workspace_bytes": 1 << 20, **way}

    def step(hidden, weight, labels, vectors):
        loss, stats = ck.linear_policy_loss(hidden, weight, labels, **vectors, **options)
        return (loss.detach(), stats.entropy, *torch.autograd.grad(loss, (hidden, weight)))

    expected = [value.clone() for value in step(*second)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and sets libraries up
        for _ in range(2):
            step(*first)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step(*first)
    with torch.no_grad():
        for own, other in zip(first[:3], second[:3], strict=True):
            own.copy_(other)
        for name, own in first[3].items():
            own.copy_(second[3][name])
    for _ in range(2):  # a second replay starts from what the first left
        for value in result:
            value.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        for got, value in zip(result, expected, strict=True):
            assert torch.equal(got, value)


@each_way
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["list", "device"])
def test_the_host_does_not_wait_whatever_the_chunks(way, kind, monkeypatch):
    shrink(monkeypatch)
    problem = make_problem(num_rows=33, vocab=48, dim=16, ignored=4).rounded(torch.bfloat16, "cuda")
    hidden, weight, labels, vectors = leaves_of(problem)
    counted = (labels != ck.IGNORE_INDEX).nonzero()[:, 0]
    rows = counted if kind == "device" else counted.tolist()
    options = {"spec": spec_of("dapo"), "backend": "triton", "rows": rows, **way}
    for mode in ("default", "error"):  # the first call compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            loss, stats = ck.linear_policy_loss(hidden, weight, labels, **vectors, **options)
            loss.backward()
            stats.sums()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["one_pass", "two_pass"])
def test_kept_rows_beyond_2_to_31_elements(mode):
    """16 384 rows of 151 936 kept in one buffer: the last ones equal a call of them alone."""
    num_rows, vocab, dim = 16_384, 151_936, 7_168 if mode == "one_pass" else 128
    needed = 6 * num_rows * vocab + 16 * vocab * dim
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / GIB:.0f} GiB of free GPU memory")
    g = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(num_rows, dim, device="cuda", generator=g) * (3 / dim**0.5)
    weight = torch.randn(vocab, dim, device="cuda", generator=g, dtype=torch.bfloat16)
    labels = torch.randint(vocab, (num_rows,), device="cuda", generator=g)
    weights = torch.zeros(num_rows, device="cuda")
    late = slice(num_rows - 64, num_rows)
    weights[late] = 1.0

    def run(rows):
        own = hidden[rows].bfloat16().requires_grad_()
        head = weight.detach().requires_grad_()
        loss, stats = ck.linear_policy_loss(
            own, head, labels[rows], token_weights=weights[rows], entropy_weights=weights[rows],
            spec=ck.ObjectiveSpec.preset("sft"), backend="triton", mode=mode,
            workspace_bytes=5 * num_rows * vocab // 2,
        )  # fmt: skip
        loss.backward()
        return own.grad, head.grad, stats

    d_hidden, d_weight, stats = run(slice(0, num_rows))
    assert not d_hidden[: num_rows - 64].any(), "rows without weight"
    assert stats.logprobs.isfinite().all()
    late_hidden, late_weight, late_stats = run(late)
    assert_near(stats.entropy[late], late_stats.entropy, 1e-5)
    assert_near(d_hidden[late], late_hidden, 2e-2)
    assert_near(d_weight, late_weight, 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"mode": "two_pass"}, {"workspace_bytes": 256 << 20}])
def test_real_peaks_are_those_counted_on_fake_tensors(options):
    num_rows, vocab, dim = 4096, 32_003, 1024
    kind = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    hidden, weight = torch.randn(num_rows, dim, **kind), torch.randn(vocab, dim, **kind)
    labels = torch.randint(vocab, (num_rows,), device="cuda")
    vectors = torch.randn(4, num_rows, device="cuda")
    names = ("advantages", "token_weights", "entropy_weights", "ref_logprobs")
    given = dict(zip(names, vectors, strict=True))
    spec = ck.ObjectiveSpec.preset("crpo")
    for _ in range(2):  # the first call compiles, and cuBLAS takes its workspace
        hidden.grad = weight.grad = None
        with CudaBytes(hidden.device) as counter:
            loss, _ = ck.linear_policy_loss(
                hidden, weight, labels, spec=spec, backend="triton", **given, **options
            )
            loss.backward()
            peak = counter.peak
    counted = max(peaks(num_rows, vocab, dim, **options))
    assert peak <= 1.03 * counted + (32 << 20), (peak, counted)

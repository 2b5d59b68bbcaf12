"""The head in eight bits: values by hand, the same numbers from every backend, bounded memory."""

from __future__ import annotations

import pytest
import torch

import crpo_kernels as ck
from benchmarks.live_bytes import LiveBytes
from crpo_kernels import quantised as eight
from numerics import make_problem
from triton_tools import why_no_triton

FP8 = torch.float8_e4m3fn
needs_triton = pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))


def score(problem, dtype=torch.float32, **options):
    hidden, weight = problem.hidden.to(dtype), problem.weight.to(dtype)
    options = {"temperature": 0.9, "bias": problem.bias.to(dtype), **options}
    with torch.no_grad():
        return ck.linear_logprobs(hidden, weight, problem.labels, **options)


def test_values_and_scales_by_hand(monkeypatch):
    """Of amax 448 and 28: steps of 32 from 256 on, of 4 from 32 on; by blocks."""
    rows = torch.tensor([[448.0, 269.0, -41.0, 0.0], [28.0, 14.0, -1.75, 0.4375], [0.0] * 4])
    monkeypatch.setattr(eight, "CACHED_ELEMENTS", 4)
    values, scales = eight.quantised(rows)
    assert values.dtype is FP8
    assert scales.tolist() == [1.0, 0.0625, 2.0**-100]
    assert values.float().tolist() == [[448, 256, -40, 0], [448, 224, -28, 7], [0] * 4]
    assert eight.widened(rows)[1].tolist() == rows[1].tolist()


def test_what_is_not_finite_reaches_the_whole_row():
    rows = torch.tensor([[1.0, torch.nan], [torch.inf, 1.0], [1.0, 2.0]])
    is_nan = eight.widened(rows).isnan()
    assert is_nan[0].all()
    assert is_nan[1].any()
    assert not is_nan[2].any()
    problem = make_problem(ignored=0)
    problem.hidden[3, 2] = torch.inf
    out = score(problem, head_dtype=FP8)
    assert out.logprobs.isnan().nonzero().tolist() == [[3]]


BACKENDS = {
    "torch": {"backend": "torch"},
    "torch, small chunks": {"backend": "torch", "workspace_bytes": 12_000},
    "fused": {"backend": "triton", "mode": "fused"},
    "triton, chunks": {"backend": "triton", "mode": "two_pass"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", BACKENDS)
def test_every_backend_scores_the_same_numbers(way, dtype):
    if "triton" in BACKENDS[way]["backend"] and (reason := why_no_triton()):
        pytest.skip(reason)
    problem = make_problem()
    expected = score(problem, dtype, backend="dense", head_dtype=FP8)
    found = score(problem, dtype, head_dtype=FP8, **BACKENDS[way])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
    exact = score(problem, dtype, backend="dense")
    errors = (found.logprobs - exact.logprobs).abs()
    assert 0.01 < errors.max() < 1.0  # D = 16 averages little


def test_errors_shrink_with_the_number_of_products():
    """Of unit variance logits: each product is off by some per cent, their sum by less."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 1024, generator=g)
    weight = torch.randn(400, 1024, generator=g) / 32
    labels = torch.randint(0, 400, (64,), generator=g)
    exact, found = (
        ck.linear_logprobs(hidden, weight, labels, backend="torch", head_dtype=head_dtype)
        for head_dtype in (None, FP8)
    )
    rms = (exact.logprobs - found.logprobs).square().mean().sqrt()
    assert 0.01 < rms < 0.06  # 2^-4 / sqrt(3) a factor, uniform: .036 of logits of 1


def test_off_means_off():
    problem = make_problem()
    for backend in ("torch", "dense"):
        plain = score(problem, backend=backend)
        assert torch.equal(
            score(problem, backend=backend, head_dtype=None).logprobs, plain.logprobs
        )
        assert not torch.equal(score(problem, backend=backend, head_dtype=FP8)[0], plain.logprobs)


def test_a_changed_weight_is_quantised_anew():
    """Also where neither its address nor its version tells: nothing is kept between calls."""
    problem = make_problem()
    first = score(problem, head_dtype=FP8)
    problem.weight.data.mul_(0.5)
    second = score(problem, head_dtype=FP8)
    half = score(problem, backend="dense", head_dtype=FP8)
    assert (second.logprobs - first.logprobs).abs().max() > 0.1
    torch.testing.assert_close(second.logprobs, half.logprobs, rtol=0, atol=2e-5)


def test_the_widened_weight_never_exists_as_a_whole():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 256, generator=g), torch.randn(4096, 256, generator=g)
    labels = torch.tensor([1, 2, 3, 4])
    with LiveBytes(hidden, weight, labels) as counter, torch.no_grad():
        ck.linear_logprobs(
            hidden, weight, labels, backend="torch", head_dtype=FP8, workspace_bytes=1 << 20
        )
    assert counter.peak < 1 << 20 < weight.nbytes


def test_what_cannot_be_quantised_is_refused():
    problem = make_problem()
    hidden, weight = problem.hidden.float(), problem.weight.float()
    with pytest.raises(ValueError, match=r"head_dtype: expected None or torch.float8_e4m3fn, got"):
        ck.linear_logprobs(hidden, weight, problem.labels, head_dtype=torch.int8)
    with pytest.raises(ValueError, match=r"head_dtype: .* where a gradient is asked for.*no_grad"):
        ck.linear_logprobs(hidden, weight.requires_grad_(), problem.labels, head_dtype=FP8)
    with pytest.raises(ValueError, match=r"head_dtype: expected None for float64 tensors"):
        ck.linear_logprobs(problem.hidden, problem.weight, problem.labels, head_dtype=FP8)
    asked = {"num_rows": 4, "vocab_size": 10, "hidden_size": 4, "head_dtype": FP8}
    with pytest.raises(ValueError, match=r"head_dtype: expected None where a gradient"):
        ck.explain_choice(**asked)
    assert "scoring by chunks" in ck.explain_choice(**asked, backend="torch", is_scoring=True)[0]


def test_in_a_compiled_graph():
    problem = make_problem(ignored=0)
    hidden, weight = problem.hidden.float(), problem.weight.float()

    def call(hidden, weight):
        return ck.linear_logprobs(
            hidden, weight, problem.labels, head_dtype=FP8, backend="torch"
        ).logprobs

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(hidden, weight), call(hidden, weight))

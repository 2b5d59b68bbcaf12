"""Numerics that bite: offsets, -inf, NaN, peaked rows, bf16; generated loops equal eager ones."""

from __future__ import annotations

import math

import pytest
import torch

import crpo_kernels as ck
from crpo_kernels import chunked, compilation
from crpo_kernels.rows import LogitView
from crpo_kernels.rows_compiled import CompiledRows
from crpo_kernels.rows_torch import EagerRows
from crpo_kernels.spec import ObjectiveSpec
from crpo_kernels.terms import Coefficients
from numerics import (
    FAST_WAYS,
    WAYS,
    assert_near,
    assert_same_result,
    make_problem,
    rel_error,
    rms,
    run_loss,
    spec_of,
    way_id,
)


def identity_problem(logits, labels):
    """hidden and weight whose products are exactly ``logits``."""
    return logits, torch.eye(logits.shape[1], dtype=logits.dtype), labels


@pytest.mark.parametrize("backend", ["torch", "dense"])
@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4])
def test_a_common_offset_of_the_logits_cancels(backend, offset):
    logits = torch.randn(9, 50) * 2
    logits = (logits + offset) - offset  # what survives the offset in fp32
    hidden, weight, labels = identity_problem(logits + offset, torch.arange(9))
    out = ck.linear_logprobs(hidden, weight, labels, backend=backend)
    log_p = logits.double().log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    assert float((out.entropy - entropy).abs().max()) < 2e-6
    assert float((out.logprobs - log_p[torch.arange(9), labels]).abs().max()) < 2e-6


@pytest.mark.parametrize("way", WAYS, ids=way_id)
def test_minus_inf_logits_have_probability_zero_and_no_nan(way):
    problem = make_problem(num_rows=9, ignored=0)
    problem.labels = problem.labels % 60
    truth = make_problem(num_rows=9, ignored=0)
    truth.labels = problem.labels
    truth.weight, truth.bias = truth.weight[:64], truth.bias[:64]
    problem.bias[64:] = -torch.inf  # a padded vocabulary
    options = {"spec": spec_of("crpo"), "bias": True, "temperature": 0.5}
    got = run_loss(problem, torch.float64, **options, **way)
    expected = run_loss(truth, torch.float64, backend="dense", **options)
    assert_near(got[0], expected[0], 1e-12)
    assert_near(got[1]["hidden"], expected[1]["hidden"], 1e-12)
    assert_near(got[1]["weight"][:64], expected[1]["weight"], 1e-12)
    assert not got[1]["weight"][64:].any()
    assert_near(got[2].entropy, expected[2].entropy, 1e-12)


@pytest.mark.parametrize("way", WAYS, ids=way_id)
def test_rows_of_only_minus_inf_stay_finite(way):
    problem = make_problem(num_rows=4, ignored=0)
    problem.bias.fill_(-torch.inf)
    _, grads, stats = run_loss(problem, torch.float32, spec=spec_of("crpo"), bias=True, **way)
    assert all(grad.isfinite().all() for grad in grads.values())
    torch.testing.assert_close(stats.entropy, torch.full((4,), math.log(101)))
    torch.testing.assert_close(stats.logprobs, torch.full((4,), -math.log(101)))
    assert stats.lse.isfinite().all()


@pytest.mark.parametrize("way", WAYS, ids=way_id)
def test_nan_in_a_counted_row_reaches_loss_and_gradient(way):
    for name in ("hidden", "weight", "bias"):
        problem = make_problem()
        getattr(problem, name).reshape(-1)[17] = torch.nan  # row 1 of hidden is counted
        for preset in ("crpo", "cispo", "sft"):
            loss, grads, _ = run_loss(
                problem, torch.float32, spec=spec_of(preset), bias=True, **way
            )
            assert loss.isnan(), (name, preset)
            assert grads["weight"].isnan().any(), (name, preset)
    problem = make_problem()
    problem.vectors["advantages"][1] = torch.nan
    assert run_loss(problem, torch.float32, spec=spec_of("dapo"), **way)[0].isnan()


def test_true_class_gradient_of_a_peaked_row():
    """p_y = .999 in bf16, where 1 - p_y would be 0 or .004: it is formed in fp32, rounded once."""
    logits = torch.zeros(1, 4, dtype=torch.bfloat16)
    logits[0, 2] = 8.0
    hidden, weight, labels = identity_problem(logits, torch.tensor([2]))
    hidden.requires_grad_()
    ck.linear_logprobs(hidden, weight, labels).logprobs.sum().backward()
    rest = 3 * math.exp(-8.0) / (1 + 3 * math.exp(-8.0))
    assert float(hidden.grad[0, 2]) == pytest.approx(rest, rel=2**-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_the_logit_gradient_sum_to_the_slope_of_lse(dtype):
    torch.manual_seed(0)
    logits = (3 * torch.randn(7, 40)).to(dtype)
    hidden, weight, labels = identity_problem(logits, torch.arange(7))
    hidden.requires_grad_()
    out = ck.linear_logprobs(hidden, weight, labels)
    g, q, l = torch.randn(3, 7)  # noqa: E741
    (out.logprobs * g + out.entropy * q + out.lse * l).sum().backward()
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    assert float((hidden.grad.float().sum(1) - l).abs().max()) < tolerance


def naive(hidden, weight, labels, vectors, temperature):
    """Plain torch in the dtype of its inputs, as a trainer without a kernel writes it."""
    logits = (hidden @ weight.t()).float() / temperature
    log_p = logits.log_softmax(1)
    logprobs = log_p.gather(1, labels[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(1)
    ratio = (logprobs - vectors["old_logprobs"]).exp()
    adv = vectors["advantages"]
    bracket = -torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv)
    loss = (vectors["token_weights"] * bracket + vectors["entropy_weights"] * entropy).sum()
    return loss, logprobs, entropy


@pytest.mark.parametrize("way", FAST_WAYS, ids=way_id)
def test_bf16_error_is_at_most_twice_that_of_naive_torch(way):
    problem = make_problem(num_rows=192, vocab=1999, dim=64, ignored=0, seed=3)
    problem.hidden *= 0.3  # entropies of 1-3 nats
    exact = [x.bfloat16().double().requires_grad_() for x in (problem.hidden, problem.weight)]
    logits = exact[0].detach() @ exact[1].detach().t() / 0.8
    logprobs = logits.log_softmax(1)[torch.arange(192), problem.labels]
    problem.vectors["old_logprobs"] = logprobs + 0.2 * torch.randn(192, dtype=torch.float64)
    truth = naive(*exact, problem.labels, problem.vectors, 0.8)
    truth[0].backward()
    floats = {k: v.float() for k, v in problem.vectors.items()}
    rival = [x.detach().bfloat16().requires_grad_() for x in exact]
    loss, logprobs, entropy = naive(*rival, problem.labels, floats, 0.8)
    loss.backward()
    ours = [x.detach().bfloat16().requires_grad_() for x in exact]
    vectors = {k: floats[k] for k in ("advantages", "token_weights", "entropy_weights")}
    got, stats = ck.linear_policy_loss(
        *ours,
        problem.labels,
        old_logprobs=floats["old_logprobs"],
        temperature=0.8,
        **vectors,
        **{**way, **({"workspace_bytes": 900_000} if "workspace_bytes" in way else {})},
    )
    got.backward()
    pairs = {
        "loss": (got, loss, truth[0]),
        "logprobs": (stats.logprobs, logprobs, truth[1]),
        "entropy": (stats.entropy, entropy, truth[2]),
        "d_hidden": (ours[0].grad, rival[0].grad, exact[0].grad),
        "d_weight": (ours[1].grad, rival[1].grad, exact[1].grad),
    }
    for name, (value, rivals, true) in pairs.items():
        assert rms(value, true) <= 2 * rms(rivals, true) + 1e-6, name


def test_d_weight_of_many_chunks_is_accumulated_in_fp32():
    problem = make_problem(num_rows=512, vocab=64, dim=8, ignored=0)
    spec = ObjectiveSpec.preset("sft")
    options = {"spec": spec, "drop": ("entropy_weights", "z_loss_weights", "ref_logprobs")}
    truth = run_loss(problem, torch.float64, **options)[1]["weight"]
    one = run_loss(problem, torch.bfloat16, workspace_bytes=1 << 20, **options)[1]["weight"]
    many = run_loss(problem, torch.bfloat16, workspace_bytes=66_500, **options)[1]["weight"]
    assert rms(many, truth) <= 1.3 * rms(one, truth)


@pytest.fixture
def compiled_always(monkeypatch):
    reason = compilation.missing_toolchain()
    if reason:
        pytest.skip(f"the row passes cannot be compiled here: {reason}")
    monkeypatch.setattr(compilation, "COMPILE_ELEMENTS", 0)


def test_generated_loops_equal_the_eager_ones(compiled_always):
    view, labels = LogitView.make(torch.randn(77), torch.rand(12) + 0.5, 1.5, 6.0), torch.arange(12)
    eager = EagerRows(5, 77, torch.float32, torch.empty(0))
    generated = CompiledRows(torch.float32)
    raw = (torch.randn(12, 77) * 3).bfloat16()
    raw[3, 5], raw[4, 6] = -torch.inf, torch.nan
    labels[7] = int(raw[7].argmax())
    truth, stats = eager.stats(raw, labels, view), generated.stats(raw, labels, view)
    for a, b in zip(stats, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)
    for q in (None, torch.randn(12)):
        slopes = Coefficients(torch.randn(12), q, None)
        expected = torch.empty_like(raw)
        eager.grad_(raw, expected, labels, view, truth, slopes)
        in_place = raw.clone()
        generated.grad_(in_place, in_place, labels, view, truth, slopes)
        torch.testing.assert_close(in_place, expected, rtol=1e-2, atol=1e-4, equal_nan=True)
        assert in_place[4].isnan().any()
        assert not in_place[3].isnan().any()


def test_the_loss_with_generated_loops_equals_the_oracle(compiled_always):
    problem = make_problem()
    for way in FAST_WAYS:
        options = {"spec": spec_of("crpo"), "temperature": 0.9, "drop": ("old_logprobs",)}
        truth = run_loss(problem, torch.float64, backend="dense", **options)
        assert_same_result(run_loss(problem, torch.float32, **options, **way), truth, 1e-5)


def test_another_number_of_rows_compiles_nothing(compiled_always):
    from torch._dynamo.utils import counters

    for num_rows, seen in ((24, None), (25, None), (31, "fixed"), (50, "fixed")):
        problem = make_problem(num_rows=num_rows)
        run_loss(problem, torch.float32, spec=spec_of("crpo"), drop=("old_logprobs",))
        if seen is None:
            frames = counters["stats"]["unique_graphs"]
        assert counters["stats"]["unique_graphs"] == frames


def test_compilation_is_a_predicate_with_a_reason(monkeypatch):
    large = torch.empty(1 << 10, 8)
    reason = compilation.uncompiled_reason
    assert "too few logits" in reason(large, 1 << 10, 1 << 10)
    assert "fp64" in reason(large.double(), 1 << 20, 1 << 10)
    monkeypatch.setattr(compilation, "missing_toolchain", lambda: None)
    assert reason(large, 1 << 18, 1 << 10) is None
    from benchmarks.live_bytes import LiveBytes

    with LiveBytes():
        assert "TorchDispatchMode" in reason(large, 1 << 18, 1 << 10)
    monkeypatch.setattr(compilation, "missing_toolchain", lambda: "no C++ compiler")
    assert reason(large, 1 << 18, 1 << 10) == "no C++ compiler"


def test_without_a_compiler_the_row_passes_are_eager(monkeypatch):
    monkeypatch.setenv("PATH", "")
    compilation.missing_toolchain.cache_clear()
    assert "no C++ compiler" in compilation.missing_toolchain()
    compilation.missing_toolchain.cache_clear()
    monkeypatch.setattr(compilation, "COMPILE_ELEMENTS", 0)
    monkeypatch.setattr(compilation, "missing_toolchain", lambda: "no C++ compiler")
    monkeypatch.setattr(chunked, "CompiledRows", None)
    run_loss(make_problem(), torch.float32, spec=spec_of("dapo"))


def test_errors_of_this_file_are_measured_right():
    assert rel_error(torch.tensor([1.0, 2.1]), torch.tensor([1.0, 2.0])) == pytest.approx(0.05)
    with pytest.raises(AssertionError, match="flat index 1"):
        assert_near(torch.tensor([1.0, 2.1]), torch.tensor([1.0, 2.0]), 1e-3)


def test_generated_code_gets_no_memory_twice(monkeypatch):
    """torch.compile's code for two arguments of one memory fails for chunks of several sizes."""
    from crpo_kernels import rows_compiled

    seen = []

    def plain(function, *_variant):
        def call(*arguments):
            seen.append([x.data_ptr() for x in arguments if isinstance(x, torch.Tensor)])
            return function(*arguments)

        return call

    monkeypatch.setattr(rows_compiled, "_compiled", plain)
    hidden, weight = torch.randn(40, 8, requires_grad=True), torch.randn(300, 8)
    sizes = {"token_weights": torch.ones(40), "spec": ck.ObjectiveSpec("sft")}
    labels = torch.arange(40)
    truth, _ = ck.linear_policy_loss(hidden, weight, labels, **sizes)
    (wanted,) = torch.autograd.grad(truth, hidden)
    monkeypatch.setattr("crpo_kernels.call.uncompiled_reason", lambda *_: None)
    loss, _ = ck.linear_policy_loss(hidden, weight, labels, workspace_bytes=1 << 16, **sizes)
    (found,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(found, wanted)
    assert len(seen) == 4  # statistics and gradients of two chunks
    assert all(len(set(pointers)) == len(pointers) for pointers in seen)

"""The Triton backend whatever its inputs hold: ignored rows, NaN, -inf, nothing; one by hand."""

from __future__ import annotations

import math

import pytest
import torch

import crpo_kernels as ck
import triton_tools
from crpo_kernels.spec import ObjectiveSpec
from numerics import PRESETS, assert_near, assert_same_result, run_loss, spec_of
from triton_cases import TOLERANCE, each_way, shrink, small

if reason := triton_tools.why_no_triton():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    """Several tiles, chunks and groups at these sizes."""
    shrink(monkeypatch)


@each_way
@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_no_counted_rows_give_zeros_connected_to_the_graph(way, num_rows, device):
    problem = small(device, num_rows=num_rows)
    problem.labels.fill_(ck.IGNORE_INDEX)
    problem.cu_seqlens = torch.tensor([0, num_rows], device=device)
    for preset in PRESETS:
        options = {"spec": spec_of(preset), "bias": True, "backend": "triton", **way}
        loss, grads, stats = run_loss(problem, torch.float32, **options)
        assert float(loss) == 0.0
        assert all(grad is not None and not grad.any() for grad in grads.values())
        assert all(values.shape == (num_rows,) and not values.any() for values in stats)
    hidden, weight, _ = problem.leaves(torch.float32)
    out = ck.linear_logprobs(hidden, weight, problem.labels, backend="triton")
    sum(value.sum() for value in out).backward()
    assert not weight.grad.any()


@each_way
def test_one_row(way, device):
    problem = small(device, num_rows=1, ignored=0)
    problem.cu_seqlens = torch.tensor([0, 1], device=device)
    truth = run_loss(problem, torch.float64, spec=spec_of("gspo"), backend="dense")
    got = run_loss(problem, torch.float32, spec=spec_of("gspo"), backend="triton", **way)
    assert_same_result(got, truth, TOLERANCE)


@each_way
def test_ignored_rows_may_hold_garbage_and_inputs_are_not_changed(way, device, guarded_empty):
    problem = small(device)
    options = {"spec": spec_of("dapo", rho_mode="truncate"), "temperature": problem.temperature}
    truth = run_loss(problem, torch.float64, backend="dense", **options)
    ignored = problem.labels == ck.IGNORE_INDEX
    for vector in problem.vectors.values():
        vector[ignored] = torch.nan
    problem.hidden[ignored] = torch.inf
    hidden, weight, _ = problem.leaves(torch.float32)
    inputs = [hidden, weight, problem.labels, problem.temperature, *problem.vectors.values()]
    before = [value.detach().clone() for value in inputs]
    loss, stats = ck.linear_policy_loss(
        hidden, weight, problem.labels, **problem.vectors, **options, backend="triton", **way
    )
    loss.backward()
    grads = {"hidden": hidden.grad, "weight": weight.grad}
    assert_same_result((loss.detach(), grads, stats), truth, TOLERANCE)
    assert not hidden.grad[ignored].any()
    for now, then in zip(inputs, before, strict=True):
        torch.testing.assert_close(now.detach(), then, equal_nan=True, rtol=0, atol=0)


@each_way
def test_nan_of_a_counted_row_reaches_loss_and_gradient_but_no_other_row(way, device):
    for preset in ("crpo", "cispo", "sft"):
        problem = small(device)
        problem.hidden[2, 3] = torch.nan
        loss, grads, stats = run_loss(
            problem, torch.float32, spec=spec_of(preset), backend="triton", **way
        )
        assert loss.isnan(), preset
        assert grads["weight"].isnan().all(0).any(), preset
        rows = grads["hidden"].isnan().any(1)
        assert rows.nonzero()[:, 0].tolist() == [2], preset
        assert stats.logprobs.isnan().nonzero()[:, 0].tolist() == [2], preset
        assert stats.token_loss.isnan().nonzero()[:, 0].tolist() == [2], preset
    for name in ("advantages", "old_logprobs", "ref_logprobs", "token_weights"):
        problem = small(device)
        problem.vectors[name][2] = torch.nan
        loss, grads, _ = run_loss(
            problem, torch.float32, spec=spec_of("dapo"), backend="triton", **way
        )
        assert loss.isnan(), name
        assert grads["hidden"].isnan().any(1).nonzero()[:, 0].tolist() == [2], name


@each_way
def test_weight_zero_rows_add_nothing_whatever_their_logprobs_hold(way, device):
    problem = small(device, ignored=0)
    problem.vectors["token_weights"][::3] = 0.0
    options = {"spec": spec_of("dapo"), "backend": "triton", **way}
    truth = run_loss(problem, torch.float32, **options)
    for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs"):
        problem.vectors[name][::3] = torch.nan
    loss, grads, _ = run_loss(problem, torch.float32, **options)
    assert torch.equal(loss, truth[0])
    assert all(torch.equal(grads[name], truth[1][name]) for name in ("hidden", "weight"))


@each_way
def test_a_padded_vocabulary(way, device):
    """As a slice of the weight, whose rest is not read, or by a bias of -inf."""
    problem = small(device, ignored=0)
    problem.labels %= 30
    options = {"spec": spec_of("dapo"), "bias": True}
    cut = small(device, ignored=0)
    cut.labels, cut.weight, cut.bias = problem.labels, cut.weight[:30], cut.bias[:30]
    truth = run_loss(cut, torch.float64, backend="dense", **options)
    problem.bias[30:] = -torch.inf
    got = run_loss(problem, torch.float32, backend="triton", **options, **way)
    assert not got[1]["weight"][30:].any()
    assert not got[1]["bias"][30:].any()
    for name in ("weight", "bias"):
        got[1][name] = got[1][name][:30]
    assert_same_result(got, truth, TOLERANCE)
    padded = problem.weight.float()
    padded[30:] = torch.nan
    padded.requires_grad_()
    hidden, _, bias = cut.leaves(torch.float32, bias=True)
    loss, _ = ck.linear_policy_loss(
        hidden, padded[:30], cut.labels, bias=bias, spec=spec_of("dapo"), backend="triton",
        **problem.vectors, **way,
    )  # fmt: skip
    loss.backward()
    assert_near(loss.detach(), truth[0], TOLERANCE)
    assert_near(padded.grad[:30], truth[1]["weight"], TOLERANCE)
    assert not padded.grad[30:].any()


@each_way
def test_rows_of_only_minus_inf_stay_finite(way, device):
    problem = small(device, num_rows=4, ignored=0)
    problem.bias.fill_(-torch.inf)
    options = {"spec": spec_of("crpo"), "bias": True, "backend": "triton", **way}
    _, grads, stats = run_loss(problem, torch.float32, **options)
    assert all(grad.isfinite().all() for grad in grads.values())
    expected = torch.full((4,), math.log(40), device=device)
    torch.testing.assert_close(stats.entropy, expected)
    torch.testing.assert_close(stats.logprobs, -expected)


@each_way
def test_zero_entropy_weights_equal_none_bitwise(way, device):
    problem = small(device)
    problem.vectors["entropy_weights"] = torch.zeros(11, device=device)
    options = {"spec": spec_of("crpo"), "backend": "triton", **way}
    zeros = run_loss(problem, torch.float32, **options)
    none = run_loss(problem, torch.float32, drop=("entropy_weights",), **options)
    assert_same_result(zeros, none, 0.0)


def test_stats_by_hand(device):
    def f32(values):
        return torch.tensor(values, device=device)

    half, fifth, tenth = [0.5, 0.25, 0.25], [0.2, 0.2, 0.6], [0.1, 0.1, 0.8]
    loss, stats = ck.linear_policy_loss(
        f32([half, fifth, tenth]).log(),
        torch.eye(3, device=device),
        torch.tensor([0, 1, ck.IGNORE_INDEX], device=device),
        advantages=f32([2.0, -1.0, 9.0]),
        token_weights=f32([0.5, 0.25, 9.0]),
        entropy_weights=f32([0.1, 0.0, 9.0]),
        old_logprobs=f32([0.25, 0.4, 0.9]).log(),
        ref_logprobs=f32([1.0, 0.2, 0.9]).log(),
        rollout_logprobs=f32([0.1, 0.4, 0.9]).log(),
        spec=ObjectiveSpec(kl_coef=0.1, rho_mode="truncate", rho_cap=2.0),
        backend="triton",
    )
    kl = 1.0 - math.log(2.0)  # reference twice as likely: 2 - 1 - ln 2
    first = 2.0 * -2.4 + 0.1 * kl  # rho min(2.5, 2); ratio 2 clipped at 1.2, times 2
    entropies = [1.5 * math.log(2.0), 0.4 * math.log(5.0) - 0.6 * math.log(0.6), 0.0]
    expected = {
        "ratio": [2.0, 0.5, 0.0],
        "rho": [2.0, 1.0, 0.0],
        "kl": [kl, 0.0, 0.0],
        "token_loss": [first, 0.8, 0.0],
        "is_clipped": [True, True, False],
        "is_top1": [True, False, False],
        "is_counted": [True, True, False],
        "entropy": entropies,
        "lse": [0.0, 0.0, 0.0],
        "logprobs": [-math.log(2.0), -math.log(5.0), 0.0],
    }
    for name, values in expected.items():
        assert getattr(stats, name).tolist() == pytest.approx(values, abs=2e-6), name
    assert float(loss) == pytest.approx(0.5 * first + 0.25 * 0.8 + 0.1 * entropies[0], rel=1e-6)

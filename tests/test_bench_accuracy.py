"""Errors against fp64, and candidates with planted faults that must be marked wrong."""

from __future__ import annotations

import re
from dataclasses import replace
from math import log

import pytest
import torch

from benchmarks.losses import baselines
from benchmarks.losses.accuracy import FLOORS, TIMES, Truth, differences, what_is_wrong
from benchmarks.losses.baselines import Candidate, Result, naive
from benchmarks.losses.cases import Case, Inputs, make_inputs

CASE = Case(64, 3000, 64, torch.bfloat16)
PEAKED = 2.0**-12  # the probability below which a filter drops gradients


def dense(inputs: Inputs, change) -> Result:
    """Plain torch whose gradient of the logits is changed before the two products of backward."""
    logprobs, entropy = baselines.naive_logprobs(inputs)
    raw = (inputs.hidden @ inputs.weight.t()).detach().float().requires_grad_()
    log_p = (raw / inputs.case.temperature).log_softmax(1)
    picked = log_p.gather(1, inputs.labels.unsqueeze(1)).squeeze(1)
    own = -(log_p.exp() * log_p).sum(1)
    (policy,) = torch.autograd.grad(
        baselines.objective(inputs, picked, None), raw, retain_graph=True
    )
    (entropic,) = torch.autograd.grad((inputs.entropy_weights * own).sum(), raw)
    is_kept = log_p.detach() > log(PEAKED)
    is_kept[torch.arange(len(picked)), inputs.labels] = True  # a filter knows the labels
    d_raw = change(policy, entropic, is_kept).to(inputs.hidden.dtype)
    return Result(
        None,
        d_raw @ inputs.weight.detach(),
        d_raw.t() @ inputs.hidden.detach(),
        logprobs.detach(),
        entropy.detach(),
    )


FAULTS = {
    "filter": (lambda g, h, k: torch.where(k, g + h, 0.0), "d_weight_tail"),
    "entropy_filter": (lambda g, h, k: g + torch.where(k, h, 0.0), "d_weight_tail"),
    "entropy_scaled": (lambda g, h, k: g + 0.85 * h, "bias"),
    "entropy_detached": (lambda g, h, k: g, "d_"),
    "half_the_rows": (lambda g, h, k: (g + h) * (torch.arange(len(k)) % 2).unsqueeze(1), "d_"),
    "nan": (lambda g, h, k: (g + h) / 0.0 * 0.0, "not finite"),
}


@pytest.fixture(scope="module")
def truths():
    return {
        kind: Truth(make_inputs(replace(CASE, dtype=kind)), 32, 1000)
        for kind in (torch.bfloat16, torch.float32)
    }


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_marked_with_value_and_limit(truths, kind, fault):
    change, where = FAULTS[fault]
    candidate = Candidate("bad", "bad", lambda inputs: dense(inputs, change))
    errors, wrong = truths[kind].errors(candidate)
    assert wrong, errors
    assert "limit" in wrong or fault == "nan"
    if kind == torch.bfloat16:  # in fp32 everything that a fault touches is beyond its limit
        assert where in wrong, (wrong, errors)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=str)
def test_right_candidates_are_not_wrong(truths, kind):
    honest = {
        "plain": naive,
        "in two products": lambda inputs: dense(inputs, lambda g, h, k: g + h),
        "ours": baselines.fused("one_pass", "torch"),
        "recomputed": baselines.fused("two_pass", "torch", baselines.small_workspace),
    }
    for name, step in honest.items():
        errors, wrong = truths[kind].errors(Candidate(name, name, step))
        assert wrong == "", name
        assert set(errors) == set(FLOORS), name
    without = Candidate("x", "x", lambda inputs: naive_without_entropy(inputs), "peer", False)
    assert truths[kind].errors(without)[1] == ""
    assert truths[kind].errors(replace(without, has_entropy_gradient=True))[1] != ""


def naive_without_entropy(inputs: Inputs) -> Result:
    got = naive(replace(inputs, entropy_weights=0 * inputs.entropy_weights))
    return replace(got, entropy=None)


def test_wrong_values_are_marked_too(truths):
    def rounded(inputs):
        got = naive(inputs)
        return replace(got, logprobs=got.logprobs + 0.5, entropy=None)

    _, wrong = truths[torch.bfloat16].errors(Candidate("x", "x", rounded))
    assert re.fullmatch(r"logprobs rms 0\.(49|5|51), limit 0\.\d+", wrong), wrong


def test_other_objectives_and_temperatures_have_their_own_truth(truths):
    def mean_nll(inputs, logprobs, entropy):
        return -logprobs.mean()

    def step(inputs):
        assert inputs.case.temperature == 1.0
        logprobs, entropy = baselines.naive_logprobs(inputs)
        return Result(None, *baselines.gradients(-logprobs.mean(), inputs), logprobs, entropy)

    candidate = Candidate(
        "x", "x", step, has_entropy_gradient=False, objective=mean_nll, takes_temperature=False
    )
    errors, wrong = truths[torch.float32].errors(candidate)
    assert wrong == ""
    assert errors["d_hidden"]["rms"] < 1e-4
    other = replace(candidate, objective=negated)
    assert "2, limit" in truths[torch.float32].errors(other)[1]  # 2 x the gradient, away from it


def negated(inputs, logprobs, entropy):
    return logprobs.mean()


def test_differences_are_those_of_the_formulas():
    truth, value = torch.tensor([3.0, 4.0]).double(), torch.tensor([3.0, 5.0])
    found = differences(value, truth, is_gradient=True)
    size = (25 / 2) ** 0.5
    assert found["max"] == pytest.approx(1 / size)
    assert found["rms"] == pytest.approx(0.5**0.5 / size)
    assert found["bias"] == pytest.approx((3 * 3 + 4 * 5) / 25 - 1)
    assert differences(value, truth, is_gradient=False) == pytest.approx(
        {"max": 1.0, "rms": 0.5**0.5}
    )
    zero = torch.zeros(3).double()
    assert differences(zero.float(), zero, is_gradient=True) == {"max": 0, "rms": 0, "bias": 0}
    assert differences(torch.ones(3), zero, is_gradient=True)["rms"] > 1e9


def test_the_limit_is_so_many_times_plain_torch_plus_a_floor():
    rival = {"entropy": {"max": 0.1, "rms": 0.01}}
    limit = TIMES * 0.01 + FLOORS["entropy"]["rms"]
    for factor, coarseness, is_wrong in ((0.99, 1, False), (1.01, 1, True), (15.9, 16, False)):
        found = {"entropy": {"max": 0.0, "rms": factor * limit}}
        assert bool(what_is_wrong(found, rival, coarseness)) == is_wrong
    worst = {"entropy": {"max": 100.0, "rms": 1.01 * limit}}
    assert what_is_wrong(worst, rival) == f"entropy max 1e+02, limit {TIMES * 0.1 + 0.02:.2g}"
    assert what_is_wrong({"entropy": {"max": float("nan"), "rms": 0.0}}, rival) == (
        "entropy: not finite"
    )

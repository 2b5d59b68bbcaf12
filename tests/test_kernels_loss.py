"""Backends and modes of the fused loss against the dense fp64 oracle and plain torch."""

from __future__ import annotations

import itertools

import pytest
import torch

import crpo_kernels as ck
from crpo_kernels import objective
from crpo_kernels.spec import ObjectiveSpec
from numerics import (
    FAST_WAYS,
    PRESETS,
    WAYS,
    assert_near,
    assert_same_result,
    is_possible,
    make_problem,
    rel_error,
    run_loss,
    spec_of,
    way_id,
)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("on_policy", [True, False], ids=["on", "off"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_every_backend_and_mode_equals_the_fp64_oracle(preset, on_policy, dtype, tolerance):
    problem = make_problem()
    drop = ("old_logprobs",) if on_policy else ()
    options = {"spec": spec_of(preset), "temperature": 0.9, "drop": drop, "bias": True}
    truth = run_loss(problem, torch.float64, backend="dense", **options)
    for way in WAYS:
        if is_possible(way, preset, on_policy):
            result = run_loss(problem, dtype, **way, **options)
            assert_same_result(result, truth, tolerance)
            assert result[0].dtype == (dtype if dtype == torch.float64 else torch.float32)
            assert result[1]["weight"].dtype == dtype


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("on_policy", [True, False], ids=["on", "off"])
def test_modes_equal_linear_logprobs_and_the_objective_in_plain_torch(preset, on_policy):
    problem = make_problem()
    drop = ("old_logprobs",) if on_policy else ()
    spec = spec_of(preset, rho_mode="truncate", rho_cap=1.2)
    hidden, weight, _ = problem.leaves(torch.float64)
    out = ck.linear_logprobs(hidden, weight, problem.labels, temperature=0.8)
    loss = plain_loss(out, problem, spec, on_policy)
    loss.backward()
    for way in WAYS:
        if is_possible(way, preset, on_policy):
            got, grads, stats = run_loss(
                problem, torch.float64, spec=spec, temperature=0.8, drop=drop, **way
            )
            assert_near(got, loss.detach(), 1e-12, "loss")
            assert_near(grads["hidden"], hidden.grad, 1e-12, "hidden")
            assert_near(grads["weight"], weight.grad, 1e-12, "weight")
            assert_near(stats.logprobs, out.logprobs.detach(), 1e-12)


def plain_loss(out, problem, spec, on_policy):
    """The loss contract written out in torch operations, with autograd for every derivative."""
    lp, v = out.logprobs, problem.vectors
    counted = problem.labels != ck.IGNORE_INDEX
    old = lp.detach() if on_policy else v["old_logprobs"]
    log_ratio = lp - old
    if spec.policy == "gspo":
        log_ratio = lp - lp.detach()
        for a, b in itertools.pairwise(problem.cu_seqlens.tolist()):
            mean = (lp.detach() - old)[a:b][counted[a:b]].mean()
            log_ratio = torch.cat([log_ratio[:a], log_ratio[a:b] + mean, log_ratio[b:]])
    ratio, adv = log_ratio.clamp(-20, 20).exp(), v["advantages"]
    if spec.policy == "sft":
        term = -lp
    elif spec.policy == "cispo":
        term = -ratio.detach().clamp(max=1 + spec.clip_high) * adv * lp
    else:
        clipped = ratio.clamp(1 - spec.clip_low, 1 + spec.clip_high)
        term = -torch.minimum(ratio * adv, clipped * adv)
    rho = (old - v["rollout_logprobs"]).exp().clamp(max=spec.rho_cap)
    x = v["ref_logprobs"] - lp
    bracket = rho * term + spec.kl_coef * (torch.expm1(x) - x)
    per_token = v["token_weights"] * bracket
    per_token = per_token + v["entropy_weights"] * out.entropy + v["z_loss_weights"] * out.lse**2
    return per_token[counted].sum()


@pytest.mark.parametrize("way", WAYS, ids=way_id)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": "per_token"},
        {"logit_scale": 0.25},
        {"logit_scale": 1.7, "logit_softcap": 5.0, "bias": True, "temperature": "per_token"},
        {"logit_softcap": 3.0},
        {"bias": True, "logit_scale": -0.5},
    ],
    ids=lambda o: "+".join(o),
)
def test_logit_transforms(way, options):
    problem = make_problem()
    options = dict(options)
    if options.get("temperature") == "per_token":
        options["temperature"] = problem.temperature
    hidden, weight, bias = problem.leaves(torch.float64, options.get("bias", False))
    logits = hidden @ weight.t()
    if bias is not None:
        logits = logits + bias
    logits = options.get("logit_scale", 1.0) * logits
    if "logit_softcap" in options:
        logits = options["logit_softcap"] * torch.tanh(logits / options["logit_softcap"])
    if "temperature" in options:
        logits = logits / problem.temperature[:, None]
    counted = problem.labels != ck.IGNORE_INDEX
    log_p = logits.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    logprobs = log_p.gather(1, problem.labels.clamp(min=0)[:, None])[:, 0]
    v = problem.vectors
    per_token = -v["token_weights"] * logprobs + v["entropy_weights"] * entropy
    per_token = per_token + v["z_loss_weights"] * logits.logsumexp(1) ** 2
    per_token[counted].sum().backward()
    drop = ("ref_logprobs",)
    sft = ObjectiveSpec.preset("sft")
    _, grads, stats = run_loss(problem, torch.float64, spec=sft, drop=drop, **options, **way)
    assert_near(stats.entropy, entropy.detach() * counted, 1e-12, "entropy")
    assert_near(stats.logprobs, logprobs.detach() * counted, 1e-12, "logprobs")
    assert_near(stats.lse, logits.logsumexp(1).detach() * counted, 1e-12, "lse")
    assert_near(grads["hidden"], hidden.grad, 1e-12, "hidden")
    assert_near(grads["weight"], weight.grad, 1e-12, "weight")
    if bias is not None:
        assert_near(grads["bias"], bias.grad, 1e-12, "bias")


@pytest.mark.parametrize("output", ["logprobs", "entropy", "lse"])
@pytest.mark.parametrize("backend", ["torch", "dense"])
def test_linear_logprobs_is_differentiable_through_each_output(output, backend):
    problem = make_problem()
    hidden, weight, bias = problem.leaves(torch.float64, bias=True)
    out = ck.linear_logprobs(
        hidden, weight, problem.labels, bias=bias, temperature=0.7, backend=backend
    )
    upstream = problem.vectors["advantages"]
    (getattr(out, output) * upstream).sum().backward()
    got = hidden.grad.clone(), weight.grad.clone(), bias.grad.clone()
    for leaf in (hidden, weight, bias):
        leaf.grad = None
    logits = (hidden @ weight.t() + bias) / 0.7
    log_p = logits.log_softmax(1)
    truth = {
        "logprobs": log_p.gather(1, problem.labels.clamp(min=0)[:, None])[:, 0],
        "entropy": -(log_p.exp() * log_p).sum(1),
        "lse": logits.logsumexp(1),
    }[output]
    (truth * upstream)[problem.labels != ck.IGNORE_INDEX].sum().backward()
    for value, leaf in zip(got, (hidden, weight, bias), strict=True):
        assert_near(value, leaf.grad, 1e-12, output)


def test_an_expanded_upstream_gradient_is_accepted():
    problem = make_problem()
    hidden, weight, _ = problem.leaves(torch.float64)
    ck.linear_logprobs(hidden, weight, problem.labels).entropy.sum().backward()  # stride 0
    assert float(hidden.grad.abs().sum()) > 0


@pytest.mark.parametrize("backend", ["torch", "dense"])
def test_gradcheck(backend):
    problem = make_problem(num_rows=5, vocab=7, dim=3, ignored=4)
    vectors = {k: v for k, v in problem.vectors.items() if k != "rollout_logprobs"}
    hidden, weight, bias = problem.leaves(torch.float64, bias=True)

    def loss(h, w, b):
        return ck.linear_policy_loss(
            h,
            w,
            problem.labels,
            bias=b,
            spec=spec_of("dapo"),
            temperature=problem.temperature,
            logit_softcap=4.0,
            logit_scale=1.3,
            backend=backend,
            **vectors,
        )[0]

    def outputs(h, w, b):
        return tuple(ck.linear_logprobs(h, w, problem.labels, bias=b, backend=backend))

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))
    assert torch.autograd.gradcheck(outputs, (hidden, weight, bias))


def test_zero_entropy_weights_equal_none_bitwise():
    problem = make_problem()
    zeros = torch.zeros(37, dtype=torch.float64)
    for way in FAST_WAYS:
        problem.vectors["entropy_weights"] = zeros
        with_zeros = run_loss(problem, torch.float32, spec=spec_of("crpo"), **way)
        without = run_loss(
            problem, torch.float32, spec=spec_of("crpo"), drop=("entropy_weights",), **way
        )
        assert torch.equal(with_zeros[0], without[0])
        for name in ("hidden", "weight"):
            assert torch.equal(with_zeros[1][name], without[1][name])


def test_stats_and_sums_by_hand():
    weight = torch.eye(3, dtype=torch.float64)
    hidden = torch.log(f64([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6], [0.1, 0.1, 0.8]]))
    labels = torch.tensor([0, 1, ck.IGNORE_INDEX])
    loss, stats = ck.linear_policy_loss(
        hidden,
        weight,
        labels,
        advantages=f64([2.0, -1.0, 9.0]),
        token_weights=f64([0.5, 0.25, 9.0]),
        entropy_weights=f64([0.1, 0.0, 9.0]),
        old_logprobs=torch.log(f64([0.25, 0.4, 0.9])),
        ref_logprobs=torch.log(f64([1.0, 0.2, 0.9])),
        rollout_logprobs=torch.log(f64([0.1, 0.4, 0.9])),
        spec=ObjectiveSpec(kl_coef=0.1, rho_mode="truncate", rho_cap=2.0),
    )
    kl = 1.0 - torch.log(f64(2.0))  # reference twice as likely: 2 - 1 - ln 2
    first = 2.0 * -2.4 + 0.1 * float(kl)  # rho min(2.5, 2); ratio 2 clipped at 1.2, times 2
    assert stats.ratio.tolist() == pytest.approx([2.0, 0.5, 0.0])
    assert stats.rho.tolist() == pytest.approx([2.0, 1.0, 0.0])
    assert stats.kl.tolist() == pytest.approx([float(kl), 0.0, 0.0])
    assert stats.token_loss.tolist() == pytest.approx([first, 0.8, 0.0])
    assert stats.is_clipped.tolist() == [True, True, False]
    assert stats.is_top1.tolist() == [True, False, False]
    entropy = [1.5 * float(torch.log(f64(2.0))), float(-(hidden[1].exp() * hidden[1]).sum()), 0.0]
    assert stats.entropy.tolist() == pytest.approx(entropy)
    assert stats.lse.tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-15)
    assert float(loss) == pytest.approx(0.5 * first + 0.25 * 0.8 + 0.1 * entropy[0])
    sums = stats.sums()
    expected = {
        "num_tokens": 2.0,
        "token_loss": first + 0.8,
        "logprobs": float(torch.log(f64(0.1))),
        "entropy": sum(entropy),
        "ratio": 2.5,
        "kl": float(kl),
        "rho": 3.0,
        "clip_fraction": 2.0,
        "is_top1": 1.0,
    }
    assert list(sums) == list(expected)
    assert torch.stack(list(sums.values())).shape == (9, 2)
    for name, value in expected.items():
        assert sums[name].tolist() == pytest.approx([value, 2.0])


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def test_gspo_takes_the_mean_over_labelled_tokens_of_whole_sequences():
    problem = make_problem(num_rows=8, ignored=0)
    problem.labels[2] = ck.IGNORE_INDEX
    problem.cu_seqlens = torch.tensor([0, 4, 4, 8])
    _, _, stats = run_loss(problem, torch.float64, spec=ObjectiveSpec.preset("gspo"))
    gap = stats.logprobs - problem.vectors["old_logprobs"]
    first = float(gap[[0, 1, 3]].mean().exp())
    second = float(gap[4:].mean().exp())
    assert stats.ratio.tolist() == pytest.approx([first, first, 0.0, first, *[second] * 4])


def test_weight_zero_rows_add_nothing_whatever_their_logprobs_hold():
    problem = make_problem(ignored=0)
    problem.vectors["token_weights"][::3] = 0.0
    truth = run_loss(problem, torch.float64, spec=spec_of("dapo"), rows=None)
    for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs"):
        problem.vectors[name][::3] = torch.nan
    loss, grads, _ = run_loss(problem, torch.float64, spec=spec_of("dapo"))
    assert torch.equal(loss, truth[0])
    assert torch.equal(grads["weight"], truth[1]["weight"])


def test_the_loss_shares_the_objective(monkeypatch):
    """All ways use objective.py's own functions: no second copy of the formula."""
    problem = make_problem()
    before = [run_loss(problem, torch.float64, spec=spec_of("dapo"), **way)[0] for way in WAYS]
    original = objective.clip_term

    def doubled(*args):
        value, slope, ratio, clipped = original(*args)
        return 2 * value, 2 * slope, ratio, clipped

    monkeypatch.setattr(objective, "clip_term", doubled)
    after = [run_loss(problem, torch.float64, spec=spec_of("dapo"), **way)[0] for way in WAYS]
    assert all(rel_error(a, b) > 1e-3 for a, b in zip(after, before, strict=True))

"""Whatever a call may meet: frozen parts, strides, no rows, autocast, checkpointing, compile."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import crpo_kernels as ck
from crpo_kernels import dispatch
from crpo_kernels.spec import ObjectiveSpec
from numerics import (
    FAST_WAYS,
    PRESETS,
    TINY,
    WAYS,
    assert_near,
    assert_same_result,
    is_possible,
    make_problem,
    run_loss,
    run_strided,
    spec_of,
    way_id,
)


@pytest.mark.parametrize("way", FAST_WAYS, ids=way_id)
@pytest.mark.parametrize("needs", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ()])
def test_frozen_pieces_get_no_gradient_and_change_no_other(way, needs):
    problem = make_problem()
    options = {"spec": spec_of("crpo"), "bias": True, "drop": ("old_logprobs",)}
    truth = run_loss(problem, torch.float64, backend="dense", **options)
    loss, grads, _ = run_loss(problem, torch.float64, needs=needs, **options, **way)
    assert_near(loss, truth[0], 1e-12)
    for name, grad in grads.items():
        if name in needs:
            assert_near(grad, truth[1][name], 1e-12, name)
        else:
            assert grad is None


@pytest.mark.parametrize("way", WAYS, ids=way_id)
def test_a_second_backward_is_exact_and_upstream_may_be_any_scalar(way):
    problem = make_problem()
    hidden, weight, bias = problem.leaves(torch.float64, bias=True)
    vectors = {k: v for k, v in problem.vectors.items() if k != "old_logprobs"}
    loss, _ = ck.linear_policy_loss(
        hidden, weight, problem.labels, bias=bias, spec=spec_of("crpo"), **vectors, **way
    )
    leaves = (hidden, weight, bias)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, retain_graph=True)
    scaled = torch.autograd.grad(loss * -0.37, leaves)
    for a, b, c in zip(first, again, scaled, strict=True):
        assert torch.equal(a, b)
        assert_near(c, -0.37 * a, 1e-13)


@pytest.mark.parametrize("way", FAST_WAYS, ids=way_id)
def test_a_second_derivative_is_refused(way):
    problem = make_problem(num_rows=6)
    hidden, weight, _ = problem.leaves(torch.float64)
    weights = problem.vectors["token_weights"]
    loss, _ = ck.linear_policy_loss(
        hidden, weight, problem.labels, token_weights=weights, spec=ObjectiveSpec("sft"), **way
    )
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(loss * scale, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("way", WAYS, ids=way_id)
def test_rows_leading_dimensions_and_strides(way):
    problem = make_problem(num_rows=36)
    options = {"spec": spec_of("dapo"), **way}
    truth = run_loss(problem, torch.float64, **options)
    rows = (problem.labels != ck.IGNORE_INDEX).nonzero()[:, 0].tolist()
    assert_same_result(run_loss(problem, torch.float64, rows=rows, **options), truth, 1e-13)
    loss, grads, _ = run_strided(problem, torch.float64, (6, 6), **options)
    assert_near(loss, truth[0], 1e-13)
    for name, grad in grads.items():
        assert_near(grad, truth[1][name], 1e-13, name)


def test_unlisted_rows_do_not_count():
    problem = make_problem(ignored=0)
    listed = [2, 3, 11, 36]
    kept = problem.labels.clone()
    problem.labels = torch.full_like(kept, ck.IGNORE_INDEX)
    problem.labels[listed] = kept[listed]
    truth = run_loss(problem, torch.float64, spec=spec_of("dapo"))
    problem.labels = kept
    result = run_loss(problem, torch.float64, spec=spec_of("dapo"), rows=torch.tensor(listed))
    assert_same_result(result, truth, 1e-13)
    assert int(result[2].is_counted.sum()) == 4


@pytest.mark.parametrize("way", WAYS, ids=way_id)
@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_no_counted_rows_give_zeros_that_are_connected_to_the_graph(way, num_rows):
    problem = make_problem(num_rows=num_rows)
    problem.labels.fill_(ck.IGNORE_INDEX)
    problem.cu_seqlens = torch.tensor([0, num_rows])
    for preset in PRESETS:
        if is_possible(way, preset, on_policy=False):
            loss, grads, stats = run_loss(
                problem, torch.float32, spec=spec_of(preset), bias=True, **way
            )
            assert float(loss) == 0.0
            for name, grad in grads.items():
                assert grad is not None, name
                assert not grad.any(), name
            for values in stats:
                assert values.shape == (num_rows,)
                assert not values.any()
            assert stats.sums()["entropy"].tolist() == [0.0, 0.0]
    hidden, weight, _ = problem.leaves(torch.float32)
    out = ck.linear_logprobs(hidden, weight, problem.labels, backend=way.get("backend", "auto"))
    sum(value.sum() for value in out).backward()
    assert not weight.grad.any()


@pytest.mark.parametrize("way", WAYS, ids=way_id)
def test_one_row(way):
    problem = make_problem(num_rows=1, ignored=0)
    problem.cu_seqlens = torch.tensor([0, 1])
    truth = run_loss(problem, torch.float64, spec=spec_of("dapo"), backend="dense")
    assert_same_result(run_loss(problem, torch.float64, spec=spec_of("dapo"), **way), truth, 1e-12)


@pytest.mark.parametrize("way", WAYS, ids=way_id)
def test_ignored_rows_may_hold_garbage_and_inputs_are_not_changed(way, poisoned_empty):
    problem = make_problem()
    truth = run_loss(problem, torch.float64, spec=spec_of("dapo"), backend="dense")
    ignored = problem.labels == ck.IGNORE_INDEX
    for vector in problem.vectors.values():
        vector[ignored] = torch.nan
    problem.hidden[ignored] = torch.inf
    copies = {k: v.clone() for k, v in problem.vectors.items()}
    loss, grads, stats = run_loss(problem, torch.float64, spec=spec_of("dapo"), **way)
    assert_same_result((loss, grads, stats), truth, 1e-12)
    for name, vector in problem.vectors.items():
        torch.testing.assert_close(vector, copies[name], equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("way", WAYS, ids=way_id)
def test_tied_weights(way):
    problem = make_problem()
    ids = torch.arange(37) % 101

    def grad_of(loss_of):
        weight = problem.weight.clone().requires_grad_()
        loss_of(weight[ids] * 0.5, weight).backward()
        return weight.grad

    weights = problem.vectors["token_weights"]
    truth = grad_of(lambda h, w: plain_nll(h, w, problem.labels, weights))
    got = grad_of(
        lambda h, w: ck.linear_policy_loss(
            h, w, problem.labels, token_weights=weights, spec=ObjectiveSpec.preset("sft"), **way
        )[0]
    )
    assert_near(got, truth, 1e-12)


def plain_nll(hidden, weight, labels, weights):
    counted = labels != ck.IGNORE_INDEX
    log_p = (hidden @ weight.t()).log_softmax(1)
    picked = log_p.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return -(weights * picked)[counted].sum()


@pytest.mark.parametrize("way", FAST_WAYS, ids=way_id)
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(way, reentrant):
    problem = make_problem()
    options = {"token_weights": problem.vectors["token_weights"], "spec": ObjectiveSpec("sft")}

    def grads(run):
        hidden, weight, _ = problem.leaves(torch.float64)
        run(hidden, weight).backward()
        return hidden.grad, weight.grad

    def loss_of(hidden, weight):
        return ck.linear_policy_loss(torch.tanh(hidden), weight, problem.labels, **options, **way)[
            0
        ]

    truth = grads(loss_of)
    got = grads(lambda h, w: checkpoint(loss_of, h, w, use_reentrant=reentrant))
    assert torch.equal(truth[0], got[0])
    assert torch.equal(truth[1], got[1])


@pytest.mark.parametrize("way", FAST_WAYS, ids=way_id)
def test_autocast_casts_like_a_linear_layer(way):
    problem = make_problem()
    hidden, weight, _ = problem.leaves(torch.float32)
    weights = problem.vectors["token_weights"].float()
    options = {"token_weights": weights, "spec": ObjectiveSpec("sft"), **way}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = ck.linear_policy_loss(hidden, weight, problem.labels, **options)
        loss.backward()  # inside the context too: the products of backward say their dtypes
    cast = [leaf.detach().bfloat16().requires_grad_() for leaf in (hidden, weight)]
    truth, _ = ck.linear_policy_loss(*cast, problem.labels, **options)
    truth.backward()
    assert torch.equal(loss, truth)
    assert hidden.grad.dtype == torch.float32
    assert torch.equal(hidden.grad, cast[0].grad.float())
    assert torch.equal(weight.grad, cast[1].grad.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        leaf64, weight64, _ = problem.leaves(torch.float64)
        loss64, _ = ck.linear_policy_loss(leaf64, weight64, problem.labels, **options)
    assert loss64.dtype == torch.float64


@pytest.mark.parametrize("way", FAST_WAYS, ids=way_id)
def test_inside_torch_compile(way):
    problem = make_problem()
    options = {"token_weights": problem.vectors["token_weights"], "spec": ObjectiveSpec("sft")}

    def step(hidden, weight):
        loss, _ = ck.linear_policy_loss(hidden * 2, weight, problem.labels, **options, **way)
        return loss * 3

    results = []
    for function in (step, torch.compile(step, backend="aot_eager")):
        hidden, weight, _ = problem.leaves(torch.float64)
        function(hidden, weight).backward()
        results.append((hidden.grad, weight.grad))
    assert_near(results[1][0], results[0][0], 1e-14)
    assert_near(results[1][1], results[0][1], 1e-14)


def test_no_grad_and_inference_mode_score_without_a_graph():
    problem = make_problem()
    hidden, weight, _ = problem.leaves(torch.float32)
    truth = ck.linear_logprobs(hidden, weight, problem.labels)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            out = ck.linear_logprobs(hidden, weight, problem.labels, mode="one_pass")
            loss, _ = ck.linear_policy_loss(
                hidden,
                weight,
                problem.labels,
                token_weights=problem.vectors["token_weights"],
                spec=ObjectiveSpec("sft"),
            )
        assert not out.logprobs.requires_grad
        assert not loss.requires_grad
        assert_near(out.entropy, truth.entropy.detach(), 1e-7)


def test_repeated_calls_are_bitwise_equal():
    problem = make_problem()
    for way in WAYS:
        first = run_loss(problem, torch.float32, spec=spec_of("dapo"), **way)
        second = run_loss(problem, torch.float32, spec=spec_of("dapo"), **way)
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1]["weight"], second[1]["weight"])


def test_choices_are_logged_once_with_their_reason(caplog):
    dispatch._log_once.cache_clear()
    caplog.set_level("INFO", logger="crpo_kernels")
    problem = make_problem()
    gspo, dapo = ObjectiveSpec.preset("gspo"), ObjectiveSpec.preset("dapo")
    for _ in range(2):
        run_loss(problem, torch.float32, spec=dapo)
        run_loss(problem, torch.float32, spec=gspo)
        run_loss(problem, torch.float32, spec=gspo, workspace_bytes=TINY)
    aligned = "whole sequences fit a chunk, which then knows the ratios of its rows"
    too_long = "the longest does not fit a chunk of this workspace"
    gspo_reason = (
        "backend torch, mode two_pass: the ratio of gspo is a mean over the whole sequence of "
        "this call's own logprobs"
    )
    assert caplog.messages[0].startswith("backend auto: torch (triton does not run: ")
    assert caplog.messages[1:] == [
        "backend torch, mode one_pass: the coefficients are known before the head runs",
        "row passes eager: the call has too few logits to pay for a compilation",
        f"backend torch, mode one_pass: {aligned}",
        f"{gspo_reason}, and {too_long}; the logits are computed again for the gradient",
    ]

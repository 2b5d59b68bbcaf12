"""The Triton backend whatever a call may be: frozen parts, strides, autocast, checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import crpo_kernels as ck
import triton_tools
from numerics import assert_near, assert_same_result, run_loss, run_strided, spec_of
from triton_cases import GROUPS, TOLERANCE, WAYS, each_way, note_plans, shrink, small

if reason := triton_tools.why_no_triton():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    """Several tiles, chunks and groups at these sizes."""
    shrink(monkeypatch)


@pytest.mark.parametrize("num_rows", [11, 12])
def test_the_ways_are_what_they_are_called(num_rows, device, monkeypatch):
    made = note_plans(monkeypatch)
    for way in WAYS:
        problem = small(device, num_rows)
        run_loss(problem, torch.float32, spec=spec_of("dapo"), backend="triton", **way)
    num_counted = num_rows - 3
    assert [(x.chunk_rows, x.group_rows) for x in made] == [(4, num_counted)] * 2 + [(2, 4)]
    assert [x.kept for x in made] == [None, "exps", None]


def loss_of(problem, hidden, weight, spec=None, **options):
    """The loss on given leaves."""
    vectors = {k: v for k, v in problem.vectors.items() if k != "old_logprobs"}
    return ck.linear_policy_loss(
        hidden, weight, problem.labels, spec=spec or spec_of("crpo"), backend="triton",
        **vectors, **options,
    )  # fmt: skip


@each_way
def test_frozen_pieces_get_no_gradient_and_change_no_other(way, device, guarded_empty):
    problem = small(device)
    options = {"spec": spec_of("dapo"), "bias": True}
    truth = run_loss(problem, torch.float64, backend="dense", **options)
    for needs in [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ()]:
        loss, grads, _ = run_loss(
            problem, torch.float32, needs=needs, backend="triton", **options, **way
        )
        assert_near(loss, truth[0], TOLERANCE)
        for name, grad in grads.items():
            if name in needs:
                assert_near(grad, truth[1][name], TOLERANCE, name)
            else:
                assert grad is None


@each_way
def test_a_second_backward_is_exact_and_upstream_may_be_any_scalar(way, device):
    problem = small(device)
    hidden, weight, bias = leaves = problem.leaves(torch.float32, bias=True)
    loss, _ = loss_of(problem, hidden, weight, bias=bias, **way)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, retain_graph=True)
    doubled = torch.autograd.grad(loss * -0.5, leaves, retain_graph=True)
    scaled = torch.autograd.grad(loss * -0.37, leaves)
    is_exact = way.get("mode") != "two_pass"  # there kept exponentials first, then logits again
    for a, b, c, d in zip(first, again, doubled, scaled, strict=True):
        assert torch.equal(a, b) if is_exact else rel(a, b) < 1e-6
        assert torch.equal(-0.5 * b, c)  # a power of two rounds nothing
        assert rel(d, -0.37 * a) < 1e-6


def rel(a, b):
    return float((a - b).abs().max() / b.abs().max())


@each_way
def test_an_expanded_upstream_gradient_of_the_loss(way, device):
    problem = small(device)
    hidden, weight, _ = problem.leaves(torch.float32)
    losses = loss_of(problem, hidden, weight, **way)[0].expand(3)
    losses.sum().backward()
    other, head, _ = problem.leaves(torch.float32)
    (3 * loss_of(problem, other, head, **way)[0]).backward()
    assert_near(hidden.grad, other.grad, 1e-6)
    assert_near(weight.grad, head.grad, 1e-6)


@each_way
def test_a_second_derivative_is_refused(way, device):
    problem = small(device)
    hidden, weight, _ = problem.leaves(torch.float32)
    scale = torch.ones((), device=device, requires_grad=True)
    loss = loss_of(problem, hidden, weight, **way)[0] * scale
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@each_way
def test_rows_leading_dimensions_and_strides(way, device):
    problem = small(device, num_rows=12)
    options = {"spec": spec_of("dapo"), "backend": "triton", **way}
    truth = run_loss(problem, torch.float32, **options)
    counted = (problem.labels != ck.IGNORE_INDEX).nonzero()[:, 0]
    for rows in (counted, counted.int(), counted.tolist(), counted.cpu()):
        assert_same_result(run_loss(problem, torch.float32, rows=rows, **options), truth, 0.0)
    loss, grads, stats = run_strided(problem, torch.float32, (3, 4), **options)
    assert_near(loss, truth[0], 1e-6)
    for name, grad in grads.items():
        assert_near(grad, truth[1][name], 1e-6, name)
    assert stats.logprobs.shape == (12,)


@each_way
def test_expanded_inputs(way, device):
    """One hidden state and one advantage for all tokens, with stride 0."""
    problem = small(device, ignored=0)
    base, weight, _ = problem.leaves(torch.float32)
    first = base.detach()[:1].clone().requires_grad_()
    for name in ("advantages", "entropy_weights", "z_loss_weights"):
        problem.vectors[name] = problem.vectors[name][:1].expand(11)
    loss, _ = loss_of(problem, first.expand(11, 8), weight, bias=weight[:1, 0].expand(40), **way)
    loss.backward()
    same = first.detach().repeat(11, 1).double().requires_grad_()
    exact = weight.detach().double().requires_grad_()
    vectors = {k: v for k, v in problem.vectors.items() if k != "old_logprobs"}
    truth, _ = ck.linear_policy_loss(
        same, exact, problem.labels, bias=exact[:1, 0].expand(40), spec=spec_of("crpo"),
        backend="dense", **vectors,
    )  # fmt: skip
    truth.backward()
    assert_near(loss.detach(), truth.detach(), TOLERANCE)
    assert_near(first.grad, same.grad.sum(0, keepdim=True), TOLERANCE)
    assert_near(weight.grad, exact.grad, TOLERANCE)


def test_unlisted_rows_do_not_count_and_rows_come_in_any_order(device):
    problem = small(device, ignored=0)
    options = {"spec": spec_of("dapo"), "backend": "triton"}
    listed, kept = [10, 2, 7, 3], problem.labels.clone()
    problem.labels = torch.full_like(kept, ck.IGNORE_INDEX)
    problem.labels[listed] = kept[listed]
    truth = run_loss(problem, torch.float32, **options)
    problem.labels = kept
    got = run_loss(problem, torch.float32, rows=listed, **options)
    assert_same_result(got, truth, 1e-6)
    assert got[2].is_counted.nonzero()[:, 0].tolist() == sorted(listed)


@each_way
def test_tied_weights(way, device):
    problem = small(device)
    ids = torch.arange(11, device=device) % 40

    def grad_of(dtype, **options):
        weight = problem.weight.to(dtype, copy=True).requires_grad_()
        vectors = {k: v for k, v in problem.vectors.items() if k != "old_logprobs"}
        ck.linear_policy_loss(
            weight[ids] * 0.5, weight, problem.labels, spec=spec_of("crpo"), **vectors, **options
        )[0].backward()
        return weight.grad

    truth = grad_of(torch.float64, backend="dense")
    assert_near(grad_of(torch.float32, backend="triton", **way), truth, TOLERANCE)


@each_way
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(way, reentrant, device):
    problem = small(device)

    def loss(hidden, weight):
        return loss_of(problem, torch.tanh(hidden), weight, **way)[0]

    def grads(run):
        hidden, weight, _ = problem.leaves(torch.float32)
        run(hidden, weight).backward()
        return hidden.grad, weight.grad

    truth, got = grads(loss), grads(lambda h, w: checkpoint(loss, h, w, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(truth, got, strict=True))


@each_way
def test_autocast_casts_like_a_linear_layer(way, device):
    problem = small(device)
    hidden, weight, bias = problem.leaves(torch.float32, bias=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss, _ = loss_of(problem, hidden, weight, bias=bias, **way)
        loss.backward()  # inside the context too: the products of backward say their dtypes
    cast = [leaf.detach().bfloat16().requires_grad_() for leaf in (hidden, weight)]
    own = bias.detach().clone().requires_grad_()
    truth, _ = loss_of(problem, *cast, bias=own, **way)
    truth.backward()
    assert torch.equal(loss, truth)
    assert loss.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert torch.equal(hidden.grad, cast[0].grad.float())
    assert torch.equal(weight.grad, cast[1].grad.float())
    assert torch.equal(bias.grad, own.grad)


def test_no_grad_and_inference_mode_score_without_a_graph(device):
    problem = small(device)
    hidden, weight, _ = problem.leaves(torch.float32)
    truth = ck.linear_logprobs(hidden, weight, problem.labels, backend="triton")
    true_loss, _ = loss_of(problem, hidden, weight)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            for mode in ("one_pass", "two_pass"):
                out = ck.linear_logprobs(
                    hidden, weight, problem.labels, mode=mode, backend="triton"
                )
                assert torch.equal(out.entropy, truth.entropy)
                assert not out.logprobs.requires_grad
            loss, _ = loss_of(problem, hidden, weight)
        assert not loss.requires_grad
        assert torch.equal(loss, true_loss)


@pytest.mark.parametrize("workspace", [None, GROUPS])
def test_mode_a_needs_no_weight_in_backward(workspace, device):
    """FSDP2 may take the gathered weight away after forward."""
    problem = small(device)
    grads = []
    for is_gone in (False, True):
        hidden, weight, bias = leaves = problem.leaves(torch.float32, bias=True)
        loss, _ = loss_of(problem, hidden, weight, bias=bias, workspace_bytes=workspace)
        if is_gone:
            weight.untyped_storage().resize_(0)
        grads.append(torch.autograd.grad(loss, leaves))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_inputs_changed_before_backward_are_noticed(device):
    """What backward reads is saved with autograd, which knows its version."""
    problem = small(device)
    for mode, index in (("one_pass", 0), ("two_pass", 0), ("two_pass", 1)):
        leaves = problem.leaves(torch.float32)[:2]
        loss, _ = loss_of(problem, *leaves, mode=mode)
        with torch.no_grad():
            leaves[index].add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@each_way
def test_repeated_calls_are_bitwise_equal(way, device):
    options = {"spec": spec_of("dapo"), "bias": True, "backend": "triton", **way}
    first, second = (run_loss(small(device), torch.float32, **options) for _ in range(2))
    assert_same_result(first, second, 0.0)

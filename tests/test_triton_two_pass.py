"""Two passes on Triton: kept exponentials and logits that are computed again, against fp64.

With E = e^(z - m) kept in bf16 a gradient is rounded twice. On a GPU both round to nearest: the
tests that say so patch the interpreter, whose own bf16 stores truncate (twice the error, one sign).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import crpo_kernels as ck
import triton_tools
from benchmarks.live_bytes import LiveBytes
from crpo_kernels import dispatch, plan
from numerics import assert_near, assert_same_result, make_problem, rms, run_loss, spec_of

if reason := triton_tools.why_no_triton():
    pytest.skip(reason, allow_module_level=True)

from crpo_kernels import rows_triton
from crpo_kernels.exps_triton import row_exp
from crpo_kernels.rows_triton import row_grad
from crpo_kernels.terms import Coefficients
from row_cases import Rows, assert_grad, make_rows, run_stats, truth_of
from triton_tools import Guarded

KEPT, AGAIN = {}, {"workspace_bytes": 9_000}  # 18 rows of 101 logits and their E fit, or do not
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several tiles at these sizes."""
    monkeypatch.setattr(rows_triton, "BLOCK_V", 32)


@pytest.fixture
def rounded(monkeypatch, device):
    """Stores round to nearest, as on a GPU."""
    if device != "cpu":
        return
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def nearest(value, source, target, mode):
        if str(source) == "fp32" and str(target) == "bf16":
            bits = torch.from_numpy(np.array(value)).view(FP32).to(BF16).view(torch.int16)
            return bits.numpy().view(np.uint16)
        return convert(value, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", nearest)


def exps_of(rows: Rows, stats, dtype) -> Guarded:
    """E of ``rows`` in a guarded buffer: all written, nothing beside."""
    guarded = Guarded(tuple(rows.raw.shape), dtype, rows.raw.device)
    row_exp(rows.raw, guarded.tensor, rows.view(), stats.maximum)
    guarded.check()
    return guarded


def grad_of_exps(rows: Rows, stats, dtype=FP32, has=(True, True)):
    """`row_grad` in place over E."""
    guarded = exps_of(rows, stats, dtype)
    g, q, l = rows.slopes  # noqa: E741
    coefficients = Coefficients(g, q if has[0] else None, l if has[1] else None)
    exps = guarded.tensor
    row_grad(exps, exps, rows.labels, rows.view(), stats, coefficients, is_exp=True)
    guarded.check()
    return exps


@pytest.mark.parametrize("vocab", [1, 15, 17, 31, 32, 33, 101])
def test_exponentials_and_their_gradient_at_any_size(vocab, device):
    for options in ((), ("bias", "scale", "softcap", "tokens"), ("all", "softcap"), ("bias",)):
        rows = make_rows(3, vocab, device, seed=vocab, options=options)
        rows.labels[0], rows.labels[1] = 0, vocab - 1
        truth, stats = truth_of(rows), run_stats(rows).stats()
        exps = exps_of(rows, stats, FP32).tensor
        assert float(exps.max()) == 1.0
        assert_near(exps.double().log() + truth.maximum[:, None], truth.logits, 2e-6)
        assert_grad(grad_of_exps(rows, stats), truth.d_raw, 4e-6)


@pytest.mark.parametrize("has", [(True, False), (False, True), (False, False)])
def test_slopes_of_entropy_and_lse_may_be_missing(has, device):
    rows = make_rows(3, 70, device, options=("softcap",))
    stats = run_stats(rows).stats()
    got = grad_of_exps(rows, stats, has=has)
    rows.slopes[1] *= has[0]
    rows.slopes[2] *= has[1]
    assert_grad(got, truth_of(rows).d_raw, 2e-6)


def test_bf16_exponentials_are_rounded_once(device, rounded):
    rows = make_rows(3, 101, device)
    stats = run_stats(rows).stats()
    exact, kept = (exps_of(rows, stats, dtype).tensor for dtype in (FP32, BF16))
    assert torch.equal(kept, exact.to(BF16))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_what_underflowed_and_minus_inf_have_no_gradient(dtype, device):
    rows = make_rows(3, 101, device, options=("softcap",))
    rows.softcap = None
    rows.raw[:, 40:] = -math.inf
    rows.raw[:, 7] -= 300.0
    rows.labels[:] = torch.tensor([3, 0, 7])  # the last label itself has probability 0
    stats = run_stats(rows).stats()
    d_raw = grad_of_exps(rows, stats, dtype)
    assert d_raw.isfinite().all()
    assert not d_raw[:, 40:].any()
    assert not d_raw[:2, 7].any()
    assert_near(d_raw[2, 7], rows.slopes[0, 2], 8e-3)  # g (1 - 0)
    assert_near(d_raw, truth_of(rows).d_raw, 5e-6 if dtype == FP32 else 2e-2)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_nan_stays_in_its_row(dtype, device):
    rows = make_rows(3, 101, device)
    rows.raw[1, 60] = math.nan
    d_raw = grad_of_exps(rows, run_stats(rows).stats(), dtype)
    others = torch.arange(101, device=device) != rows.labels[1]
    assert d_raw[1, others].isnan().all()
    assert d_raw[[0, 2]].isfinite().all()


def test_a_row_of_only_minus_inf_is_uniform(device):
    rows = make_rows(2, 64, device)
    rows.raw[0] = -math.inf
    d_raw = grad_of_exps(rows, run_stats(rows).stats())
    rows.raw[0] = 0.0
    assert_grad(d_raw, truth_of(rows).d_raw, 2e-6)


def products_of(call):
    """(products of n V D that ran, the call's result)."""

    def added(_total, a, b, **_options):
        return 2 * a[0] * a[1] * b[1]

    mapping = {torch.ops.aten.addmm_: added}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        result = call()
    return counter.get_total_flops(), result


@pytest.mark.parametrize("way", [KEPT, AGAIN], ids=["kept", "again"])
@pytest.mark.parametrize("preset", ["crpo", "gspo", "cispo"])
def test_the_loss_equals_the_oracle_in_6_or_8_nvd(way, preset, device, guarded_empty):
    problem = make_problem(num_rows=23, ignored=5).rounded(FP32, device)
    options = {"spec": spec_of(preset), "bias": True, "temperature": problem.temperature}
    options |= {"logit_softcap": 6.0, "logit_scale": 1.3, "upstream": -1.7}
    truth = run_loss(problem, torch.float64, backend="dense", **options)
    way = {"backend": "triton", "mode": "two_pass", **way}
    operations, got = products_of(lambda: run_loss(problem, FP32, **way, **options))
    assert_same_result(got, truth, 1e-5)
    assert operations == (6 if "workspace_bytes" not in way else 8) * 18 * 101 * 16


@pytest.mark.parametrize("needs", [("hidden",), ("weight",), ("bias",)])
def test_only_what_needs_a_gradient_is_computed(needs, device):
    problem = make_problem(num_rows=23).rounded(FP32, device)
    options = {"spec": spec_of("dapo"), "bias": True}
    truth = run_loss(problem, torch.float64, backend="dense", **options)
    way = {"backend": "triton", "mode": "two_pass", "needs": needs}
    operations, got = products_of(lambda: run_loss(problem, FP32, **way, **options))
    assert operations == (2 if needs == ("bias",) else 4) * 18 * 101 * 16
    for name in ("hidden", "weight", "bias"):
        if name in needs:
            assert_near(got[1][name], truth[1][name], 1e-5, name)
        else:
            assert got[1][name] is None


def own_loss(problem, way, outputs=("logprobs", "entropy", "lse"), dtype=FP32):
    """Leaves and a loss of one's own on `linear_logprobs`, with gradients of stride 0."""
    hidden, weight, bias = problem.leaves(dtype, bias=True)
    out = ck.linear_logprobs(
        hidden, weight, problem.labels, bias=bias, temperature=0.8, backend="triton", **way
    )
    return (hidden, weight, bias), sum(getattr(out, name).sum() for name in outputs)


@pytest.mark.parametrize("way", [KEPT, AGAIN], ids=["kept", "again"])
@pytest.mark.parametrize("outputs", [("logprobs",), ("entropy",), ("lse",), ("lse", "entropy")])
def test_any_output_alone_and_gradients_of_stride_0(outputs, way, device):
    problem = make_problem(num_rows=13).rounded(FP32, device)
    leaves, loss = own_loss(problem, way, outputs)
    loss.backward()
    truth = problem.leaves(torch.float64, bias=True)
    hidden, weight, bias = truth
    logits = (hidden @ weight.t() + bias) / 0.8
    log_p = logits.log_softmax(1)
    every = {
        "logprobs": log_p.gather(1, problem.labels.clamp(min=0)[:, None])[:, 0],
        "entropy": -(log_p.exp() * log_p).sum(1),
        "lse": logits.logsumexp(1),
    }
    counted = problem.labels != ck.IGNORE_INDEX
    sum(every[name][counted].sum() for name in outputs).backward()
    for leaf, true_leaf in zip(leaves, truth, strict=True):
        assert_near(leaf.grad, true_leaf.grad, 2e-5)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_second_backward_computes_the_logits_again(dtype, device):
    problem = make_problem(num_rows=23).rounded(dtype, device)
    leaves, loss = own_loss(problem, KEPT, dtype=dtype)
    work = 18 * 101 * 16
    grads = []
    for factor in (4, 6, 6):  # d_hidden and d_weight; the logits as well
        operations, _ = products_of(lambda: loss.backward(retain_graph=True))
        assert operations == factor * work
        grads.append([leaf.grad.clone() for leaf in leaves])
        for leaf in leaves:
            leaf.grad = None
    for first, second, third in zip(*grads, strict=True):
        assert_near(first, second, 1e-5 if dtype == FP32 else 2e-2)
        assert torch.equal(second, third)


def test_scores_without_a_gradient_keep_nothing(device):
    problem = make_problem(num_rows=23).rounded(FP32, device)
    hidden, weight, _ = problem.leaves(FP32, needs=())
    with LiveBytes(hidden, weight, problem.labels) as counter:
        out = ck.linear_logprobs(hidden, weight, problem.labels, backend="triton", mode="two_pass")
    assert not out.logprobs.requires_grad
    assert counter.peak < 18 * 112 * 4 * 1.9


class Large(TorchDispatchMode):
    """Finds new storages of at least ``least`` bytes."""

    def __init__(self, least: int, known: set) -> None:
        super().__init__()
        self.least, self.known, self.found = least, known, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().nbytes() >= self.least:
                pointer = leaf.untyped_storage().data_ptr()
                if pointer not in self.known:
                    self.known.add(pointer)
                    self.found.append((str(func), leaf.shape))
        return out


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_nothing_else_of_n_times_v_exists_and_the_workspace_bounds_it(dtype, device, monkeypatch):
    """E is the one buffer of all rows: forward makes it, backward turns it into dZ."""
    monkeypatch.setattr(rows_triton, "BLOCK_V", 512)  # one tile a row: tensors are looked at
    monkeypatch.setattr(plan, "RING_ROWS", 16)
    monkeypatch.setattr(plan, "ROW_MULTIPLE", 8)
    num_rows, vocab, dim = 60, 300, 8
    monkeypatch.setattr(plan, "PRODUCT_BYTES", 16 * 4 * dim)  # a CPU casts what it multiplies
    problem = make_problem(num_rows, vocab, dim, ignored=0).rounded(dtype, device)
    item = torch.empty(0, dtype=dtype).element_size()
    row = plan.RowBytes(304 * 4, 304 * item + 2 * dim * item)
    least = num_rows * (row.d_raw + plan.BYTES_OF_VECTORS) + 8 * row.raw + 16 * dim * 4
    for workspace in (least, least - 1):
        hidden, weight, _ = problem.leaves(dtype)
        options = {"backend": "triton", "workspace_bytes": workspace}
        known = {hidden.untyped_storage().data_ptr(), weight.untyped_storage().data_ptr()}
        with LiveBytes(hidden, weight, problem.labels) as counter:
            with Large(num_rows * vocab * item, known) as forward:
                out = ck.linear_logprobs(hidden, weight, problem.labels, **options)
            with Large(num_rows * vocab * item, known) as backward:
                out.entropy.sum().backward()
        fits = workspace == least
        assert len(forward.found) == fits, forward.found
        assert backward.found == []
        gradients = (num_rows + vocab) * dim * item
        accumulator = 0 if fits else 4 * vocab * dim
        casts = 4 * vocab * (16 + dim) if dtype == BF16 and device == "cpu" else 0
        assert counter.peak <= workspace + gradients + accumulator + casts


def test_the_choice_is_logged_once_with_its_reason(device, caplog):
    dispatch._log_once.cache_clear()
    caplog.set_level("INFO", logger="crpo_kernels")
    problem = make_problem(num_rows=13).rounded(FP32, device)
    for way in (KEPT, AGAIN, KEPT, AGAIN):
        own_loss(problem, way)
    why = (
        "backend triton, mode two_pass: the loss on its outputs, and with it every coefficient, "
        "comes after the head has run"
    )
    assert caplog.messages == [
        f"{why}; the exponentials of all rows fit the workspace and are kept",
        f"{why}; the logits are computed again for the gradient",
    ]


def test_explain_choice_says_which(monkeypatch):
    monkeypatch.setattr(dispatch, "triton_obstacle", lambda *_, **__: None)
    asked = {"num_rows": 4096, "vocab_size": 131072, "hidden_size": 1024, "backend": "triton"}
    for workspace, words in ((2 << 30, "exponentials of all rows fit"), (1 << 30, "again")):
        text, _ = ck.explain_choice(**asked, workspace_bytes=workspace)
        assert words in text, text


@pytest.mark.parametrize("preset", ["crpo", "sft"])
def test_bf16_gradients_are_within_3_5e_3_of_fp64(preset, device, rounded):
    problem = make_problem(num_rows=40, vocab=203, dim=32, ignored=0, seed=3)
    problem.hidden *= 0.4  # entropies of 1-3 nats
    problem = problem.rounded(BF16, device)
    options = {"spec": spec_of(preset), "temperature": 0.8}
    truth = run_loss(problem, torch.float64, backend="dense", **options)
    got = run_loss(problem, BF16, backend="triton", mode="two_pass", **options)
    for name in ("hidden", "weight"):
        assert rms(got[1][name], truth[1][name]) <= 3.5e-3, name
    for name in ("logprobs", "entropy"):  # of fp32 logits: E has no part in them
        assert rms(getattr(got[2], name), getattr(truth[2], name)) <= 5e-5


def test_truncated_stores_are_within_1_2e_2(device):
    """The interpreter as it is: each store loses up to 2^-7, .7 x 2^-8 in the mean, of one sign."""
    problem = make_problem(num_rows=40, vocab=203, dim=32, ignored=0, seed=3).rounded(BF16, device)
    options = {"spec": spec_of("crpo"), "temperature": 0.8}
    truth = run_loss(problem, torch.float64, backend="dense", **options)
    got = run_loss(problem, BF16, backend="triton", mode="two_pass", **options)
    for name in ("hidden", "weight"):
        assert rms(got[1][name], truth[1][name]) <= 1.2e-2, name


def test_tiny_weights_lose_no_bits_in_bf16(device):
    """bf16 has fp32's exponents: a loss 2^-40 times as large has the same gradients, scaled."""
    problem = make_problem(num_rows=13).rounded(BF16, device)
    drop = ("ref_logprobs",)
    options = {"spec": ck.ObjectiveSpec("clip"), "backend": "triton", "mode": "two_pass"}
    first = run_loss(problem, BF16, drop=drop, **options)
    for name in ("token_weights", "entropy_weights", "z_loss_weights"):
        problem.vectors[name] = problem.vectors[name] * 2.0**-40
    second = run_loss(problem, BF16, drop=drop, **options)
    for name in ("hidden", "weight"):
        assert torch.equal(first[1][name], second[1][name] * 2.0**40)


def test_repeats_bit_by_bit_and_no_rows(device):
    problem = make_problem(num_rows=13).rounded(BF16, device)
    options = {"spec": spec_of("crpo"), "backend": "triton", "mode": "two_pass"}
    first, second = (run_loss(problem, BF16, **options) for _ in range(2))
    for name in ("hidden", "weight"):
        assert torch.equal(first[1][name], second[1][name])
    problem.labels.fill_(ck.IGNORE_INDEX)
    loss, grads, _ = run_loss(problem, BF16, **options)
    assert float(loss) == 0.0
    assert not any(grad.any() for grad in (grads["hidden"], grads["weight"]))

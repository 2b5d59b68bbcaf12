"""The objective's twin in Triton equals torch's functions, alone and in the row kernel's epilogue.

Allowed per value: 4 units in the last place of what is added up for it, and 2 more for each nat of
an exponential's argument, which is how far apart two correct exponentials may be.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

import triton_tools
from crpo_kernels import ObjectiveSpec, objective
from crpo_kernels.row_table import COLUMNS, RowTable
from crpo_kernels.rows import LogitView
from crpo_kernels.spec import KL_ESTIMATORS, PRESETS, RHO_MODES, TokenInputs
from crpo_kernels.terms import Sequences, evaluate

if reason := triton_tools.why_no_triton():
    pytest.skip(reason, allow_module_level=True)

import triton
import triton.language as tl

from crpo_kernels.rows_triton import row_stats
from crpo_kernels.twin_triton import triton_twin

EPS = torch.finfo(torch.float32).eps
NAN = math.nan
BEYOND_20 = math.nextafter(20.0, 21.0) + 2e-6  # the next fp32
LOG_RATIOS = [
    *torch.linspace(-3, 3, 47).tolist(),
    *(s * x for s in (1, -1) for x in (0.0, 1e-30, 1e-8, 1e-4, 19.9, 20.0, BEYOND_20, 25.0, 1e4)),
]
KL_SHIFTS = [  # reference - policy
    *(s * x for s in (1, -1) for x in (0.0, 1e-8, 1e-4, 0.03, 0.4999, 0.5, 0.51, 2.0, 15.0, 30.0)),
    20.0,
    BEYOND_20,
    -100.0,
]
LOG_RHOS = [0.0, 1e-6, -0.4, 0.69, 0.7, 1.5, -3.0, 40.0, 80.0, -80.0]
OUTPUTS = ("value", "slope", "ratio", "kl", "rho", "is_clipped")

with triton_tools.interpreting():
    TWIN = triton_twin(objective)
_token_terms, _row_loss, _lse_slope = TWIN.token_terms, TWIN.row_loss, TWIN.lse_slope
_row_factors, _weighted = TWIN.row_factors, TWIN.weighted


@triton_tools.jit
def token_terms_kernel(
    logprob_ptr,  # [T], as the following
    log_ratio_ptr,
    log_rho_ptr,
    advantages_ptr,
    ref_logprob_ptr,
    out_ptr,  # [6, T]
    num_tokens,
    clip_low,
    clip_high,
    kl_coef,
    rho_cap,
    rho_floor,
    POLICY: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    RHO_MODE: tl.constexpr,
    USES_KL: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = offs_t < num_tokens
    logprob = tl.load(logprob_ptr + offs_t, mask=mask)
    log_ratio = tl.load(log_ratio_ptr + offs_t, mask=mask)
    advantages = tl.load(advantages_ptr + offs_t, mask=mask)
    log_rho = None
    if log_rho_ptr is not None:
        log_rho = tl.load(log_rho_ptr + offs_t, mask=mask)
    ref_logprob = None
    if ref_logprob_ptr is not None:
        ref_logprob = tl.load(ref_logprob_ptr + offs_t, mask=mask)
    value, slope, ratio, kl, rho, is_clipped = _token_terms(
        POLICY, KL_ESTIMATOR, RHO_MODE, USES_KL, logprob, log_ratio, log_rho, advantages,
        ref_logprob, clip_low, clip_high, kl_coef, rho_cap, rho_floor,
    )  # fmt: skip
    tl.store(out_ptr + offs_t, value, mask=mask)
    tl.store(out_ptr + num_tokens + offs_t, slope, mask=mask)
    tl.store(out_ptr + 2 * num_tokens + offs_t, ratio, mask=mask)
    tl.store(out_ptr + 3 * num_tokens + offs_t, kl, mask=mask)
    tl.store(out_ptr + 4 * num_tokens + offs_t, rho, mask=mask)
    tl.store(out_ptr + 5 * num_tokens + offs_t, is_clipped.to(tl.float32), mask=mask)


@triton_tools.jit
def row_kernel(
    values_ptr,  # [9, T] as the loads name them
    out_ptr,  # [6, T]
    num_tokens,
    HAS_ALL: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = offs_t < num_tokens
    value = tl.load(values_ptr + offs_t, mask=mask)
    token_weight = tl.load(values_ptr + num_tokens + offs_t, mask=mask)
    entropy = tl.load(values_ptr + 2 * num_tokens + offs_t, mask=mask)
    lse = tl.load(values_ptr + 4 * num_tokens + offs_t, mask=mask)
    g = tl.load(values_ptr + 6 * num_tokens + offs_t, mask=mask)
    logprob = tl.load(values_ptr + 7 * num_tokens + offs_t, mask=mask)
    mean_shift = tl.load(values_ptr + 8 * num_tokens + offs_t, mask=mask)
    entropy_weight = None
    z_weight = None
    d_lse = None
    if HAS_ALL:
        entropy_weight = tl.load(values_ptr + 3 * num_tokens + offs_t, mask=mask)
        z_weight = tl.load(values_ptr + 5 * num_tokens + offs_t, mask=mask)
        d_lse = _lse_slope(lse, z_weight)
        tl.store(out_ptr + 3 * num_tokens + offs_t, d_lse, mask=mask)
    loss = _row_loss(value, token_weight, entropy, entropy_weight, lse, z_weight)
    a, label_grad = _row_factors(g, entropy_weight, d_lse, logprob, entropy, mean_shift)
    tl.store(out_ptr + offs_t, loss, mask=mask)
    tl.store(out_ptr + num_tokens + offs_t, a, mask=mask)
    tl.store(out_ptr + 2 * num_tokens + offs_t, label_grad, mask=mask)
    tl.store(out_ptr + 4 * num_tokens + offs_t, _weighted(token_weight, value), mask=mask)


def grid(*columns):
    """[T] per column: every log ratio with every advantage, the other columns in rotation."""
    pairs = list(product(LOG_RATIOS, (-1.7, 0.0, 2.3)))
    made = [torch.tensor(column, dtype=torch.float32) for column in zip(*pairs, strict=True)]
    for stride, values in enumerate(columns, 1):  # another rotation for each
        made.append(torch.tensor([values[i * stride % len(values)] for i in range(len(pairs))]))
    return made


def run_twin(device, spec, logprob, log_ratio, log_rho, advantages, ref_logprob):
    """Name -> [T] from the kernel."""
    count = logprob.numel()
    vectors = (logprob, log_ratio, log_rho, advantages, ref_logprob)
    vectors = [None if x is None else x.to(device) for x in vectors]
    out = torch.full((len(OUTPUTS), count), NAN, device=device)
    bounds = (spec.clip_low, spec.clip_high, spec.kl_coef, spec.rho_cap, spec.rho_floor)
    choices = (spec.policy, spec.kl_estimator, spec.rho_mode, spec.kl_coef != 0)
    token_terms_kernel[(triton.cdiv(count, 128),)](
        *vectors, out, count, *map(float, bounds), *choices, BLOCK_T=128
    )
    return dict(zip(OUTPUTS, out.cpu(), strict=True))


def run_torch(spec, dtype, *vectors):
    """Name -> [T] from the functions themselves."""
    logprob, log_ratio, log_rho, advantages, ref = (
        x if x is None else x.to(dtype) for x in vectors
    )
    made = objective.token_terms(
        spec.policy, spec.kl_estimator, spec.rho_mode, spec.kl_coef != 0,
        logprob, log_ratio, log_rho, advantages, ref,
        spec.clip_low, spec.clip_high, spec.kl_coef, spec.rho_cap, spec.rho_floor,
    )  # fmt: skip
    return dict(zip(OUTPUTS, made, strict=True))


def room(spec, logprob, log_ratio, log_rho, advantages, ref_logprob):
    """Name -> [T] what rounding may do: units in the last place of the terms that are added."""
    exact = run_torch(
        replace(spec, kl_coef=0.0), torch.float64, logprob, log_ratio, log_rho, advantages, None
    )
    nats = log_ratio.double().abs().clamp(max=20)
    size = {name: exact[name].abs() for name in ("value", "slope", "ratio", "rho")}
    size["kl"], kl_slope = torch.zeros_like(nats), 0.0
    if log_rho is not None:
        nats = nats + log_rho.double().abs()
    if ref_logprob is not None:
        x = (ref_logprob.double() - logprob.double()).abs()
        nats = nats + x.clamp(max=20)
        far = (ref_logprob.double() - logprob.double()).clamp(max=20).exp() + 1 + x
        near = 0.5 * x * x
        size["kl"] = torch.where(x < 0.5, near, far) if spec.kl_estimator == "k3" else near + x
        kl_slope = size["kl"] + x + (spec.kl_estimator == "k1")
    size["value"] = size["value"] + spec.kl_coef * size["kl"]
    size["slope"] = size["slope"] + spec.kl_coef * kl_slope
    return {name: (4 + 2 * nats) * EPS * magnitude + 1e-37 for name, magnitude in size.items()}


def assert_within(got, expected, allowed, what):
    """Elementwise; NaN and infinities in the same places."""
    for name, limit in allowed.items():
        a, b = got[name].double(), expected[name].double()
        is_same = (a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= limit)
        wrong = (~is_same).nonzero()[:1].flatten().tolist()
        assert not wrong, (
            f"{what}: {name}{wrong}: {a[wrong]} for {b[wrong]}, allowed {limit[wrong]}"
        )


def specs(preset):
    """Every KL estimator and rho mode on a preset, with and without a reference."""
    for estimator, rho_mode, kl_coef in product(KL_ESTIMATORS, RHO_MODES, (0.0, 0.05)):
        yield ObjectiveSpec.preset(
            preset, kl_estimator=estimator, rho_mode=rho_mode, kl_coef=kl_coef, rho_floor=0.5
        )


@pytest.mark.parametrize("preset", PRESETS)
def test_equals_torch_on_the_grid(preset, device):
    log_ratio, advantages, logprob, shift, log_rho = grid([0.0, -0.75, -2.5], KL_SHIFTS, LOG_RHOS)
    for spec in specs(preset):
        for is_on_policy in (False, True):
            vectors = (
                logprob,
                torch.zeros_like(log_ratio) if is_on_policy else log_ratio,
                log_rho if spec.rho_mode else None,
                advantages,
                logprob + shift if spec.kl_coef or spec.kl_estimator == "k2" else None,
            )
            got = run_twin(device, spec, *vectors)
            allowed = room(spec, *vectors)
            assert all(bool(x.isfinite().all()) for x in got.values()), spec
            for dtype in (torch.float32, torch.float64):
                expected = run_torch(spec, dtype, *vectors)
                assert torch.equal(got["is_clipped"].bool(), expected["is_clipped"]), spec
                assert_within(got, expected, allowed, f"{spec} {dtype}")
        clipped = got["is_clipped"].bool().any() if spec.policy != "sft" else True
        assert clipped or is_on_policy


@pytest.mark.parametrize("policy", ["clip", "gspo", "cispo"])
@pytest.mark.parametrize("advantage", [2.3, -1.7])
def test_both_clip_edges_are_inclusive(policy, advantage, device):
    """Bounds at which the ratio lands exactly on an edge, and one ulp to either side of it."""
    for log_ratio in (0.0, 0.25, 0.6, -0.25, -0.6):
        x = torch.tensor([log_ratio, log_ratio]), torch.full((2,), advantage)
        vectors = (torch.tensor([-1.0, -1.0]), x[0], None, x[1], None)
        wide = ObjectiveSpec(policy=policy, clip_low=1.0, clip_high=100.0)
        ratio = run_twin(device, wide, *vectors)["ratio"][0]
        for side in (-math.inf, None, math.inf):
            edge = ratio if side is None else torch.nextafter(ratio, torch.tensor(side))
            edge = float(edge)  # 1 + (edge - 1) and 1 - (1 - edge) are exact in fp32
            high, low = max(edge - 1.0, 0.0), min(max(1.0 - edge, 0.0), 1.0)
            spec = ObjectiveSpec(policy=policy, clip_low=low, clip_high=high)
            got = {name: float(x[0]) for name, x in run_twin(device, spec, *vectors).items()}
            is_above, is_below = float(ratio) > 1.0 + high, float(ratio) < 1.0 - low
            if policy == "cispo":
                is_clipped = is_above
                factor = min(float(ratio), 1.0 + high)
                expected = (factor * advantage, -factor * advantage)  # of logprob -1
            else:
                is_clipped = is_above if advantage > 0 else is_below
                clipped = 1.0 + high if is_above else 1.0 - low
                value = -(clipped if is_clipped else float(ratio)) * advantage
                expected = (value, 0.0 if is_clipped else value)
            assert bool(got["is_clipped"]) is is_clipped, (log_ratio, side)
            assert (got["value"], got["slope"]) == pytest.approx(expected, rel=2 * EPS)


def test_both_edges_of_the_rho_mask_are_inclusive(device):
    x = torch.tensor([0.0])
    for log_rho in (0.4, -0.4):
        vectors = (x - 1.0, x, x + log_rho, x + 1.0, None)
        free = ObjectiveSpec(rho_mode="mask", rho_cap=1e9)
        rho = float(run_twin(device, free, *vectors)["rho"])
        inside = {"rho_floor": rho, "rho_cap": rho}
        outside = {"rho_cap": rho * (1 - EPS)}, {"rho_floor": rho * (1 + EPS), "rho_cap": 9.0}
        for bounds, expected in ((inside, rho), (outside[0], 0.0), (outside[1], 0.0)):
            got = run_twin(device, ObjectiveSpec(rho_mode="mask", **bounds), *vectors)
            assert (float(got["rho"]), float(got["value"])) == (expected, -expected)


def test_nothing_moves_beyond_20_nats(device):
    log_ratio = torch.tensor([20.0, BEYOND_20, 90.0, -20.0, -BEYOND_20, -90.0])
    advantages = -torch.ones(6)
    spec = ObjectiveSpec(clip_low=1.0)  # nothing is clipped: A < 0 and no lower bound
    got = run_twin(device, spec, torch.zeros(6), log_ratio, None, advantages, None)
    assert got["ratio"].tolist() == pytest.approx(
        [math.exp(20)] * 3 + [math.exp(-20)] * 3, rel=4e-6
    )
    assert got["slope"].tolist() == [got["ratio"][0], 0.0, 0.0, got["ratio"][3], 0.0, 0.0]
    assert got["value"].tolist() == got["ratio"].tolist()


@pytest.mark.parametrize("preset", ["crpo", "gspo", "cispo", "sft"])
def test_a_nan_in_any_input_stays_nan(preset, device):
    names = ("logprob", "log_ratio", "log_rho", "advantages", "ref_logprob")
    vectors = torch.zeros(5, 6)
    vectors[:, :5].fill_diagonal_(NAN)
    for estimator, rho_mode in product(KL_ESTIMATORS, ("truncate", "mask")):
        spec = ObjectiveSpec.preset(preset, kl_coef=0.1, kl_estimator=estimator, rho_mode=rho_mode)
        got = run_twin(device, spec, *vectors)
        expected = run_torch(spec, torch.float32, *vectors)
        for name in OUTPUTS[:-1]:
            nans = got[name].isnan().tolist()
            assert nans == expected[name].isnan().tolist(), (spec, name)
            assert not nans[-1], (spec, name)
        reaches = [n for n, is_nan in zip(names, got["value"].isnan(), strict=False) if is_nan]
        ignored = {"sft": ["log_ratio", "advantages"]}.get(preset, [])
        assert [n for n in names if n not in reaches] == ignored
        assert got["ratio"].isnan().tolist()[1], "log_ratio"


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, of the NaN
@pytest.mark.parametrize("has_all", [True, False])
def test_weights_and_row_factors(has_all, device):
    values = torch.randn(9, 300)
    values[7] = -values[7].abs() * torch.logspace(-8, 1, 300)  # logprobs
    values[2], values[8] = values[2].abs(), -values[8].abs()
    values[[1, 3, 5], 10:20] = 0.0  # zero weights
    values[[0, 2, 4], 10:13] = torch.tensor([NAN, math.inf, -math.inf])  # ... with garbage
    out = torch.full((5, 300), NAN, device=device)
    row_kernel[(3,)](values.to(device), out, 300, has_all, BLOCK_T=128)
    got = out.cpu()
    for dtype in (torch.float32, torch.float64):
        value, weight, entropy, q, lse, z_weight, g, logprob, shift = values.to(dtype)
        q, z_weight = (q, z_weight) if has_all else (None, None)
        d_lse = objective.lse_slope(lse, z_weight) if has_all else None
        loss = objective.row_loss(value, weight, entropy, q, lse, z_weight)
        a, label_grad = objective.row_factors(g, q, d_lse, logprob, entropy, shift)
        size = 1 + sum(x.abs() * x.abs() for x in (value, entropy, lse, g, shift)).nan_to_num(0.0)
        limit = {str(i): 8 * EPS * size.double() for i in (0, 1, 2, 4)}
        expected = {"0": loss, "1": a, "2": label_grad, "4": objective.weighted(weight, value)}
        assert_within({str(i): got[i] for i in range(5)}, expected, limit, str(dtype))
        if has_all:
            assert_within({"d_lse": got[3]}, {"d_lse": d_lse}, {"d_lse": limit["0"]}, "d_lse")
    assert got[0, 10:20].tolist() == got[4, 10:20].tolist() == [0.0] * 10
    # g (1 - p) does not cancel where p is nearly 1
    certain = (values[7] > -1e-3) & (values[1] != 0)
    if not has_all:
        exact = -values[6].double() * values[7].double().expm1()
        assert float((got[2] / exact - 1)[certain].abs().max()) < 8 * EPS


def epilogue(device, spec, inputs, raw):
    """Name -> [C] of the shipped row kernel."""
    table = RowTable(COLUMNS, raw.shape[0], raw.to(device), torch.float32)
    table.values.fill_(NAN)
    moved = inputs._make(None if x is None else x.to(device) for x in inputs)
    view = LogitView(None, None, 1.0)
    row_stats(raw.to(device), moved.labels, view, table, slice(None), spec, moved)
    return {name: table.column(name).cpu() for name in COLUMNS}


@pytest.mark.parametrize("preset", ["crpo", "dapo", "gspo", "cispo", "sft"])  # all that differ
@pytest.mark.parametrize("has_old", [True, False])
def test_the_row_kernel_s_epilogue_is_the_same_objective(preset, has_old, device):
    """Its loss, slopes and statistics, from its own logprobs, entropy and lse."""
    count = 9
    raw = torch.randn(count, 5) * 2
    labels = torch.arange(count) % 5
    logprob = raw.log_softmax(1)[torch.arange(count), labels]
    shifts = torch.tensor([0.0, 0.3, -0.3, 1e-4, 25.0, -25.0, 2.0, -2.0, 0.05])
    old_logprobs = (logprob - shifts).index_fill(0, torch.tensor([2]), NAN)
    full = TokenInputs(
        labels,
        token_weights=torch.linspace(0.5, 1.5, count).index_fill(0, torch.tensor([2]), 0.0),
        advantages=torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0, -2.0, -0.3, 0.3, 1.0]),
        entropy_weights=torch.linspace(-0.1, 0.1, count),
        z_loss_weights=torch.full((count,), 0.01),
        old_logprobs=old_logprobs if has_old else None,
        rollout_logprobs=logprob + shifts.flip(0) / 3,
        ref_logprobs=logprob + shifts.roll(1),
    )
    of_no_kl = ObjectiveSpec().kl_estimator  # without a reference all estimators are the same
    differ = [s for s in specs(preset) if s.kl_coef or s.kl_estimator == of_no_kl]
    for number, spec in enumerate(differ):
        drop = ("entropy_weights", "z_loss_weights", "advantages")[number % 4 : number % 4 + 1]
        inputs = full._replace(**dict.fromkeys(drop))
        inputs = inputs if spec.kl_coef else inputs._replace(ref_logprobs=None)
        has_rho = has_old and spec.rho_mode is not None
        got = epilogue(device, spec, inputs, raw)
        own = Sequences(torch.arange(count), count)  # gspo: the mean of one token is its own
        made = evaluate(spec, inputs, got["logprobs"], got["entropy"], got["lse"], own)
        names = ("token_loss", "ratio", "kl", "rho", "is_clipped", "loss")
        expected = {name: getattr(made, name) for name in names}
        expected["d_logprobs"] = made.coefficients.d_logprobs
        if "z_loss_weights" not in drop:
            expected["d_lse"] = made.coefficients.d_lse
        scale = {k: 1e-5 * (v.double().abs() + 1) for k, v in expected.items()}
        assert_within(got, expected, scale, f"{spec} without {drop}")
        assert torch.equal(got["is_clipped"].bool(), made.is_clipped)
        assert got["token_loss"][2].isnan() == ((has_old and preset != "sft") or has_rho)
        assert got["loss"][2].isfinite()
        assert got["d_logprobs"][2] == 0

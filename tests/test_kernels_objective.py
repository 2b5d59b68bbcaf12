"""The objective: a table made by hand, slopes against autograd, and what the file may contain."""

from __future__ import annotations

import ast
import inspect
import math

import pytest
import torch

from crpo_kernels import objective
from crpo_kernels.spec import ObjectiveSpec

LN = math.log
# policy, ratio, advantage, clip_low, clip_high -> value, slope, is_clipped; all worked out by hand
CLIP_TABLE = [
    (1.5, 2.0, 0.2, 0.2, -2.4, 0.0, True),  # above: -1.2 * 2
    (1.5, -2.0, 0.2, 0.2, 3.0, 3.0, False),  # pessimistic: the ratio stays, -1.5 * -2
    (0.5, 2.0, 0.2, 0.2, -1.0, -1.0, False),
    (0.5, -2.0, 0.2, 0.2, 1.6, 0.0, True),  # below: -0.8 * -2
    (1.1, 3.0, 0.2, 0.2, -3.3, -3.3, False),
    (1.25, 4.0, 0.2, 0.28, -5.0, -5.0, False),  # dapo's wider upper edge
    (1.3, 4.0, 0.2, 0.28, -5.12, 0.0, True),
    (0.9, 0.0, 0.2, 0.2, 0.0, 0.0, False),
]
CISPO_TABLE = [  # ratio, advantage, clip_high, logprob -> value, slope, is_clipped
    (2.0, 3.0, 4.0, -1.5, 9.0, -6.0, False),  # -2 * 3 * -1.5
    (8.0, 3.0, 4.0, -1.5, 22.5, -15.0, True),  # -5 * 3 * -1.5
    (8.0, -1.0, 4.0, -0.5, -2.5, 5.0, True),
    (0.01, 1.0, 4.0, -2.0, 0.02, -0.01, False),  # no lower bound
]
KL_TABLE = [  # estimator, logprob, ref -> value, slope
    ("k1", -2.0, -1.5, -0.5, 1.0),
    ("k2", -2.0, -1.5, 0.125, -0.5),
    ("k3", -2.0, -2.0, 0.0, 0.0),
    ("k3", -1.0, -1.0 + LN(2.0), 1.0 - LN(2.0), -1.0),  # 2 - 1 - ln 2; 1 - 2
    ("k3", -1.0, -1.0 - LN(4.0), -0.75 + 2 * LN(2.0), 0.75),  # 1/4 - 1 + ln 4; 1 - 1/4
]


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("row", CLIP_TABLE)
def test_clip_table(row):
    ratio, advantage, low, high, value, slope, clipped = row
    got = objective.clip_term(f64(ratio).log(), f64(advantage), low, high)
    assert [float(x) for x in got[:3]] == pytest.approx([value, slope, ratio], abs=1e-12)
    assert bool(got[3]) is clipped


@pytest.mark.parametrize("row", CISPO_TABLE)
def test_cispo_table(row):
    ratio, advantage, high, logprob, value, slope, clipped = row
    got = objective.cispo_term(f64(logprob), f64(ratio).log(), f64(advantage), high)
    assert [float(x) for x in got[:3]] == pytest.approx([value, slope, ratio], rel=1e-12)
    assert bool(got[3]) is clipped


@pytest.mark.parametrize("row", KL_TABLE)
def test_kl_table(row):
    estimator, logprob, ref, value, slope = row
    got = objective.kl_term(estimator, f64(logprob), f64(ref))
    assert [float(x) for x in got] == pytest.approx([value, slope], abs=1e-12)


def test_sft_table():
    value, slope, ratio, clipped = objective.sft_term(f64(-2.5), f64(0.0))
    assert (float(value), float(slope), float(ratio), bool(clipped)) == (2.5, -1.0, 1.0, False)


def test_rho_table():
    log_rho = f64(LN(0.25), LN(1.5), LN(3.0), 800.0)
    assert objective.rho_term("truncate", log_rho, 2.0, 0.5).tolist() == pytest.approx(
        [0.25, 1.5, 2.0, 2.0]
    )
    assert objective.rho_term("mask", log_rho, 2.0, 0.5).tolist() == pytest.approx([0, 1.5, 0, 0])
    edges = objective.rho_term("mask", f64(0.0, LN(0.5)), 1.0, 0.5)
    assert edges.tolist() == pytest.approx([1.0, 0.5])  # both edges inclusive


def test_at_a_clip_edge_the_unclipped_slope_holds():
    for advantage in (2.0, -2.0):
        for log_ratio in (0.0, 0.25, -0.25):
            ratio = float(torch.tensor(log_ratio, dtype=torch.float64).exp())
            low, high = max(1.0 - ratio, 0.0), max(ratio - 1.0, 0.0)
            assert 1.0 + high == ratio or 1.0 - low == ratio
            got = objective.clip_term(f64(log_ratio), f64(advantage), low, high)
            assert (float(got[0]), float(got[1])) == (-ratio * advantage, -ratio * advantage)
            assert not bool(got[3])


def test_the_log_ratio_is_clamped_at_20_and_has_no_slope_beyond():
    log_ratio = f64(-25.0, -20.0, 20.0, 25.0)
    value, slope, ratio, _ = objective.clip_term(log_ratio, f64(-1.0, -1.0, -1.0, -1.0), 1.0, 1e99)
    assert ratio.tolist() == [math.exp(-20), math.exp(-20), math.exp(20), math.exp(20)]
    assert value.tolist() == ratio.tolist()
    assert slope.tolist() == [0.0, math.exp(-20), math.exp(20), 0.0]  # at +-20 itself it moves


@pytest.mark.parametrize("policy", ["clip", "sft"])
def test_slope_is_the_derivative_of_the_value(policy):
    log_ratio = torch.cat([torch.linspace(-3, 3, 241, dtype=torch.float64), f64(-1e-9, 1e-9, 19.9)])
    for advantage in (-1.7, 0.0, 2.3):
        logprob = (log_ratio - 1.0).requires_grad_()
        value, slope, _, _ = objective.policy_term(
            policy, logprob, logprob + 1.0, torch.full_like(log_ratio, advantage), 0.2, 0.28
        )
        (derivative,) = torch.autograd.grad(value.sum(), logprob)
        torch.testing.assert_close(slope, derivative, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_slope_is_the_derivative_of_the_value(estimator):
    small = torch.logspace(-9, 0, 60, dtype=torch.float64)
    x = torch.cat(
        [torch.linspace(-15, 15, 121, dtype=torch.float64), small, -small, f64(0.5, -0.5)]
    )
    logprob = (-x).requires_grad_()
    value, slope = objective.kl_term(estimator, logprob, torch.zeros_like(x))
    (derivative,) = torch.autograd.grad(value.sum(), logprob)
    torch.testing.assert_close(slope, derivative, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_does_not_cancel(dtype):
    exact = torch.logspace(-8, -0.31, 80, dtype=torch.float64).to(dtype)
    for sign in (1.0, -1.0):
        x = sign * exact
        series = sum(x.double() ** n / math.factorial(n) for n in range(2, 20))
        value, slope = objective.kl_term("k3", -x, torch.zeros_like(x))
        eps = torch.finfo(dtype).eps
        assert float((value.double() / series - 1).abs().max()) < max(8 * eps, 2e-13)
        assert float((slope.double() / -(series + x.double()) - 1).abs().max()) < max(
            8 * eps, 2e-13
        )


def test_k3_keeps_pulling_back_a_policy_that_left_the_reference():
    value, slope = objective.kl_term("k3", f64(-30.0, -120.0), f64(0.0, -20.0))
    assert value.tolist() == pytest.approx([math.exp(20) - 31, math.exp(20) - 101])
    assert slope.tolist() == pytest.approx(
        [1 - math.exp(20)] * 2
    )  # raising logprob lowers the loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_stays_nan_everywhere(dtype):
    nan, one = torch.tensor([math.nan], dtype=dtype), torch.ones(1, dtype=dtype)
    for policy in ("clip", "cispo", "sft"):
        value, slope, ratio, _ = objective.policy_term(policy, nan, nan, one, 0.2, 0.2)
        assert value.isnan()
        assert slope.isnan()
        assert ratio.isnan()
    assert objective.clip_term(one, nan, 0.2, 0.2)[0].isnan()
    for mode in ("truncate", "mask"):
        assert objective.rho_term(mode, nan, 2.0, 0.0).isnan()
    for estimator in ("k1", "k2", "k3"):
        assert all(x.isnan() for x in objective.kl_term(estimator, nan, one))


def test_weight_zero_beats_garbage():
    garbage = f64(math.nan, math.inf, 3.0)
    assert objective.weighted(f64(0.0, 0.0, 2.0), garbage).tolist() == [0.0, 0.0, 6.0]
    assert objective.weighted(f64(1.0), f64(math.nan)).isnan()


def test_objective_uses_where_and_exp_only_so_that_triton_can_share_it():
    tree = ast.parse(inspect.getsource(objective))
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert [ast.unparse(n) for n in imports] == ["import torch as ops"]
    attributes = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert attributes == {"ops.where", "ops.exp"}
    calls = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    assert not {name for name in calls if any(w in name for w in ("min", "max", "clamp", "clip("))}
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Call) and n.keywords]


def test_presets_have_the_published_defaults():
    preset = ObjectiveSpec.preset
    for name in ("grpo", "bnpo", "dr_grpo"):
        assert preset(name) == ObjectiveSpec("clip", 0.2, 0.2, 0.0)
    assert preset("crpo") == ObjectiveSpec("clip", 0.2, 0.2, 0.01, "k3")
    assert preset("dapo") == ObjectiveSpec("clip", 0.2, 0.28, 0.0)
    assert preset("gspo") == ObjectiveSpec("gspo", 3e-4, 4e-4, 0.0)
    assert preset("cispo").policy == "cispo"
    assert preset("cispo").clip_high == 4.0
    assert preset("sft").policy == "sft"
    assert preset("crpo", kl_coef=0.0, rho_mode="mask").rho_mode == "mask"
    spec = ObjectiveSpec()
    assert (spec.rho_mode, spec.rho_cap, spec.rho_floor, spec.kl_estimator) == (
        None,
        2.0,
        0.0,
        "k3",
    )
    with pytest.raises(AttributeError):
        spec.kl_coef = 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ObjectiveSpec.preset("dappo"), "preset: expected one of .* Did you mean 'dapo'"),
        (lambda: ObjectiveSpec.preset("dapo", clip_hi=1), "Did you mean 'clip_high'"),
        (lambda: ObjectiveSpec(policy="ppo"), "policy: expected one of"),
        (lambda: ObjectiveSpec(kl_estimator="k4"), "kl_estimator: expected .* got 'k4'"),
        (lambda: ObjectiveSpec(rho_mode="clip"), "rho_mode: expected one of"),
        (lambda: ObjectiveSpec(clip_low=1.5), r"clip_low: expected .* \[0.0, 1.0\], got 1.5"),
        (lambda: ObjectiveSpec(clip_high=-0.1), "clip_high: expected .* got -0.1"),
        (lambda: ObjectiveSpec(kl_coef=math.nan), "kl_coef: expected .* got nan"),
        (lambda: ObjectiveSpec(rho_floor=3.0), "rho_floor: expected"),
    ],
)
def test_a_wrong_spec_says_what_to_type(make, message):
    with pytest.raises(ValueError, match=message):
        make()

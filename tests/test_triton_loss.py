"""The whole loss on the Triton backend against the dense oracle in fp64: every value it returns."""

from __future__ import annotations

import itertools

import pytest
import torch

import crpo_kernels as ck
import triton_tools
from benchmarks.compile_gate.pairwise import pairwise
from crpo_kernels import plan
from numerics import PRESETS, assert_near, assert_same_result, make_problem, rms, run_loss
from triton_cases import TOLERANCE, note_plans, shrink

if reason := triton_tools.why_no_triton():
    pytest.skip(reason, allow_module_level=True)

COEFS = [-0.06, 0.02, 0.04]
ESTIMATORS = ("k1", "k2", "k3", None)
RHO = (
    {"rho_mode": None},
    {"rho_mode": "truncate", "rho_cap": 1.1},
    {"rho_mode": "mask", "rho_floor": 0.8, "rho_cap": 1.3},
)
SIZES = {"one group": (4, 10), "groups": (2, 4), "single rows": (1, 1)}  # chunk and group
OPTIONS = {
    "preset": ("crpo", "dapo", "gspo", "cispo", "sft"),
    "on_policy": (True, False),
    "mode": ("auto", "two_pass"),
    "workspace": tuple(SIZES),
    "logit_softcap": (None, 4.0),
    "logit_scale": (1.0, -0.6),
    "bias": (False, True),
    "temperature": (1.0, 0.8, "tokens"),
    "rows": (None, "list", "tensor"),
    "z_loss": (False, True),
    "vocab": (17, 63, 130),
    "dim": (8, 7),
}


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    """Several tiles of a row, chunks of a group and slices of a product at these sizes."""
    shrink(monkeypatch, block=32)


@pytest.fixture
def plans(monkeypatch):
    """Every plan that is made."""
    return note_plans(monkeypatch)


def staged(problem, seed=0):
    """The problem with weights from the package's own functions: aggregation and stages."""
    g = torch.Generator().manual_seed(seed)
    num_rows = problem.labels.numel()
    stage_ids = torch.randint(-1, 3, (num_rows,), generator=g).to(problem.labels.device)
    counted = problem.labels != ck.IGNORE_INDEX
    stage_ids[~counted] = -1
    aggregation = ck.weights.AGGREGATIONS[seed % 3]
    options = {"max_length": 9.0} if aggregation == "constant" else {}
    bounds = problem.cu_seqlens
    token_weights = ck.aggregation_weights(counted, bounds, aggregation=aggregation, **options)
    entropy_weights = ck.stage_entropy_weights(
        stage_ids, bounds, COEFS, reduction=ck.weights.REDUCTIONS[seed % 3]
    )
    problem.vectors["token_weights"] = token_weights.double()
    problem.vectors["entropy_weights"] = entropy_weights.double()
    return problem


def compare(problem, tolerance=TOLERANCE, **options):
    """Loss, gradients and every statistic equal the oracle's."""
    where = {name: options.pop(name, None) for name in ("mode", "workspace_bytes", "rows")}
    options.setdefault("bias", True)
    truth = run_loss(problem, torch.float64, backend="dense", **options)
    where = {name: value for name, value in where.items() if value is not None}
    got = run_loss(problem, torch.float32, backend="triton", **where, **options)
    assert got[0].dtype == torch.float32
    allowed = tolerance * added_up(problem, truth[2], options.get("drop", ()))
    assert abs(float(got[0]) - float(truth[0])) <= allowed, (got[0], truth[0], allowed)
    assert_same_result((truth[0], *got[1:]), truth, tolerance)
    return got


def added_up(problem, stats, drop):
    """The sum of the sizes of everything that the loss adds up: its terms may cancel."""
    parts = {
        "token_weights": stats.token_loss,
        "entropy_weights": stats.entropy,
        "z_loss_weights": stats.lse.square(),
    }
    given = {name: part for name, part in parts.items() if name not in drop}
    return sum(float((problem.vectors[name] * part).abs().sum()) for name, part in given.items())


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("on_policy", [True, False], ids=["on", "off"])
def test_every_preset_kl_rho_and_weighting(preset, on_policy, device, guarded_empty):
    for number, estimator in enumerate(ESTIMATORS):
        kl = {"kl_coef": 0.0} if estimator is None else {"kl_coef": 0.1, "kl_estimator": estimator}
        spec = ck.ObjectiveSpec.preset(preset, **kl, **RHO[number % 3])
        problem = make_problem(num_rows=11, vocab=40, dim=8, ignored=4, seed=number)
        problem = staged(problem.rounded(torch.float32, device), seed=number)
        drop = ["old_logprobs"] * on_policy + ["z_loss_weights"] * (number % 2)
        drop += ["ref_logprobs"] * (estimator is None)
        drop += ["rollout_logprobs"] * (spec.rho_mode is None)
        compare(problem, spec=spec, drop=drop, temperature=0.9, upstream=(1.0, -1.7)[number % 2])


@pytest.mark.parametrize("options", pairwise(OPTIONS), ids=lambda o: "-".join(map(str, o.values())))
def test_options_meet_in_pairs(options, device, plans, guarded_empty):
    options = dict(options)
    preset, on_policy = options.pop("preset"), options.pop("on_policy")
    vocab, dim = options.pop("vocab"), options.pop("dim")
    problem = make_problem(num_rows=13, vocab=vocab, dim=dim, ignored=5, seed=vocab)
    problem = staged(problem.rounded(torch.float32, device), seed=vocab)
    drop = ["old_logprobs"] * on_policy + ["z_loss_weights"] * (not options.pop("z_loss"))
    kind = options.pop("workspace")
    if options["temperature"] == "tokens":
        options["temperature"] = problem.temperature
    if options["rows"]:
        counted = (problem.labels != ck.IGNORE_INDEX).nonzero()[:, 0]
        options["rows"] = counted.tolist() if options["rows"] == "list" else counted
    spec = ck.ObjectiveSpec.preset(preset, kl_coef=0.05)
    workspace = workspace_of(kind, 10, vocab, dim)
    compare(problem, spec=spec, drop=drop, workspace_bytes=workspace, **options)
    assert plans[-1].backend == "triton"
    assert (plans[-1].chunk_rows, plans[-1].group_rows) == SIZES[kind]
    is_kept = plans[-1].mode == "two_pass" and kind == "one group"
    assert plans[-1].kept == ("exps" if is_kept else None)


def workspace_of(kind, num_rows, vocab, dim):
    """Bytes for chunks and groups of `SIZES` in fp32, with the plan's own terms."""
    if kind == "one group":
        return None
    fixed = plan.BYTES_OF_VECTORS * num_rows + 4 * dim * plan.product_rows(dim)
    raw, d_raw = 4 * plan.padded(vocab), 4 * plan.padded(vocab) + 8 * dim
    return fixed + (2 * (raw + 2 * d_raw) if kind == "groups" else raw + d_raw)


def test_groups_by_the_bound_on_kept_rows(device, plans):
    """Beyond 4 D bytes a row of the vocabulary, d_weight accumulates whatever the workspace is."""
    problem = make_problem(num_rows=23, vocab=50, dim=2, ignored=0).rounded(torch.float32, device)
    compare(problem, spec=ck.ObjectiveSpec.preset("dapo"))
    assert (plans[-1].chunk_rows, plans[-1].group_rows) == (4, 8)


@pytest.mark.parametrize("output", ["logprobs", "entropy", "lse", "all"])
@pytest.mark.parametrize("workspace", [None, 5_000])
def test_linear_logprobs(output, workspace, device, guarded_empty):
    problem = make_problem(num_rows=11, vocab=70, dim=8).rounded(torch.float32, device)
    names = ("logprobs", "entropy", "lse") if output == "all" else (output,)
    found = []
    for dtype, backend in ((torch.float64, "dense"), (torch.float32, "triton")):
        leaves = problem.leaves(dtype, bias=True)
        out = ck.linear_logprobs(
            *leaves[:2],
            problem.labels,
            bias=leaves[2],
            temperature=problem.temperature,
            logit_softcap=6.0,
            backend=backend,
            workspace_bytes=workspace if backend == "triton" else None,
        )
        upstream = problem.vectors["advantages"].to(dtype)
        sum((getattr(out, name) * upstream).sum() for name in names).backward()
        found.append(([value.detach() for value in out], [leaf.grad for leaf in leaves]))
    for truth, got in zip(*found, strict=True):
        for expected, value in zip(truth, got, strict=True):
            assert_near(value, expected, TOLERANCE)


def test_an_expanded_upstream_gradient(device):
    """`.sum()` sends one value with stride 0."""
    problem = make_problem(num_rows=9, vocab=40, dim=8, ignored=0).rounded(torch.float32, device)
    for name in ("logprobs", "entropy", "lse"):
        grads = []
        for upstream in (torch.ones((), device=device).expand(9), torch.ones(9, device=device)):
            hidden, weight, _ = problem.leaves(torch.float32)
            out = ck.linear_logprobs(hidden, weight, problem.labels, backend="triton")
            getattr(out, name).backward(upstream)
            grads.append((hidden.grad, weight.grad))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("way", [{}, {"mode": "two_pass"}, {"workspace_bytes": 16_000}], ids=str)
def test_bf16_error_is_at_most_twice_that_of_plain_torch(way, device, plans):
    """The interpreter's bf16 stores truncate, twice a rounding: there twice as much is allowed."""
    problem = make_problem(num_rows=40, vocab=203, dim=32, ignored=0, seed=3)
    problem.hidden *= 0.4  # entropies of 1-3 nats
    problem = problem.rounded(torch.bfloat16, device)
    drop = ("rollout_logprobs", "z_loss_weights", "ref_logprobs")
    options = {"spec": ck.ObjectiveSpec.preset("dapo"), "temperature": 0.8, "drop": drop}
    truth = run_loss(problem, torch.float64, backend="dense", **options)
    got = run_loss(problem, torch.bfloat16, backend="triton", **options, **way)
    rival = plain(problem)
    assert (plans[-1].group_rows < 40) == ("workspace_bytes" in way)
    factor = 2 if device == "cuda" else 4
    for name in ("hidden", "weight"):
        ours, theirs = rms(got[1][name], truth[1][name]), rms(rival[name], truth[1][name])
        assert ours <= factor * theirs + 1e-6, (name, ours, theirs)
        assert got[1][name].dtype == torch.bfloat16
    for name in ("logprobs", "entropy"):
        ours = rms(getattr(got[2], name), getattr(truth[2], name))
        theirs = rms(rival[name], getattr(truth[2], name))
        assert ours <= 2 * theirs + 1e-6, (name, ours, theirs)
        assert ours <= 5e-5, "logits are never rounded to bf16"
    assert abs(float(got[0] - truth[0])) <= 2 * abs(float(rival["loss"] - truth[0])) + 1e-6


def plain(problem):
    """Plain torch in bf16, as a trainer without a kernel writes it."""
    hidden, weight, _ = problem.leaves(torch.bfloat16)
    v = {name: vector.float() for name, vector in problem.vectors.items()}
    log_p = ((hidden @ weight.t()).float() / 0.8).log_softmax(1)
    logprobs = log_p.gather(1, problem.labels[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(1)
    ratio, adv = (logprobs - v["old_logprobs"]).exp(), v["advantages"]
    bracket = -torch.minimum(ratio * adv, ratio.clamp(0.8, 1.28) * adv)
    loss = (v["token_weights"] * bracket + v["entropy_weights"] * entropy).sum()
    loss.backward()
    values = {"loss": loss, "logprobs": logprobs, "entropy": entropy}
    grads = {"hidden": hidden.grad, "weight": weight.grad}
    return {name: value.detach() for name, value in {**values, **grads}.items()}


def test_d_weight_of_many_groups_is_accumulated_in_fp32(device, plans, monkeypatch):
    problem = make_problem(num_rows=64, vocab=20, dim=4, ignored=0).rounded(torch.bfloat16, device)
    drop = ("entropy_weights", "z_loss_weights", "ref_logprobs")
    options = {"spec": ck.ObjectiveSpec.preset("sft"), "drop": drop}
    truth = run_loss(problem, torch.float64, backend="dense", **options)[1]["weight"]
    options["backend"] = "triton"
    many = run_loss(problem, torch.bfloat16, workspace_bytes=9_000, **options)[1]["weight"]
    assert plans[-1].group_rows == 4
    monkeypatch.setattr(plan, "GROUP_ROWS", 64)
    one = run_loss(problem, torch.bfloat16, **options)[1]["weight"]
    assert plans[-1].group_rows == 64
    assert rms(many, truth) <= 1.3 * rms(one, truth)


def test_pairs_of_options_are_covered():
    cases = pairwise(OPTIONS)
    for a, b in itertools.combinations(OPTIONS, 2):
        assert {(c[a], c[b]) for c in cases} == set(itertools.product(OPTIONS[a], OPTIONS[b]))

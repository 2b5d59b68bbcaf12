"""Which code scores and why; the fused kernel, the chunk loop and the oracle give the same."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import crpo_kernels as ck
from benchmarks.live_bytes import LiveBytes
from crpo_kernels import dispatch, plan, scorer
from crpo_kernels.plan import HeadSizes
from crpo_kernels.score_table import Measured, nearest
from numerics import make_problem
from triton_tools import why_no_triton

FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16
needs_triton = pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))
TABLE = (
    Measured("Card", "bfloat16", 8192, 131072, 4096, 14.8, 15.5),
    Measured("Card", "bfloat16", 8192, 131072, 1024, 5.9, 3.7),
    Measured("Card", "float8_e4m3fn", 8192, 131072, 4096, 15.0, 8.0),
    Measured("Other", "bfloat16", 4096, 131072, 4096, 1.0, 9.0),
)


def sizes_of(num_rows, vocab, dim, dtype=BF16, backend="triton", head_dtype=None):
    """As of a call on a GPU: fake tensors have no values."""
    with FakeTensorMode():
        tensors = torch.empty(num_rows, dim, dtype=dtype), torch.empty(vocab, dim, dtype=dtype)
    return HeadSizes(*tensors, num_rows, backend, None, head_dtype=head_dtype)


def call(problem, dtype=torch.float32, **options):
    problem = problem.rounded(dtype)
    hidden, weight, bias = (x.to(dtype) for x in (problem.hidden, problem.weight, problem.bias))
    options = {"bias": bias, "temperature": problem.temperature.float()} | options
    with torch.no_grad():
        return ck.linear_logprobs(hidden, weight, problem.labels, **options)


def differ(a, b):
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


# ---- the choice


def test_the_nearest_shape_of_this_device_and_dtype_decides():
    """By doublings of T, V and D together; 3 are too far."""
    assert nearest(TABLE, "Card", "bfloat16", (8192, 131072, 2000)) is TABLE[1]
    assert nearest(TABLE, "Card", "bfloat16", (8192, 131072, 2100)) is TABLE[0]
    assert nearest(TABLE, "Card", "bfloat16", (2048, 65536, 4096)) is TABLE[0]
    assert nearest(TABLE, "Card", "bfloat16", (2048, 65536, 8200)) is None
    assert nearest(TABLE, "Card", "float32", (8192, 131072, 4096)) is None
    assert nearest(TABLE, "Third", "bfloat16", (8192, 131072, 4096)) is None
    assert nearest((), "Card", "bfloat16", (0, 1, 1)) is None


def test_a_measured_device_is_decided_by_its_times(monkeypatch):
    monkeypatch.setattr(scorer, "device_name", lambda _: "Card")
    wide = scorer.cheaper_scorer(sizes_of(8000, 131000, 4096), TABLE)
    reason = (
        "measured on Card at T 8192 V 131072 D 4096, the nearest shape: "
        "fused kernel 15.5 ms, chunk loop 14.8 ms"
    )
    assert wide == ("chunks", reason)
    assert scorer.cheaper_scorer(sizes_of(8000, 131000, 1024), TABLE).name == "fused"
    eight = sizes_of(8000, 131000, 4096, head_dtype=FP8)
    assert scorer.cheaper_scorer(eight, TABLE).name == "fused"


@pytest.mark.parametrize(
    ("shape", "dtype", "head_dtype", "share"),
    [  # 2 D / .8 operations a logit beside 2 D + 240 * 8
        ((1024, 131072, 4096), BF16, None, 10240 / 10112),
        ((1024, 131072, 1024), BF16, None, 2560 / 3968),
        ((1024, 131072, 1024), BF16, FP8, 1280 / 3968),
        ((1024, 131072, 1024), torch.float32, None, 4096 / (2048 + 24 * 8)),
        # few rows: the weight's bytes, 240 * 2 D a column, and 8 bytes of each logit
        ((1, 131072, 1024), BF16, None, 491520 / (491520 + 1920)),
    ],
)
def test_without_a_measurement_the_model_decides_and_says_so(shape, dtype, head_dtype, share):
    sizes = sizes_of(*shape, dtype, head_dtype=head_dtype)
    assert scorer.modelled_share(sizes) == pytest.approx(share, rel=1e-6)
    name, reason = scorer.cheaper_scorer(sizes)
    assert name == ("fused" if share <= 1 else "chunks")
    assert reason == (
        f"not measured on a GPU that is only planned for: by the cost model the fused kernel takes "
        f"{share:.2f} of the chunk loop's time"
    )


def test_on_a_cpu_the_chunk_loop_scores_and_says_why(caplog):
    dispatch._log_once.cache_clear()
    caplog.set_level("INFO", logger="crpo_kernels")
    problem = make_problem()
    for _ in range(2):
        call(problem)
    expected = (
        "backend torch, scoring by chunks of logits: the fused kernel needs the backend triton"
    )
    assert [m for m in caplog.messages if "scoring" in m] == [expected]
    asked = {"num_rows": 64, "vocab_size": 700, "hidden_size": 16, "is_scoring": True}
    first, _ = ck.explain_choice(**asked, backend="torch")
    assert first == f"backend torch (asked for), {expected.removeprefix('backend torch, ')}"
    first, _ = ck.explain_choice(**asked, backend="torch", mode="two_pass")
    assert first.endswith("scoring by chunks of logits: mode two_pass was asked for")
    first, _ = ck.explain_choice(**asked, backend="dense")
    assert first.endswith("scoring by all logits at once: it is the oracle")


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels are compiled")
def test_the_interpreter_scores_with_the_fused_kernel_and_says_why():
    asked = {"num_rows": 64, "vocab_size": 700, "hidden_size": 16, "backend": "triton"}
    choice, passes = ck.explain_choice(**asked, is_scoring=True, workspace_bytes=1)
    assert choice.endswith(
        "scoring by the fused kernel: Triton's interpreter has no times to choose by"
    )
    assert passes == "no row passes: statistics are made with the product"
    choice, _ = ck.explain_choice(**asked, is_scoring=True, mode="two_pass")
    assert "scoring by chunks of logits: mode two_pass was asked for" in choice


REFUSED = {
    "torch": ({"backend": "torch"}, r"belongs to the backend triton, and torch runs \(asked for\)"),
    "dense": ({"backend": "dense"}, r"belongs to the backend triton, and dense runs \(asked for\)"),
    "no GPU": ({}, r"torch runs \(triton does not run: no GPU\)\. (Start|Pass)"),
    "fp64": ({"dtype": torch.float64}, r"torch runs \(triton does not run: hidden is float64"),
}


@pytest.mark.parametrize("case", REFUSED)
@needs_triton
def test_the_fused_kernel_is_refused_with_the_reason(case, monkeypatch):
    changes, words = REFUSED[case]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if torch.cuda.is_available() and case == "no GPU":
        pytest.skip("there is one")
    expected = rf"mode: expected 'auto', 'one_pass' or 'two_pass' here, got 'fused': .*{words}"
    with pytest.raises(ValueError, match=expected):
        call(make_problem(), **({"mode": "fused"} | changes))


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_a_gradient_or_a_loss_is_not_scored(backend):
    problem = make_problem()
    hidden, weight = problem.hidden.float().requires_grad_(), problem.weight.float()
    options = {"backend": backend, "mode": "fused"}
    words = r"mode: expected 'auto', .* got 'fused': a gradient or a loss is asked for.*no_grad"
    with pytest.raises(ValueError, match=words):
        ck.linear_logprobs(hidden, weight, problem.labels, **options)
    with pytest.raises(ValueError, match=words):
        ck.linear_policy_loss(
            hidden.detach(), weight, problem.labels, spec=ck.ObjectiveSpec("sft"), **options,
            token_weights=problem.vectors["token_weights"].float(),
        )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"mode: expected one of \[.*'fused'\], got 'fussed'\. Did"
    ):
        ck.linear_logprobs(hidden, weight, problem.labels, mode="fussed")


# ---- the values


WAYS = {
    "plain": {"bias": None, "temperature": 1.0},
    "bias and temperatures": {},
    "soft cap": {"logit_softcap": 3.0, "logit_scale": 0.7},
    "rows": {"rows": [1, 2, 8, 30, 31]},
    "bf16": {"dtype": BF16},
}


@pytest.mark.parametrize("way", WAYS)
@needs_triton
def test_the_fused_kernel_is_the_chunk_loop(way, monkeypatch):
    """Also where counted rows are gathered in several parts."""
    monkeypatch.setattr(plan, "ROW_MULTIPLE", 8)
    monkeypatch.setattr(plan, "GATHERED_BYTES", 1)
    problem, options = make_problem(ignored=7), {"backend": "triton", **WAYS[way]}
    exact = call(problem, **{**options, "backend": "dense"})
    loop = call(problem, **options, mode="two_pass")
    fused = call(problem, **options, mode="fused")
    assert differ(fused, call(problem, **options)) == 0  # auto
    assert differ(fused, loop) <= 1e-5
    assert differ(fused, exact) <= 1e-5
    counted = problem.labels != ck.IGNORE_INDEX
    assert (fused.logprobs[~counted] == 0).all()
    assert (fused.entropy > 0).sum() > 4


@needs_triton
def test_few_bytes_beside_the_inputs_whatever_the_workspace():
    """O(T), where the chunk loop holds rows of logits; nobody asks the driver what is free."""
    problem = make_problem(num_rows=40, vocab=700, dim=16, ignored=0)
    hidden, weight = problem.hidden.float(), problem.weight.float()
    peaks = {}
    for mode in ("fused", "two_pass"):
        with LiveBytes(hidden, weight, problem.labels) as counter, torch.no_grad():
            size = 1 if mode == "fused" else None
            out = ck.linear_logprobs(
                hidden, weight, problem.labels, backend="triton", mode=mode, workspace_bytes=size
            )
        peaks[mode] = counter.peak
        del out
    assert peaks["fused"] <= 40 * 4 * (7 + 4 * 22 + 8)  # table, sums of 22 splits, vectors
    assert peaks["two_pass"] >= 40 * 700 * 4


@needs_triton
def test_an_empty_call_and_one_without_counted_rows():
    weight = torch.randn(30, 16)
    for labels in (torch.empty(0, dtype=torch.int64), torch.full((3,), ck.IGNORE_INDEX)):
        hidden = torch.randn(labels.numel(), 16)
        for head_dtype in (None, FP8):
            out = ck.linear_logprobs(
                hidden, weight, labels, backend="triton", mode="fused", head_dtype=head_dtype
            )
            assert torch.equal(out.logprobs, torch.zeros(labels.numel()))


@needs_triton
def test_fake_tensors_start_no_kernel_and_make_no_logits():
    """Who plans memory: fake states and weight, real labels."""
    labels = torch.arange(40)
    with FakeTensorMode(allow_non_fake_inputs=True):
        hidden = torch.empty(40, 16, dtype=BF16)
        weight = torch.empty(5000, 16, dtype=BF16)
    for rows in (None, [1, 2, 3]):
        with LiveBytes(hidden, weight, labels) as counter, torch.no_grad():
            out = ck.linear_logprobs(hidden, weight, labels, backend="triton", rows=rows)
        assert out.logprobs.shape == (40,)
        assert counter.peak < 40 * 5000  # a byte per logit


# ---- in a graph of torch.compile


@needs_triton
def test_a_compiled_graph_scores_as_an_eager_call(monkeypatch):
    from crpo_kernels import linear_triton

    started, plain = [], linear_triton.launch
    monkeypatch.setattr(
        linear_triton,
        "launch",
        lambda kernel, *a, **k: (started.append(kernel.__name__), plain(kernel, *a, **k)),
    )
    problem = make_problem(ignored=0)
    hidden, weight = problem.hidden.float(), problem.weight.float()

    def score(hidden, weight, mode="auto"):
        return ck.linear_logprobs(hidden, weight, problem.labels, backend="triton", mode=mode)

    compiled = torch.compile(score, backend="aot_eager", fullgraph=True)
    eager = score(hidden, weight)
    assert started == ["linear_stats_kernel", "linear_join_kernel"]
    assert differ(compiled(hidden, weight), eager) == 0
    assert differ(compiled(hidden, weight, "fused"), eager) == 0
    assert len(started) == 6
    leaf = hidden.clone().requires_grad_()
    out = compiled(leaf, weight)  # a gradient: the chunk loop
    assert len(started) == 6
    assert differ((out.logprobs.detach(),), (eager.logprobs,)) <= 1e-5
    (grad,) = torch.autograd.grad(out.logprobs.sum(), leaf)
    own = hidden.clone().requires_grad_()
    (expected,) = torch.autograd.grad(score(own, weight).logprobs.sum(), own)
    assert differ((grad,), (expected,)) <= 1e-6
    with pytest.raises(ValueError, match="got 'fused': a gradient or a loss is asked for"):
        compiled(leaf, weight, "fused")


@needs_triton
@pytest.mark.gpu
def test_a_cuda_graph_of_the_fused_kernel_replays_on_other_values():
    problem = make_problem(num_rows=32, vocab=48, dim=16, ignored=0).rounded(BF16, "cuda")
    hidden, weight = problem.hidden.to(BF16), problem.weight.to(BF16)
    rows = torch.arange(0, 32, 2, device="cuda")

    def score():
        with torch.no_grad():
            return ck.linear_logprobs(hidden, weight, problem.labels, rows=rows, mode="fused")

    score()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = score()
    hidden.copy_(torch.randn_like(hidden))
    graph.replay()
    torch.cuda.synchronize()
    assert differ(out, score()) == 0

"""`lora_head`: a low-rank adapter beside the head's weight, against the merged weight in fp64."""

from __future__ import annotations

import pytest
import torch

import crpo_kernels as ck
from benchmarks.live_bytes import LiveBytes
from compile_tools import BACKENDS, compiled, need, place, results
from crpo_kernels.spec import ObjectiveSpec
from numerics import TINY, WAYS, assert_near, assert_same_result, make_problem, spec_of, way_id
from triton_cases import GROUPS, TOLERANCE, shrink, small
from triton_tools import why_no_triton

SCALING, RANK = 0.7, 3
FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16
NAMES = ("hidden", "A", "B")
needs_triton = pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))


def adapter(problem, rank=RANK):
    """A and B in fp64 that move the logits by about as much as sampling noise."""
    g = torch.Generator().manual_seed(7)
    vocab, dim = problem.weight.shape
    down = torch.randn(rank, dim, generator=g, dtype=FP64) / dim**0.5
    up = torch.randn(vocab, rank, generator=g, dtype=FP64)
    return tuple(x.to(FP32).double().to(problem.hidden.device) for x in (down, up))


def factors_of(problem, dtype, needs=NAMES):
    tensors = dict(zip(NAMES, (problem.hidden, *adapter(problem)), strict=True))
    return [x.to(dtype).clone().requires_grad_(name in needs) for name, x in tensors.items()]


def run(problem, dtype, *, merged=False, trained=False, **options):
    """(loss, gradients of hidden, A, B, stats) of one call; ``merged``: W + scaling B A instead."""
    hidden, down, up = factors_of(problem, dtype)
    weight = problem.weight.to(dtype).clone().requires_grad_(trained)
    options = {"bias": problem.bias.to(dtype), "cu_seqlens": problem.cu_seqlens, **options}
    if merged:
        head = {"weight": weight + SCALING * up @ down, "backend": "dense"}
    else:
        head = {"weight": weight, "lora_head": (down, up, SCALING)}
    loss, stats = ck.linear_policy_loss(
        hidden, labels=problem.labels, **problem.vectors, **head, **options
    )
    (loss * 0.3).backward()
    grads = dict(zip(NAMES, (x.grad for x in (hidden, down, up)), strict=True))
    return loss.detach(), {**grads, "weight": weight.grad}, stats


LOSSES = {
    "off_policy": {"spec": spec_of("crpo")},
    "gspo": {"spec": spec_of("gspo")},
    "softcap": {"spec": spec_of("dapo"), "logit_softcap": 5.0, "logit_scale": 1.3},
}


@pytest.mark.parametrize("way", WAYS, ids=way_id)
@pytest.mark.parametrize("case", LOSSES)
def test_loss_and_gradients_are_those_of_the_merged_weight(case, way):
    problem = make_problem()
    if case == "gspo" and way.get("mode") == "one_pass":
        way = {k: v for k, v in way.items() if k != "workspace_bytes"}
    options = {**LOSSES[case], "temperature": problem.temperature}
    truth = run(problem, FP64, merged=True, **options)
    found = run(problem, FP64, **options, **way)
    assert_same_result(found, truth, 1e-12)
    assert found[1]["weight"] is None
    assert_same_result(run(problem, FP32, **options, **way), truth, 1e-5)


@pytest.mark.parametrize("way", WAYS[1:], ids=way_id)
def test_a_weight_that_asks_for_a_gradient_gets_it(way):
    problem, spec = make_problem(), spec_of("crpo")
    truth = run(problem, FP64, merged=True, trained=True, spec=spec)
    found = run(problem, FP64, trained=True, spec=spec, **way)
    assert truth[1]["weight"] is not None
    assert_same_result(found, truth, 1e-12)


def logprobs(problem, dtype, merged=False, **options):
    """A loss on all three outputs and its gradients."""
    hidden, down, up = factors_of(problem, dtype)
    weight = problem.weight.to(dtype)
    if merged:
        out = ck.linear_logprobs(hidden, weight + SCALING * up @ down, problem.labels, **options)
    else:
        out = ck.linear_logprobs(
            hidden, weight, problem.labels, lora_head=(down, up, SCALING), **options
        )
    slopes = torch.linspace(-1, 1, problem.labels.numel(), dtype=FP64)
    (out.logprobs * slopes + 0.2 * out.entropy * slopes.square() + 0.01 * out.lse).sum().backward()
    return [*(x.detach() for x in out), hidden.grad, down.grad, up.grad]


def naive(problem, dtype):
    """The head of a peft model in plain torch: two Linears, softmax in fp32."""
    hidden, down, up = factors_of(problem, dtype)
    linear = torch.nn.functional.linear
    logits = linear(hidden, problem.weight.to(dtype))
    logits = (logits + linear(linear(hidden, down), up) * SCALING).float()
    log_p = logits.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    chosen = log_p.gather(1, problem.labels[:, None])[:, 0]
    lse = logits.logsumexp(1)
    slopes = torch.linspace(-1, 1, problem.labels.numel())
    (chosen * slopes + 0.2 * entropy * slopes.square() + 0.01 * lse).sum().backward()
    return [*(x.detach() for x in (chosen, entropy, lse)), hidden.grad, down.grad, up.grad]


@pytest.mark.parametrize("options", [{}, {"workspace_bytes": TINY}], ids=["one chunk", "chunks"])
def test_any_loss_on_the_outputs(options):
    """Also with B = 0, where an adapter begins: d_B is then all there is."""
    problem = make_problem(ignored=4)
    truth = logprobs(problem, FP64, merged=True, backend="dense")
    for value, want in zip(logprobs(problem, FP64, **options), truth, strict=True):
        assert_near(value, want, 1e-12)
    down, up = (x.float() for x in adapter(problem))
    up = torch.zeros_like(up).requires_grad_()
    out = ck.linear_logprobs(
        problem.hidden.float(), problem.weight.float(), problem.labels, lora_head=(down, up, 2.0)
    )
    out.logprobs.sum().backward()
    plain = ck.linear_logprobs(problem.hidden.float(), problem.weight.float(), problem.labels)
    assert_near(out.logprobs.detach(), plain.logprobs, 1e-6)
    assert up.grad.abs().sum() > 0


@pytest.mark.parametrize("options", [{}, {"workspace_bytes": 40_000}], ids=["one chunk", "chunks"])
def test_bf16_is_at_most_twice_as_far_off_as_plain_torch(options):
    problem = make_problem(num_rows=96, vocab=301, dim=32, ignored=0).rounded(BF16)
    truth = logprobs(problem, FP64, merged=True, backend="dense")
    for name, value, rival, want in zip(
        ("logprobs", "entropy", "lse", *NAMES),
        logprobs(problem, BF16, **options), naive(problem, BF16), truth, strict=True,
    ):  # fmt: skip
        error, other = (float((x.double() - want).norm() / want.norm()) for x in (value, rival))
        assert error <= 2 * other + 1e-6, (name, error, other)


@needs_triton
@pytest.mark.parametrize("way", [{}, {"mode": "two_pass"}, {"workspace_bytes": GROUPS}], ids=str)
def test_the_triton_loop_adds_the_product_to_its_chunks(monkeypatch, device, way):
    """Several chunks of a group, d_hidden in slices; kept exponentials and logits made again."""
    shrink(monkeypatch)
    problem = small(device)
    truth = run(problem, FP64, merged=True, spec=spec_of("crpo"))
    found = run(problem, FP32, spec=spec_of("crpo"), backend="triton", **way)
    assert_same_result(found, truth, 2 * TOLERANCE)
    assert found[1]["weight"] is None


@needs_triton
def test_the_fused_kernel_is_refused_and_auto_says_why_it_takes_chunks(device, caplog):
    problem = small(device, ignored=0)
    _, down, up = factors_of(problem, FP32, needs=())
    call = (problem.hidden.float(), problem.weight.float(), problem.labels)
    options = {"backend": "triton", "lora_head": (down, up, SCALING)}
    merged = problem.weight.float() + SCALING * up @ down
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"mode: .*adapter \(lora_head\).* Pass mode='two_pa"):
            ck.linear_logprobs(*call, mode="fused", **options)
        with caplog.at_level("INFO", "crpo_kernels"):
            found = ck.linear_logprobs(*call, **options)
        truth = ck.linear_logprobs(call[0], merged, call[2], backend="dense")
        for value, want in zip(found, truth, strict=True):
            assert_near(value, want, TOLERANCE)
    line = next(x for x in caplog.messages if "scoring by chunks" in x)
    assert "the head has an adapter (lora_head)" in line
    assert line.endswith("lora_head of rank 3 beside a frozen weight: 2NVD + 2NVr operations")


def test_an_eight_bit_weight_scores_with_the_adapter_in_full():
    """Both chunk loop and oracle; the adapter's product is not quantised."""
    problem = make_problem()
    _, down, up = factors_of(problem, FP32, needs=())
    call = (problem.hidden.float(), problem.weight.float(), problem.labels)
    eight = {"head_dtype": torch.float8_e4m3fn, "lora_head": (down, up, 9.0)}
    with torch.no_grad():
        dense = ck.linear_logprobs(*call, backend="dense", **eight).logprobs
        found = ck.linear_logprobs(*call, **eight).logprobs
        exact = ck.linear_logprobs(*call, lora_head=(down, up, 9.0)).logprobs
    assert_near(found, dense, 1e-5)
    assert 1e-4 < float((found - exact).abs().max()) < 1.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("forget_graphs")
def test_in_a_graph_of_torch_compile(backend, device):
    """Values and gradients of hidden, A, B; loss and logprobs, ignored rows, 3 dimensions."""
    need(backend)
    problem = place(make_problem(num_rows=12, vocab=67, dim=8), device)
    vectors = {k: v.float() for k, v in problem.vectors.items()}
    weight = problem.weight.float()

    def step(hidden, down, up):
        states = torch.tanh(hidden).view(3, 4, 8)
        head = {"lora_head": (down * 2, up, SCALING), "backend": backend}
        loss, stats = ck.linear_policy_loss(
            states, weight, problem.labels, spec=spec_of("crpo"), **vectors, **head
        )
        out = ck.linear_logprobs(states, weight, problem.labels, **head)
        return loss - 0.1 * (out.logprobs * out.entropy).mean(), stats.logprobs, out.lse.detach()

    leaves = [x.float() for x in factors_of(problem, FP64, needs=())]
    truth, found = results(step, leaves), results(compiled(step), leaves)
    for value, want in zip(found, truth, strict=True):
        assert_near(value, want, 2e-6)


def test_under_autocast_and_with_an_adapter_in_fp32():
    """As peft keeps it beside a bf16 model; gradients come back in fp32."""
    problem = make_problem()
    hidden, down, up = factors_of(problem, FP32)
    weight = problem.weight.bfloat16()
    with torch.autocast("cpu", dtype=BF16):
        out = ck.linear_logprobs(hidden, weight, problem.labels, lora_head=(down, up, SCALING))
    cast = (hidden.bfloat16(), weight, problem.labels)
    other = ck.linear_logprobs(*cast, lora_head=(down, up, SCALING))
    assert torch.equal(out.logprobs, other.logprobs)
    out.logprobs.sum().backward()
    assert hidden.grad.dtype == down.grad.dtype == up.grad.dtype == FP32
    assert up.grad.abs().sum() > 0


def test_no_v_times_d_and_no_gradient_factors_are_kept():
    """Beside what a frozen head takes: d_B twice, the states and their gradient twice."""

    def peak(**options):
        hidden = torch.randn(num_rows, dim, requires_grad=True)
        weight, labels = torch.randn(vocab, dim), torch.randint(0, vocab, (num_rows,))
        inputs = [hidden, weight, labels, *(x for x in options.get("lora_head", ())[:2])]
        with LiveBytes(*inputs) as counter:
            loss, _ = ck.linear_policy_loss(
                hidden, weight, labels, token_weights=torch.ones(num_rows),
                spec=ObjectiveSpec("sft"), workspace_bytes=2 << 20, **options,
            )  # fmt: skip
            loss.backward()
        return counter.peak

    num_rows, vocab, dim, rank = 2048, 3000, 96, 4
    down, up = torch.randn(rank, dim), torch.randn(vocab, rank)
    lora_head = (down.requires_grad_(), up.requires_grad_(), 1.0)
    own = 4 * (3 * vocab * rank + 4 * num_rows * rank + num_rows * dim + 3 * rank * dim)
    assert peak(lora_head=lora_head) <= peak() + own < peak() + 4 * vocab * dim


@pytest.mark.parametrize(
    ("lora_head", "message"),
    [
        (
            (1, 2),
            r"lora_head: expected \(A \[r, 16\], B \[101, r\], scaling\), got tuple of 2\. Pass",
        ),
        (("A", "B", 1.0), r"lora_head A: expected a torch.Tensor, got str"),
        ((torch.ones(3, 15), torch.ones(101, 3), 1.0), r"got \[3, 15\] and \[101, 3\]\. Pass"),
        ((torch.ones(3, 16), torch.ones(3, 101), 1.0), r"got \[3, 16\] and \[3, 101\]"),
        ((torch.ones(0, 16), torch.ones(101, 0), 1.0), r"got \[0, 16\] and \[101, 0\]"),
        ((torch.ones(3, 16).long(), torch.ones(101, 3), 1.0), "lora_head A: .* got torch.int64"),
        ((torch.ones(3, 16), torch.ones(101, 3, device="meta"), 1.0), "lora_head B: .* on meta"),
        ((torch.ones(3, 16), torch.ones(101, 3), float("nan")), "lora_head scaling: .* got nan"),
        ((torch.ones(3, 16), torch.ones(101, 3), None), "lora_head scaling: .* got None"),
    ],
)
def test_what_is_no_adapter_is_refused(lora_head, message):
    problem = make_problem(num_rows=6)
    with pytest.raises(ValueError, match=message):
        ck.linear_logprobs(
            problem.hidden.float(), problem.weight.float(), problem.labels, lora_head=lora_head
        )


def test_the_cost_is_said():
    sizes = {"num_rows": 900, "vocab_size": 5000, "hidden_size": 64, "spec": spec_of("crpo")}
    text, _ = ck.explain_choice(**sizes, lora_rank=8)
    assert text.endswith("; lora_head of rank 8 beside a frozen weight: 4NVD + 6NVr operations")
    again, _ = ck.explain_choice(**sizes, lora_rank=8, mode="two_pass", workspace_bytes=1 << 20)
    assert again.endswith("frozen weight: 6NVD + 8NVr operations")
    assert "lora_head" not in ck.explain_choice(**sizes)[0]

"""The loss in a compiled model: autocast, checkpointing, DDP, mistakes, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

import crpo_kernels as ck
from compile_tools import (
    BACKENDS,
    SIZE,
    assert_same,
    compiled,
    loss_step,
    need,
    problem_on,
    results,
)
from crpo_kernels import operators
from crpo_kernels.compilation import missing_toolchain
from numerics import assert_near, make_problem, spec_of

pytestmark = pytest.mark.usefixtures("forget_graphs")


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside, device):
    problem = problem_on(device)

    def loss_of(hidden, weight):
        out = ck.linear_logprobs(hidden, weight, problem.labels, backend="torch")
        loss, _ = ck.linear_policy_loss(
            hidden, weight, problem.labels, backend="torch", spec=spec_of("dapo"),
            **{k: v.float() for k, v in problem.vectors.items()},
        )  # fmt: skip
        return loss + (out.entropy * out.logprobs).sum(), out.lse.detach()

    def step(hidden, weight):
        if not inside:
            return loss_of(hidden, weight)
        with torch.autocast(device, dtype=torch.bfloat16):
            return loss_of(hidden, weight)

    with torch.autocast(device, dtype=torch.bfloat16, enabled=not inside):
        truth = assert_same(step, [problem.hidden.float(), problem.weight.float()])
    plain = results(loss_of, [problem.hidden.float(), problem.weight.float()])
    assert truth[-1].dtype == torch.float32
    assert not torch.equal(truth[1], plain[1]), "products in bf16"


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing(backend, device):
    need(backend)
    problem = problem_on(device)
    step = loss_step(problem, "crpo", {"backend": backend}, torch.float32)

    def block(hidden, weight, bias):
        loss, _, entropy, *_ = step(hidden, weight, bias)
        out = ck.linear_logprobs(hidden.sin(), weight, problem.labels, backend=backend)
        return loss + (out.entropy * out.logprobs).sum(), entropy

    def checkpointed(hidden, weight, bias):
        loss, entropy = checkpoint(block, hidden, weight, bias, use_reentrant=False)
        return loss * 1.0, entropy

    leaves = [x.float() for x in (problem.hidden, problem.weight, problem.bias)]
    truth = results(block, leaves)
    for run in (checkpointed, compiled(checkpointed)):
        for want, got in zip(truth, results(run, leaves), strict=True):
            assert_near(got, want, 2e-6)


class Model(nn.Module):
    """A body, a head and the loss, as a user writes them."""

    def __init__(self, problem, backend="torch"):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
        self.head = nn.Linear(8, 67)
        self.options = {"backend": backend, "spec": spec_of("crpo")}
        for name, value in problem.vectors.items():
            self.register_buffer(name, value.float())

    def forward(self, x, labels):
        loss, stats = ck.linear_policy_loss(
            self.body(x), self.head.weight, labels, bias=self.head.bias, **self.options,
            **dict(self.named_buffers(recurse=False)),
        )  # fmt: skip
        return loss, stats


def model_results(model, problem):
    model.zero_grad()
    loss, stats = model(problem.hidden.float(), problem.labels)
    loss.backward()
    return [loss.detach(), *stats, *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_whole_model_with_generated_code(backend, device):
    need(backend)
    if device == "cpu" and (reason := missing_toolchain()):
        pytest.skip(reason)
    problem = problem_on(device)
    model = Model(problem, backend).to(device)
    run = torch.compile(model, fullgraph=True)
    truth, value = model_results(model, problem), model_results(run, problem)
    for number, (want, got) in enumerate(zip(truth, value, strict=True)):
        assert_near(got, want, 1e-5, str(number))


@pytest.fixture
def one_rank(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("layout", ["compiled DDP", "DDP of a compiled model", "FSDP2"])
def test_under_ddp_and_fsdp2(layout, one_rank):
    problem = make_problem(**SIZE)
    plain, model = model_results(Model(problem), problem), Model(problem)
    if layout == "FSDP2":
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        model.compile(fullgraph=True, backend="aot_eager")
    elif layout == "compiled DDP":  # which cuts graphs into its buckets
        model = torch.compile(nn.parallel.DistributedDataParallel(model), backend="aot_eager")
    else:
        model = nn.parallel.DistributedDataParallel(compiled(model))
    for want, got in zip(plain, model_results(model, problem), strict=True):
        full = got.full_tensor() if isinstance(got, DTensor) else got
        assert_near(full, want, 2e-6)


def test_a_sharded_weight_is_refused_with_what_to_do(one_rank):
    problem = make_problem(**SIZE)
    weight = distribute_tensor(problem.weight, init_device_mesh("cpu", (1,)), [Shard(0)])
    score = compiled(lambda hidden: ck.linear_logprobs(hidden, weight, problem.labels).lse)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"weight: .* DTensor .*full_tensor"):
        score(problem.hidden)


def test_export_holds_the_operator():
    problem = make_problem(**SIZE)

    class Scores(nn.Module):
        def forward(self, hidden, weight):
            return ck.linear_logprobs(hidden, weight, problem.labels, backend="torch").entropy

    inputs = (problem.hidden.float(), problem.weight.float())
    program = torch.export.export(Scores(), inputs)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [name for name in names if "crpo_kernels" in name] == ["crpo_kernels.logprobs.default"]
    assert torch.equal(program.module()(*inputs), Scores()(*inputs))


ERRORS = {
    "labels": ({"labels": torch.full((13,), 67)}, r"labels: .* 0\.\.66 or -100, got 67 at row 0"),
    "weight": ({"weight": torch.zeros(67, 9)}, r"weight: expected \[V, 8\]"),
    "length": ({"advantages": torch.zeros(12)}, "advantages: expected T = 13 values"),
    "temperature": ({"temperature": 0.0}, "temperature: .* above 0, got 0.0"),
    "softcap": ({"logit_softcap": -2.0}, "logit_softcap: .* got -2.0"),
    "rows": ({"rows": [1, 99]}, "rows: expected distinct indices"),
    "backend": ({"backend": "tritn"}, "backend: .* got 'tritn'"),
    "mode": ({"mode": "one_pas"}, "mode: .* Did you mean 'one_pass'"),
    "workspace": ({"workspace_bytes": 1}, "workspace_bytes: "),
    "missing": ({"advantages": None}, "advantages: expected a tensor"),
}
SHAPES = {
    "a_list": ({"labels": [1] * 13}, "labels: expected a torch.Tensor, got list"),
    "no_spec": ({"spec": "crpo"}, "spec: expected an ObjectiveSpec, got 'crpo'"),
    "shard": ({"process_group": 1}, "nor has a call with a process_group"),
    "dense": ({"backend": "dense"}, "backend: 'dense' has no operator"),
}


def compiled_call(changes, device):
    problem = problem_on(device)
    arguments = {
        "hidden": problem.hidden.float(),
        "weight": problem.weight.float(),
        "labels": problem.labels,
        "backend": "torch",
        "spec": ck.ObjectiveSpec(),
        "token_weights": problem.vectors["token_weights"],
        "advantages": problem.vectors["advantages"],
    } | changes
    arguments = {k: v.to(device) if torch.is_tensor(v) else v for k, v in arguments.items()}
    positional = [arguments.pop(name) for name in ("hidden", "weight", "labels")]
    return compiled(lambda *x: ck.linear_policy_loss(*x, **arguments)[0] * 2)(*positional)


@pytest.mark.parametrize("case", ERRORS)
def test_a_mistake_is_the_valueerror_of_an_eager_call(case):
    changes, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        compiled_call(changes, "cpu")


@pytest.mark.parametrize("case", SHAPES)
def test_what_cannot_be_traced_says_so_in_the_error(case, device):
    changes, message = SHAPES[case]
    with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
        compiled_call(changes, device)


@pytest.mark.parametrize("how", ["aot_eager", "eager"])
@pytest.mark.parametrize("function", ["loss", "logprobs"])
def test_a_second_derivative_is_refused(function, how, device):
    problem = problem_on(device)
    hidden, weight, _ = problem.leaves(torch.float32)
    weights = problem.vectors["token_weights"]

    def loss_of(hidden):
        if function == "logprobs":
            out = ck.linear_logprobs(hidden.sin(), weight, problem.labels, backend="torch")
            return (out.logprobs**2).sum()
        return ck.linear_policy_loss(
            hidden.sin(), weight, problem.labels, token_weights=weights, backend="torch",
            spec=ck.ObjectiveSpec("sft"),
        )[0] ** 2  # fmt: skip

    loss = compiled(loss_of, backend=how)(hidden)
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward|no autograd formula"):
        grad.sum().backward()


def test_torch_func_is_refused():
    problem = make_problem(**SIZE)

    def loss_of(hidden):
        return ck.linear_logprobs(hidden, problem.weight, problem.labels).logprobs.sum()

    with pytest.raises(RuntimeError, match=r"setup_context|functorch"):
        torch.func.grad(loss_of)(problem.hidden)


def test_a_graph_may_be_used_twice(device):
    problem = problem_on(device)
    step = compiled(loss_step(problem, "crpo", {"backend": "torch"}, torch.float32))
    leaves = problem.leaves(torch.float32, bias=True)
    loss = step(*leaves)[0]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss * 3, leaves)
    for a, b in zip(first, second, strict=True):
        assert_near(b, 3 * a, 2e-6)


def test_dense_and_a_frame_that_was_given_up_run_as_they_are(device):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for backend in ("dense", "torch"):
        torch._dynamo.reset()

        def step(hidden, weight, labels, backend=backend):
            return ck.linear_logprobs(hidden * 2, weight, labels, backend=backend).entropy.sum()

        with torch._dynamo.config.patch(recompile_limit=1):
            run = torch.compile(step, backend=counter, dynamic=False)
            for num_rows in (21, 9, 13):
                problem = problem_on(device, num_rows=num_rows)
                found = []
                for function in (step, run):
                    hidden, weight, _ = problem.leaves(torch.float32)
                    function(hidden, weight, problem.labels).backward()
                    found.append((hidden.grad, weight.grad))
                for want, got in zip(*found, strict=True):
                    assert torch.equal(got, want)
    assert counter.frame_count < 12, "the loop over chunks is not traced"


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_are_what_they_say(backend, device):
    """Schema, fake, autograd and dispatch, as torch checks its own operators."""
    need(backend)
    problem = problem_on(device, num_rows=7, vocab=19, dim=4)
    states, up = torch.randn(7, 2, device=device), torch.randn(19, 2, device=device)
    leaves = [*problem.leaves(torch.float32, bias=True), states, up]  # the last two: an adapter
    tokens = [problem.vectors[name].float() for name in operators.VECTORS]
    spec = ("clip", 0.2, 0.3, 0.1, "k3", None, 2.0, 0.0)
    kinds = (
        ([True, True, True, False, False], torch.float32),
        ([True, False, False, True, True], torch.float32),
        ([False, True, False, False, True], torch.bfloat16),
    )
    for needs, dtype in kinds:
        cast = [leaf.detach().to(dtype) for leaf in leaves]
        tensors = [x.requires_grad_(y) for x, y in zip(cast, needs, strict=True)]
        head = (
            *tensors[:2], problem.labels, *tensors[2:], None, problem.temperature.float(),
            1.0, 1.5, 8.0, backend, "auto", None, None, needs,
        )  # fmt: skip
        loss = (*head, *tokens, None, *spec)
        torch.library.opcheck(operators.policy_loss_op, loss)
        torch.library.opcheck(operators.logprobs_op, head)
        differentiable = [x.requires_grad for x in operators.policy_loss_op(*loss)]
        assert differentiable == [True] + [False] * 6

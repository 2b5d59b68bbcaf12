"""verl's fused head on our kernels: values, gradients, shapes, and inside verl's own forward.

What needs verl itself is skipped without it (`pip install --no-deps verl==0.9.1`); signature and
mathematics are compared with torch in any case.
"""

from __future__ import annotations

import importlib
import inspect
import sys

import pytest
import torch
import transformers

from crpo_kernels.integrations import verl
from model_cases import SIZES
from numerics import assert_near
from verl_parts import their

B, S, D, V = 3, 7, 16, 53
HEAD = ("hidden_states", "vocab_weights", "input_ids", "temperature")


@pytest.fixture
def patched():
    their("verl.utils.experimental.torch_functional")
    yield verl.patch
    verl.unpatch()


def head(dtype=torch.float64, shape=(B, S)):
    """Hidden states of ``shape``, weight, labels, and two upstream gradients."""
    hidden = torch.randn(*shape, D, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, shape), torch.randn(2, *shape, dtype=torch.float64)


def plain(hidden, weight, labels, temperature):
    """The same from all logits, in the dtype of the inputs."""
    logits = hidden @ weight.T / temperature
    log_p = logits.log_softmax(-1)
    picked = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return picked, -(log_p.exp() * log_p).sum(-1)


def backward(function, inputs, temperature, upstream):
    """[log_probs, entropy, d_hidden, d_weight] of one way to compute the head."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:2]]
    outputs = function(*leaves, inputs[2], temperature)
    loss = sum((u.to(out) * out).sum() for u, out in zip(upstream, outputs, strict=True))
    return [*(out.detach() for out in outputs), *torch.autograd.grad(loss, leaves)]


EACH = torch.tensor([0.7, 1.0, 1.5], dtype=torch.float64)
TEMPERATURES = {
    "float": (0.7, 0.7),
    "int": (2, 2),
    "one": (EACH[:1], EACH[:1]),
    "scalar": (EACH[0], EACH[0]),
    "sequence": (EACH, EACH.reshape(B, 1, 1)),
    "column": (EACH.reshape(B, 1), EACH.reshape(B, 1, 1)),
    "token": (torch.linspace(0.5, 2, B * S, dtype=torch.float64),) * 2,
}


@pytest.mark.parametrize("name", TEMPERATURES)
@pytest.mark.parametrize("shape", [(B, S), (1, B * S), (B * S,)])
def test_values_and_gradients_are_those_of_all_logits(name, shape):
    given, divisor = TEMPERATURES[name]
    if name in ("sequence", "column") and shape != (B, S):
        given, divisor = TEMPERATURES["float"]
    if name == "token":
        given = given.reshape(shape)
        divisor = given.unsqueeze(-1)
    *inputs, upstream = head(shape=shape)
    truth = backward(plain, inputs, divisor, upstream)
    for forward in (verl.fused_linear_for_ppo, verl.FusedLinearForPPO(), verl.linear_cross_entropy):
        for want, got in zip(truth, backward(forward, inputs, given, upstream), strict=True):
            assert got.shape == want.shape
            assert_near(got, want, 1e-12)


def test_gradcheck():
    hidden, weight, labels, _ = head(shape=(2, 3))
    assert torch.autograd.gradcheck(
        lambda h, w: verl.fused_linear_for_ppo(h, w, labels, 0.8), (hidden, weight)
    )


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_of_the_two_results_is_enough(wanted):
    hidden, weight, labels, upstream = head()
    outputs = verl.fused_linear_for_ppo(hidden, weight, labels, 0.7)
    (grad,) = torch.autograd.grad((upstream[wanted] * outputs[wanted]).sum(), weight)
    truth = plain(hidden, weight, labels, 0.7)[wanted]
    assert_near(grad, torch.autograd.grad((upstream[wanted] * truth).sum(), weight)[0], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(B, S), (1, B * S), (B * S,)])
def test_it_is_as_near_to_fp64_as_verls_torch_version(dtype, shape):
    module = their("verl.utils.experimental.torch_functional")
    *inputs, upstream = head(dtype, shape)
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    truth = backward(plain, exact, 0.7, upstream)
    rival = backward(module.FusedLinearForPPO(), inputs, 0.7, upstream)
    ours = backward(verl.FusedLinearForPPO(), inputs, 0.7, upstream)
    for want, theirs, got in zip(truth, rival, ours, strict=True):
        assert got.shape == theirs.shape
        limit = 2 * float((theirs.double() - want).abs().max()) + 1e-6 * float(want.abs().max())
        assert float((got.double() - want).abs().max()) <= limit
    if dtype == torch.float32:
        for theirs, got in zip(rival, ours, strict=True):
            assert got.dtype == theirs.dtype
            assert_near(got, theirs, 5e-6)


def test_signatures_are_verls():
    own = tuple(inspect.signature(verl.FusedLinearForPPO.forward).parameters)
    assert own == ("self", *HEAD)
    assert tuple(inspect.signature(verl.fused_linear_for_ppo).parameters)[:4] == HEAD
    module = their("verl.utils.experimental.torch_functional")
    assert tuple(inspect.signature(module.FusedLinearForPPO.forward).parameters) == own
    their_init = inspect.signature(module.FusedLinearForPPO).parameters
    assert list(their_init) == list(inspect.signature(verl.FusedLinearForPPO).parameters)
    assert {k: p.default for k, p in their_init.items()} == {
        "chunk_size": 512,
        "impl_backend": "torch",
    }
    function = their("verl.utils.kernel.linear_cross_entropy").LinearCrossEntropy
    parameters = list(inspect.signature(function.forward).parameters)[1:]
    assert parameters == list(inspect.signature(verl.linear_cross_entropy).parameters)


def tiny(forward):
    """A decoder whose forward is verl's, on a class of its own."""
    base = transformers.LlamaForCausalLM
    config = transformers.LlamaConfig.from_dict({**SIZES, "tie_word_embeddings": False})
    torch.manual_seed(1)
    return type(base.__name__, (base,), {"forward": forward})(config)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_model_with_verls_forward_takes_ours(backend, patched):
    """verl's forward for dense models, as its `use_fused_kernels` installs it."""
    dense = their("verl.models.transformers.dense_common")
    ids = torch.randint(0, SIZES["vocab_size"], (2, 6))
    upstream = torch.randn(2, 2, 6)

    def run(forward):
        model = tiny(forward)
        found = model(ids, return_dict=True, use_cache=False, temperature=0.8)
        loss = (upstream[0] * found.log_probs + upstream[1] * found.entropy).sum()
        loss.backward()
        return [
            found.log_probs.detach(),
            found.entropy.detach(),
            *(p.grad for p in model.parameters()),
        ]

    truth = run(dense.forward_with_torch_backend)
    patched()
    for want, got in zip(
        truth, run(getattr(dense, f"forward_with_{backend}_backend")), strict=True
    ):
        assert got.shape == want.shape
        assert_near(got, want, 1e-5)
    functional = sys.modules["verl.utils.experimental.torch_functional"]
    assert functional.FusedLinearForPPO is verl.FusedLinearForPPO


def test_importing_the_patch_is_enough(patched):
    sys.modules.pop("crpo_kernels.integrations.verl_patch", None)
    module = their("verl.utils.experimental.torch_functional")
    original = module.FusedLinearForPPO
    importlib.import_module("crpo_kernels.integrations.verl_patch")
    assert module.FusedLinearForPPO is verl.FusedLinearForPPO is not original
    patched()  # again
    verl.unpatch()
    assert module.FusedLinearForPPO is original


def test_a_verl_with_other_arguments_is_left_alone(patched, monkeypatch):
    class Changed(torch.nn.Module):
        def forward(self, hidden_states, vocab_weights, labels, temperature=1.0):
            raise AssertionError

    kernel = their("verl.utils.kernel.linear_cross_entropy")
    original = kernel.linear_cross_entropy
    functional = their("verl.utils.experimental.torch_functional")
    monkeypatch.setattr(functional, "FusedLinearForPPO", Changed)
    with pytest.raises(RuntimeError, match=r"verl: expected .*'input_ids'.* got .*'labels'"):
        patched()
    assert functional.FusedLinearForPPO is Changed
    assert kernel.linear_cross_entropy == original


class Group:
    def size(self):
        return 2


MISTAKES = {
    "ids": (lambda h, w, y: verl.fused_linear_for_ppo(h, w, y[:, 1:]), "input_ids: expected"),
    "temperatures": (
        lambda h, w, y: verl.fused_linear_for_ppo(h, w, y, torch.ones(S)),
        r"temperature: expected .*B x S",
    ),
    "id": (lambda h, w, y: verl.fused_linear_for_ppo(h, w, y + V), "labels: expected ids"),
    "zero": (lambda h, w, y: verl.fused_linear_for_ppo(h, w, y, 0.0), "temperature: .* above 0"),
    "reduction": (lambda h, w, y: verl.linear_cross_entropy(h, w, y, 1.0, "mean"), "reduction: "),
    "backend": (lambda *_: verl.FusedLinearForPPO(impl_backend="trition"), "impl_backend: "),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_say_what_to_pass(case):
    call, message = MISTAKES[case]
    with pytest.raises(ValueError, match=message):
        call(*head()[:3])


def test_tensor_parallel_heads_are_refused():
    with pytest.raises(NotImplementedError, match="dist_process_group: "):
        verl.linear_cross_entropy(*head()[:3], 1.0, "none", Group())

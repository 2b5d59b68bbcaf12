"""The other projects: those that run here are right, the others are called as they want it."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.clock import Clock
from benchmarks.losses.accuracy import Truth
from benchmarks.losses.baselines import KL_COEF, Candidate, Result, gradients, naive, objective
from benchmarks.losses.candidates import cpu_candidates
from benchmarks.losses.cases import Case, make_inputs
from benchmarks.losses.measure import measure
from benchmarks.losses.needs import Needs
from benchmarks.losses.peers import cce, liger, loss_peers, quack, score_peers, trl, verl
from benchmarks.losses.peers.common import mean_nll, sequences
from crpo_kernels.call import uncompiled_reason

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
CASE = Case(37, 301, 128, torch.float32)  # eight sequences of five rows, the last one of two
PEERS = {c.key: c for c in [*loss_peers("cpu"), *score_peers("cpu")]}
ON_CPU = [key for key, c in PEERS.items() if c.needs.device != "cuda"]
ON_GPU = [key for key, c in PEERS.items() if c.needs.device == "cuda"]
LARGE = torch.empty(0)
COLUMNS = {"logprobs", "entropy", "d_hidden", "d_weight"}


@pytest.fixture(scope="module")
def truth() -> Truth:
    return Truth(make_inputs(CASE), CASE.num_rows, 4096)


def is_right(candidate: Candidate, truth: Truth) -> None:
    """Near fp64, and with every column that it does not say to lack."""
    errors, wrong = truth.errors(candidate)
    assert wrong == ""
    assert all(found["rms"] < 1e-5 for found in errors.values()), errors
    columns = COLUMNS if candidate.num_products == 3 else {"logprobs", "entropy"}
    assert set(errors) - {"d_weight_tail"} == columns - set(candidate.lacks)
    assert candidate.has_entropy_gradient == ("entropy_gradient" not in candidate.lacks)


@pytest.mark.parametrize("key", ON_CPU)
def test_what_runs_on_a_cpu_is_right(key, truth):
    candidate = PEERS[key]
    if reason := candidate.missing(CASE, CPU):
        pytest.skip(reason)
    if candidate.needs.generates_code and (reason := uncompiled_reason(LARGE, 2048, 151_936)):
        pytest.skip(reason)  # no C++ compiler
    is_right(candidate, truth)
    assert candidate.version()


@pytest.mark.parametrize("key", ON_GPU)
def test_what_needs_a_gpu_says_so_on_a_cpu(key):
    reason = PEERS[key].missing(CASE, CPU)
    absent = f"{PEERS[key].needs.distribution} is not installed"
    assert reason == ("needs a CUDA device" if PEERS[key].version() else absent)


def on_logits(logits, old_logp, ref_logp, completion_ids, advantages, **given):
    """What Liger's Triton loss computes: the GRPO loss per token of logits [B, L + 1, V]."""
    assert old_logp is None
    assert (given["eps_low"], given["eps_high"], given["reduce"]) == (0.2, 0.2, False)
    log_p = (logits[:, :-1] / given["temperature"]).log_softmax(2)
    logprobs = log_p.gather(2, completion_ids.unsqueeze(2)).squeeze(2)
    ratio = torch.exp(logprobs - logprobs.detach())
    x = ref_logp - logprobs
    kl = given["beta"] * (torch.exp(x) - x - 1)
    return kl - ratio * advantages.unsqueeze(1), None, None


def with_entropy(hidden, weight, labels, temperature, *_):
    """Log-probabilities and entropies in torch."""
    return on_all_logits(hidden @ weight.t(), labels, temperature)


def on_all_logits(logits, index, temperature):
    """The same from logits."""
    log_p = (logits / temperature).log_softmax(1)
    return log_p.gather(1, index.unsqueeze(1)).squeeze(1), -(log_p.exp() * log_p).sum(1)


def cross_entropy(hidden, weight, target, reduction):
    """Of hidden states and head."""
    return F.cross_entropy(hidden @ weight.t(), target, reduction=reduction)


STAND_INS = {  # in torch for the functions that need a GPU, with their names for the arguments
    "liger_logits": (liger, "logits_loss", on_logits),
    "liger_logits_scored": (
        *(liger, "logits_scores"),
        lambda logits, ids, t: on_all_logits(logits[:, :-1].flatten(0, 1), ids.flatten(), t)[
            0
        ].view(ids.shape),
    ),
    "trl_logits": (trl, "logits_function", on_all_logits),
    "trl_logits_scored": (trl, "logits_function", on_all_logits),
    "verl_triton": (verl, "triton_function", SimpleNamespace(apply=with_entropy)),
    "verl_triton_scored": (verl, "triton_function", SimpleNamespace(apply=with_entropy)),
    "quack": (
        quack,
        "loss_function",
        lambda x, weight, target, reduction: cross_entropy(x, weight, target, reduction),
    ),
    "quack_scored": (
        *(quack, "forward_function"),
        lambda x, weight, target, need_dx, need_dw: (
            cross_entropy(x, weight, target, "none"),
            need_dx or None,
            need_dw or None,
        ),
    ),
    **{
        key: (
            cce,
            "linear_cross_entropy",
            lambda e, c, targets, reduction, **_: cross_entropy(e, c, targets, reduction),
        )
        for key in ("cce", "cce_exact", "cce_exact_scored")
    },
}


@pytest.mark.parametrize("key", ON_GPU)
def test_what_needs_a_gpu_gets_the_right_numbers(key, truth, monkeypatch):
    module, name, function = STAND_INS[key]
    monkeypatch.setattr(module, name, lambda: function)
    is_right(PEERS[key], truth)


def source_parameters(package: str, path: str, name: str) -> inspect.Signature:
    """The signature of a function whose module cannot be imported here."""
    found = importlib.util.find_spec(package)
    source = Path(found.submodule_search_locations[0]) / path
    (node,) = (
        n
        for n in ast.parse(source.read_text("utf-8")).body
        if isinstance(n, ast.FunctionDef) and n.name == name
    )
    names = [a.arg for a in node.args.args]
    given = len(names) - len(node.args.defaults)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [
            inspect.Parameter(n, kind, default=inspect.Parameter.empty if i < given else None)
            for i, n in enumerate(names)
        ]
    )


def quack_parameters(name: str) -> inspect.Signature:
    return source_parameters("quack", "linear_cross_entropy.py", name)


LOGITS = torch.empty(8, 6, 301)
# the distribution, the signature, and what it is called with: by place, by name
LIGER, CCE, QUACK = "liger-kernel", "cut-cross-entropy", "quack-kernels"
CALLS = {
    "liger_made": (LIGER, lambda: liger.chunked_class(), lambda i: liger.chunked_arguments(i)[0]),
    "liger": (
        *(LIGER, lambda: liger.chunked_class().forward),
        lambda i: {"self": None, **liger.chunked_arguments(i)[1]},
    ),
    "liger_scored": (LIGER, lambda: liger.chunked_base().chunk_forward, liger.scores_arguments),
    "liger_scaled": (LIGER, lambda: liger.scaled_function().apply, liger.scaled_arguments),
    "liger_logits": (
        *(LIGER, lambda: liger.logits_loss()),
        lambda i: liger.logits_arguments(i, LOGITS),
    ),
    "liger_logits_scored": (
        *(LIGER, lambda: liger.logits_scores()),
        lambda i: (LOGITS, i.labels, 1.0),
    ),
    "trl": (
        *("trl", lambda: trl.chunked_function().forward),
        lambda i: (None, *trl.chunked_arguments(i)),
    ),
    "trl_logits": ("trl", lambda: trl.logits_function(), trl.logits_arguments),
    "verl_triton": (
        *("verl", lambda: verl.triton_function().forward),
        lambda i: (None, *verl.triton_arguments(i)),
    ),
    "verl_torch": (
        *("verl", lambda: verl.torch_function().forward),
        lambda i: (None, *verl.torch_arguments(i)),
    ),
    "quack": (
        *(QUACK, lambda: quack_parameters("chunked_linear_cross_entropy")),
        quack.loss_arguments,
    ),
    "quack_scored": (
        *(QUACK, lambda: quack_parameters("chunked_linear_cross_entropy_fwd")),
        quack.forward_arguments,
    ),
    **{
        f"cce {kind.__name__}": (
            *(CCE, cce.linear_cross_entropy),
            lambda i, kind=kind: cce.CutCrossEntropy(kind).arguments(i),
        )
        for kind in (cce.exact, cce.filtered, cce.compiled)
    },
}


@pytest.mark.parametrize("name", list(CALLS))
def test_calls_fit_the_installed_signatures(name):
    distribution, function, arguments = CALLS[name]
    if not Needs(distribution).version():
        pytest.skip(f"{distribution} is not installed")
    found, given = function(), arguments(make_inputs(CASE))
    signature = found if isinstance(found, inspect.Signature) else inspect.signature(found)
    bound = signature.bind(**given) if isinstance(given, dict) else signature.bind(*given)
    assert len(bound.arguments) == len(given)


def test_the_exact_cut_cross_entropy_has_no_filter(monkeypatch):
    if not Needs("cut-cross-entropy").version():
        pytest.skip("cut-cross-entropy is not installed")
    assert cce.exact() in ({"impl": "cce", "filter_eps": None}, {"impl": "cce_exact"})
    newer = SimpleNamespace(CCEPresets=SimpleNamespace(names={"cce", "cce_exact"}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setitem(sys.modules, "cut_cross_entropy.cce_utils", newer)
    assert cce.exact() == {"impl": "cce_exact"}


def test_verl_is_reached_without_ray():
    if not Needs("verl").version():
        pytest.skip("verl is not installed")
    assert verl.torch_function().__name__ == "FusedLinearForPPOFunction"
    assert verl.triton_function().__name__ == "LinearCrossEntropy"
    assert "ray" not in sys.modules


def test_generated_code_has_no_count_of_memory():
    """The counter sees operations; what it does not see is no number."""
    candidates = [c for c in cpu_candidates() if c.key in ("products", "naive")]
    candidates.append(replace(PEERS["compiled"], step=naive))
    report = measure(CASE, candidates, Clock(CPU), 1)
    row = report["rows"][-1]
    assert "peak_bytes" not in row
    assert row["lacks"]["peak_bytes"].startswith("not counted")
    assert row["seconds"]["warm"]["median"] > 0
    assert report["rows"][1]["peak_bytes"] > 0


def other_task(inputs):
    """Plain cross entropy where the policy's loss is asked for."""
    logits = inputs.hidden @ inputs.weight.t() / inputs.case.temperature
    loss = F.cross_entropy(logits, inputs.labels)
    return Result(loss, *gradients(loss, inputs), naive(inputs).logprobs)


def forgets_temperature(inputs):
    return naive(replace(inputs, case=replace(CASE, temperature=1.0)))


@pytest.mark.parametrize("step", [other_task, forgets_temperature])
def test_a_peer_with_another_task_than_it_says_is_wrong(step, truth):
    errors, wrong = truth.errors(Candidate("x", "x", step, has_entropy_gradient=False))
    assert wrong.startswith(("d_", "logprobs", "entropy"))
    assert max(found["rms"] for found in errors.values()) > 0.05


def test_tasks_are_told_apart(truth):
    """Right for plain cross entropy is wrong for the policy, and the other way round."""
    right = Candidate("x", "x", other_task, has_entropy_gradient=False, objective=mean_nll)
    assert truth.errors(right)[1] == ""
    inputs, logprobs = make_inputs(CASE), torch.zeros(37)
    assert float(mean_nll(inputs, logprobs - 2, None)) == 2.0
    assert float(objective(inputs, inputs.ref_logprobs, None)) == pytest.approx(
        float(-(inputs.token_weights * inputs.advantages).sum()), abs=1e-5
    )
    assert KL_COEF == 0.01


def test_rows_become_padded_sequences():
    values = torch.arange(14.0).view(7, 2)
    made = sequences(values, 3)
    assert made.shape == (3, 3, 2)
    assert torch.equal(made.flatten(0, 1)[:7], values)
    assert not made.flatten(0, 1)[7:].any()
    assert sequences(torch.arange(6), 3).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_needs_are_reasons(monkeypatch, capsys):
    def noisy():
        print("banner")
        print("warning", file=sys.stderr)
        raise ImportError("no module named ray")

    assert Needs().unmet(CASE, CPU) == ""
    assert Needs("nowhere-to-be-found").unmet(CASE, CPU) == "nowhere-to-be-found is not installed"
    assert Needs("torch", noisy, device="cuda").unmet(CASE, CPU) == "needs a CUDA device"
    assert (
        Needs("torch", noisy).unmet(CASE, CPU)
        == "cannot be imported: ImportError: no module named ray"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    hopper = Needs("torch", noisy, device="cuda", capability=((9, 0), (10, 0)))
    assert hopper.unmet(CASE, CUDA) == "needs sm_90, sm_100, this is sm_80"
    halves = Needs("torch", noisy, dtypes=(torch.bfloat16, torch.float16))
    assert halves.unmet(CASE, CUDA) == "takes bfloat16 or float16 only"
    tiles = Needs("torch", noisy, multiples={"dim": 128, "num_rows": 8})
    assert tiles.unmet(CASE, CUDA) == "T must be a multiple of 8, got 37"
    said = capsys.readouterr()
    assert said.out + said.err == ""


def test_quack_wants_hopper_and_whole_vectors(monkeypatch):
    needs, even = PEERS["quack"].needs, Case(40, 304, 128, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert needs.device_reason(CUDA).startswith("needs sm_90")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert needs.device_reason(CUDA) == needs.case_reason(even) == ""
    assert needs.case_reason(CASE) == "takes bfloat16 or float16 only"
    assert PEERS["verl_triton"].needs.case_reason(Case(8, 50257, 1001, torch.bfloat16)) == (
        "D must be a multiple of 128, got 1001"
    )

"""Every supported architecture: the fused loss is that of the model's own logits, in any layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from architecture_cases import ARCHITECTURES, make
from crpo_fast import distributed
from crpo_fast import policy as policies
from crpo_fast.batch import SamplingParams
from crpo_fast.distributed import World
from crpo_fast.models import export_model, load_model, train_tokenizer
from crpo_fast.packing import Sequence, pack
from crpo_fast.policy import Policy
from crpo_fast.rollout import RolloutError
from crpo_fast.rollout.hf import HFEngine
from crpo_fast.rollout.static import StaticEngine
from crpo_fast.step import accumulate, micro_batches
from layout_cases import Case, old_logprobs
from layout_reference import expect
from layout_worker import whole

CASE = Case(
    *("bnpo", "clip_old", "sequence_mean", "k3"), tied=True, layout="packed",
    checkpointing=False, frozen_head=False, completions="whole", shares="even",
)  # fmt: skip
CLOSE = 1e-6  # transformers' norms and rotations compute in fp32 whatever the dtype
every = pytest.mark.parametrize("name", ARCHITECTURES)


@pytest.fixture(scope="module")
def alone() -> Iterator[World]:
    yield distributed.init(threads=1)
    distributed.shutdown()


@pytest.fixture
def exact_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' eager attention has a softmax in fp32 whatever the dtype; here it has not."""
    plain = torch.nn.functional.softmax
    monkeypatch.setattr("torch.nn.functional.softmax", lambda x, dim=-1, dtype=None: plain(x, dim))


def reference(name: str, **changes: Any) -> Any:
    """The model with transformers' own plain attention."""
    model = make(name, **changes)
    model.set_attn_implementation("eager")
    return model


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def create(name: str, world: World, *, seed: int = 0, trainable: bool = True) -> Policy:
    model = make(name, seed=seed)
    return policies.create(model, world, compute_dtype=torch.float64, trainable=trainable)


@every
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_loss_and_all_gradients_are_those_of_the_models_own_logits(
    name: str, layout: str, alone: World, exact_softmax: None
) -> None:
    """Clipped ratios, KL and stage entropies; one sequence at a time on the other side."""
    case = replace(CASE, layout=layout)
    policy, frozen = create(name, alone), create(name, alone, seed=2, trainable=False)
    sequences = case.sequences()
    options = {"token_budget": 100, "layout": layout, "reference": frozen}
    batches = micro_batches(sequences, case.spec, policy, **options)
    assert len(batches) > 1
    old = torch.tensor([x for xs in old_logprobs(sequences) for x in xs], dtype=torch.float64)
    batches = [b.with_vectors(old_logprobs=old[b.source]) for b in batches]
    loss, sums, _ = accumulate(policy, batches, case.spec)

    plain = reference(name)
    expected = expect(case, plain, reference(name, seed=2), old_logprobs(sequences))
    assert loss == pytest.approx(expected.loss, rel=CLOSE)
    means = sums.means()
    for metric in ("logprobs", "entropy", "kl", "clip_fraction", "stage_entropy/1"):
        assert means[metric] == pytest.approx(expected.metrics[metric], rel=CLOSE), metric
    named = dict(policy.model.named_parameters())
    assert {n for n, p in named.items() if p.grad is not None} == set(expected.grads) == set(named)
    for key, want in expected.grads.items():
        assert want.abs().max() > 0, f"{key}: a gradient of zero shows nothing"
        assert relative(named[key].grad, want) < CLOSE, key


@every
def test_packed_rows_are_sequences_alone(name: str, alone: World) -> None:
    model = make(name)
    lengths, ids = [7, 1, 12, 5], torch.randint(0, 300, (1, 25))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    together = model(ids, position_ids=positions, use_cache=False).logits
    one_by_one = [model(x, use_cache=False).logits for x in ids.split(lengths, 1)]
    assert relative(together, torch.cat(one_by_one, 1)) < 1e-12
    create(name, alone).check_packing()


@every
def test_rollouts_have_the_logprobs_of_the_policy(name: str, alone: World) -> None:
    """Cache, window and caps of generation against those of training, beyond the window."""
    policy = create(name, alone)
    engine = StaticEngine(policy.model)
    engine.sync(policy.model, 0)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13]]
    params = SamplingParams(max_tokens=9, eos_ids=(1,), temperature=0.9)
    groups = engine.generate(prompts, 2, params, seed=3)
    samples = [(g.prompt_ids, s) for g in groups for s in g.samples]
    (batch,) = pack([Sequence(p, s.token_ids, [-1] * len(s.token_ids)) for p, s in samples], 200)
    sampled = torch.tensor([x for _, s in samples for x in s.logprobs], dtype=torch.float64)
    assert (policy.logprobs(batch, 0.9) - sampled).abs().max() < 1e-5  # an engine's are fp32


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["I lost my job, and nobody calls."] * 9, 290, ["<think>", "</think>"])


@every
def test_an_export_is_the_same_model_in_transformers(
    name: str, tokenizer: Any, tmp_path: Path
) -> None:
    model = make(name, torch.float32)
    folder = export_model(model, tokenizer, tmp_path / "model", state_dict=model.state_dict())
    ids = torch.arange(2, 14)[None]
    options = {"attn_implementation": model.config._attn_implementation, "dtype": torch.float32}
    loaded = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert type(loaded) is type(model)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    again = load_model(folder)[0]
    states = (model.state_dict(), loaded.state_dict(), again.state_dict())
    assert all(state.keys() == states[0].keys() for state in states)
    assert all(torch.equal(state[k], v) for state in states for k, v in states[0].items())
    assert again.config._attn_implementation == model.config._attn_implementation
    tied = [m.lm_head.weight is m.get_input_embeddings().weight for m in (model, loaded, again)]
    assert tied == [model.config.tie_word_embeddings] * 3


@every
def test_a_sharded_policy_that_casts_has_the_same_gradients(name: str, alone: World) -> None:
    """FSDP2 units around every architecture's blocks, norm and head: fp64 masters, fp32 compute."""
    sequences = CASE.sequences()
    spec = replace(CASE, objective="clip", kl="none").spec
    gradients = []
    for dtype in (torch.float64, torch.float32):
        policy = policies.create(make(name), alone, compute_dtype=dtype)
        batches = micro_batches(sequences, spec, policy, token_budget=100, layout="packed")
        accumulate(policy, batches, spec)
        gradients.append({n: whole(p.grad) for n, p in policy.model.named_parameters()})
    assert isinstance(policy.model.lm_head.weight, DTensor)
    exact, cast = gradients
    assert all(relative(cast[key], exact[key]) < 1e-4 for key in exact)


def test_a_frozen_head_keeps_its_bias(alone: World) -> None:
    model = make("phi")
    policy = policies.create(model, alone, compute_dtype=torch.float64, freeze_head=True)
    assert {n for n, p in policy.model.named_parameters() if not p.requires_grad} == {
        "lm_head.weight",
        "lm_head.bias",
    }


def test_paged_generation_is_refused_where_it_has_no_soft_cap() -> None:
    with pytest.raises(RolloutError, match=r"has none\. Type --rollout\.engine static"):
        HFEngine(make("gemma2"))

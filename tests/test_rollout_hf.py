"""Both embedded engines: exact logprobs, reproducible samples, checked results, modes restored."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from crpo_fast.batch import RolloutGroup, SamplingParams
from crpo_fast.models_build import build_model
from crpo_fast.rollout import Engine, RolloutError, check_request
from crpo_fast.rollout.hf import HFEngine
from crpo_fast.rollout.sampling import sample
from crpo_fast.rollout.static import StaticEngine

EOS = 3
ENGINES = [HFEngine, StaticEngine]
PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14], [5, 6, 7, 8, 9], list(range(20, 55))]
PARAMS = SamplingParams(max_tokens=12, eos_ids=(EOS,))


def tiny(architecture: str = "llama"):
    model = build_model(
        architecture,
        vocab_size=60,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        tie_word_embeddings=False,
        eos_token_id=EOS,
        seed=1,
    )
    with torch.no_grad():  # sharper than at the start, so that a wrong logprob is far off
        model.get_output_embeddings().weight.mul_(2.0)
    return model


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def each_model(request):
    return tiny(request.param)


@pytest.fixture(scope="module")
def model():
    return tiny()


def synced(engine_class, model, version=0, **options):
    engine = engine_class(model, **options)
    engine.sync(model, version)
    return engine


def gradients(model) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def tokens(groups: list[RolloutGroup]) -> list[list[list[int]]]:
    return [[s.token_ids for s in group.samples] for group in groups]


@torch.no_grad()
def recomputed(model, group: RolloutGroup, sample, temperature: float) -> torch.Tensor:
    """Logprobs of a training forward: no cache, no padding, one sequence."""
    ids = torch.tensor([group.prompt_ids + sample.token_ids])
    logits = model(ids, use_cache=False).logits[0].float() / temperature
    first = len(group.prompt_ids) - 1
    rows = torch.log_softmax(logits, -1)[first:-1]
    return rows.gather(1, torch.tensor(sample.token_ids)[:, None]).squeeze(1)


def largest_error(model, groups: list[RolloutGroup], temperature: float) -> float:
    return max(
        (recomputed(model, g, s, temperature) - torch.tensor(s.logprobs)).abs().max().item()
        for g in groups
        for s in g.samples
    )


@pytest.mark.parametrize("engine_class", ENGINES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_equal_a_training_forward(engine_class, temperature, each_model):
    params = SamplingParams(12, (EOS,), temperature=temperature)
    groups = synced(engine_class, each_model).generate(PROMPTS, 3, params, seed=0)
    assert largest_error(each_model, groups, temperature) < 1e-5


@pytest.mark.parametrize("engine_class", ENGINES)
def test_groups_come_in_input_order_with_reasons_and_version(engine_class, model):
    groups = synced(engine_class, model, version=7).generate(PROMPTS, 8, PARAMS, seed=0)
    assert [g.prompt_ids for g in groups] == PROMPTS
    assert [len(g.samples) for g in groups] == [8] * len(PROMPTS)
    samples = [s for g in groups for s in g.samples]
    assert {s.policy_version for s in samples} == {7}
    for s in samples:
        assert EOS not in s.token_ids[:-1]
        assert s.finish_reason == ("stop" if s.token_ids[-1] == EOS else "length")
        assert s.finish_reason == "stop" or len(s.token_ids) == PARAMS.max_tokens
    assert {s.finish_reason for s in samples} == {"stop", "length"}
    assert len({tuple(s.token_ids) for s in groups[0].samples}) > 1


@pytest.mark.parametrize("engine_class", ENGINES)
def test_several_end_tokens_all_stop(engine_class, model):
    params = SamplingParams(12, tuple(range(0, 60, 4)))
    groups = synced(engine_class, model).generate(PROMPTS, 4, params, seed=0)
    lasts = {s.token_ids[-1] for g in groups for s in g.samples if s.finish_reason == "stop"}
    assert len(lasts) > 2
    assert all(last in params.eos_ids for last in lasts)


@pytest.mark.parametrize("engine_class", ENGINES)
def test_same_seed_same_samples_other_seed_others(engine_class, model):
    engine = synced(engine_class, model)
    first = engine.generate(PROMPTS, 3, PARAMS, seed=5)
    torch.manual_seed(99)
    torch.rand(3)
    again = synced(engine_class, model).generate(PROMPTS, 3, PARAMS, seed=5)
    assert first == again
    assert tokens(engine.generate(PROMPTS, 3, PARAMS, seed=6)) != tokens(first)
    assert tokens(engine.generate(PROMPTS, 3, PARAMS, seed=5, first=64)) != tokens(first)


@pytest.mark.parametrize("engine_class", ENGINES)
def test_global_random_state_and_modes_are_left_alone(engine_class, model):
    model.train()
    model.model.layers[0].mlp.eval()
    before, attention = torch.get_rng_state(), model.config._attn_implementation
    synced(engine_class, model).generate(PROMPTS[:2], 2, PARAMS, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert not model.model.layers[0].mlp.training
    assert model.model.layers[1].mlp.training
    assert model.config._attn_implementation == attention == "sdpa_packed"
    assert not any("forward" in vars(module) for module in model.modules())
    model.train()


@pytest.mark.parametrize("engine_class", ENGINES)
def test_training_goes_on_between_rollouts(engine_class):
    model = tiny()
    engine = synced(engine_class, model)
    ids = torch.tensor([PROMPTS[0]])
    model(ids, use_cache=False).logits.square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    engine.generate(PROMPTS, 2, PARAMS, seed=0)
    model(ids, use_cache=False).logits.square().sum().backward()
    assert all(map(torch.equal, expected, gradients(model)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    engine.sync(model, 1)
    groups = engine.generate(PROMPTS, 2, PARAMS, seed=0)
    assert largest_error(model, groups, 1.0) < 1e-5  # the new weights, not the old ones


@pytest.mark.parametrize("engine_class", ENGINES)
def test_greedy_is_the_argmax(engine_class, model):
    params = SamplingParams(10, (EOS,), temperature=0.0)
    groups = synced(engine_class, model).generate(PROMPTS, 1, params, seed=0)
    for group in groups:
        ids = list(group.prompt_ids)
        for token in group.samples[0].token_ids:
            with torch.no_grad():
                assert model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax() == token
            ids.append(token)
    assert largest_error(model, groups, 1.0) < 1e-5
    assert groups == synced(engine_class, model).generate(PROMPTS, 1, params, seed=1)


@pytest.mark.parametrize("engine_class", ENGINES)
def test_top_k_and_top_p_are_obeyed(engine_class, model):
    for params in (SamplingParams(8, (), top_k=2), SamplingParams(8, (), top_p=0.5)):
        groups = synced(engine_class, model).generate(PROMPTS, 4, params, seed=0)
        for group in groups:
            for s in group.samples:
                ids = torch.tensor([group.prompt_ids + s.token_ids])
                with torch.no_grad():
                    probs = model(ids, use_cache=False).logits[0].softmax(-1)
                rows = probs[len(group.prompt_ids) - 1 : -1]
                own = rows.gather(1, torch.tensor(s.token_ids)[:, None])
                likelier = torch.where(rows > own + 1e-6, rows, 0.0)
                if params.top_k:
                    assert int((likelier > 0).sum(1).max()) < params.top_k
                else:
                    assert float(likelier.sum(1).max()) < params.top_p
        if not engine_class.renormalises:
            assert largest_error(model, groups, 1.0) < 1e-5
        else:
            assert largest_error(model, groups, 1.0) > 0.1


@pytest.mark.parametrize("engine_class", ENGINES)
def test_first_tokens_follow_the_models_distribution(engine_class, model):
    params = SamplingParams(1, (), temperature=0.7)
    groups = synced(engine_class, model).generate([PROMPTS[1]], 1500, params, seed=3)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[1]]), use_cache=False).logits[0, -1]
    expected = (logits / 0.7).softmax(-1)
    drawn = torch.tensor([s.token_ids[0] for s in groups[0].samples])
    observed = torch.bincount(drawn, minlength=60) / 1500
    # 4 standard deviations of a frequency, for each of the 60 tokens
    bound = 4 * (expected * (1 - expected) / 1500).sqrt() + 1e-3
    assert bool(((observed - expected).abs() < bound).all())


@pytest.mark.parametrize("engine_class", ENGINES)
def test_prompts_of_one_token(engine_class, model):
    groups = synced(engine_class, model).generate([[4], [5, 6, 7], [8]], 3, PARAMS, seed=0)
    assert [g.prompt_ids for g in groups] == [[4], [5, 6, 7], [8]]
    assert [len(g.samples) for g in groups] == [3, 3, 3]
    assert largest_error(model, groups, 1.0) < 1e-5


@pytest.mark.parametrize("engine_class", ENGINES)
def test_autocast_and_the_gathering_context(engine_class, model):
    inside = []

    @contextmanager
    def gathered():
        inside.append("in")
        yield
        inside.append("out")

    engine = synced(engine_class, model, autocast=torch.bfloat16, gathered=gathered)
    groups = engine.generate(PROMPTS, 2, PARAMS, seed=0)
    assert inside == ["in", "out"]
    assert 1e-5 < largest_error(model, groups, 1.0) < 0.3  # bf16, and close
    before = model(torch.tensor([PROMPTS[0]])).logits
    assert torch.equal(before, model(torch.tensor([PROMPTS[0]])).logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # no weight of the rollout is cached
        loss = model(torch.tensor([PROMPTS[0]])).logits.square().sum()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()


@pytest.mark.parametrize("engine_class", ENGINES)
def test_order_of_calls(engine_class, model):
    engine = engine_class(model)
    assert isinstance(engine, Engine)
    with pytest.raises(RolloutError, match=r"Call engine\.sync"):
        engine.generate(PROMPTS, 2, PARAMS, seed=0)
    with pytest.raises(RolloutError, match="expected the model that this engine was built with"):
        engine.sync(tiny(), 0)
    engine.sync(model, 0)
    assert engine.generate([], 2, PARAMS, seed=0) == []
    engine.close()
    with pytest.raises(RolloutError, match="closed"):
        engine.generate(PROMPTS, 2, PARAMS, seed=0)


@pytest.mark.parametrize("engine_class", ENGINES)
def test_nan_logits_are_an_error_that_names_a_request(engine_class):
    model = tiny()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RolloutError, match=r"request req_|logits: expected finite") as error:
        synced(engine_class, model).generate(PROMPTS, 2, PARAMS, seed=0)
    assert len(str(error.value)) > 40


@pytest.mark.parametrize("engine_class", ENGINES)
def test_temperature_0_in_rollouts_is_refused(engine_class, model):
    params = SamplingParams(8, (EOS,), temperature=0.0)
    with pytest.raises(ValueError, match=r"above 0 in rollouts.*--rollout\.temperature 1\.0"):
        synced(engine_class, model).generate(PROMPTS, 2, params, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 0}, "group_size: expected at least 1, got 0"),
        ({"temperature": -1.0}, "temperature: expected a number above 0"),
        ({"max_tokens": 0}, "--rollout.max_tokens"),
        ({"top_p": 0.0}, "--rollout.top_p 1"),
        ({"top_k": -1}, "--rollout.top_k 0"),
        ({"seed": -1}, "seed: expected an integer"),
        ({"prompt_ids": [[1], []]}, r"prompt_ids\[1\]: expected at least one token"),
    ],
)
def test_requests_that_are_refused(changes, message):
    request = {"prompt_ids": [[1]], "group_size": 2, "seed": 0}
    settings = {"max_tokens": 8, "eos_ids": (EOS,)}
    for name, value in changes.items():
        (request if name in request else settings)[name] = value
    with pytest.raises(ValueError, match=message):
        check_request(**request, params=SamplingParams(**settings))


def output(**changes):
    from transformers.generation.continuous_batching import RequestStatus

    fields = {
        "generated_tokens": [4],
        "logprobs": [-1.0],
        "error": None,
        "status": RequestStatus.FINISHED,
    }
    fields.update(changes)
    return SimpleNamespace(**fields, is_finished=lambda: fields["status"] == RequestStatus.FINISHED)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"req_0": output()}, "expected 2 completions, got 1"),
        ({"req_0": output(), "req_1": output(error="out of pages")}, "request req_1.*out of pages"),
        ({"req_0": output(), "req_1": output(logprobs=[])}, "req_1.*1 tokens and 0 logprobs"),
        ({"req_0": output(generated_tokens=[], logprobs=[]), "req_1": output()}, "req_0.*got 0"),
        ({"req_0": output(logprobs=[float("-inf")]), "req_1": output()}, "req_0.*finite logprobs"),
    ],
)
def test_hf_results_are_counted_and_checked(outputs, message, model, monkeypatch):
    monkeypatch.setattr(type(model), "generate_batch", lambda *_, **__: outputs)
    with pytest.raises(RolloutError, match=message):
        synced(HFEngine, model).generate([[1, 2]], 2, PARAMS, seed=0)


def test_hf_cache_smaller_than_the_request_makes_it_wait(model):
    engine = synced(HFEngine, model, max_cache_tokens=256, page_size=16, max_batch_tokens=64)
    groups = engine.generate(PROMPTS, 8, PARAMS, seed=0)
    assert sum(len(g.samples) for g in groups) == 40
    assert largest_error(model, groups, 1.0) < 1e-5


def test_static_samples_depend_neither_on_chunks_nor_on_ranks(model):
    whole = synced(StaticEngine, model).generate(PROMPTS, 5, PARAMS, seed=0)
    chunks = synced(StaticEngine, model, max_rows=4).generate(PROMPTS, 5, PARAMS, seed=0)
    assert tokens(whole) == tokens(chunks)
    assert largest_error(model, chunks, 1.0) < 1e-5
    rest = synced(StaticEngine, model).generate(PROMPTS[2:], 5, PARAMS, seed=0, first=2)
    assert tokens(whole[2:]) == tokens(rest)


def test_static_buffers_grow(model):
    params = SamplingParams(80, ())
    groups = synced(StaticEngine, model).generate(PROMPTS, 2, params, seed=0)
    assert {len(s.token_ids) for g in groups for s in g.samples} == {80}
    assert largest_error(model, groups, 1.0) < 1e-5


@pytest.mark.parametrize("engine_class", ENGINES)
def test_sliding_windows_are_kept(engine_class):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("mistral", vocab_size=60, sliding_window=5, **sizes, **heads)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa_packed")
    groups = synced(engine_class, model).generate(PROMPTS, 2, PARAMS, seed=0)
    assert largest_error(model, groups, 1.0) < 1e-5


def test_static_rows_that_ended_are_dropped(model):
    rows = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    groups = synced(StaticEngine, model).generate(PROMPTS, 8, PARAMS, seed=0)
    hook.remove()
    lengths = [len(s.token_ids) for g in groups for s in g.samples]
    assert rows[0] == 4  # each different prompt once
    for step, count in enumerate(rows[1:], 1):
        running = sum(length > step for length in lengths)
        assert running <= count < running / (1 - 1 / 8) + 1
    assert rows[-1] < 40


def test_sample_inverts_the_cumulative_distribution():
    probs = torch.tensor([[0.1, 0.0, 0.6, 0.3]])
    params = SamplingParams(1, ())
    points = [(0.0, 0), (0.0999, 0), (0.1001, 2), (0.6999, 2), (0.7001, 3), (1 - 2**-24, 3)]
    for uniform, expected in points:
        token, logprob = sample(probs.log(), torch.tensor([uniform]), params)
        assert token.item() == expected
        assert logprob.item() == pytest.approx(probs[0, expected].log().item(), abs=1e-6)


def test_sample_never_returns_a_token_without_mass():
    logits = torch.full((1, 50), -200.0)
    logits[0, 7] = 0.0
    for uniform in (0.0, 0.5, 1 - 2**-24):
        assert sample(logits, torch.tensor([uniform]), SamplingParams(1, ()))[0].item() == 7


def test_sample_top_p_keeps_the_token_that_reaches_the_mass():
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log()
    params = SamplingParams(1, (), top_p=0.6)
    drawn = {sample(logits, torch.tensor([u / 100]), params)[0].item() for u in range(100)}
    assert drawn == {1, 2}
    token, logprob = sample(logits, torch.tensor([0.99]), params)
    assert token.item() == 2
    assert logprob.item() == pytest.approx(-1.2039728, abs=1e-5)  # log 0.3, not renormalised

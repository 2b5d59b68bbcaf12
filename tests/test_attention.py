"""``sdpa_packed``: the same numbers as sequences alone, without a mask over the whole row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from crpo_fast.attention import SDPA_PACKED, sequence_lengths
from crpo_fast.models_build import build_model

LENGTHS = [7, 1, 12, 5]


def packed():
    ids = torch.randint(0, 90, (1, sum(LENGTHS)))
    return ids, torch.cat([torch.arange(n) for n in LENGTHS])[None]


def built(architecture: str) -> Any:
    if architecture == "mistral":  # a sliding window shorter than the longest sequence
        config = AutoConfig.for_model(
            "mistral",
            vocab_size=90,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=5,
        )
        return AutoModelForCausalLM.from_config(config, attn_implementation=SDPA_PACKED).double()
    model = build_model(
        architecture, vocab_size=90, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2
    )
    return model.double()


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral"])
def test_packed_rows_equal_sequences_alone(architecture):
    model, (ids, positions) = built(architecture), packed()
    assert model.config._attn_implementation == SDPA_PACKED
    alone = torch.cat([model(x, use_cache=False).logits for x in ids.split(LENGTHS, 1)], 1)
    together = model(ids, position_ids=positions, use_cache=False).logits
    assert (together - alone).abs().max() < 1e-12
    weights = torch.randn_like(alone)
    expected = torch.autograd.grad((alone * weights).sum(), list(model.parameters()))
    actual = torch.autograd.grad((together * weights).sum(), list(model.parameters()))
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).abs().max() < 1e-12 * max(1.0, b.abs().max().item())


def test_a_packed_row_never_builds_its_whole_attention_matrix(monkeypatch):
    calls = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, **options):
        calls.append((query.shape[2], key.shape[2], attn_mask))
        return plain(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr("crpo_fast.attention.scaled_dot_product_attention", spy)
    ids, positions = packed()
    built("llama")(ids, position_ids=positions, use_cache=False)
    assert calls == [(n, n, None) for n in LENGTHS] * 2


def test_padded_batches_and_generation_are_those_of_sdpa():
    model = built("qwen3")
    ids = torch.randint(0, 90, (2, 5))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    results = []
    for name in ("sdpa", SDPA_PACKED):
        model.set_attn_implementation(name)
        logits = model(ids, attention_mask=mask, use_cache=False).logits
        options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
        generated = model.generate(ids, attention_mask=mask, **options)
        single = model.generate(ids[:1], attention_mask=mask[1:], **options)
        results.append((logits, generated, single))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("padded", [True, False])
def test_decoding_equals_a_forward_of_everything(padded):
    model = built("qwen3")
    ids = torch.randint(0, 90, (2, 6))
    mask = torch.ones_like(ids)
    mask[0, :2] = 1 - int(padded)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    past = model(ids[:, :5], attention_mask=mask[:, :5], position_ids=positions[:, :5])
    last = model(
        ids[:, 5:],
        attention_mask=mask,
        position_ids=positions[:, 5:],
        past_key_values=past.past_key_values,
    ).logits
    assert (whole[:, 5:] - last).abs().max() < 1e-6  # its softmax is in fp32


def test_gradient_checkpointing_changes_nothing():
    model, (ids, positions) = built("llama"), packed()
    model.train()
    gradients = []
    for on in (False, True):
        if on:
            options = {"use_reentrant": False}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        loss = model(ids, position_ids=positions, use_cache=False).logits.square().sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_lengths_are_found_again_when_positions_change_in_place():
    positions = packed()[1]
    assert sequence_lengths(positions) == LENGTHS
    assert sequence_lengths(positions) == LENGTHS
    positions[0, 3:7] = torch.arange(4)
    assert sequence_lengths(positions) == [3, 4, 1, 12, 5]
    assert sequence_lengths(torch.arange(9)[None]) == [9]

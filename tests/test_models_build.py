"""Tokenizers that invert exactly, models whose weights depend on their seed alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from crpo_fast.attention import check_attention, choose_attention
from crpo_fast.config import ConfigError
from crpo_fast.models import load_tokenizer
from crpo_fast.models_build import (
    EOS_TOKEN,
    PAD_TOKEN,
    ModelError,
    build_model,
    train_tokenizer,
)

STAGES = ("think", "stimulus", "primary_appraisal", "answer")
TAGS = [tag for name in STAGES for tag in (f"<{name}>", f"</{name}>")]
TEXTS = [
    "I lost my job, and nobody calls.\nMy rent is due. Consider: is the poster stressed?",
    "<think>\n<stimulus>lost job, rent</stimulus><primary_appraisal>a threat</primary_appraisal>",
    "</think>\n<answer>Yes</answer>",
] * 20
TOKENIZER = train_tokenizer(TEXTS, 400, TAGS)


def build(**changes: Any):
    sizes: dict[str, Any] = {"vocab_size": 400, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
    return build_model(**{**sizes, **changes})


@pytest.fixture(scope="module")
def tokenizer():
    return TOKENIZER


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_every_tag_is_one_token_wherever_it_occurs(tokenizer):
    for tag in TAGS:
        own = tokenizer.convert_tokens_to_ids(tag)
        for text in (tag, f"word{tag}word", f" {tag} ", f"{tag}{tag}", f".{tag}\n"):
            assert encode(tokenizer, text).count(own) == text.count(tag)
        assert tokenizer.decode([own]) == tag
        assert tokenizer.decode([own], skip_special_tokens=True) == tag


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=20), st.sampled_from([*TAGS, " ", "\n", "  "]))))
def test_decoding_inverts_encoding(parts):
    text = "".join(parts)
    assert TOKENIZER.decode(encode(TOKENIZER, text)) == text


HARD = ["", " ", "a  b", "\r\n\t", "caf\u00e9 e\u0301", "\U0001f600 \U0001f468\u200d\U0001f469"]
HARD += ["\x00", "Don't , you . ?", "<|unknown|> < think >", "\u00a0x\u3000", "1 2 , 3 n't 've"]


@pytest.mark.parametrize("text", HARD)
def test_decoding_inverts_encoding_on_hard_texts(text, tokenizer):
    assert tokenizer.decode(encode(tokenizer, text)) == text


def test_frequent_words_keep_their_punctuation(tokenizer):
    ids = encode(tokenizer, "I lost my job, and")
    assert [tokenizer.decode([i]) for i in ids] == ["I", " lost", " my", " job,", " and"]


def test_special_tokens_and_size(tokenizer):
    assert len(tokenizer) <= 400
    assert max(tokenizer.get_vocab().values()) == len(tokenizer) - 1
    assert tokenizer.convert_tokens_to_ids([PAD_TOKEN, EOS_TOKEN]) == [0, 1]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.decode([1], skip_special_tokens=True) == ""
    assert tokenizer.chat_template is None


def test_the_same_texts_give_the_same_tokenizer(tokenizer):
    again = train_tokenizer(iter(TEXTS), 400, TAGS)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for text in TEXTS[:3]:
        assert encode(loaded, text) == encode(tokenizer, text)
        assert loaded.decode(encode(loaded, text)) == text
    assert loaded.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("size", "tags", "message"),
    [
        (300, TAGS * 2, "tags: expected different"),
        (400, [""], "tags: expected different, non-empty"),
        (400, [EOS_TOKEN], "Rename a stage"),
        (200, TAGS, r"expected at least 266 .*--model\.build\.vocab_size 778"),
    ],
)
def test_tokenizers_that_are_refused(size, tags, message):
    with pytest.raises(ModelError, match=message):
        train_tokenizer(TEXTS, size, tags)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_weights_depend_on_the_seed_alone(architecture):
    before = torch.get_rng_state()
    first = build(architecture=architecture, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    again = build(architecture=architecture, seed=4)
    other = build(architecture=architecture, seed=5)
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)
    assert {p.dtype for p in first.parameters()} == {torch.float32}
    assert first.config.model_type == architecture


@pytest.mark.parametrize("tied", [True, False])
def test_tying_and_the_scale_of_the_first_logits(tied):
    model = build(hidden_size=128, tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    with torch.no_grad():
        logits = model(torch.randint(0, 400, (4, 32))).logits
    assert 0.5 < logits.std().item() < 2.0  # about 1: neither flat nor peaked
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert entropy > torch.tensor(400.0).log() - 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gpt9"}, "expected one of llama, qwen3, got 'gpt9'"),
        ({"hidden_size": 36}, r"multiple of 2 \* num_heads = 8.*--model\.build\.hidden_size 128"),
        ({"num_kv_heads": 3}, "num_kv_heads: expected a divisor of num_heads = 4, got 3"),
    ],
)
def test_sizes_that_are_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        build(**changes)


def test_choice_of_attention(monkeypatch):
    assert choose_attention("eager") == ("eager", "asked for by model.attention")
    assert choose_attention("auto", "cpu")[0] == "sdpa_packed"
    present = {"flash_attn"}
    monkeypatch.setattr("crpo_fast.attention.find_spec", lambda name: name in present or None)
    assert choose_attention("auto", "cuda:0")[0] == "flash_attention_2"
    present.add("flash_attn_3")
    assert choose_attention("auto", "cuda:0")[0] == "flash_attention_3"
    for model_type, expected in (("llama", "flash_attention_3"), ("doge", "sdpa_packed")):
        config = AutoConfig.for_model(model_type)
        name, reason = choose_attention("auto", "cuda:0", model_config=config)
        assert name == expected, model_type
    assert reason == "sdpa, as transformers has no flash attention for doge"
    name, reason = choose_attention("auto", "cuda", "float32")  # which flash attention refuses
    assert (name, "takes bfloat16 and not float32" in reason) == ("sdpa_packed", True)
    present.clear()
    name, reason = choose_attention("auto", "cuda:0")
    assert name == "sdpa_packed"
    assert "crpo-fast[flash]" in reason


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ("flash", r"one of auto, eager, .*sdpa_packed.*got 'flash'. Type --model.attention auto"),
        ("flash_attention_2", "runs on cpu, got 'flash_attention_2', which needs a GPU. Type --mo"),
    ],
)
def test_attention_that_cannot_run_is_refused(requested, message):
    with pytest.raises(ConfigError, match=message):
        check_attention(requested, "cpu")
    for fine in ("auto", "eager", "sdpa", "kernels-community/flash-attn2"):
        check_attention(fine, "cpu")
    check_attention("flash_attention_2", "cuda:0")

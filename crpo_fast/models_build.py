"""Models and tokenizers from nothing: a decoder from its sizes, a tokenizer from a corpus."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from crpo_fast.attention import choose_attention

__all__ = [
    "ARCHITECTURES",
    "EOS_TOKEN",
    "PAD_TOKEN",
    "ModelError",
    "build_model",
    "train_tokenizer",
]

EOS_TOKEN = "<|end|>"
PAD_TOKEN = "<|pad|>"
ARCHITECTURES = ("llama", "qwen3")
_WORDS = r" ?\S+|\s+(?!\S)|\s+"


class ModelError(ValueError):
    """A model or tokenizer that cannot be used; the message says what to type."""


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, tags: Sequence[str]
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE over whitespace-separated words.

    Punctuation stays with its word, so that a frequent word with its comma is one token. Every tag
    is one token wherever it occurs and survives decoding. ``decode(encode(text)) == text`` for any
    text. The same texts in the same order give the same tokenizer.

    Args:
        texts: the corpus.
        vocab_size: most entries of the vocabulary: pad, end, 256 bytes, merges and tags together.
        tags: whole tags such as "<think>" and "</think>".

    Raises:
        ModelError: ``vocab_size`` has no room for bytes and tags; a tag is empty or there twice.
    """
    special = [PAD_TOKEN, EOS_TOKEN]
    if len({*tags, *special, ""}) != len(tags) + 3:
        raise ModelError(
            f"tags: expected different, non-empty strings other than {special}, got {list(tags)}. "
            "Rename a stage."
        )
    smallest = len(special) + 256 + len(tags)
    if vocab_size < smallest:
        raise ModelError(
            f"vocab_size: expected at least {smallest} (2 special tokens, 256 bytes, {len(tags)} "
            f"tags), got {vocab_size}. Type --model.build.vocab_size {smallest + 512}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(tags),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_without(tags, texts), trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        clean_up_tokenization_spaces=False,
    )


def _without(tags: Sequence[str], texts: Iterable[str]) -> Iterable[str]:
    """Tags are cut out: what surrounds them in a text is tokenised without them, too."""
    if not tags:
        return texts
    pattern = re.compile("|".join(re.escape(tag) for tag in sorted(tags, key=len, reverse=True)))
    return (part for text in texts for part in pattern.split(text))


def build_model(
    architecture: str = "llama",
    *,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    intermediate_size: int | None = None,
    max_positions: int = 2048,
    tie_word_embeddings: bool = True,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    attention: str = "auto",
    seed: int = 0,
) -> PreTrainedModel:
    """Builds a decoder with fp32 weights that depend on the sizes and ``seed`` alone.

    Projections start from N(0, 1 / fan_in), those that write into the residual stream with a
    variance 2 num_layers times smaller, embeddings from N(0, 1 / hidden_size).

    Args:
        architecture: "llama" or "qwen3".
        vocab_size: rows of the embedding; at least len(tokenizer).
        hidden_size: D; a multiple of 2 num_heads.
        num_layers: decoder blocks.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of num_heads; None: num_heads.
        intermediate_size: width of the MLP; None: 8/3 D, rounded up to a multiple of 32.
        max_positions: longest sequence in tokens.
        tie_word_embeddings: whether the head is the embedding.
        eos_token_id: end token; goes into the generation config, too.
        pad_token_id: padding token.
        attention: "auto" or an implementation of transformers, see ``choose_attention``.
        seed: of the initial weights; torch's global random state is left alone.

    Raises:
        ModelError: unknown architecture, or sizes that do not fit each other.
    """
    kv_heads = num_kv_heads or num_heads
    _check_sizes(architecture, hidden_size, num_heads, kv_heads)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or -(-8 * hidden_size // 96) * 32,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden_size // num_heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    return _initialised(config, choose_attention(attention)[0], seed)


def _check_sizes(architecture: str, hidden_size: int, num_heads: int, num_kv_heads: int) -> None:
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"model.build.architecture: expected one of {', '.join(ARCHITECTURES)}, got "
            f"{architecture!r}. Type --model.build.architecture llama."
        )
    if hidden_size % (2 * num_heads):
        raise ModelError(
            f"model.build.hidden_size: expected a multiple of 2 * num_heads = {2 * num_heads}, got "
            f"{hidden_size}. Type --model.build.hidden_size {32 * num_heads}."
        )
    if num_heads % num_kv_heads:
        raise ModelError(
            f"model.build.num_kv_heads: expected a divisor of num_heads = {num_heads}, got "
            f"{num_kv_heads}. Type --model.build.num_kv_heads {num_heads}."
        )


def _initialised(config: Any, attention: str, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU as well
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention
        )
        with torch.no_grad():
            for name, module in model.named_modules():
                if isinstance(module, nn.Embedding | nn.Linear):
                    std = module.weight.shape[1] ** -0.5
                    if name.endswith(("o_proj", "down_proj")):
                        std /= (2 * config.num_hidden_layers) ** 0.5
                    if name != "lm_head" or not config.tie_word_embeddings:
                        module.weight.normal_(0.0, std)
    return model

"""Tiny decoders of many architectures, built from their configs so that every number matters.

Weights are several times larger than an initialised model's, biases are not zero, and windows are
shorter than a sequence: scores and logits reach the bend of every cap, and no head is uniform.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from crpo_fast.attention import choose_attention

VOCAB = 300
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
TIED = {"tie_word_embeddings": True}
WINDOW = {"sliding_window": 5}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
MULTIPLIERS = {
    "logits_scaling": 0.7,
    "residual_multiplier": 0.5,
    "embedding_multiplier": 4.0,
    "attention_multiplier": 0.3,
}
# name -> (model type of transformers, what differs from SIZES)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "smollm": ("llama", TIED),
    "smollm3": ("smollm3", {**TIED, "no_rope_layers": [1, 0]}),
    "qwen2.5": ("qwen2", TIED),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "gemma2": (
        "gemma2",
        {**TIED, **MIXED, "head_dim": 8, "query_pre_attn_scalar": 8}
        | {"final_logit_softcapping": 1.5, "attn_logit_softcapping": 1.0},
    ),
    "gemma3": (
        "gemma3_text",
        {**TIED, **MIXED, "head_dim": 8, "query_pre_attn_scalar": 8}
        | {"final_logit_softcapping": 1.5},
    ),
    "mistral": ("mistral", {**WINDOW, "head_dim": 8}),
    "phi": ("phi", {}),  # the head has a bias
    "phi3": ("phi3", WINDOW),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", MIXED),
    "granite": ("granite", {**TIED, **MULTIPLIERS}),
    "cohere": ("cohere", {**TIED, "logit_scale": 3.0}),
    "gpt2": ("gpt2", {**TIED, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "cohere2": ("cohere2", {**TIED, **MIXED, "logit_scale": 0.5}),
}


def make(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Any:
    """The model of ``ARCHITECTURES`` with ``changes`` of its config."""
    model_type, differences = ARCHITECTURES[name]
    config = AutoConfig.for_model(model_type, **{**SIZES, **differences, **changes})
    attention, _ = choose_attention("auto", model_config=config)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
            else:  # norms and biases
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.to(dtype).eval()

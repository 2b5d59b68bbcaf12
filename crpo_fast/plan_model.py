"""The model of a plan: from its sizes or its config.json alone, never from weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from crpo_fast import models
from crpo_fast.attention import SDPA_PACKED
from crpo_fast.config import Config
from crpo_fast.models import ModelError
from crpo_fast.session import built_model

__all__ = ["model_maker", "parameters_by_part"]

SMOLLM2 = {  # of SmolLM2-135M-Instruct, which `python -m crpo_fast.models smollm2` makes
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_PARTS = {  # piece of a parameter's name -> part of the model; the first that fits
    "norm": "norms",
    "lm_head": "head",
    "embed": "embedding",
    "attn": "attention",
    "attention": "attention",
    "mlp": "mlp",
}


def model_maker(config: Config, device: str) -> Callable[[], Any]:
    """A function that makes the initial model with uninitialised fp32 weights.

    Flash attention needs its package and a GPU; sdpa stands for it, which keeps the same tensors
    for backward (q, k, v, output and one number a row).

    Raises:
        ModelError: no such folder, no config.json, or not a causal LM.
    """
    settings = config.model
    attention, _ = models.choose_attention(settings.attention, device)
    if attention.startswith("flash"):
        attention = SDPA_PACKED
    if not settings.path:
        vocabulary = settings.build.vocab_size
        return lambda: built_model(config, vocabulary, attention)
    if settings.path == "smollm2" and not Path(settings.path).exists():
        found: Any = AutoConfig.for_model("llama", **SMOLLM2)
    else:
        try:
            found = models.check_model(settings.path)
        except ModelError as error:
            raise ModelError(
                f"{error} For a plan a folder with its config.json is enough."
            ) from error
        attention, _ = models.choose_attention(attention, model_config=found)
    return lambda: AutoModelForCausalLM.from_config(
        found, dtype=torch.float32, attn_implementation=attention
    )


def parameters_by_part(model: Any) -> dict[str, int]:
    """Numbers of parameters: "all", "trainable", and by part (a tied head is the embedding)."""
    counts = {"all": 0, "trainable": 0}
    for name, parameter in model.named_parameters():
        number = parameter.numel()  # of the whole tensor, however it is sharded
        part = next((part for piece, part in _PARTS.items() if piece in name), "other")
        counts["all"] += number
        counts["trainable"] += number if parameter.requires_grad else 0
        counts[part] = counts.get(part, 0) + number
    return counts

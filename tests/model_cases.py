"""A decoder that takes no time, for benchmarks of whole models."""

from __future__ import annotations

from pathlib import Path

from benchmarks.step.case import model_config

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "vocab_size": 320,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


def save_tiny_config(folder: Path) -> Path:
    """The config of a very small Qwen3, in ``folder``, which is returned."""
    config = model_config("tiny")
    config.update(SIZES)
    config.layer_types = config.layer_types[: SIZES["num_hidden_layers"]]
    config.save_pretrained(folder)
    return folder

"""Floating-point operations of a training step, and the rate of products to compare them with.

Model FLOPs (what the mathematics needs; nothing is counted twice for recomputation, nothing for
padding), with N the parameters of the blocks (embedding and head not among them), T the tokens of
the step, R its completion tokens, len_i the lengths of its sequences, L layers, H heads of size d:

    forward    2 N T  +  2 L H d sum(len_i^2)  +  2 V D R
                         causal attention: half of 4 L H d len_i^2
    training   3 x forward (backward is twice the forward)
    reference  1 x forward, where there is a KL reference

MFU = these FLOPs / seconds / peak. Peak: on a GPU the datasheet's rate of bf16 products (fp32 for
--dtype float32), on a CPU the best product of that dtype measured in the same run.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.devices import DEVICES

SIZES = (1024, 2048)  # of the square products that are tried on a CPU
TRIES = 4


def block_parameters(config: Any) -> int:
    """Parameters of the blocks' products: attention and MLP of every layer."""
    size, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or size // heads
    attention = 2 * size * heads * head_dim + 2 * size * config.num_key_value_heads * head_dim
    return config.num_hidden_layers * (attention + 3 * size * config.intermediate_size)


def forward_flops(config: Any, tokens: int, rows: int, squares: int) -> float:
    """One forward pass.

    Args:
        config: of the model.
        tokens: of all sequences, prompts included.
        rows: completion tokens, for which the head is computed.
        squares: sum of the squared lengths of the sequences.
    """
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = 2.0 * config.num_hidden_layers * heads * head_dim * squares
    head = 2.0 * config.vocab_size * config.hidden_size * rows
    return 2.0 * block_parameters(config) * tokens + attention + head


def step_flops(config: Any, found: dict[str, Any], *, has_reference: bool) -> dict[str, float]:
    """FLOPs of a step by what they are for; ``found`` is what `case.distribution` returns."""
    forward = forward_flops(config, found["tokens"], found["completion_tokens"], found["squares"])
    return {"training": 3 * forward, "reference": forward if has_reference else 0.0}


def peak_rate(dtype: torch.dtype, device: torch.device, gpu_name: str) -> tuple[float, str]:
    """(FLOP/s of products, where the figure is from)."""
    kind = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        for key, known in DEVICES.items():
            if key in gpu_name.lower():
                return known.product_flops(kind), f"datasheet of {known.title}, {kind}"
    return measured_rate(dtype, device), f"best square {kind} product of this run"


def measured_rate(dtype: torch.dtype, device: torch.device) -> float:
    """The best rate of some square products."""
    best = 0.0
    for size in SIZES:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        for _ in range(TRIES):
            begin = time.perf_counter()
            a @ b
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2.0 * size**3 / (time.perf_counter() - begin))
    return best

"""Inputs from a real model: hidden states before its head on made-up posts, its head, its labels.

The model reads posts of `crpo_fast.synthetic` in rows of 256 tokens, without gradients and in the
dtype of the case. Labels are the tokens that come next, or samples of its own distribution.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crpo_fast import synthetic, synthetic_phrases
from crpo_fast.models import load_model

from .cases import CPU_FLOATS, GPU_ROWS, Case, Inputs, with_weights

LENGTH = 256  # tokens that the model reads at a time
BATCH = 8


class Stop(Exception):
    """The hidden states are there; the product over the head is not needed."""


def checkpoint_case(
    folder: Path, rows: int | None, device: str, dtype: torch.dtype
) -> tuple[Case, Any, Any]:
    """The case of a transformers folder, its model and tokenizer.

    Raises:
        ModelError: it cannot be loaded.
        ValueError: its head has a bias, which most candidates cannot add.
    """
    model, tokenizer = load_model(folder, dtype=dtype, device=device)
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ValueError(
            f"expected a model whose head has no bias, got {folder} with one. Name another model."
        )
    assert head is not None, "load_model takes causal models, which have a head"
    vocab_size, dim = head.weight.shape
    if rows is None:
        rows = GPU_ROWS if device == "cuda" else max(16, min(2048, CPU_FLOATS // dim))
    name = f"checkpoint {folder.resolve().name}"
    case = Case(rows, vocab_size, dim, dtype, 1.0, shape=folder.resolve().name, inputs=name)
    return case, model, tokenizer


def checkpoint_inputs(
    case: Case,
    device: torch.device,
    model: Any,
    tokenizer: Any,
    *,
    is_sampled: bool,
    seed: int = 0,
) -> Inputs:
    """The inputs of `checkpoint_case`.

    Args:
        case: as it came from there.
        device: of the inputs; the model is moved there.
        model: with a head.
        tokenizer: of the model.
        is_sampled: labels are samples at the case's temperature, not the next tokens.
        seed: of the posts and samples.
    """
    model = model.to(device).eval()
    parts, labels, count = [], [], 0
    for ids in batches(tokenizer, seed):
        given = ids.to(device)
        parts.append(hidden_states(model, given[:, :-1]).flatten(0, 1))  # [B L, D]
        labels.append(given[:, 1:].flatten())
        count += labels[-1].numel()
        if count >= case.num_rows:
            break
    hidden = torch.cat(parts)[: case.num_rows].clone()
    weight = model.get_output_embeddings().weight.detach().clone()
    generator = torch.Generator(device).manual_seed(seed)
    following = torch.cat(labels)[: case.num_rows]
    chosen, logprobs = scored_labels(
        case, hidden, weight, None if is_sampled else following, generator
    )
    return with_weights(case, hidden, weight, chosen, logprobs, generator)


def batches(tokenizer: Any, seed: int) -> Iterator[Tensor]:
    """Batches ``[B, L + 1]`` of token ids of posts, one after the other, without end."""
    rng, ids = random.Random(seed), []
    tasks, knobs = list(synthetic_phrases.TASKS), synthetic.Knobs()
    size = BATCH * (LENGTH + 1)
    while True:
        while len(ids) < size:
            post = synthetic.make_post(rng, rng.choice(tasks), knobs, held_out=False)
            ids += tokenizer(post.text, add_special_tokens=False)["input_ids"]
            ids.append(tokenizer.eos_token_id)
        yield torch.tensor(ids[:size]).view(BATCH, LENGTH + 1)
        ids = ids[size:]


@torch.no_grad()
def hidden_states(model: Any, ids: Tensor) -> Tensor:  # [B, L, D]
    """What the head of ``model`` gets for ``ids`` ``[B, L]``."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append(arguments[0])
        raise Stop

    handle = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        model(input_ids=ids, use_cache=False)
    except Stop:
        pass
    finally:
        handle.remove()
    return seen[0]


@torch.no_grad()
def scored_labels(
    case: Case,
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    labels: Tensor | None,  # [T]
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Labels, sampled where there are none, and their log-probabilities ``[T]``."""
    found, logprobs = [], []
    for part, rows in enumerate(hidden.split(256)):
        log_p = ((rows @ weight.t()).float() / case.temperature).log_softmax(1)
        if labels is None:
            chosen = torch.multinomial(log_p.exp(), 1, generator=generator)
        else:
            chosen = labels[256 * part : 256 * (part + 1)].unsqueeze(1)
        found.append(chosen.squeeze(1))
        logprobs.append(log_p.gather(1, chosen).squeeze(1))
    return torch.cat(found), torch.cat(logprobs)

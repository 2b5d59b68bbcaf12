"""The engine ``static``: one left-padded batch, a preallocated KV cache, finished rows dropped.

prompts sorted by length -> chunks of rows -> prefill each prompt once -> copy its cache to the
samples -> decode one token a step for all rows -> drop finished rows

Why it exists beside ``hf``: with sdpa, continuous batching computes every running sequence's attention
against every other's cache under a mask. On a CPU that is most of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from crpo_fast.batch import SamplingParams
from crpo_fast.rollout import RolloutError
from crpo_fast.rollout.embedded import Completion, EmbeddedEngine

__all__ = ["StaticEngine"]

# Dropping rows copies the cache, so it waits until this share of the rows has finished.
_DROP_SHARE = 1 / 8


class StaticEngine(EmbeddedEngine):
    """Generates with plain forwards; see ``EmbeddedEngine`` for the other arguments.

    Log-probabilities are of softmax(logits / temperature) also with top_p and top_k. Every row has its
    own random numbers, so a sample does not depend on which others share its batch (up to rounding).

    Args:
        max_rows: sequences decoded at once; more run one chunk after the other.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_rows: int = 128,
        autocast: torch.dtype | None = None,
        gathered: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__(model, autocast=autocast, gathered=gathered)
        if max_rows < 1:
            raise ValueError(f"max_rows: expected at least 1, got {max_rows}. Type 128.")
        self._max_rows = max_rows

    def _complete(
        self, prompt_ids: list[list[int]], group_size: int, params: SamplingParams, seed: int
    ) -> list[Completion]:
        count = len(prompt_ids) * group_size
        generator = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(count, params.max_tokens, generator=generator)  # on the CPU everywhere
        rows = sorted(range(count), key=lambda row: (len(prompt_ids[row // group_size]), row))
        ids, logprobs = [[] for _ in rows], [[] for _ in rows]
        device = self._model.device
        autocast = torch.autocast(device.type, dtype=self._autocast, enabled=self._autocast is not None)
        with autocast:  # one context: weights are cast once
            for start in range(0, count, self._max_rows):
                chunk = rows[start : start + self._max_rows]
                prompts = [prompt_ids[row // group_size] for row in chunk]
                steps = self._decode(prompts, uniforms[chunk].to(device), params)
                for row, token, logprob in steps:
                    ids[chunk[row]].append(token)
                    logprobs[chunk[row]].append(logprob)
        return [
            Completion(f"prompt {row // group_size} sample {row % group_size}", *both)
            for row, both in enumerate(zip(ids, logprobs, strict=True))
        ]

    def _decode(
        self, prompts: list[list[int]], uniforms: Tensor, params: SamplingParams
    ) -> Iterator[tuple[int, int, float]]:
        """Yields (row, token, logprob) in the order in which they are sampled."""
        batch, logits = self._prefill(prompts, params.max_tokens)
        eos = torch.tensor(params.eos_ids, dtype=torch.long, device=logits.device)
        rows = torch.arange(len(prompts), device=logits.device)  # [n], row in the chunk
        alive = torch.ones_like(rows, dtype=torch.bool)  # [n]
        for step in range(params.max_tokens):
            tokens, logprobs = sample(logits, uniforms[rows, step], params)  # [n], [n]
            live = alive.tolist()
            for entry in zip(rows.tolist(), tokens.tolist(), logprobs.tolist(), live, strict=True):
                if entry[3]:
                    yield entry[:3]
            alive = alive & ~torch.isin(tokens, eos)
            remaining = int(alive.sum())
            if remaining == 0 or step + 1 == params.max_tokens:
                return
            if remaining <= (1 - _DROP_SHARE) * len(rows):
                keep = alive.nonzero().squeeze(1)
                batch.keep(keep)
                rows, tokens, alive = rows[keep], tokens[keep], alive[keep]
            batch.grow()
            logits = self._forward(tokens[:, None], batch)

    def _prefill(self, prompts: list[list[int]], max_tokens: int) -> tuple[_Batch, Tensor]:
        """Runs each different prompt once; returns the rows' batch and their logits [n, V]."""
        unique = list(dict.fromkeys(map(tuple, prompts)))
        longest, device = max(map(len, unique)), self._model.device
        ids = [[0] * (longest - len(p)) + list(p) for p in unique]
        real = [[False] * (longest - len(p)) + [True] * len(p) for p in unique]
        layers = self._model.config.get_text_config().num_hidden_layers
        cache = Cache(layers=[_BufferLayer(longest + max_tokens) for _ in range(layers)])
        padded = any(len(p) < longest for p in unique)
        batch = _Batch(cache, torch.tensor(real, device=device), padded)
        logits = self._forward(torch.tensor(ids, device=device), batch)
        index = {p: i for i, p in enumerate(unique)}
        rows = torch.tensor([index[tuple(p)] for p in prompts], device=device)
        batch.keep(rows)
        return batch, logits[rows]

    def _forward(self, ids: Tensor, batch: _Batch) -> Tensor:
        """Appends ``ids`` [n, q] to the cache; returns the last position's fp32 logits [n, V]."""
        output = self._model(
            input_ids=ids,
            position_ids=(batch.real.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :],  # [n, q]
            attention_mask=batch.real if batch.padded else None,
            past_key_values=batch.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()


@dataclass
class _Batch:
    """Rows of equal length: the cached part and what is real in it."""

    cache: Cache
    real: Tensor  # [n, length] bool; False: left padding
    padded: bool

    def keep(self, rows: Tensor) -> None:
        """Selects (also repeats) rows [m]."""
        self.real = self.real[rows]
        for layer in self.cache.layers:
            layer.reorder_cache(rows)

    def grow(self) -> None:
        """Makes room for one more token in every row."""
        self.real = torch.nn.functional.pad(self.real, (0, 1), value=True)


class _BufferLayer(DynamicLayer):
    """Keys and values in a buffer of fixed length: appending a token does not copy the past."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates [n, heads, capacity, head_dim] twice."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            x.new_zeros(*x.shape[:2], self.capacity, x.shape[3]) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends [n, heads, q, head_dim]; returns views of everything so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Tokens cached so far."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Selects rows; only the filled part is copied."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(len(beam_idx), *old.shape[1:])
            new[:, :, : self.length] = old[beam_idx, :, : self.length]
            setattr(self, name, new)


def sample(logits: Tensor, uniforms: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Draws one token a row by inverting the cumulative distribution.

    Args:
        logits: [n, V] fp32.
        uniforms: [n] fp32 in [0, 1), one random number a row.
        params: temperature (0: argmax), top_p, top_k.

    Returns:
        Tokens [n] and their logprobs [n] in nats, of softmax(logits / temperature) over all tokens.

    Raises:
        RolloutError: logits that are NaN.
    """
    greedy = params.temperature == 0.0
    logprobs = torch.log_softmax(logits if greedy else logits / params.temperature, dim=-1)
    if torch.isnan(logprobs).any():
        raise RolloutError(
            "logits: expected finite numbers, got NaN. Lower optim.lr, or go back to a checkpoint."
        )
    if greedy:
        tokens = logits.argmax(-1)
    else:
        kept = _truncated(logprobs.exp(), params)
        cumulative = kept.cumsum(-1)  # [n, V]
        points = uniforms[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, points, right=True).squeeze(1)
        tokens = torch.minimum(tokens, cumulative.argmax(-1))  # rounding: the last one that is kept
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)


def _truncated(probs: Tensor, params: SamplingParams) -> Tensor:
    """Zeroes what top_k and then top_p leave out of ``probs`` [n, V]; the rest is not renormalised."""
    if params.top_k == 0 and params.top_p == 1.0:
        return probs
    order = probs.argsort(dim=-1, descending=True, stable=True)
    ranked = probs.gather(1, order)
    if params.top_k:
        ranked[:, params.top_k :] = 0.0
    if params.top_p < 1.0:
        mass = ranked / ranked.sum(-1, keepdim=True)
        before = mass.cumsum(-1) - mass  # mass of the likelier ones
        ranked[before >= params.top_p] = 0.0
    return torch.zeros_like(probs).scatter(1, order, ranked)

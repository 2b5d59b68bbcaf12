"""The engine ``static``: one left-padded batch, a KV cache allocated once, finished rows dropped.

prompts by length -> chunks of rows -> prefill each prompt once -> copy its cache to its samples ->
one token a step for all rows -> drop the rows that ended

It exists beside ``hf`` because of CPUs: with sdpa, continuous batching computes the attention of
every running sequence to the cache of all others, under a mask (docs/log.md has the measurement).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from crpo_fast.batch import SamplingParams
from crpo_fast.rollout.embedded import Completion, EmbeddedEngine
from crpo_fast.rollout.sampling import sample

__all__ = ["StaticEngine"]

# Dropping rows copies the cache, so it waits until this share of the rows has ended.
_DROP_SHARE = 1 / 8


class StaticEngine(EmbeddedEngine):
    """Generates with plain forwards; see ``EmbeddedEngine`` for the other arguments.

    Logprobs are of softmax(logits / temperature) also under top_p and top_k. Every row has random
    numbers of its own: up to rounding, a sample does not depend on what shares its batch.

    Args:
        max_rows: sequences decoded at once; further ones follow chunk by chunk.
    """

    renormalises = False

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
            raise ValueError(f"max_rows: expected at least 1, got {max_rows}. Type max_rows=128.")
        self._max_rows = max_rows

    def _complete(
        self, prompt_ids: list[list[int]], group_size: int, params: SamplingParams, seed: int
    ) -> list[Completion]:
        count = len(prompt_ids) * group_size
        generator = torch.Generator().manual_seed(seed)  # the same numbers on every device
        uniforms = torch.rand(count, params.max_tokens, generator=generator)
        completions = [
            Completion(f"prompt {row // group_size}, sample {row % group_size}", [], [])
            for row in range(count)
        ]
        rows = sorted(range(count), key=lambda row: len(prompt_ids[row // group_size]))
        with self._autocasting():
            for start in range(0, count, self._max_rows):
                chunk = rows[start : start + self._max_rows]
                prompts = [tuple(prompt_ids[row // group_size]) for row in chunk]
                steps = self._decode(prompts, uniforms[chunk].to(self._model.device), params)
                for index, token, logprob in steps:
                    completions[chunk[index]].token_ids.append(token)
                    completions[chunk[index]].logprobs.append(logprob)
        return completions

    def _autocasting(self) -> AbstractContextManager[Any]:
        """One context around all forwards, so that weights are cast once."""
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self._model.device.type, dtype=self._autocast)

    def _decode(
        self, prompts: list[tuple[int, ...]], uniforms: Tensor, params: SamplingParams
    ) -> Iterator[tuple[int, int, float]]:
        """Yields (index of the prompt, token, logprob); ``uniforms`` is [n, max_tokens]."""
        batch, logits = self._prefill(prompts, params.max_tokens)
        eos = torch.tensor(params.eos_ids, dtype=torch.long, device=logits.device)
        rows = torch.arange(len(prompts), device=logits.device)  # [n]
        alive = torch.ones_like(rows, dtype=torch.bool)  # [n]
        for step in range(params.max_tokens):
            tokens, logprobs = sample(logits, uniforms[rows, step], params)  # [n], [n]
            sampled = (rows[alive].tolist(), tokens[alive].tolist(), logprobs[alive].tolist())
            yield from zip(*sampled, strict=True)
            alive = alive & ~torch.isin(tokens, eos)
            remaining = int(alive.sum())
            if remaining == 0 or step + 1 == params.max_tokens:
                return
            if remaining <= (1 - _DROP_SHARE) * len(rows):
                batch.select(alive.nonzero().squeeze(1))
                rows, tokens, alive = rows[alive], tokens[alive], alive[alive]
            batch.real = pad(batch.real, (0, 1), value=True)
            logits = self._forward(tokens[:, None], batch)

    def _prefill(self, prompts: list[tuple[int, ...]], max_tokens: int) -> tuple[_Batch, Tensor]:
        """Runs each different prompt once; returns a batch of all rows and their logits [n, V]."""
        unique = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
        longest, device = max(map(len, unique)), self._model.device
        ids = [[0] * (longest - len(p)) + list(p) for p in unique]
        real = [[False] * (longest - len(p)) + [True] * len(p) for p in unique]
        batch = _Batch(
            cache=_BufferCache(longest + max_tokens - 1),  # the last token is never an input
            real=torch.tensor(real, device=device),
            padded=any(len(p) < longest for p in unique),
        )
        logits = self._forward(torch.tensor(ids, device=device), batch)
        rows = torch.tensor([unique[p] for p in prompts], device=device)
        batch.select(rows)
        return batch, logits[rows]

    def _forward(self, ids: Tensor, batch: _Batch) -> Tensor:
        """Appends ``ids`` [n, q] to the cache; returns the last position's fp32 logits [n, V]."""
        positions = (batch.real.cumsum(1) - 1).clamp(min=0)  # [n, length]
        output = self._model(
            input_ids=ids,
            position_ids=positions[:, -ids.shape[1] :],
            attention_mask=batch.real if batch.padded else None,
            past_key_values=batch.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()


class _BufferCache(Cache):
    """Keys and values of all layers in buffers of fixed length: a new token copies no old one."""

    def __init__(self, capacity: int) -> None:
        super().__init__(layers=[])
        self._capacity = capacity
        self._buffers: list[list[Tensor]] = []  # [n, heads, capacity, head_dim] each
        self._lengths: list[int] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends [n, heads, q, head_dim]; returns views of everything so far."""
        states = (key_states, value_states)
        if layer_idx == len(self._buffers):
            self._buffers.append([self._empty(x, x.shape[0]) for x in states])
            self._lengths.append(0)
        start = self._lengths[layer_idx]
        end = self._lengths[layer_idx] = start + key_states.shape[2]
        for buffer, state in zip(self._buffers[layer_idx], states, strict=True):
            buffer[:, :, start:end] = state
        keys, values = self._buffers[layer_idx]
        return keys[:, :, :end], values[:, :, :end]

    def _empty(self, like: Tensor, rows: int) -> Tensor:
        return like.new_empty(rows, like.shape[1], self._capacity, like.shape[3])

    def select(self, rows: Tensor) -> None:
        """Selects (or repeats) rows [m]; copies the filled part only."""
        for layer, (buffers, length) in enumerate(zip(self._buffers, self._lengths, strict=True)):
            chosen = [self._empty(buffer, len(rows)) for buffer in buffers]
            for new, old in zip(chosen, buffers, strict=True):
                new[:, :, :length] = old[rows, :, :length]
            self._buffers[layer] = chosen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens cached so far."""
        return self._lengths[layer_idx] if layer_idx < len(self._lengths) else 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position in the cache of the next token."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the keys that ``query_length`` new tokens will see."""
        return self.get_seq_length(layer_idx) + query_length, 0


@dataclass
class _Batch:
    """Rows of equal length: what is cached of them, and which of it is no padding."""

    cache: _BufferCache
    real: Tensor  # [n, length] bool; False on the left
    padded: bool  # some row is

    def select(self, rows: Tensor) -> None:
        """Selects (or repeats) rows [m]."""
        self.real = self.real[rows]
        self.cache.select(rows)

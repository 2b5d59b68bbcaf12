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
# Buffers have room for up to so many tokens more; then they are copied to larger ones.
_ROOM = 32


class StaticEngine(EmbeddedEngine):
    """Generates with plain forwards; see ``EmbeddedEngine`` for the other arguments.

    Logprobs are of softmax(logits / temperature) also under top_p and top_k. Every row has random
    numbers of its own: up to rounding, a sample does not depend on what shares its batch, nor on
    the number of ranks.

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
        self,
        prompt_ids: list[list[int]],
        group_size: int,
        params: SamplingParams,
        seed: int,
        first: int,
    ) -> list[Completion]:
        count, before = len(prompt_ids) * group_size, first * group_size
        generator = torch.Generator().manual_seed(seed)  # the same numbers on every device
        # a row's numbers depend on its position among those of all ranks
        uniforms = torch.rand(before + count, params.max_tokens, generator=generator)[before:]
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

    def rehearse(
        self,
        prompts: list[tuple[int, ...]],
        max_tokens: int,
        sampled: Callable[[Tensor], None],
    ) -> None:
        """The moments of a generation that need most memory, with no token sampled.

        Prefill of the first ``max_rows`` of ``prompts``, the last growth of the cache with all
        rows alive, and the forward after it. ``sampled`` stands for the sampling: planning has
        tensors without values (crpo_fast/plan_moments.py).
        """
        with self._prepared(), self._autocasting():
            batch, logits = self._prefill(prompts[: self._max_rows])
            sampled(logits)
            del logits
            filled = batch.length + max_tokens - 2  # tokens in the cache before the last forward
            batch.length = max(batch.length, filled // _ROOM * _ROOM)  # where the cache last grew
            batch.real = batch.real.new_ones(len(batch.real), batch.length)
            batch.cache.extend(batch.length)
            batch.append()
            sampled(
                self._forward(batch.real[:, :1].long(), batch.positions, batch.real, batch.cache)
            )

    def _decode(
        self, prompts: list[tuple[int, ...]], uniforms: Tensor, params: SamplingParams
    ) -> Iterator[tuple[int, int, float]]:
        """Yields (index of the prompt, token, logprob); ``uniforms`` is [n, max_tokens]."""
        batch, logits = self._prefill(prompts)
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
            batch.append()
            logits = self._forward(tokens[:, None], batch.positions, batch.real, batch.cache)

    def _prefill(self, prompts: list[tuple[int, ...]]) -> tuple[_Batch, Tensor]:
        """Runs each different prompt once; returns a batch of all rows and their logits [n, V]."""
        unique = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
        longest, device = max(map(len, unique)), self._model.device
        ids = [[0] * (longest - len(p)) + list(p) for p in unique]
        real = torch.tensor(
            [[False] * (longest - len(p)) + [True] * len(p) for p in unique], device=device
        )
        positions = (real.cumsum(1) - 1).clamp(min=0)
        mask = None if bool(real.all()) else real
        cache = _BufferCache()
        logits = self._forward(torch.tensor(ids, device=device), positions, mask, cache)
        rows = torch.tensor([unique[p] for p in prompts], device=device)
        batch = _Batch(cache, real, positions[:, -1:], longest)
        batch.select(rows)
        return batch, logits[rows]

    def _forward(self, ids: Tensor, positions: Tensor, real: Tensor | None, cache: Cache) -> Tensor:
        """Appends ``ids`` [n, q] to the cache; returns the last position's fp32 logits [n, V]."""
        output = self._model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=real,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()


@dataclass
class _Batch:
    """Rows of equal length with room for some more tokens."""

    cache: _BufferCache
    real: Tensor  # [n, capacity] bool; False for padding on the left and room on the right
    positions: Tensor  # [n, 1], of the newest token
    length: int

    def select(self, rows: Tensor) -> None:
        """Selects (or repeats) rows [m] and makes room."""
        capacity = (self.length // _ROOM + 1) * _ROOM
        self.cache.select(rows, self.length, capacity)
        self.real = pad(self.real[rows, : self.length], (0, capacity - self.length))
        self.positions = self.positions[rows]

    def append(self) -> None:
        """Counts one more token in every row; the next forward caches it."""
        if self.length == self.real.shape[1]:
            self.select(torch.arange(len(self.real), device=self.real.device))
        self.real[:, self.length] = True
        self.positions = self.positions + 1
        self.cache.slot = self.length
        self.length += 1


class _BufferCache(Cache):
    """Keys and values of all layers in buffers with room: a new token seldom copies the old ones.

    A decoding step sees the whole buffers, and its mask hides the room: products on a CPU want
    contiguous operands and would copy a view of the filled part in every step.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.slot = 0  # where the next token goes
        self._buffers: list[list[Tensor]] = []  # keys, values: [n, heads, capacity, head_dim]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes the prompts' [n, heads, q, head_dim], later one token's; returns what it sees."""
        states = [key_states, value_states]
        if layer_idx == len(self._buffers):
            self._buffers.append(states)
        else:
            for buffer, state in zip(self._buffers[layer_idx], states, strict=True):
                buffer[:, :, self.slot] = state[:, :, 0]
        keys, values = self._buffers[layer_idx]
        return keys, values

    def select(self, rows: Tensor, length: int, capacity: int) -> None:
        """Copies the first ``length`` tokens of rows [m] into new buffers."""
        for buffers in self._buffers:
            for index, old in enumerate(buffers):
                # zeros, as what the mask hides must be finite
                new = old.new_zeros(len(rows), old.shape[1], capacity, old.shape[3])
                new[:, :, :length] = old[rows, :, :length]
                buffers[index] = new

    def extend(self, capacity: int) -> None:
        """Buffers of another capacity, one after the other, with nothing copied into them."""
        for buffers in self._buffers:
            for index, old in enumerate(buffers):
                buffers[index] = old.new_zeros(old.shape[0], old.shape[1], capacity, old.shape[3])

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Tokens before the ones that come next."""
        return self.slot

    def get_query_offset(self, *_: Any, **__: Any) -> int:
        """Slot of the next token."""
        return self.slot

    def get_mask_sizes(self, query_length: int, *_: Any, **__: Any) -> tuple[int, int]:
        """Number and offset of the keys that the next tokens see."""
        return (self._buffers[0][0].shape[2] if self._buffers else query_length), 0

"""The engine ``hf``: transformers' continuous batching over a paged KV cache, on CPU or GPU.

prompts -> generate_batch (prefill once, fork, decode) -> ids and logprobs, counted and checked
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig

from crpo_fast.attention import PACKED_SOFTCAP, SDPA_PACKED
from crpo_fast.batch import SamplingParams
from crpo_fast.rollout import RolloutError
from crpo_fast.rollout.embedded import Completion, EmbeddedEngine

__all__ = ["HFEngine"]

_STREAM = 0x9E3779B97F4A7C15  # odd: other positions give other seeds


class HFEngine(EmbeddedEngine):
    """Generates with ``model.generate_batch``; see ``EmbeddedEngine`` for the other arguments.

    Args:
        max_batch_tokens: tokens of one forward: prefill chunks plus one per running sequence. With
            sdpa the attention mask has max_batch_tokens x (tokens in the cache) entries.
            None: 1024 on a CPU, sized from free memory on a GPU.
        page_size: tokens of one page of the KV cache. None: 32 on a CPU, 256 on a GPU (paged flash
            attention wants a multiple of it).
        max_cache_tokens: bound of the KV cache over all running sequences, in tokens; requests
            beyond it wait. None: what the request needs on a CPU, 40 % of free memory on a GPU.
    """

    renormalises = True

    def __init__(
        self,
        model: nn.Module,
        *,
        max_batch_tokens: int | None = None,
        page_size: int | None = None,
        max_cache_tokens: int | None = None,
        autocast: torch.dtype | None = None,
        gathered: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__(model, autocast=autocast, gathered=gathered)
        if self._model.config._attn_implementation == PACKED_SOFTCAP:
            raise RolloutError(
                "rollout.engine: expected static for a model with a soft cap of attention scores, "
                "got hf, whose paged attention has none. Type --rollout.engine static."
            )
        on_cpu = self._model.device.type == "cpu"
        self._max_batch_tokens = max_batch_tokens or (1024 if on_cpu else None)
        self._page_size = page_size or self.default_page_size("cpu" if on_cpu else "cuda")
        self._max_cache_tokens = max_cache_tokens

    @staticmethod
    def default_page_size(device: str) -> int:
        """Tokens of a page of the cache; paged flash attention wants a multiple of 256."""
        return 32 if device == "cpu" else 256

    def _complete(
        self,
        prompt_ids: list[list[int]],
        group_size: int,
        params: SamplingParams,
        seed: int,
        first: int,
    ) -> list[Completion]:
        seed = (seed + first * _STREAM) % 2**63  # one stream for all rows of a call
        # a request is forked one token before the end of its prompt: one token is too short for it
        forks = group_size if min(map(len, prompt_ids)) > 1 else 1
        inputs = [list(ids) for ids in prompt_ids for _ in range(group_size // forks)]
        with self._own_attention(), self._autocast_forward():
            outputs = self._model.generate_batch(
                inputs=inputs,
                generation_config=_generation_config(params, forks),
                continuous_batching_config=self._batching_config(inputs, forks, params, seed),
                progress_bar=False,
            )
        return [_completion(name, output) for name, output in outputs.items()]

    @contextmanager
    def _own_attention(self) -> Iterator[None]:
        """Continuous batching knows sdpa, but not our form of it for packed rows."""
        model, name = self._model, self._model.config._attn_implementation
        if name != SDPA_PACKED:
            yield
            return
        model.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            model.set_attn_implementation(name)

    @contextmanager
    def _autocast_forward(self) -> Iterator[None]:
        """Runs every forward under autocast: the engine's thread does not inherit ours."""
        if self._autocast is None:
            yield
            return
        model, plain, dtype = self._model, self._model.forward, self._autocast
        was_patched = "forward" in vars(model)

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            _take_any_dtype(kwargs.get("cache"))
            with torch.autocast(model.device.type, dtype=dtype):
                return plain(*args, **kwargs)

        model.forward = forward
        try:
            yield
        finally:
            del model.forward
            if was_patched:
                model.forward = plain

    def _batching_config(
        self, inputs: list[list[int]], forks: int, params: SamplingParams, seed: int
    ) -> ContinuousBatchingConfig:
        page, blocks = self._page_size, None
        if self._model.device.type == "cpu" or self._max_cache_tokens is not None:
            lengths = (len(ids) + params.max_tokens for ids in inputs)
            needed = sum(forks * (math.ceil(length / page) + 1) for length in lengths)
            limit = needed if self._max_cache_tokens is None else self._max_cache_tokens // page
            blocks = max(min(needed, limit), 4)
        return ContinuousBatchingConfig(
            return_logprobs=True,
            seed=seed,
            page_size=page,
            num_blocks=blocks,
            max_memory_percent=0.4,  # training wants the rest; read where blocks is None
            max_batch_tokens=self._max_batch_tokens,
            max_requests_per_batch=len(inputs) * forks,
            auto_switch_to_flash=False,  # the attention of training, no other
            use_cuda_graph=False,  # sharded weights move between calls
            use_async_batching=False,
        )


def _completion(name: str, output: Any) -> Completion:
    if output.error is not None or not output.is_finished():
        raise RolloutError(
            f"request {name}: expected it to finish, got status {output.status.name}: "
            f"{output.error}"
        )
    return Completion(f"request {name}", list(output.generated_tokens), list(output.logprobs))


def _generation_config(params: SamplingParams, forks: int) -> GenerationConfig:
    greedy = params.temperature == 0.0
    return GenerationConfig(
        max_new_tokens=params.max_tokens,
        do_sample=not greedy,
        temperature=1.0 if greedy else params.temperature,
        top_p=1.0 if greedy else params.top_p,
        top_k=0 if greedy else params.top_k,
        num_return_sequences=forks,
        eos_token_id=list(params.eos_ids) or -1,  # -1: no end token
        pad_token_id=0,
    )


def _take_any_dtype(cache: Any) -> None:
    """Casts what a paged cache is given: it has the parameters' dtype, not autocast's."""
    if cache is None or "update" in vars(cache):
        return
    update = cache.update

    def casting_update(key_states: torch.Tensor, value_states: torch.Tensor, **kwargs: Any) -> Any:
        key, value = key_states.to(cache.dtype), value_states.to(cache.dtype)
        key, value = update(key_states=key, value_states=value, **kwargs)
        return key.to(value_states.dtype), value.to(value_states.dtype)

    cache.update = casting_update

"""The embedded engine: transformers' continuous batching over a paged KV cache, on CPU or GPU.

    prompts x group -> generate_batch (prefill once, fork G ways, decode) -> ids + logprobs, counted and checked

The weights are those of the policy itself, so ``sync`` only records the version.
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

from crpo_fast.batch import RolloutGroup, Sample, SamplingParams
from crpo_fast.rollout import RolloutError, check_request

__all__ = ["HFEngine"]


class HFEngine:
    """Generates with ``model.generate_batch``.

    Args:
        model: a transformers causal LM; its weights are the policy's.
        max_batch_tokens: tokens of one forward (prefill chunk plus one per running sequence). The attention
            mask of sdpa has max_batch_tokens x (tokens in the cache) entries. None: sized from GPU memory.
        page_size: tokens of one page of the KV cache.
        max_cache_tokens: upper bound of the KV cache, in tokens over all running sequences; requests beyond
            it wait. None: as many as the request needs (CPU), or sized from GPU memory (GPU).
        autocast: compute dtype of the forward passes, as in training; None leaves the parameters' dtype.
        gathered: returns a context in which a sharded model's units are unsharded on this rank. Ranks
            make different numbers of forwards, so no collective may happen inside.
    """

    renormalises = True

    def __init__(
        self,
        model: nn.Module,
        *,
        max_batch_tokens: int | None = 1024,
        page_size: int = 32,
        max_cache_tokens: int | None = None,
        autocast: torch.dtype | None = None,
        gathered: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._model: Any = model
        self._max_batch_tokens = max_batch_tokens
        self._page_size = page_size
        self._max_cache_tokens = max_cache_tokens
        self._autocast = autocast
        self._gathered = gathered
        self._version: int | None = None

    def sync(self, policy: nn.Module, version: int) -> None:
        """Records the version; the engine shares the policy's weights."""
        if policy is not self._model:
            raise RolloutError(
                "sync: expected the model this engine was built with, got another one."
                " Build a new HFEngine for it."
            )
        self._version = version

    def close(self) -> None:
        """Lets go of the model."""
        self._model = None

    def generate(
        self, prompt_ids: list[list[int]], group_size: int, params: SamplingParams, seed: int
    ) -> list[RolloutGroup]:
        """See ``Engine.generate``. Log-probabilities are renormalised over the tokens that top_p/top_k keep."""
        check_request(prompt_ids, group_size, params, seed)
        if self._model is None:
            raise RolloutError("generate: the engine is closed. Build a new one.")
        if self._version is None:
            raise RolloutError(
                "generate: the engine has no policy version yet. Call engine.sync(policy, version) first."
            )
        if not prompt_ids:
            return []
        # transformers forks a request one token before the end of its prompt: one token is too short
        forks = group_size if min(map(len, prompt_ids)) > 1 else 1
        inputs = [list(ids) for ids in prompt_ids for _ in range(group_size // forks)]
        with self._prepared():
            outputs = self._model.generate_batch(
                inputs=inputs,
                generation_config=_generation_config(params, forks),
                continuous_batching_config=self._batching_config(inputs, forks, params, seed),
                progress_bar=False,
            )
        samples = self._samples(list(outputs.items()), len(prompt_ids) * group_size, params)
        return [
            RolloutGroup(list(ids), samples[i * group_size : (i + 1) * group_size])
            for i, ids in enumerate(prompt_ids)
        ]

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """Eval mode, gathered weights, autocast and a private random state; all restored afterwards."""
        model, training = self._model, self._model.training
        cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
        model.eval()
        try:
            with torch.random.fork_rng(devices=cuda), self._gathered(), self._autocast_forward():
                yield
        finally:
            model.train(training)

    @contextmanager
    def _autocast_forward(self) -> Iterator[None]:
        """Runs the model's forward under autocast: the engine's thread does not inherit ours."""
        if self._autocast is None:
            yield
            return
        model, plain, dtype = self._model, self._model.forward, self._autocast
        own = "forward" in vars(model)

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            _cast_cache_updates(kwargs.get("cache"))
            with torch.autocast(model.device.type, dtype=dtype, cache_enabled=True):
                return plain(*args, **kwargs)

        model.forward = forward
        try:
            yield
        finally:
            if own:
                model.forward = plain
            else:
                del model.forward

    def _batching_config(
        self, inputs: list[list[int]], forks: int, params: SamplingParams, seed: int
    ) -> ContinuousBatchingConfig:
        on_cpu = self._model.device.type == "cpu"
        blocks = None
        if on_cpu or self._max_cache_tokens is not None:  # nothing to size it from on a CPU
            page = self._page_size
            needed = sum(
                forks * (math.ceil((len(ids) + params.max_tokens) / page) + 1) for ids in inputs
            )
            limit = math.inf if self._max_cache_tokens is None else self._max_cache_tokens // page
            blocks = max(int(min(needed, limit)), 4)
        options: dict[str, Any] = (
            {"use_cuda_graph": False, "use_async_batching": False} if on_cpu else {}
        )
        return ContinuousBatchingConfig(
            return_logprobs=True,
            seed=seed,
            page_size=self._page_size,
            num_blocks=blocks,
            max_batch_tokens=self._max_batch_tokens,
            auto_switch_to_flash=False,  # the attention of training, not another one
            max_requests_per_batch=len(inputs) * forks,
            **options,
        )

    def _samples(
        self, outputs: list[tuple[str, Any]], expected: int, params: SamplingParams
    ) -> list[Sample]:
        """Turns the engine's outputs into samples; a missing or failed request is an error."""
        for name, output in outputs:
            if output.error is not None or not output.is_finished():
                raise RolloutError(
                    f"request {name}: the engine ended it with status {output.status.name}: {output.error}."
                )
        if len(outputs) != expected:
            raise RolloutError(
                f"generate_batch: expected {expected} results, got {len(outputs)}: the engine's thread died;"
                " its error is in the log above."
            )
        return [self._sample(name, output, params) for name, output in outputs]

    def _sample(self, name: str, output: Any, params: SamplingParams) -> Sample:
        ids, logprobs = list(output.generated_tokens), list(output.logprobs)
        if not 1 <= len(ids) <= params.max_tokens or len(ids) != len(logprobs):
            raise RolloutError(
                f"request {name}: expected 1 to {params.max_tokens} tokens with one logprob each, got"
                f" {len(ids)} tokens and {len(logprobs)} logprobs."
            )
        if not all(map(math.isfinite, logprobs)):
            raise RolloutError(f"request {name}: the engine returned a logprob that is not finite.")
        assert self._version is not None
        reason = "stop" if ids[-1] in params.eos_ids else "length"
        return Sample(ids, logprobs, reason, self._version)


def _generation_config(params: SamplingParams, forks: int) -> GenerationConfig:
    greedy = params.temperature == 0.0
    return GenerationConfig(
        max_new_tokens=params.max_tokens,
        do_sample=not greedy,
        temperature=1.0 if greedy else params.temperature,
        top_p=1.0 if greedy else params.top_p,
        top_k=0 if greedy else params.top_k,
        num_return_sequences=forks,
        eos_token_id=list(params.eos_ids) or -1,
        pad_token_id=0,
    )


def _cast_cache_updates(cache: Any) -> None:
    """Makes a paged cache take keys and values of the autocast dtype (it is allocated in the parameters')."""
    if cache is None or "update" in vars(cache):
        return
    update = cache.update

    def casting(key_states: torch.Tensor, value_states: torch.Tensor, **kwargs: Any) -> Any:
        key, value = update(
            key_states=key_states.to(cache.dtype),
            value_states=value_states.to(cache.dtype),
            **kwargs,
        )
        return key.to(value_states.dtype), value.to(value_states.dtype)

    cache.update = casting

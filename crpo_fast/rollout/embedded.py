"""What both embedded engines share: the policy's weights, modes restored, results checked."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from crpo_fast.batch import RolloutGroup, Sample, SamplingParams
from crpo_fast.rollout import RolloutError, check_request

__all__ = ["Completion", "EmbeddedEngine"]


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine returns for one request; ``name`` is how its errors call it."""

    name: str
    token_ids: list[int]
    logprobs: list[float]


class EmbeddedEngine(ABC):
    """Generates in this process with the weights of the policy itself.

    Args:
        model: a transformers causal LM; its weights are the policy's.
        autocast: compute dtype of the forward passes, as in training; None leaves the parameters'.
        gathered: returns a context in which a sharded model is whole on this rank. Ranks make
            different numbers of forwards, so no collective may happen inside.
    """

    renormalises: bool

    def __init__(
        self,
        model: nn.Module,
        *,
        autocast: torch.dtype | None = None,
        gathered: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._model: Any = model
        self._autocast = autocast
        self._gathered = gathered
        self._version: int | None = None

    def sync(self, policy: nn.Module, version: int) -> None:
        """Records the version; the weights are the policy's own."""
        if policy is not self._model:
            raise RolloutError(
                "sync: expected the model that this engine was built with, got another one. "
                f"Build a new {type(self).__name__} for it."
            )
        self._version = version

    def close(self) -> None:
        """Lets go of the model."""
        self._model = None

    def generate(
        self,
        prompt_ids: list[list[int]],
        group_size: int,
        params: SamplingParams,
        seed: int,
        first: int = 0,
    ) -> list[RolloutGroup]:
        """See ``Engine.generate``."""
        check_request(prompt_ids, group_size, params, seed)
        if self._model is None:
            raise RolloutError("generate: the engine is closed. Build a new one.")
        if self._version is None:
            raise RolloutError(
                "generate: the engine has no policy yet. Call engine.sync(policy, version) first."
            )
        with self._prepared():  # a collective, which a rank without prompts takes part in
            if not prompt_ids:
                return []
            completions = self._complete(prompt_ids, group_size, params, seed, first)
        expected = len(prompt_ids) * group_size
        if len(completions) != expected:
            raise RolloutError(
                f"generate: expected {expected} completions, got {len(completions)}. "
                "The engine's own error is in the log above."
            )
        samples = [self._sample(c, params) for c in completions]
        return [
            RolloutGroup(list(ids), samples[i * group_size : (i + 1) * group_size])
            for i, ids in enumerate(prompt_ids)
        ]

    @abstractmethod
    def _complete(
        self,
        prompt_ids: list[list[int]],
        group_size: int,
        params: SamplingParams,
        seed: int,
        first: int,
    ) -> list[Completion]:
        """All completions: prompt by prompt, the samples of one prompt side by side."""

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """Eval mode and the whole model; modes and global random states are restored afterwards."""
        modes = [(module, module.training) for module in self._model.modules()]
        cuda = [self._model.device] if self._model.device.type == "cuda" else []
        self._model.eval()
        try:
            with torch.random.fork_rng(devices=cuda), torch.no_grad(), self._gathered():
                yield
        finally:
            for module, training in modes:
                module.training = training

    def _sample(self, completion: Completion, params: SamplingParams) -> Sample:
        """A checked sample.

        Raises:
            RolloutError: no or too many tokens, a missing logprob, or one that is not finite.
        """
        name, ids, logprobs = completion.name, completion.token_ids, completion.logprobs
        if not 1 <= len(ids) <= params.max_tokens or len(ids) != len(logprobs):
            raise RolloutError(
                f"{name}: expected 1 to {params.max_tokens} tokens with one logprob each, got "
                f"{len(ids)} tokens and {len(logprobs)} logprobs."
            )
        if not all(map(math.isfinite, logprobs)):
            raise RolloutError(
                f"{name}: expected finite logprobs, got {logprobs}. "
                "The model's logits are NaN or infinite; load an earlier checkpoint."
            )
        assert self._version is not None, "generate() checks it"
        reason = "stop" if ids[-1] in params.eos_ids else "length"
        return Sample(ids, logprobs, reason, self._version)

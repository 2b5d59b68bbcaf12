"""Rollout engines: token ids in, token ids and log-probabilities out. One protocol, several engines.

An engine never sees text: prompts come as ids, completions leave as ids, so nothing is tokenised twice.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import nn

from crpo_fast.batch import RolloutGroup, SamplingParams

__all__ = ["Engine", "RolloutError", "check_request"]


class RolloutError(RuntimeError):
    """An engine did not deliver what it was asked for; the message names the request and the engine's text."""


@runtime_checkable
class Engine(Protocol):
    """What the trainer and the evaluation ask of an engine.

    Attributes:
        renormalises: whether ``top_p``/``top_k`` change the reported log-probabilities (they are then
            of the kept tokens only, larger than softmax(logits / temperature) by -log of the kept mass).
    """

    renormalises: bool

    def generate(
        self,
        prompt_ids: list[list[int]],  # one list of token ids per prompt
        group_size: int,
        params: SamplingParams,
        seed: int,
    ) -> list[RolloutGroup]:
        """Samples ``group_size`` completions of every prompt; groups come back in input order.

        The same arguments and weights give the same samples; another seed gives others. torch's global
        random state is the same afterwards as before.

        Raises:
            ValueError: an argument is out of range.
            RolloutError: the engine failed, or has not been synced with a policy yet.
        """
        ...

    def sync(self, policy: nn.Module, version: int) -> None:
        """Makes the engine serve the weights of ``policy`` from now on, under this version number."""
        ...

    def close(self) -> None:
        """Frees what the engine holds. A closed engine refuses to generate."""
        ...


def check_request(
    prompt_ids: list[list[int]], group_size: int, params: SamplingParams, seed: int
) -> None:
    """Refuses a request that no engine can serve, before any work is done.

    Raises:
        ValueError: names the argument, what it got and what to type.
    """
    if group_size < 1:
        raise ValueError(
            f"group_size: expected at least 1, got {group_size}. Set rollout.group_size."
        )
    if params.temperature < 0.0:
        raise ValueError(
            f"temperature: expected a number above 0, got {params.temperature}. Set rollout.temperature = 1.0."
        )
    if params.temperature == 0.0 and group_size > 1:
        raise ValueError(
            f"temperature: expected a number above 0 in rollouts, got 0 with group_size {group_size} (all samples"
            " of a group would be equal and every advantage 0). Set rollout.temperature = 1.0; greedy decoding"
            " is for evaluation, with group_size 1."
        )
    if params.max_tokens < 1:
        raise ValueError(
            f"max_tokens: expected at least 1, got {params.max_tokens}. Set rollout.max_tokens, for example to 256."
        )
    if not 0.0 < params.top_p <= 1.0:
        raise ValueError(
            f"top_p: expected a number in (0, 1], got {params.top_p}. Set rollout.top_p = 1.0."
        )
    if params.top_k < 0:
        raise ValueError(
            f"top_k: expected 0 (off) or more, got {params.top_k}. Set rollout.top_k = 0."
        )
    if not 0 <= seed < 2**63:
        raise ValueError(
            f"seed: expected an integer in [0, 2**63), got {seed}. Set seed = 0 in the config."
        )
    for index, ids in enumerate(prompt_ids):
        if not ids:
            raise ValueError(
                f"prompt_ids: expected at least one token, got none in prompt {index}."
                " Give the prompt some text or a beginning-of-text token."
            )

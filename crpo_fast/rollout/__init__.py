"""Rollout engines: token ids in, token ids and logprobs out. One protocol, several engines.

An engine never sees text: nothing is tokenised twice.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import nn

from crpo_fast.batch import RolloutGroup, SamplingParams

__all__ = ["Engine", "RolloutError", "check_request"]


class RolloutError(RuntimeError):
    """An engine did not deliver; the message names the request and the engine's own text."""


@runtime_checkable
class Engine(Protocol):
    """What the trainer and the evaluation ask of an engine.

    Attributes:
        renormalises: whether logprobs are of the tokens that top_p and top_k keep. They are then
            larger than those of softmax(logits / temperature) by -log(kept mass).
    """

    renormalises: bool

    def generate(
        self,
        prompt_ids: list[list[int]],
        group_size: int,
        params: SamplingParams,
        seed: int,
        first: int = 0,
    ) -> list[RolloutGroup]:
        """Samples ``group_size`` completions of every prompt; groups come in the prompts' order.

        The same weights and arguments give the same samples, another seed gives others. torch's
        global random state is afterwards what it was before.

        On a sharded model this is a collective: every rank calls it equally often, with any number
        of prompts, none included.

        Args:
            prompt_ids: token ids of each prompt, at least one.
            group_size: samples of one prompt.
            params: temperature 0 decodes greedily and needs ``group_size`` 1.
            seed: in [0, 2^63), the same on all ranks.
            first: position of the first prompt among those of all ranks. Equal positions may have
                equal random numbers, other positions have others.

        Raises:
            ValueError: an argument is out of range.
            RolloutError: the engine failed, is closed, or was never synced.
        """
        ...

    def sync(self, policy: nn.Module, version: int) -> None:
        """Makes the engine serve the weights of ``policy`` under this version number."""
        ...

    def close(self) -> None:
        """Frees what the engine holds; it refuses to generate afterwards."""
        ...


def check_request(
    prompt_ids: list[list[int]], group_size: int, params: SamplingParams, seed: int
) -> None:
    """Refuses what no engine can serve, before any work is done.

    Raises:
        ValueError: names the argument, its value and what to type.
    """
    if group_size < 1:
        raise ValueError(
            f"group_size: expected at least 1, got {group_size}. Type --rollout.group_size 8."
        )
    if params.temperature < 0.0 or (params.temperature == 0.0 and group_size > 1):
        raise ValueError(
            f"temperature: expected a number above 0 in rollouts, got {params.temperature} with "
            f"group_size {group_size}. Greedy samples of one prompt are equal and teach nothing; "
            "type --rollout.temperature 1.0 (0 is for evaluation, with group_size 1)."
        )
    if params.max_tokens < 1:
        raise ValueError(
            f"max_tokens: expected at least 1, got {params.max_tokens}. "
            "Type --rollout.max_tokens 256."
        )
    if not 0.0 < params.top_p <= 1.0:
        raise ValueError(
            f"top_p: expected a number in (0, 1], got {params.top_p}. Type --rollout.top_p 1."
        )
    if params.top_k < 0:
        raise ValueError(
            f"top_k: expected 0 (off) or more, got {params.top_k}. Type --rollout.top_k 0."
        )
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected an integer in [0, 2^63), got {seed}. Type --seed 0.")
    for index, ids in enumerate(prompt_ids):
        if not ids:
            raise ValueError(
                f"prompt_ids[{index}]: expected at least one token, got none. "
                "Give the prompt some text."
            )

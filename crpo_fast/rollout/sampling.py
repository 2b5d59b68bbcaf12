"""One token a row from logits, with one random number a row."""

from __future__ import annotations

import torch
from torch import Tensor

from crpo_fast.batch import SamplingParams
from crpo_fast.rollout import RolloutError

__all__ = ["sample"]


def sample(logits: Tensor, uniforms: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Draws tokens by inverting the cumulative distribution.

    Args:
        logits: [n, V] fp32.
        uniforms: [n] fp32 in [0, 1).
        params: temperature (0: argmax), top_k, top_p.

    Returns:
        Tokens [n] and their logprobs [n] in nats, of softmax(logits / temperature) over all tokens
        (of softmax(logits) when the temperature is 0).

    Raises:
        RolloutError: NaN among the logits.
    """
    greedy = params.temperature == 0.0
    logprobs = torch.log_softmax(logits if greedy else logits / params.temperature, dim=-1)
    if torch.isnan(logprobs).any():
        raise RolloutError(
            "logits: expected finite numbers, got NaN. Lower the learning rate, or resume from an "
            "earlier checkpoint with --run.resume PATH."
        )
    if greedy:
        tokens = logits.argmax(-1)
    else:
        cumulative = _truncated(logprobs.exp(), params).cumsum(-1)  # [n, V]
        points = uniforms[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, points, right=True).squeeze(1)
        # a point rounded up to the total lies behind the last token with any mass
        tokens = torch.minimum(tokens, cumulative.argmax(-1))
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)


def _truncated(probs: Tensor, params: SamplingParams) -> Tensor:
    """Zeroes in ``probs`` [n, V] what top_k, then top_p leave out; the rest stays as it is.

    top_p keeps the likeliest tokens up to and including the one that reaches the mass.
    """
    if params.top_k == 0 and params.top_p == 1.0:
        return probs
    order = probs.argsort(dim=-1, descending=True, stable=True)
    ranked = probs.gather(1, order)
    if params.top_k:
        ranked[:, params.top_k :] = 0.0
    if params.top_p < 1.0:
        mass = ranked / ranked.sum(-1, keepdim=True)
        before = mass.cumsum(-1) - mass  # of the likelier tokens
        ranked[before >= params.top_p] = 0.0
    return torch.zeros_like(probs).scatter(1, order, ranked)

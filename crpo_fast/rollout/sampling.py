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
    if params.temperature not in (0.0, 1.0):
        logits = logits / params.temperature
    # one pass each: largest, exp, cumulative; rows are as long as the vocabulary
    largest = logits.amax(-1, keepdim=True)  # [n, 1]
    masses = (logits - largest).exp_()  # [n, V]
    cumulative = masses.cumsum(-1)
    total = cumulative[:, -1:].clone()
    if torch.isnan(total).any():
        raise RolloutError(
            "logits: expected finite numbers, got NaN. Lower the learning rate, or resume from an "
            "earlier checkpoint with --run.resume PATH."
        )
    if params.temperature == 0.0:
        tokens = logits.argmax(-1, keepdim=True)  # [n, 1]
    else:
        if params.top_k > 0 or params.top_p < 1.0:
            cumulative = _truncated(masses, params).cumsum(-1)
        points = uniforms[:, None] * cumulative[:, -1:]  # below the last one: uniforms are below 1
        tokens = torch.searchsorted(cumulative, points, right=True)
    logprobs = logits.gather(1, tokens) - largest - total.log()
    return tokens.squeeze(1), logprobs.squeeze(1)


def _truncated(masses: Tensor, params: SamplingParams) -> Tensor:
    """Zeroes in ``masses`` [n, V] what top_k, then top_p leave out; the rest stays as it is.

    top_p keeps the likeliest tokens up to and including the one that reaches the share.
    """
    order = masses.argsort(dim=-1, descending=True, stable=True)
    ranked = masses.gather(1, order)
    if params.top_k > 0:
        ranked[:, params.top_k :] = 0.0
    if params.top_p < 1.0:
        before = ranked.cumsum(-1) - ranked  # of the likelier tokens
        ranked[before >= params.top_p * ranked.sum(-1, keepdim=True)] = 0.0
    return torch.zeros_like(masses).scatter(1, order, ranked)

"""The dense oracle: all logits at once, ordinary autograd through the head, short and dumb.

It shares with the fast paths only the objective's mathematics. Memory is several times T V; use it
to check, not to train.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOWEST_LOGIT = -1e30  # stands for -inf, as in every backend


def dense_logits(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    *,
    bias: Tensor | None = None,  # [V]
    temperature: Tensor | float = 1.0,  # [T] or one for all
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    states: Tensor | None = None,  # [T, r] of an adapter
    up: Tensor | None = None,  # [V, r]
) -> Tensor:  # [T, V] fp32 (fp64)
    """Tempered logits, worked in fp32 (fp64 for fp64 inputs)."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden.to(dtype) @ weight.to(dtype).t()  # [T, V]
    if states is not None and up is not None:
        logits = logits + states.to(dtype) @ up.to(dtype).t()
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = logit_scale * logits
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    column = temperature.unsqueeze(1) if isinstance(temperature, Tensor) else temperature
    logits = logits / column
    return torch.where(logits < LOWEST_LOGIT, LOWEST_LOGIT, logits)


def dense_logprobs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, entropy, lse, is_top1) ``[n]`` of logits ``[n, V]`` and labels ``[n]``."""
    maximum = logits.detach().amax(1, keepdim=True) if logits.shape[0] else logits.detach()[:, :1]
    shifted = logits - maximum  # [n, V]
    log_sum = shifted.exp().sum(1).log()  # [n]
    log_p = shifted - log_sum.unsqueeze(1)  # [n, V]
    entropy = -(log_p.exp() * log_p).sum(1)  # [n]
    label_shift = shifted.gather(1, labels.unsqueeze(1)).squeeze(1)  # [n]
    return label_shift - log_sum, entropy, maximum.squeeze(1) + log_sum, label_shift >= 0

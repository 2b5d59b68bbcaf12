"""Fused lm_head projection, log-softmax, entropy, stage weights and group-relative objective.

    from crpo_kernels import ObjectiveSpec, aggregation_weights, linear_policy_loss

    token_weights = aggregation_weights(labels != -100, cu_seqlens)
    loss, stats = linear_policy_loss(hidden, lm_head.weight, labels, advantages=advantages,
                                     token_weights=token_weights, spec=ObjectiveSpec.preset("dapo"))
    loss.backward()

Needs torch and nothing else.
"""

from .api import linear_logprobs, linear_policy_loss
from .dispatch import BackendChoice, choose_backend, unsupported_reason
from .explain import explain_choice
from .spec import IGNORE_INDEX, Logprobs, ObjectiveSpec, TokenStats
from .weights import aggregation_weights, stage_entropy_weights

__all__ = [
    "IGNORE_INDEX",
    "BackendChoice",
    "Logprobs",
    "ObjectiveSpec",
    "TokenStats",
    "aggregation_weights",
    "choose_backend",
    "explain_choice",
    "linear_logprobs",
    "linear_policy_loss",
    "stage_entropy_weights",
    "unsupported_reason",
]

"""How far the sampling engine is from the trainer: rho = p_train / p_rollout of the sampled tokens.

p_train is the policy's at the start of the step's updates, before any of them: the numerator of the
correction that ``objective.rho_mode`` applies (the ratio of the clip is new / old). Over all
completion tokens of all ranks, with x = log rho and N tokens:

    mismatch       mean |x|                       mismatch/max   max |x|            nats
    mismatch/kl    mean (e^x - 1 - x)             k3 of KL(rollout || train), nats
    rho/mean       mean rho                       rho/min, rho/max
    rho/ess        (sum rho)^2 / (N sum rho^2)    effective sample size, a share: 1 without mismatch
    rho/cut        share of tokens that the mode truncates or masks (0 without a mode)

The rho of these is the bare one; the metric ``rho`` is the mean of the weights that were applied.
"""

from __future__ import annotations

from torch import Tensor

from crpo_fast.metrics import Sums
from crpo_kernels import ObjectiveSpec

_SQUARE = "rho/square"  # the mean of rho^2, which becomes rho/ess


def add_mismatch(
    sums: Sums,
    logprobs: Tensor,  # [R] of the policy before the first update
    rollout_logprobs: Tensor,  # [R]
    objective: ObjectiveSpec,
) -> None:
    """Add the tokens of one micro-batch."""
    log_rho = logprobs.double() - rollout_logprobs.double()
    rho, count = log_rho.exp(), log_rho.numel()
    sums.add("mismatch", log_rho.abs().sum(), count)
    sums.add("mismatch/kl", (log_rho.expm1() - log_rho).sum(), count)
    sums.add("rho/mean", rho.sum(), count)
    sums.add(_SQUARE, rho.square().sum(), count)
    sums.add("rho/cut", _is_cut(rho, objective), count)
    sums.add_extremes("mismatch", log_rho.abs())
    sums.add_extremes("rho", rho, minimum=True)


def _is_cut(rho: Tensor, objective: ObjectiveSpec) -> Tensor | float:
    if objective.rho_mode is None:
        return 0.0
    above = rho > objective.rho_cap
    if objective.rho_mode == "mask":
        above = above | (rho < objective.rho_floor)
    return above.sum()


def finish_mismatch(metrics: dict[str, float]) -> None:
    """Turn the mean of rho^2 into the effective sample size."""
    square = metrics.pop(_SQUARE, None)
    if square is not None:
        metrics["rho/ess"] = metrics["rho/mean"] ** 2 / square if square else 0.0

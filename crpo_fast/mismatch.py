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

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from crpo_fast.config import RolloutConfig
from crpo_fast.endings import MismatchError
from crpo_fast.metrics import Metrics, Sums
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
    found = {
        "mismatch": log_rho.abs(),
        "mismatch/kl": log_rho.expm1() - log_rho,
        "rho/mean": rho,
        _SQUARE: rho.square(),
        "rho/cut": _is_cut(rho, objective).double(),
    }
    totals = torch.stack(list(found.values())).sum(1)
    for name, total in zip(found, totals.unbind(), strict=True):
        sums.add(name, total, count)
    sums.add_extremes("mismatch", log_rho.abs())
    sums.add_extremes("rho", rho, minimum=True)


def _is_cut(rho: Tensor, objective: ObjectiveSpec) -> Tensor:
    if objective.rho_mode is None:
        return torch.zeros_like(rho)
    above = rho > objective.rho_cap
    return above | (rho < objective.rho_floor) if objective.rho_mode == "mask" else above


def finish_mismatch(metrics: Metrics) -> None:
    """Turn the mean of rho^2 into the effective sample size."""
    if _SQUARE in metrics:
        square, mean = metrics.pop(_SQUARE), metrics["rho/mean"]
        is_known = square is not None and mean is not None
        metrics["rho/ess"] = (mean**2 / square if square else 0.0) if is_known else None


@dataclass
class MismatchCheck:
    """The first rollout that is trained on shows whether the engine serves the same weights.

    Attributes:
        bound: of the mean of |log rho|, nats.
        is_due: nothing was checked yet.
    """

    bound: float
    is_due: bool = True

    @classmethod
    def of(cls, rollout: RolloutConfig, renormalises: bool) -> MismatchCheck:
        """The config's bound, wider for an engine whose logprobs are of what top_p keeps."""
        return cls(rollout.max_mismatch - (math.log(rollout.top_p) if renormalises else 0.0))

    def update(self, metrics: Metrics) -> None:
        """Take up the metrics of a step; one without a good update says nothing.

        Raises:
            MismatchError: the bound is exceeded.
        """
        mismatch = metrics.get("mismatch")
        if not self.is_due or mismatch is None or not metrics["updates"]:
            return
        self.is_due = False
        if mismatch > self.bound:
            raise MismatchError(
                "the engine serves other weights: mean |train - rollout logprob| is "
                f"{mismatch:.4f} nats on the first batch, the bound is {self.bound}. "
                "Same attention and dtype in both? Type --model.compute_dtype float32, or raise "
                "--rollout.max_mismatch knowingly."
            )

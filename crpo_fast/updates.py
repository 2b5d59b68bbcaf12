"""The optimizer updates of one rollout.

    split             the groups of the rollout -> minibatches
    add_old_logprobs  logprobs of the policy before the first update, where a pass is needed
    run_updates       update u on minibatch u mod M -> the step's metrics, pooled over its updates

The ratio of the policy term is new / old, old being the policy before the first update: the one
whose rollout it is. The first update needs no pass of its own for it: it is on-policy (ratio 1 with
the gradient of the logprob), and its forward's logprobs serve as the old ones when its minibatch
comes again. With one update per rollout there is neither an extra pass nor any old logprob.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from crpo_fast.config import Config, PhaseConfig
from crpo_fast.loss import LossSpec
from crpo_fast.metrics import Metrics, Sums
from crpo_fast.mismatch import finish_mismatch
from crpo_fast.nonfinite import Guard
from crpo_fast.packing import MicroBatch, Sequence
from crpo_fast.policy import Policy
from crpo_fast.score_head import finish_errors
from crpo_fast.step import optimizer_step
from crpo_fast.timing import timer
from crpo_fast.traces import TokenTrace


@dataclass(frozen=True)
class UpdatePlan:
    """How many updates one rollout gives.

    Attributes:
        updates: U, a multiple of ``minibatches``.
        minibatches: M; every group is in one of them, and so in U / M updates.
        group_size: consecutive sequences of this rank that belong together.
    """

    updates: int = 1
    minibatches: int = 1
    group_size: int = 1

    def passes(self, metrics: Metrics) -> float:
        """How often the updates of a step with these metrics went through each sequence."""
        names = ("updates", "skipped", "skipped_empty")
        return sum(metrics[name] or 0.0 for name in names) / self.minibatches

    def split(self, sequences: list[Sequence]) -> list[list[Sequence]]:
        """Minibatch m has the groups m, m + M, m + 2 M ... of this rank, in rollout order.

        Prompts are shuffled already. Where M divides every rank's share, as the config check
        demands, a minibatch has the same groups at any number of ranks.
        """
        if self.minibatches == 1:
            return [sequences]
        starts = range(0, len(sequences), self.group_size)
        groups = [sequences[i : i + self.group_size] for i in starts]
        return [
            [s for group in groups[m :: self.minibatches] for s in group]
            for m in range(self.minibatches)
        ]


def update_plan(config: Config, phase: PhaseConfig) -> UpdatePlan:
    """Several updates belong to rollouts alone."""
    if phase.algorithm == "sft":
        return UpdatePlan()
    updates = config.train.updates_per_rollout
    return UpdatePlan(updates, config.train.minibatches or updates, config.rollout.group_size)


def add_old_logprobs(
    minibatches: list[list[MicroBatch]], spec: LossSpec, policy: Policy
) -> list[list[MicroBatch]]:
    """The minibatches, all but the first with ``old_logprobs`` from a pass without gradients."""
    first, *others = minibatches
    with timer("forward"):
        return [first] + [
            [policy.with_logprobs(b, "old_logprobs", spec) for b in batches] for batches in others
        ]


def run_updates(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    minibatches: list[list[MicroBatch]],
    spec: LossSpec,
    *,
    updates: int,
    max_grad_norm: float,
    guard: Guard,
    where: str,
    trace: TokenTrace | None = None,
) -> Metrics:
    """All updates of a step; returns its global metrics, pooled over the updates that were done.

    An update whose loss or gradient is not finite is skipped and counted (``skipped``,
    ``skipped_total``; where none was done the metrics are its own), one without any token too
    (``skipped_empty``); weights and optimizer state are then those from before it. The step ends
    early when ``guard`` is exhausted.

    Args:
        policy: is updated, in place.
        optimizer: with its state.
        minibatches: of ``add_old_logprobs``.
        spec: the phase's loss.
        updates: U.
        max_grad_norm: L2 norm to which gradients are clipped.
        guard: counts and saves what is not finite.
        where: step_<n>, for messages and folders.
        trace: takes up the token statistics of some sequences.
    """
    minibatches, pooled, norms = list(minibatches), Sums(), []
    counts = {"updates": 0, "skipped": 0, "skipped_empty": 0}
    for u in range(updates):
        batches = minibatches[u % len(minibatches)]
        last = update = optimizer_step(
            policy, optimizer, batches, spec, max_grad_norm=max_grad_norm, trace=trace
        )
        if u == 0 and updates > len(minibatches):
            pairs = zip(batches, update.logprobs, strict=True)
            minibatches[0] = [b.with_vectors(old_logprobs=old) for b, old in pairs]
        if update.is_empty:
            counts["skipped_empty"] += 1
        elif not update.is_finite:
            counts["skipped"] += 1
            name = where if updates == 1 else f"{where}_update_{u + 1}"
            guard.skipped(name, policy.model, batches, update.logprobs, update.metrics())
            if guard.is_exhausted:
                break
        else:
            counts["updates"] += 1
            guard.done()
            pooled.merge(update.sums)
            norms.append(update.grad_norm)
    if not norms:
        pooled, norms = last.sums, [last.grad_norm]
    metrics = pooled.means()
    finish_mismatch(metrics)
    finish_errors(metrics)
    metrics["grad_norm"] = sum(norms) / len(norms)
    return {**metrics, **{k: float(v) for k, v in counts.items()}, "skipped_total": guard.total}

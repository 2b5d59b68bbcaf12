"""One optimizer update: sequences -> weights -> micro-batches -> gradients -> update -> metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crpo_fast import attention, distributed
from crpo_fast.loss import LossSpec, flat_vectors, micro_batch_loss
from crpo_fast.metrics import Metrics, Sums
from crpo_fast.mismatch import add_mismatch
from crpo_fast.packing import MicroBatch, Sequence, dummy, pack
from crpo_fast.policy import Policy
from crpo_fast.score_head import add_errors
from crpo_fast.timing import timer
from crpo_fast.traces import TokenTrace, positions


def micro_batches(
    sequences: list[Sequence],
    spec: LossSpec,
    policy: Policy,
    *,
    token_budget: int,
    layout: str,
    reference: Policy | None = None,
) -> list[MicroBatch]:
    """This rank's micro-batches with all their vectors; at least one, equally many on every rank.

    Ranks with fewer sequences (or none) get dummy micro-batches, whose gradients are zero, so that
    the collectives of forward and backward stay in step and every rank has every metric.
    """
    world = policy.world
    flat = flat_vectors(
        sequences,
        spec,
        all_sum=lambda x: distributed.all_sum(x.to(world.device)).cpu(),
        rank=world.rank,
        world_size=world.size,
        dtype=next(policy.model.parameters()).dtype,
    )
    flat["trace"] = positions(sequences)
    batches = [b.attach(**flat) for b in pack(sequences, token_budget, layout=layout)]
    empty = {name: None if v is None else v[:0] for name, v in flat.items()}
    missing = max(1, distributed.all_max(len(batches), world)) - len(batches)
    batches += [dummy(layout).attach(**empty) for _ in range(missing)]
    batches = [_on_device(b, world.device) for b in batches]
    if reference is None:
        return batches
    with timer("forward"):
        return [reference.with_logprobs(b, "ref_logprobs", spec) for b in batches]


def _on_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    copy = batch.to(device)
    if copy.position_ids is not batch.position_ids and len(batch.position_ids) == 1:
        attention.moved(batch.position_ids, copy.position_ids)
    return copy


@dataclass(frozen=True)
class Update:
    """What came of one update, the same on every rank but for ``logprobs``.

    Attributes:
        sums: metrics of all ranks.
        loss, grad_norm: global; the norm before clipping.
        logprobs: of each micro-batch's rows, by the policy before the update.
    """

    sums: Sums
    loss: float
    grad_norm: float
    logprobs: list[Tensor]

    @property
    def is_empty(self) -> bool:
        """There was no token on any rank, so there was nothing to learn."""
        return self.sums.count("entropy") == 0

    @property
    def is_finite(self) -> bool:
        """Are loss and gradient finite?"""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def metrics(self) -> Metrics:
        """Of this update alone."""
        return {**self.sums.means(), "grad_norm": self.grad_norm}


def accumulate(
    policy: Policy, batches: list[MicroBatch], spec: LossSpec, trace: TokenTrace | None = None
) -> tuple[float, Sums, list[Tensor]]:
    """Forward and backward of all micro-batches; the host reads the device once, at their end.

    The loss already carries the global denominators and the data-parallel size: nothing is divided
    here.

    Returns:
        this rank's loss, its metrics, and the logprobs of each micro-batch's rows.
    """
    sums, losses, logprobs = Sums(), [], []
    for i, batch in enumerate(batches):
        distributed.set_gradient_sync(policy.model, i == len(batches) - 1)
        with timer("forward"):
            loss, stats = micro_batch_loss(policy, batch, spec)
        with timer("backward"):
            loss.backward()
        losses.append(loss.detach())
        logprobs.append(stats.logprobs)
        _add_stats(sums, stats, batch, spec)
        if trace is not None:
            trace.add(batch, stats, policy.world.size)
    return sum(torch.stack(losses).tolist()), sums, logprobs


def optimizer_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batches: list[MicroBatch],
    spec: LossSpec,
    *,
    max_grad_norm: float,
    trace: TokenTrace | None = None,
) -> Update:
    """One update. It is skipped, on all ranks alike, when it is empty or not finite.

    A skipped update leaves weights and optimizer state as they were.
    """
    world = policy.world
    optimizer.zero_grad(set_to_none=True)
    loss, sums, logprobs = accumulate(policy, batches, spec, trace)
    with timer("optimizer"):
        norm = distributed.clip_grad_norm(policy.model, max_grad_norm)
    sums.add("loss", loss, 1)  # mean over ranks of dp-scaled losses = the global loss
    sums = sums.reduced(
        lambda x: distributed.all_sum(x.to(world.device)).cpu(),
        lambda peaks: distributed.largest(peaks, world),
    )
    update = Update(sums, sums.total("loss") / sums.count("loss"), norm, logprobs)
    if update.is_finite and not update.is_empty:
        with timer("optimizer"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # not kept while the next rollout is sampled
            distributed.wait_for_device(world)
    return update


def _add_stats(sums: Sums, stats: Any, batch: MicroBatch, spec: LossSpec) -> None:
    for name, (total, count) in stats.sums().items():
        if name != "num_tokens":
            sums.add(name, total, count)
    stage_ids, entropy = batch.vectors["stage_ids"], stats.entropy
    for k in range(len(spec.stage_coefs)):
        mask = stage_ids == k
        sums.add(
            f"stage_entropy/{k}", torch.where(mask, entropy, 0).sum(dtype=torch.float64), mask.sum()
        )
        sums.add(f"stage_tokens/{k}", mask.sum(), len(batch.cu_seqlens) - 1)  # mean per sequence
    add_errors(sums, batch.vectors)
    rollout: Tensor | None = batch.vectors.get("rollout_logprobs")
    if rollout is not None:
        old = batch.vectors.get("old_logprobs", stats.logprobs)
        add_mismatch(sums, old, rollout, spec.objective)

"""One optimizer step: sequences -> weights -> micro-batches -> gradients -> update -> metrics."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from crpo_fast import distributed
from crpo_fast.loss import LossSpec, flat_vectors, micro_batch_loss
from crpo_fast.metrics import Sums
from crpo_fast.packing import MicroBatch, Sequence, dummy, pack
from crpo_fast.policy import Policy
from crpo_fast.timing import timer


class NonFiniteError(RuntimeError):
    """The loss or a gradient is NaN or infinite."""


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
    batches = [b.attach(**flat) for b in pack(sequences, token_budget, layout=layout)]
    empty = {name: None if v is None else v[:0] for name, v in flat.items()}
    missing = max(1, distributed.all_max(len(batches), world)) - len(batches)
    batches += [dummy(layout).attach(**empty) for _ in range(missing)]
    batches = [b.to(world.device) for b in batches]
    if reference is None:
        return batches
    options = dict(spec.options)
    with timer("forward"):
        return [
            b.with_vectors(ref_logprobs=reference.logprobs(b, spec.temperature, **options))
            for b in batches
        ]


def accumulate(policy: Policy, batches: list[MicroBatch], spec: LossSpec) -> tuple[float, Sums]:
    """Forward and backward of all micro-batches; returns this rank's loss and its metrics.

    The loss already carries the global denominators and the data-parallel size: nothing is divided
    here.
    """
    sums, total = Sums(), 0.0
    for i, batch in enumerate(batches):
        distributed.set_gradient_sync(policy.model, i == len(batches) - 1)
        with timer("forward"):
            loss, stats = micro_batch_loss(policy, batch, spec)
        with timer("backward"):
            loss.backward()
        total += float(loss.detach())
        _add_stats(sums, stats, batch, spec)
    return total, sums


def optimizer_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batches: list[MicroBatch],
    spec: LossSpec,
    *,
    max_grad_norm: float,
) -> dict[str, float]:
    """One update; returns the step's global metrics.

    Raises:
        NonFiniteError: loss or gradient norm is not finite; the weights are as before the step.
    """
    optimizer.zero_grad(set_to_none=True)
    loss, sums = accumulate(policy, batches, spec)
    with timer("optimizer"):
        norm = distributed.clip_grad_norm(policy.model, max_grad_norm)
    sums.add("loss", loss, 1)  # mean over ranks of dp-scaled losses = the global loss
    metrics = sums.means(lambda x: distributed.all_sum(x.to(policy.world.device)).cpu())
    if not math.isfinite(norm) or not math.isfinite(metrics["loss"]):
        raise NonFiniteError(
            f"loss {metrics['loss']}, gradient norm {norm}: not finite, the weights were not "
            "updated. Lower optim.lr, or look for NaN in the data and the model "
            "(model.compute_dtype float32 helps)."
        )
    with timer("optimizer"):
        optimizer.step()
    return {**metrics, "grad_norm": norm}


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
    rollout: Tensor | None = batch.vectors.get("rollout_logprobs")
    if rollout is not None:
        sums.add(
            "mismatch", (stats.logprobs - rollout).abs().sum(dtype=torch.float64), rollout.numel()
        )

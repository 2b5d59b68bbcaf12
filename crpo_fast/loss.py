"""From records to the two weight vectors, and from a micro-batch to the fused loss.

Everything global is inside ``token_weights`` and ``entropy_weights`` before any packing: the denominators
are summed over ranks once per optimizer step, and both vectors carry the data-parallel size, because FSDP
averages gradients over ranks. No layout, no number of micro-batches can change them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from crpo_fast.config import Config, PhaseConfig
from crpo_fast.packing import MicroBatch, Sequence
from crpo_kernels import (
    ObjectiveSpec,
    aggregation_weights,
    linear_policy_loss,
    stage_entropy_weights,
)

# the presets' usual aggregation; crpo: the paper trains with TRL's "bnpo" over groups of its device batch
AGGREGATION = {
    "sft": "token_mean",
    "crpo": "bnpo",
    "grpo": "sequence_mean",
    "bnpo": "bnpo",
    "dapo": "token_mean",
    "dr_grpo": "constant",
    "gspo": "sequence_mean",
    "cispo": "token_mean",
}


@dataclass(frozen=True)
class LossSpec:
    """What a phase minimises.

    Attributes:
        objective: policy term, KL and train/rollout correction of the kernel.
        aggregation: token_mean | sequence_mean | constant | bnpo.
        stage_coefs: [S] coefficients of the stages; all zero switches the entropy term off.
        reduction, reference_length: of the stage entropy weights.
        temperature: of the policy (the sampling temperature; 1 in SFT).
        max_length: the constant of ``constant``, in tokens.
        group: consecutive samples per group of ``bnpo``.
        options: further keyword arguments of the kernel (backend, workspace_bytes).
    """

    objective: ObjectiveSpec
    aggregation: str
    stage_coefs: tuple[float, ...] = ()
    reduction: str = "sequence_mean"
    reference_length: int | None = None
    temperature: float = 1.0
    max_length: int = 1
    group: int = 1
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def has_entropy(self) -> bool:
        """Is there an entropy term at all?"""
        return any(self.stage_coefs)


def loss_spec(config: Config, phase: PhaseConfig, stage_coefs: list[float]) -> LossSpec:
    """The phase's algorithm with the config's overrides; the entropy term belongs to crpo alone."""
    overrides = {
        name: getattr(config.objective, name)
        for name in ("clip_low", "clip_high", "kl_coef", "kl_estimator", "rho_mode", "rho_cap")
        if getattr(config.objective, name) is not None
    }
    is_sft = phase.algorithm == "sft"
    aggregation = None if is_sft else config.objective.aggregation
    options: dict[str, Any] = {"backend": config.train.loss_backend}
    if config.train.workspace_mib is not None:
        options["workspace_bytes"] = config.train.workspace_mib * 2**20
    return LossSpec(
        objective=ObjectiveSpec.preset(phase.algorithm, **({} if is_sft else overrides)),
        aggregation=aggregation or AGGREGATION[phase.algorithm],
        stage_coefs=tuple(stage_coefs) if phase.algorithm == "crpo" else (0.0,) * len(stage_coefs),
        reduction=config.entropy.reduction,
        reference_length=config.entropy.reference_length,
        temperature=1.0 if is_sft else config.rollout.temperature,
        max_length=config.rollout.max_tokens,
        group=config.objective.bnpo_group,
        options=tuple(options.items()),
    )


def flat_vectors(
    sequences: list[Sequence],
    spec: LossSpec,
    *,
    all_sum: Callable[[Tensor], Tensor],
    rank: int = 0,
    world_size: int = 1,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor | None]:
    """Per-token vectors [N] over the completion tokens of this rank's sequences, in rollout order.

    Args:
        sequences: this rank's sequences; with ``bnpo`` every rank must hold equally many.
        spec: the phase's loss.
        all_sum: sums a tensor over ranks (called once).
        rank, world_size: position among the data-parallel ranks; the weights carry ``world_size``.
        dtype: of the result; the weights are computed in fp64.

    Returns:
        token_weights, entropy_weights, advantages, rollout_logprobs (None where not used), stage_ids.
    """
    lengths = [len(s.completion_ids) for s in sequences]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    stage_ids = torch.tensor([k for s in sequences for k in s.stage_ids], dtype=torch.long)
    num_groups, group_ids = 0, None
    if spec.aggregation == "bnpo":
        first = rank * len(sequences)
        num_groups = -(-world_size * len(sequences) // spec.group)
        group_ids = (first + torch.arange(len(sequences))) // spec.group
    counts = all_sum(_counts(lengths, stage_ids, sequences, len(spec.stage_coefs), group_ids, num_groups))
    tokens, total, present, stage_tokens, group_tokens = counts.split(
        [1, 1, len(spec.stage_coefs), len(spec.stage_coefs), num_groups]
    )
    token_weights = aggregation_weights(
        torch.ones(sum(lengths), dtype=torch.float64),
        cu_seqlens,
        aggregation=spec.aggregation,
        num_tokens=int(tokens),
        num_sequences=int(total),
        max_length=spec.max_length,
        group_ids=group_ids,
        group_tokens=group_tokens if num_groups else None,
    )
    entropy_weights = None
    if spec.has_entropy:
        entropy_weights = stage_entropy_weights(
            stage_ids,
            cu_seqlens,
            torch.tensor(spec.stage_coefs, dtype=torch.float64),
            reduction=spec.reduction,
            reference_length=spec.reference_length,
            num_sequences=int(total),
            num_present=present,
            num_stage_tokens=stage_tokens,
        )
    per_sequence = torch.tensor([s.advantage for s in sequences], dtype=torch.float64)
    rollout = [x for s in sequences for x in s.rollout_logprobs or ()]
    has_rollout = all(s.rollout_logprobs is not None for s in sequences)  # also of a rank with none
    return {
        "token_weights": (token_weights * world_size).to(dtype),
        "entropy_weights": None if entropy_weights is None else (entropy_weights * world_size).to(dtype),
        "advantages": per_sequence.repeat_interleave(torch.tensor(lengths, dtype=torch.long)).to(dtype),
        "rollout_logprobs": torch.tensor(rollout, dtype=dtype) if has_rollout else None,
        "stage_ids": stage_ids,
    }


def _counts(
    lengths: list[int],
    stage_ids: Tensor,
    sequences: list[Sequence],
    num_stages: int,
    group_ids: Tensor | None,
    num_groups: int,
) -> Tensor:
    """[2 + 2S + groups] fp64: tokens, sequences, sequences with each stage, tokens of each stage, of each group."""
    out = torch.zeros(2 + 2 * num_stages + num_groups, dtype=torch.float64)
    out[0], out[1] = sum(lengths), len(lengths)
    for k in range(num_stages):
        out[2 + k] = sum(k in s.stage_ids for s in sequences)
        out[2 + num_stages + k] = (stage_ids == k).sum()
    if group_ids is not None:
        groups = out[2 + 2 * num_stages :]
        groups.index_add_(0, group_ids, torch.tensor(lengths, dtype=torch.float64))
    return out


def micro_batch_loss(policy: Any, batch: MicroBatch, spec: LossSpec) -> tuple[Tensor, Any]:
    """Forward of one micro-batch: (loss to call backward on, TokenStats of its rows)."""
    v = batch.vectors

    def compute(hidden: Tensor, weight: Tensor, **head: Any) -> tuple[Tensor, Any]:
        return linear_policy_loss(
            hidden,
            weight,
            batch.labels,
            advantages=v.get("advantages") if spec.objective.policy != "sft" else None,
            token_weights=v["token_weights"],
            entropy_weights=v.get("entropy_weights"),
            rollout_logprobs=v.get("rollout_logprobs") if spec.objective.rho_mode else None,
            ref_logprobs=v.get("ref_logprobs"),
            spec=spec.objective,
            cu_seqlens=batch.cu_seqlens,
            temperature=spec.temperature,
            **head,
            **dict(spec.options),
        )

    return policy(batch, compute)


def without_entropy(spec: LossSpec) -> LossSpec:
    """The same objective without its stage entropy term."""
    return replace(spec, stage_coefs=(0.0,) * len(spec.stage_coefs))

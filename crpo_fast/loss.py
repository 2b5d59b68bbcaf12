"""From records to the two weight vectors, and from a micro-batch to the fused loss.

Everything global is inside ``token_weights`` and ``entropy_weights`` before any packing: the
denominators are summed over ranks once per optimizer step, and both vectors carry the data-parallel
size, because FSDP averages gradients over ranks. No layout, no number of micro-batches can change
them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crpo_fast.config import Config, ConfigError, PhaseConfig
from crpo_fast.packing import MicroBatch, Sequence
from crpo_kernels import (
    ObjectiveSpec,
    aggregation_weights,
    linear_policy_loss,
    stage_entropy_weights,
)

# the presets' usual aggregation; the paper trains crpo with TRL's "bnpo", by its device batch
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

_OVERRIDES = (
    *("clip_low", "clip_high", "kl_coef", "kl_estimator"),
    *("rho_mode", "rho_cap", "rho_floor"),
)


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
        scoring: those that calls without gradients have besides (mode, head_dtype).
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
    scoring: tuple[tuple[str, Any], ...] = ()

    @property
    def score_options(self) -> dict[str, Any]:
        """Keyword arguments of the kernel in passes without gradients."""
        return {**dict(self.options), **dict(self.scoring)}

    @property
    def has_entropy(self) -> bool:
        """Is there an entropy term at all?"""
        return any(self.stage_coefs)


def loss_spec(config: Config, phase: PhaseConfig, stage_coefs: list[float]) -> LossSpec:
    """The phase's algorithm with the config's overrides; the entropy term belongs to crpo alone.

    Raises:
        ConfigError: an override that the objective refuses.
    """
    is_sft = phase.algorithm == "sft"
    aggregation = None if is_sft else config.objective.aggregation
    return LossSpec(
        objective=_objective(config, phase.algorithm),
        aggregation=aggregation or AGGREGATION[phase.algorithm],
        stage_coefs=tuple(stage_coefs) if phase.algorithm == "crpo" else (0.0,) * len(stage_coefs),
        reduction=config.entropy.reduction,
        reference_length=config.entropy.reference_length,
        temperature=1.0 if is_sft else config.rollout.temperature,
        max_length=config.rollout.max_tokens,
        group=config.objective.bnpo_group,
        options=tuple(kernel_options(config).items()),
        scoring=tuple(scoring_options(config).items()),
    )


def kernel_options(config: Config) -> dict[str, Any]:
    """Keyword arguments of every call of the kernels, with gradients and without."""
    options: dict[str, Any] = {"backend": config.train.loss_backend}
    if config.train.workspace_mib is not None:
        options["workspace_bytes"] = config.train.workspace_mib * 2**20
    return options


def scoring_options(config: Config) -> dict[str, Any]:
    """What calls without gradients have besides; empty by default."""
    options: dict[str, Any] = {}
    if config.train.score_kernel != "auto":
        options["mode"] = {"fused": "fused", "chunks": "two_pass"}[config.train.score_kernel]
    if config.train.score_head == "fp8":
        options["head_dtype"] = torch.float8_e4m3fn
    return options


def _objective(config: Config, algorithm: str) -> ObjectiveSpec:
    if algorithm == "sft":
        return ObjectiveSpec.preset(algorithm)
    options = {name: getattr(config.objective, name) for name in _OVERRIDES}
    try:
        return ObjectiveSpec.preset(
            algorithm, **{name: value for name, value in options.items() if value is not None}
        )
    except ValueError as error:
        what = str(error).partition(" Write ObjectiveSpec(")[0]  # advice for Python
        raise ConfigError(
            f"objective.{what} Leave --objective.{what.partition(':')[0]} out for the default of "
            f"{algorithm}."
        ) from error


@dataclass(frozen=True)
class _Counts:
    """The denominators of one optimizer step: counts over the sequences of all ranks."""

    tokens: int
    sequences: int
    present: Tensor  # [S] fp64, sequences with each stage
    stage_tokens: Tensor  # [S] fp64
    group_tokens: Tensor | None  # [groups] fp64, of bnpo
    without_logprobs: int  # sequences whose engine gave no logprobs


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
        sequences: this rank's sequences: any number, none included, and any may have an empty
            completion. All ranks' sequences in rank order are the order of ``bnpo``'s groups.
        spec: the phase's loss.
        all_sum: sums a tensor over ranks (called once, with ``bnpo`` twice).
        rank: position among the data-parallel ranks.
        world_size: number of data-parallel ranks; the weights carry it.
        dtype: of the result; the weights are computed in fp64.

    Returns:
        token_weights, entropy_weights, advantages, rollout_logprobs (None where not used, on all
        ranks alike), stage_ids.
    """
    lengths = torch.tensor([len(s.completion_ids) for s in sequences], dtype=torch.long)  # [B]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths.tolist())], dtype=torch.int32)
    stage_ids = torch.tensor([k for s in sequences for k in s.stage_ids], dtype=torch.long)  # [N]
    group_ids, num_groups = None, 0
    if spec.aggregation == "bnpo":
        group_ids, num_groups = _groups(len(sequences), spec.group, all_sum, rank, world_size)
    counts = _counts(sequences, len(spec.stage_coefs), group_ids, num_groups, all_sum)
    token_weights = aggregation_weights(
        torch.ones(int(lengths.sum()), dtype=torch.float64),
        cu_seqlens,
        aggregation=spec.aggregation,
        num_tokens=counts.tokens,
        num_sequences=counts.sequences,
        max_length=spec.max_length,
        group_ids=group_ids,
        group_tokens=counts.group_tokens,
    )
    entropy_weights = _entropy_weights(stage_ids, cu_seqlens, spec, counts)
    if entropy_weights is not None:
        entropy_weights = (entropy_weights * world_size).to(dtype)
    advantages = torch.tensor([s.advantage for s in sequences], dtype=torch.float64)  # [B]
    return {
        "token_weights": (token_weights * world_size).to(dtype),
        "entropy_weights": entropy_weights,
        "advantages": advantages.repeat_interleave(lengths).to(dtype),
        "rollout_logprobs": None if counts.without_logprobs else _logprobs(sequences, dtype),
        "stage_ids": stage_ids,
    }


def _groups(
    count: int, size: int, all_sum: Callable[[Tensor], Tensor], rank: int, world_size: int
) -> tuple[Tensor, int]:
    """([B] group of each of this rank's sequences, number of groups).

    A sequence's group is its index among those of all ranks // ``size``, so that it does not depend
    on how many each rank holds.
    """
    held = torch.zeros(world_size, dtype=torch.float64)
    held[rank] = count
    held = all_sum(held).long()
    first = int(held[:rank].sum())
    return (first + torch.arange(count)) // size, -(-int(held.sum()) // size)


def _counts(
    sequences: list[Sequence],
    num_stages: int,
    group_ids: Tensor | None,  # [B]
    num_groups: int,
    all_sum: Callable[[Tensor], Tensor],
) -> _Counts:
    """This rank's counts in one vector, which is summed over ranks once."""
    stages = range(num_stages)
    lengths = [len(s.completion_ids) for s in sequences]
    present = [sum(k in s.stage_ids for s in sequences) for k in stages]
    stage_tokens = [sum(s.stage_ids.count(k) for s in sequences) for k in stages]
    group_tokens = torch.zeros(num_groups, dtype=torch.float64)
    if group_ids is not None:
        group_tokens.index_add_(0, group_ids, torch.tensor(lengths, dtype=torch.float64))
    without = sum(s.rollout_logprobs is None and bool(s.completion_ids) for s in sequences)
    local = torch.tensor(
        [sum(lengths), len(lengths), without, *present, *stage_tokens], dtype=torch.float64
    )
    total = all_sum(torch.cat([local, group_tokens]))  # [3 + 2S + groups]
    tokens, number, without, present, stage_tokens, group_tokens = total.split(
        [1, 1, 1, num_stages, num_stages, num_groups]
    )
    return _Counts(
        tokens=int(tokens),
        sequences=int(number),
        present=present,
        stage_tokens=stage_tokens,
        group_tokens=group_tokens if num_groups else None,
        without_logprobs=int(without),
    )


def _entropy_weights(
    stage_ids: Tensor, cu_seqlens: Tensor, spec: LossSpec, counts: _Counts
) -> Tensor | None:
    if not spec.has_entropy:
        return None
    return stage_entropy_weights(
        stage_ids,
        cu_seqlens,
        torch.tensor(spec.stage_coefs, dtype=torch.float64),
        reduction=spec.reduction,
        reference_length=spec.reference_length,
        num_sequences=counts.sequences,
        num_present=counts.present,
        num_stage_tokens=counts.stage_tokens,
    )


def _logprobs(sequences: list[Sequence], dtype: torch.dtype) -> Tensor:
    values = [x for s in sequences for x in s.rollout_logprobs or ()]
    return torch.tensor(values, dtype=dtype)  # [N], empty on a rank without a sequence


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
            old_logprobs=v.get("old_logprobs"),
            rollout_logprobs=v.get("rollout_logprobs") if spec.objective.rho_mode else None,
            ref_logprobs=v.get("ref_logprobs"),
            spec=spec.objective,
            cu_seqlens=batch.cu_seqlens,
            rows=range(batch.labels.numel()),  # all count: nobody has to ask a GPU
            temperature=spec.temperature,
            **head,
            **dict(spec.options),
        )

    return policy(batch, compute)

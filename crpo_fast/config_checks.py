"""Checks of a whole configuration that need neither model nor data."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from crpo_fast.batch import LAYOUTS
from crpo_fast.config_file import ConfigError
from crpo_fast.config_ranges import check_ranges

if TYPE_CHECKING:
    from crpo_fast.config import Config

ALGORITHMS = ("sft", "crpo", "grpo", "bnpo", "dapo", "dr_grpo", "gspo", "cispo")
AGGREGATIONS = ("token_mean", "sequence_mean", "constant", "bnpo")
LOSS_BACKENDS = ("auto", "triton", "torch", "dense")  # of crpo_kernels
SCORE_KERNELS = ("auto", "fused", "chunks")
SCORE_HEADS = ("full", "fp8")
LR_SCHEDULES = ("linear", "cosine", "constant")


def check(config: Config) -> None:
    """Cross-field checks; needs neither model nor data.

    Raises:
        ConfigError: what to type.
    """
    check_ranges(config)
    _choice("model.compute_dtype", config.model.compute_dtype, ("bfloat16", "float32", "float64"))
    _choice("model.block_kernels", config.model.block_kernels, ("auto", "liger", "none"))
    _choice("data.format", config.data.format, ("auto", "synthetic", "official", "table"))
    _choice("train.layout", config.train.layout, LAYOUTS)
    _choice("train.loss_backend", config.train.loss_backend, LOSS_BACKENDS)
    _choice("train.score_kernel", config.train.score_kernel, SCORE_KERNELS)
    _choice("train.score_head", config.train.score_head, SCORE_HEADS)
    if config.train.score_head == "fp8" and config.model.compute_dtype == "float64":
        raise ConfigError(
            "train.score_head: expected full with model.compute_dtype float64, which is for "
            "checking, got 'fp8'. Type --train.score_head full."
        )
    _choice("optim.schedule", config.optim.schedule, LR_SCHEDULES)
    _choice("eval.split", config.eval.split, ("val", "test"))
    _choice("rewards.balance", config.rewards.balance, ("reward", "advantage", "none"))
    _choice("rewards.match", config.rewards.match, ("prefix", "exact"))
    _choice("advantages.scale", config.advantages.scale, ("group_std", "batch_std", "none"))
    _choice(
        "entropy.schedule",
        config.entropy.schedule,
        ("tanh", "linear", "cosine", "step", "explicit"),
    )
    _choice(
        "entropy.reduction",
        config.entropy.reduction,
        ("sequence_mean", "token_mean", "present_only"),
    )
    _choice("entropy.controller", config.entropy.controller, ("fixed", "dual"))
    _choice("entropy.anneal", config.entropy.anneal, ("none", "linear", "cosine"))
    if config.entropy.anneal_to < 0:
        raise ConfigError(
            f"entropy.anneal_to: expected a factor of at least 0, got {config.entropy.anneal_to}. "
            "Type --entropy.anneal_to 0.0."
        )
    _choice("rollout.engine", config.rollout.engine, ("hf", "static"))
    if config.objective.aggregation is not None:
        _choice("objective.aggregation", config.objective.aggregation, AGGREGATIONS)
    _check_lora(config)
    _check_checkpoint(config)
    _check_data(config)
    _check_rollout(config)
    _check_correction(config)
    _check_updates(config)
    _check_phases(config)
    _check_rewards(config)


def _choice(name: str, value: str, valid: Sequence[str]) -> None:
    if value not in valid:
        near = difflib.get_close_matches(value, valid, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name}: expected one of {', '.join(valid)}, got {value!r}.{hint}")


def _check_lora(config: Config) -> None:
    settings = config.lora
    if not settings.rank:
        for name in ("alpha", "dropout", "targets", "head"):
            if getattr(settings, name) != getattr(type(settings)(), name):
                raise ConfigError(
                    f"lora.{name}: expected a lora.rank above 0 with it, got lora.rank 0. Type "
                    f"--lora.rank 16, or leave lora.{name} out."
                )
        return
    if settings.head and settings.dropout:
        raise ConfigError(
            "lora.dropout: expected 0 with lora.head, got "
            f"{settings.dropout}. The loss reads lm_head's adapter from the hidden states that "
            "lm_head itself gets; type --lora.dropout 0, or --lora.no_head."
        )
    if config.model.freeze_head:
        raise ConfigError(
            "model.freeze_head: expected false with LoRA, which trains adapters alone, got true. "
            "Type --model.no_freeze_head; lm_head has an adapter with --lora.head only."
        )


def _check_checkpoint(config: Config) -> None:
    settings = config.checkpoint
    _choice("checkpoint.best", settings.best, ("auto", "weighted_f1", "reward", "none"))
    if settings.best == "weighted_f1" and not config.eval.every:
        raise ConfigError(
            "checkpoint.best: weighted_f1 needs evaluations during training, got eval.every 0. "
            "Type --eval.every 50, or --checkpoint.best reward."
        )


def _check_data(config: Config) -> None:
    data = config.data
    if data.kind == "official" and not data.root:
        raise ConfigError("data.root: expected a folder, got ''. Type --data.root <folder>.")
    if data.kind == "table" and not data.path:
        raise ConfigError(
            "data.path: expected a JSONL or CSV file, got ''. Type --data.path <file>."
        )
    if (
        data.kind == "table"
        and any(p.algorithm == "sft" for p in config.phases)
        and not data.completion
    ):
        raise ConfigError(
            "data.completion: an sft phase needs the column of written completions, got ''. "
            "Type --data.completion <column>, or remove the sft phase."
        )


def _check_rewards(config: Config) -> None:
    rewards = config.rewards
    weights, functions = rewards.weights, rewards.functions
    if weights and len(weights) != len(functions):
        raise ConfigError(
            f"rewards.weights: expected {len(functions)} numbers, one per function, got "
            f"{len(weights)}."
        )


def _check_rollout(config: Config) -> None:
    rollout, train = config.rollout, config.train
    if rollout.group_size < 2:
        raise ConfigError(
            f"rollout.group_size: expected at least 2, got {rollout.group_size}. Advantages "
            "compare the samples of one prompt; type --rollout.group_size 4."
        )
    if not 0 < rollout.temperature < math.inf:
        raise ConfigError(
            f"rollout.temperature: expected a number above 0, got {rollout.temperature}. Greedy "
            "samples of one prompt are all equal and teach nothing; type --rollout.temperature "
            "0.85."
        )
    if not 0 < rollout.top_p <= 1:
        raise ConfigError(f"rollout.top_p: expected a number in (0, 1], got {rollout.top_p}.")
    longest = config.data.max_prompt_tokens + rollout.max_tokens
    if train.token_budget < longest:
        raise ConfigError(
            f"train.token_budget: expected at least one sequence, {longest} tokens "
            f"(data.max_prompt_tokens + rollout.max_tokens), got {train.token_budget}. Type "
            f"--train.token_budget {longest}."
        )


def _check_correction(config: Config) -> None:
    objective, rollout = config.objective, config.rollout
    mode, cap, floor = objective.rho_mode, objective.rho_cap, objective.rho_floor
    if mode is None:
        for name, value in (("rho_cap", cap), ("rho_floor", floor)):
            if value is not None:
                raise ConfigError(
                    f"objective.{name}: expected objective.rho_mode with it, got {value} alone. "
                    "Type --objective.rho_mode truncate (or mask)."
                )
        return
    _choice("objective.rho_mode", mode, ("truncate", "mask"))
    if floor is not None and mode != "mask":
        raise ConfigError(
            f"objective.rho_floor: expected objective.rho_mode mask with it, got {mode!r}. Type "
            "--objective.rho_mode mask."
        )
    if cap is not None and not 1 <= cap < math.inf:
        raise ConfigError(
            f"objective.rho_cap: expected a finite number of at least 1, got {cap}. Without any "
            "mismatch rho is 1; type --objective.rho_cap 2."
        )
    if floor is not None and not 0 <= floor <= 1:
        raise ConfigError(
            f"objective.rho_floor: expected a number in [0, 1], got {floor}. Without any mismatch "
            "rho is 1; type --objective.rho_floor 0.5."
        )
    if rollout.top_p < 1 or rollout.top_k > 0:
        raise ConfigError(
            "objective.rho_mode: the correction needs untruncated sampling, got top_p "
            f"{rollout.top_p}, top_k {rollout.top_k}. Type --rollout.top_p 1 --rollout.top_k 0."
        )


def _check_updates(config: Config) -> None:
    train, prompts = config.train, config.rollout.prompts_per_step
    updates, minibatches = train.updates_per_rollout, train.minibatches
    minibatches = minibatches or updates
    if updates % minibatches:
        raise ConfigError(
            f"train.minibatches: expected a divisor of train.updates_per_rollout = {updates}, so "
            f"that every group is used equally often, got {minibatches}. Type "
            f"--train.updates_per_rollout {minibatches * -(-updates // minibatches)}."
        )
    if prompts % minibatches:
        raise ConfigError(
            f"rollout.prompts_per_step: expected a multiple of {minibatches} minibatches "
            f"(train.minibatches), got {prompts}. Type --rollout.prompts_per_step "
            f"{minibatches * -(-prompts // minibatches)}."
        )


def _check_phases(config: Config) -> None:
    if not config.phases:
        raise ConfigError("phases: expected at least one [[phases]] table, got none.")
    for i, phase in enumerate(config.phases):
        _choice(f"phases[{i}].algorithm", phase.algorithm, ALGORITHMS)
        if phase.schedule is not None:
            _choice(f"phases[{i}].schedule", phase.schedule, LR_SCHEDULES)

"""Checks of a whole configuration that need neither model nor data."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from crpo_fast.config_file import ConfigError

if TYPE_CHECKING:
    from crpo_fast.config import Config

ALGORITHMS = ("sft", "crpo", "grpo", "bnpo", "dapo", "dr_grpo", "gspo", "cispo")
AGGREGATIONS = ("token_mean", "sequence_mean", "constant", "bnpo")


def check(config: Config) -> None:
    """Cross-field checks; needs neither model nor data."""
    _choice("model.compute_dtype", config.model.compute_dtype, ("bfloat16", "float32", "float64"))
    _choice("data.format", config.data.format, ("auto", "synthetic", "official", "table"))
    _choice("train.layout", config.train.layout, ("packed", "padded"))
    _choice("optim.schedule", config.optim.schedule, ("linear", "cosine", "constant"))
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
    _choice("rollout.engine", config.rollout.engine, ("hf", "static"))
    if config.objective.aggregation is not None:
        _choice("objective.aggregation", config.objective.aggregation, AGGREGATIONS)
    _check_data(config)
    _check_rollout(config)
    _check_phases(config)
    weights, functions = config.rewards.weights, config.rewards.functions
    if weights and len(weights) != len(functions):
        raise ConfigError(
            f"rewards.weights: expected {len(functions)} numbers, one per function, got "
            f"{len(weights)}."
        )


def _choice(name: str, value: str, valid: Sequence[str]) -> None:
    if value not in valid:
        near = difflib.get_close_matches(value, valid, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name}: expected one of {', '.join(valid)}, got {value!r}.{hint}")


def _positive(**values: float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ConfigError(
                f"{name.replace('__', '.')}: expected a positive number, got {value}."
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
    _positive(data__max_prompt_tokens=data.max_prompt_tokens)


def _check_rollout(config: Config) -> None:
    rollout, train = config.rollout, config.train
    if rollout.group_size < 2:
        raise ConfigError(
            f"rollout.group_size: expected at least 2, got {rollout.group_size}. Advantages "
            "compare the samples of one prompt; type --rollout.group_size 4."
        )
    if rollout.temperature <= 0:
        raise ConfigError(
            f"rollout.temperature: expected a number above 0, got {rollout.temperature}. Greedy "
            "samples of one prompt are all equal and teach nothing; type --rollout.temperature "
            "0.85."
        )
    if not 0 < rollout.top_p <= 1:
        raise ConfigError(f"rollout.top_p: expected a number in (0, 1], got {rollout.top_p}.")
    if config.objective.rho_mode and (rollout.top_p < 1 or rollout.top_k > 0):
        raise ConfigError(
            "objective.rho_mode: the correction needs untruncated sampling, got top_p "
            f"{rollout.top_p}, top_k {rollout.top_k}. Type --rollout.top_p 1 --rollout.top_k 0."
        )
    _positive(
        rollout__prompts_per_step=rollout.prompts_per_step,
        rollout__max_tokens=rollout.max_tokens,
        train__token_budget=train.token_budget,
        optim__max_grad_norm=config.optim.max_grad_norm,
    )
    longest = config.data.max_prompt_tokens + rollout.max_tokens
    if train.token_budget < longest:
        raise ConfigError(
            f"train.token_budget: expected at least one sequence, {longest} tokens "
            f"(data.max_prompt_tokens + rollout.max_tokens), got {train.token_budget}. Type "
            f"--train.token_budget {longest}."
        )


def _check_phases(config: Config) -> None:
    if not config.phases:
        raise ConfigError("phases: expected at least one [[phases]] table, got none.")
    for i, phase in enumerate(config.phases):
        _choice(f"phases[{i}].algorithm", phase.algorithm, ALGORITHMS)
        _positive(**{f"phases[{i}]__steps": phase.steps})
    if config.train.max_steps < 0:
        raise ConfigError(
            f"train.max_steps: expected 0 (no cap) or more, got {config.train.max_steps}."
        )

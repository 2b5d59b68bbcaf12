"""Prompts -> sampled completions -> rewards -> advantages -> sequences ready for packing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from crpo_fast.advantages import group_advantages
from crpo_fast.batch import RolloutGroup, Row, SamplingParams
from crpo_fast.metrics import Sums
from crpo_fast.packing import Sequence
from crpo_fast.rollout import Engine
from crpo_fast.task import Task
from crpo_fast.timing import timer


@dataclass(frozen=True)
class Experience:
    """One rank's part of one rollout, in rollout order."""

    sequences: list[Sequence]
    sums: Sums
    samples: list[dict[str, Any]] = field(default_factory=list)  # for samples.jsonl


def collect(
    task: Task,
    engine: Engine,
    rows: list[Row],
    *,
    group_size: int,
    params: SamplingParams,
    seed: int,
    scale: str,
    all_rewards: Callable[[list[float]], list[float]] = list,
) -> Experience:
    """Sample ``group_size`` completions per row and turn them into sequences with advantages.

    Args:
        task: rewards, grammar and tokenizer.
        engine: samples the completions.
        rows: this rank's rows; groups never cross ranks.
        group_size: completions per prompt.
        params: of the sampling.
        seed: of the sampling, a function of the run's seed, the step and the rank.
        scale: of the advantages.
        all_rewards: this rank's rewards -> those of all ranks; called by ``batch_std`` alone.
    """
    sums = Sums()
    prompts = [task.prompt(row) for row in rows]
    with timer("generation"):
        groups = engine.generate([ids for ids, _ in prompts], group_size, params, seed)
    repeated = [row for row in rows for _ in range(group_size)]
    completions = [task.decode(s.token_ids) for g in groups for s in g.samples]
    with timer("reward"):
        table = task.score(repeated, completions)
    weights = None
    if task.balance == "advantage":
        weights = [task.balance_weights.get((r.dataset_id, r.label), 1.0) for r in repeated]
    batch = all_rewards(table.total) if scale == "batch_std" else None
    advantages = group_advantages(
        table.total, group_size, scale=scale, weights=weights, batch=batch
    )
    sequences = _sequences(task, groups, advantages)
    _add_rewards(sums, table, group_size)
    for _, truncated in prompts:
        sums.add("prompts/truncated", truncated > 0, 1)
    for sample in (s for g in groups for s in g.samples):
        sums.add("completions/length", len(sample.token_ids), 1)
        sums.add("completions/truncated", sample.finish_reason == "length", 1)
    first = {
        "prompt_tokens": len(prompts[0][0]),
        "dataset_id": rows[0].dataset_id,
        "answer": rows[0].label,
        "completion": completions[0],
        "rewards": {name: values[0] for name, values in table.parts.items()},
        "advantage": advantages[0],
        "stage_ids": sequences[0].stage_ids,
    }
    return Experience(sequences, sums, [first])


def written(task: Task, rows: list[Row]) -> Experience:
    """The cold-start sequences of rows with written completions."""
    sequences = [task.written(row) for row in rows]
    sums = Sums()
    sums.add("completions/length", sum(len(s.completion_ids) for s in sequences), len(sequences))
    return Experience(sequences, sums)


def _sequences(task: Task, groups: list[RolloutGroup], advantages: list[float]) -> list[Sequence]:
    pairs = [(g.prompt_ids, s) for g in groups for s in g.samples]
    return [
        Sequence(
            prompt_ids=prompt_ids,
            completion_ids=sample.token_ids,
            stage_ids=task.grammar.stage_ids(sample.token_ids, task.tokenizer),
            rollout_logprobs=sample.logprobs,
            advantage=advantage,
        )
        for (prompt_ids, sample), advantage in zip(pairs, advantages, strict=True)
    ]


def _add_rewards(sums: Sums, table: Any, group_size: int) -> None:
    for value in table.total:
        usable = math.isfinite(value)
        sums.add("reward", value if usable else 0.0, usable)
        sums.add("reward/not_usable", not usable, 1)
    for name, values in table.parts.items():
        for value in values:
            sums.add(f"reward/{name}", value or 0.0, value is not None)
    for i in range(0, len(table.total), group_size):
        group = table.total[i : i + group_size]
        sums.add("reward/zero_std_groups", max(group) == min(group), 1)

"""Prompts -> sampled completions -> rewards -> advantages -> sequences ready for packing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from crpo_fast import distributed, reward_errors
from crpo_fast.advantages import group_advantages
from crpo_fast.batch import RolloutGroup, Row, SamplingParams
from crpo_fast.distributed import World
from crpo_fast.dynamic_sampling import Resampling, has_signal
from crpo_fast.metrics import Sums
from crpo_fast.packing import Sequence
from crpo_fast.rollout import Engine
from crpo_fast.task import Task
from crpo_fast.timing import timer
from crpo_fast.traces import TokenTrace, choose, sample_record


@dataclass(frozen=True)
class Experience:
    """One rank's part of one rollout, in rollout order.

    Attributes:
        sequences: what is trained on; ``group_size`` of each prompt side by side.
        sums: metrics of everything that was sampled, of this rank until ``reduced``.
        num_sampled: tokens that were generated, dropped groups included.
        reward_errors: the first of each kind (see `reward_errors.note`).
        trace: of some sequences, on rank 0, for samples.jsonl.
    """

    sequences: list[Sequence]
    sums: Sums
    num_sampled: int = 0
    reward_errors: dict[str, Any] = field(default_factory=dict)
    trace: TokenTrace | None = None

    def reduced(self, world: World) -> Experience:
        """The same with the sums of all ranks; a collective."""
        sums = self.sums.reduced(lambda x: distributed.all_sum(x.to(world.device)).cpu())
        return replace(self, sums=sums)


@dataclass(frozen=True)
class Scored:
    """Sampled groups with their rewards: P prompts with G samples each."""

    rows: list[Row]  # [P]
    groups: list[RolloutGroup]  # [P]
    completions: list[str]  # [P * G]
    rewards: list[float]  # [P * G]
    parts: dict[str, list[float | None]]  # by reward function, [P * G]

    def with_signal(self) -> Scored:
        """The groups whose rewards differ."""
        size = len(self.rewards) // max(1, len(self.rows))
        kept = [p for p in range(len(self.rows)) if has_signal(self.rewards[p * size :][:size])]
        samples = [p * size + g for p in kept for g in range(size)]
        return Scored(
            [self.rows[p] for p in kept],
            [self.groups[p] for p in kept],
            [self.completions[i] for i in samples],
            [self.rewards[i] for i in samples],
            {name: [values[i] for i in samples] for name, values in self.parts.items()},
        )

    def joined(self, other: Scored) -> Scored:
        """These groups, then those of ``other``."""
        return Scored(
            self.rows + other.rows,
            self.groups + other.groups,
            self.completions + other.completions,
            self.rewards + other.rewards,
            {name: values + other.parts.get(name, []) for name, values in self.parts.items()},
        )


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
    mask_truncated: bool = False,
    resampling: Resampling | None = None,
    num_traced: int = 0,
    first: int = 0,
) -> Experience:
    """Sample ``group_size`` completions per row and turn them into sequences with advantages.

    Args:
        task: rewards, grammar and tokenizer.
        engine: samples the completions.
        rows: this rank's rows; groups never cross ranks.
        group_size: completions per prompt.
        params: of the sampling.
        seed: of the sampling, a function of the run's seed and the step.
        scale: of the advantages.
        all_rewards: this rank's rewards -> those of all ranks; called by ``batch_std`` alone.
        mask_truncated: a completion without an end token keeps its place and its reward in its
            group, but is an empty one in the loss.
        resampling: replaces groups without reward variance; None: they stay.
        num_traced: completions whose tokens are recorded.
        first: position of the first row among those of all ranks.
    """
    sums, errors = Sums(), {}
    batch = _sample(task, engine, rows, group_size, params, (seed, first), sums, errors)
    if resampling is not None:
        batch = _replace(
            batch,
            resampling,
            sums,
            lambda rows, seed: _sample(
                task, engine, rows, group_size, params, (seed, 0), sums, errors
            ),
        )
    repeated = [row for row in batch.rows for _ in range(group_size)]
    weights = None
    if task.balance == "advantage":
        weights = [task.balance_weights.get((r.dataset_id, r.label), 1.0) for r in repeated]
    everywhere = all_rewards(batch.rewards) if scale == "batch_std" else None
    advantages = group_advantages(
        batch.rewards, group_size, scale=scale, weights=weights, batch=everywhere
    )
    sequences = _sequences(task, batch.groups, advantages, mask_truncated)
    if mask_truncated:
        sums.add_total("completions/masked", sum(not s.completion_ids for s in sequences))
    sampled = int(sums.total("completions/length"))
    scored = Experience(sequences, sums, sampled, errors)
    return _traced(scored, task, batch, num_traced)


def _sample(
    task: Task,
    engine: Engine,
    rows: list[Row],
    group_size: int,
    params: SamplingParams,
    stream: tuple[int, int],  # seed and first of ``Engine.generate``
    sums: Sums,
    errors: dict[str, Any],
) -> Scored:
    """One round of sampling and scoring, with its metrics; ``rows`` may be empty."""
    prompts = [task.prompt(row) for row in rows]
    with timer("generation"):
        groups = engine.generate([ids for ids, _ in prompts], group_size, params, *stream)
    if not rows:  # the call was for the other ranks
        return Scored([], [], [], [], {})
    repeated = [row for row in rows for _ in range(group_size)]
    completions = [task.decode(s.token_ids) for g in groups for s in g.samples]
    with timer("reward"):
        table = task.score(repeated, completions, group_size)
    _add_rewards(sums, table, group_size)
    reward_errors.record(sums, table)
    reward_errors.note(errors, table, repeated)
    for row, completion in zip(repeated, completions, strict=True):
        sums.add("completions/right", task.is_right(row, completion), 1)
    for _, truncated in prompts:
        sums.add("prompts/truncated", truncated > 0, 1)
    for sample in (s for g in groups for s in g.samples):
        sums.add("completions/length", len(sample.token_ids), 1)
        sums.add("completions/truncated", sample.finish_reason == "length", 1)
    sums.add_total("completions/unknown_ids", _num_unknown(task, groups))
    return Scored(rows, groups, completions, table.total, table.parts)


def _num_unknown(task: Task, groups: list[RolloutGroup]) -> int:
    """Tokens whose ids the tokenizer does not know: padded rows of the head."""
    size = len(task.tokenizer)
    return sum(token >= size for g in groups for s in g.samples for token in s.token_ids)


def _replace(
    batch: Scored,
    resampling: Resampling,
    sums: Sums,
    sample: Callable[[list[Row], int], Scored],
) -> Scored:
    """Groups with reward variance alone, as many as in ``batch`` where the rounds suffice."""
    wanted = sampled = len(batch.rows)
    kept, rounds = batch.with_signal(), 1
    while rounds <= resampling.max_rounds:
        rows = resampling.rows(rounds, wanted - len(kept.rows))
        if not resampling.all_max(len(rows)):  # nothing is missing, or the data are used up
            break
        kept = kept.joined(sample(rows, resampling.seed(rounds)).with_signal())
        sampled, rounds = sampled + len(rows), rounds + 1
    sums.add("groups/rounds", rounds, 1)
    sums.add_total("groups/sampled", sampled)
    sums.add_total("groups/dropped", sampled - len(kept.rows))
    sums.add_total("groups/missing", wanted - len(kept.rows))
    return kept


def _traced(batch: Experience, task: Task, scored: Scored, count: int) -> Experience:
    """The same experience with a trace of ``count`` completions, whose sequences know it."""
    if not count or not scored.rows:
        return batch
    samples = [s for g in scored.groups for s in g.samples]
    group_size = len(scored.groups[0].samples)
    sequences, records, place, lengths = list(batch.sequences), [], 0, []
    for i in choose(scored.rewards, group_size, count):
        sequences[i] = replace(sequences[i], trace=place)
        lengths.append(len(sequences[i].completion_ids))
        place += lengths[-1]
        record = sample_record(
            task,
            scored.rows[i // group_size],
            samples[i],
            kind="sample",
            prompt=i // group_size,
            rewards={name: values[i] for name, values in scored.parts.items()},
            reward=scored.rewards[i] if math.isfinite(scored.rewards[i]) else None,
            advantage=sequences[i].advantage,
        )
        records.append(record)
    return replace(batch, sequences=sequences, trace=TokenTrace(records, lengths))


def written(task: Task, rows: list[Row]) -> Experience:
    """The cold-start sequences of rows with written completions."""
    sequences = [task.written(row) for row in rows]
    sums = Sums()
    sums.add("completions/length", sum(len(s.completion_ids) for s in sequences), len(sequences))
    return Experience(sequences, sums)


def _sequences(
    task: Task, groups: list[RolloutGroup], advantages: list[float], mask_truncated: bool
) -> list[Sequence]:
    pairs = [(g.prompt_ids, s) for g in groups for s in g.samples]
    sequences = []
    for (prompt_ids, sample), advantage in zip(pairs, advantages, strict=True):
        ids, logprobs = sample.token_ids, sample.logprobs
        if mask_truncated and sample.finish_reason == "length":
            ids, logprobs = [], []
        stage_ids = task.grammar.stage_ids(ids, task.tokenizer)
        sequences.append(Sequence(prompt_ids, ids, stage_ids, logprobs, advantage))
    return sequences


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
        sums.add("reward/zero_std_groups", not has_signal(group), 1)

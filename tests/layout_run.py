"""A whole run of train.py whose completions are replayed: the same ones at every number of ranks.

Real rollouts are seeded by rank. The engine here makes a sample from the prompt and the sample's
number alone, so that what ends in metrics.jsonl must not depend on the ranks.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from torch import nn

from crpo_fast import distributed, session, train
from crpo_fast.batch import RolloutGroup, Row, Sample, SamplingParams
from crpo_fast.distributed import World
from crpo_fast.prompts import encode_completion
from crpo_fast.task import Task

CONFIG = Path(__file__).with_name("tiny.toml")
# 3 sequences in SFT leave one of 4 ranks without any; groups of 5 for bnpo cross ranks
OPTIONS = {
    "model.compute_dtype": "float64",
    "rollout.prompts_per_step": 8,
    "rollout.group_size": 3,
    "rollout.max_tokens": 48,
    "rollout.max_mismatch": 100,
    "rollout.mask_truncated": True,
    "advantages.scale": "batch_std",
    "objective.bnpo_group": 5,
    "objective.rho_mode": "truncate",
    "objective.kl_coef": 0.1,
    "train.layout": "shared",
    "train.token_budget": 160,
    "train.updates_per_rollout": 4,
    "train.minibatches": 2,
    "train.threads": 1,
    "checkpoint.every": 0,
    "phases.0.steps": 2,
    "phases.0.sequences_per_step": 3,
    "phases.1.steps": 2,
}


class Replay:
    """Written completions with right and wrong answers, cut ones, and ones without their tags."""

    renormalises = False

    def __init__(self, task: Task) -> None:
        self.task = task
        self.rows = {tuple(task.prompt(r)[0]): r for r in (*task.rows.train, *task.rows.test)}

    def generate(
        self,
        prompt_ids: list[list[int]],
        group_size: int,
        params: SamplingParams,
        seed: int,
        first: int = 0,
    ) -> list[RolloutGroup]:
        """``seed`` and ``first`` are not used."""
        del seed, first
        return [
            RolloutGroup(ids, [self.sample(ids, i, params) for i in range(group_size)])
            for ids in prompt_ids
        ]

    def sample(self, prompt_ids: list[int], number: int, params: SamplingParams) -> Sample:
        """A function of its arguments and the task alone."""
        rng, row = random.Random(f"{prompt_ids}/{number}"), self.rows[tuple(prompt_ids)]
        ids = self.written(rng.choice(self.task.rows.cold_start), row.label if number % 2 else "No")
        kind = rng.choice(("whole", "whole", "cut", "mixed"))
        if kind == "cut":
            ids = ids[: len(ids) // 2]
        if kind == "mixed":
            ids = [i for i in ids if rng.random() < 0.8] or ids
        ids = ids[: params.max_tokens]
        reason = "stop" if ids[-1] in params.eos_ids else "length"
        return Sample(ids, [-3 - 4 * rng.random() for _ in ids], reason, 0)

    def written(self, row: Row, label: str) -> list[int]:
        """Another row's stages with ``label``."""
        text = self.task.grammar.render(row.stages or {}, label)
        return encode_completion(text, self.task.tokenizer)

    def sync(self, policy: nn.Module, version: int) -> None:
        """The weights do not matter."""

    def close(self) -> None:
        """Nothing to free."""


def main(world: World, out: Path) -> None:
    """Run in this process group, which stays open."""
    build = session.build

    def built(*args: Any, **kwargs: Any) -> session.Session:
        real = build(*args, **kwargs)
        return replace(real, engine=Replay(real.task))

    arguments = [str(CONFIG), "--run.dir", str(out / "run")]
    for name, value in OPTIONS.items():
        flag = f"--{name}" if value is True else f"--{name}={value}"
        arguments.append(flag)
    with (
        mock.patch.object(distributed, "init", return_value=world),
        mock.patch.object(distributed, "shutdown"),
        mock.patch.object(session, "build", built),
    ):
        status = train.main(arguments)
    assert status == 0, status

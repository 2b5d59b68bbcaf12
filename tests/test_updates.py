"""Several updates per rollout: weights and metrics of a step against a dense reference."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import crpo_fast.policy
from crpo_fast import distributed, train
from crpo_fast.config import ConfigError, parse_arguments
from crpo_fast.distributed import World
from crpo_fast.loss import LossSpec, flat_vectors
from crpo_fast.packing import Sequence
from crpo_fast.updates import UpdatePlan
from crpo_kernels import ObjectiveSpec
from loop_cases import CASES, Case, errors, measure


@pytest.fixture
def alone() -> Iterator[World]:
    yield distributed.init(threads=1)
    distributed.shutdown()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_step_equals_the_dense_reference(case: Case, alone: World, tmp_path: Path) -> None:
    found = errors(case, alone, tmp_path)
    assert found["weights"] <= 1e-10
    assert found["metrics"] == {}
    assert (found["clip_fraction"] > 0) == case.must_clip


@pytest.mark.parametrize(
    ("updates", "minibatches", "passes"), [(1, 1, 0), (3, 1, 0), (2, 2, 1), (4, 2, 1), (4, 4, 3)]
)
def test_extra_passes_are_made_for_later_minibatches_alone(
    updates: int,
    minibatches: int,
    passes: int,
    alone: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first minibatch's own pass gives its old logprobs; the reference is another policy."""
    calls = []
    score = crpo_fast.policy.Policy.score

    def counted(self: crpo_fast.policy.Policy, *args: Any, **kwargs: Any) -> Any:
        calls.append(next(self.model.parameters()).requires_grad)
        return score(self, *args, **kwargs)

    monkeypatch.setattr(crpo_fast.policy.Policy, "score", counted)
    measure(Case("", updates, minibatches), alone, tmp_path, budget=10_000)
    assert sum(calls) == passes
    assert len(calls) - sum(calls) == minibatches


def test_groups_are_split_alike_at_any_number_of_ranks() -> None:
    sequences = [Sequence([i], [1], [-1]) for i in range(16)]  # 8 groups of 2
    plan = UpdatePlan(2, 2, 2)

    def firsts(part: list[Sequence]) -> list[int]:
        return [s.prompt_ids[0] for s in part]

    one = [firsts(part) for part in plan.split(sequences)]
    assert one == [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]
    ranks = [plan.split(sequences[:8]), plan.split(sequences[8:])]
    assert [firsts(ranks[0][m]) + firsts(ranks[1][m]) for m in (0, 1)] == one
    uneven = [firsts(part) for part in UpdatePlan(3, 3, 2).split(sequences[:4])]
    assert uneven == [[0, 1], [2, 3], []]  # dynamic sampling left two groups


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.updates_per_rollout", "0"], "train.updates_per_rollout: expected a positive"),
        (["--train.minibatches", "-1"], "train.minibatches: expected 0"),
        (
            ["--train.updates_per_rollout", "3", "--train.minibatches", "2"],
            "a divisor of train.updates_per_rollout = 3.*--train.updates_per_rollout 4",
        ),
        (
            ["--train.updates_per_rollout", "3"],
            "multiple of 3 minibatches.*got 16.*--rollout.prompts_per_step 18",
        ),
        (["--train.max_nonfinite", "0"], "train.max_nonfinite: expected a positive"),
        (["--rollout.max_resamples", "0"], "rollout.max_resamples: expected a positive"),
        (["--objective.rho_mode", "trunkate"], "Did you mean 'truncate'"),
        (["--objective.rho_cap", "3"], "objective.rho_cap: expected objective.rho_mode with it"),
        (["--objective.rho_mode", "mask", "--objective.rho_cap", "0.5"], "of at least 1, got 0.5"),
        (
            ["--objective.rho_mode", "truncate", "--objective.rho_floor", "0.5"],
            "objective.rho_floor: expected objective.rho_mode mask",
        ),
        (
            ["--objective.rho_mode", "mask", "--objective.rho_floor", "2"],
            r"objective.rho_floor: expected a number in \[0, 1\]",
        ),
        (
            ["--objective.rho_mode", "mask", "--rollout.top_p", "0.9"],
            "the correction needs untruncated sampling.*--rollout.top_p 1",
        ),
    ],
)
def test_refusals(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_arguments(arguments)


TINY = str(Path(__file__).with_name("tiny.toml"))
EVERYTHING = [
    *("--train.updates_per_rollout", "4", "--train.minibatches", "2", "--rollout.dynamic_sampling"),
    *("--rollout.prompts_per_step", "4", "--rewards.functions", "faulty_rewards:length"),
    *("--objective.rho_mode", "truncate", "--train.threads", "1"),
]


def test_a_run_with_all_of_it_resumes_bitwise(tmp_path: Path) -> None:
    """Stopped in the middle of both phases, then continued: same weights and metrics."""

    def finished(name: str, *caps: list[str]) -> tuple[list[dict], dict]:
        for cap in (*caps, []):
            assert train.main([TINY, "--run.dir", str(tmp_path / name), *EVERYTHING, *cap]) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        timed = ("seconds", "tokens_per_second")
        logged = [json.loads(line) for line in lines]
        kept = [{k: v for k, v in r.items() if not k.startswith(timed)} for r in logged]
        return kept, load_file(tmp_path / name / "final" / "model.safetensors")

    metrics, weights = finished("whole")
    trained = [r for r in metrics if r["phase"] == "crpo"]
    assert [r["updates"] for r in trained] == [4] * 4
    assert all(r["grad_norm"] > 0 and r["ratio"] != 1 for r in trained)
    assert all(r["groups/sampled"] == 4 + r["groups/dropped"] for r in trained)
    assert all(r["updates"] == 1 for r in metrics if r["phase"] == "sft")
    again, found = finished("stopped", ["--train.max_steps", "2"])
    assert again == metrics
    assert all((found[k] == v).all() for k, v in weights.items())


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant"])
def test_masked_completions_weigh_as_in_trl(aggregation: str) -> None:
    """TRL's loss types grpo, dapo and dr_grpo, with the mask of a truncated completion at zero."""
    lengths, max_length = [3, 0, 2, 4], 6  # the second was cut off
    mask = torch.tensor([[float(t < n) for t in range(max_length)] for n in lengths])
    loss = torch.arange(24.0).reshape(4, 6) ** 1.5
    expected = {
        "sequence_mean": ((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean(),
        "token_mean": (loss * mask).sum() / mask.sum().clamp(min=1),
        "constant": (loss * mask).sum() / (4 * max_length),
    }
    sequences = [Sequence([1], [2] * n, [-1] * n, advantage=1.0) for n in lengths]
    spec = LossSpec(ObjectiveSpec(), aggregation, (), max_length=max_length)
    weights = flat_vectors(sequences, spec, all_sum=lambda x: x)["token_weights"]
    assert weights is not None
    flat = torch.cat([row[:n] for row, n in zip(loss, lengths, strict=True)])
    assert float((weights * flat).sum()) == pytest.approx(float(expected[aggregation]))

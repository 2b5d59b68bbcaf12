"""Several updates per rollout: weights and metrics of a step against a dense reference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import crpo_fast.policy
from crpo_fast import distributed
from crpo_fast.distributed import World
from crpo_fast.packing import Sequence
from crpo_fast.updates import UpdatePlan
from loop_cases import CASES, Case, errors, measure


@pytest.fixture(scope="module")
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
    logprobs = crpo_fast.policy.Policy.logprobs

    def counted(self: crpo_fast.policy.Policy, *args: object, **kwargs: object) -> object:
        calls.append(next(self.model.parameters()).requires_grad)
        return logprobs(self, *args, **kwargs)

    monkeypatch.setattr(crpo_fast.policy.Policy, "logprobs", counted)
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

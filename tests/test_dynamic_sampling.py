"""Groups without reward variance are replaced, counted, and never looked for without end."""

from __future__ import annotations

import math

import pytest

from crpo_fast.batch import Row
from crpo_fast.dynamic_sampling import further_rows, has_signal, round_seed
from loop_cases import ROWS, collected

NAN = math.nan


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1.0, 1.0, 1.0], False),
        ([1.0, 1.0, 1.5], True),
        ([1.0, NAN, NAN], False),
        ([1.0, NAN, 1.0], False),
        ([1.0, NAN, 2.0], True),
        ([NAN, math.inf], False),
        ([], False),
    ],
)
def test_signal(rewards: list[float], expected: bool) -> None:
    assert has_signal(rewards) == expected


def test_full_after_the_first_round() -> None:
    prompts, metrics, engine, batch = collected(ROWS, [4, 0, 2], (0, 1))
    assert prompts == [4, 0, 2]
    assert [len(ids) for ids, _ in engine.calls] == [3]
    assert metrics["groups/rounds"] == 1
    assert (metrics["groups/sampled"], metrics["groups/dropped"]) == (3, 0)
    assert [s.advantage for s in batch.sequences[:3]] == [-1.0, 0.0, 1.0]


def test_constant_groups_are_replaced_by_further_prompts() -> None:
    prompts, metrics, engine, batch = collected(ROWS, [1, 0, 3, 2], (0, 1), rounds=9)
    rounds = [[ids[0] for ids in prompts] for prompts, _ in engine.calls]
    assert rounds[0] == [1, 0, 3, 2]
    sampled = [i for prompts in rounds for i in prompts]
    assert len(set(sampled)) == len(sampled), "a prompt came twice"
    assert prompts == [i for i in sampled if i % 2 == 0]  # 0 and 2 first, then the further ones
    assert len(prompts) == 4
    # each round asks for exactly what is missing, with a seed of its own
    kept = 0
    for round_ in rounds:
        assert len(round_) == 4 - kept
        kept += sum(i % 2 == 0 for i in round_)
    assert len({seed for _, seed in engine.calls}) == len(rounds) > 1
    expected = {
        "groups/rounds": len(rounds),
        "groups/sampled": len(sampled),
        "groups/dropped": sum(i % 2 for i in sampled),
        "groups/missing": 0,
        # metrics are of everything that was sampled: 0, 1, 2 or three times 1
        "reward": 1.0,
        "reward/zero_std_groups": sum(i % 2 for i in sampled) / len(sampled),
        "completions/length": 1.0,
    }
    assert {k: metrics[k] for k in expected} == expected
    assert batch.num_sampled == 3 * len(sampled)
    assert [s.advantage for s in batch.sequences] == [-1.0, 0.0, 1.0] * 4


def test_rounds_are_bounded_and_what_is_missing_is_counted() -> None:
    constant = [Row(f"post {i}", "c") for i in range(50)]
    prompts, metrics, engine, batch = collected(constant, [0, 1], (0, 1), rounds=3)
    assert prompts == []
    assert batch.sequences == []
    assert batch.trace is None
    assert len(engine.calls) == 4
    found = [metrics[f"groups/{k}"] for k in ("sampled", "dropped", "missing", "rounds")]
    assert found == [8, 8, 2, 4]


def test_few_usable_rewards_are_no_signal() -> None:
    rows = [Row("post 0", "n"), Row("post 1", "v"), Row("post 2", "v")]
    prompts, metrics, _, _ = collected(rows, [0, 1], (0, 1))
    assert prompts == [1, 2]
    assert metrics["groups/dropped"] == 1
    assert metrics["reward/not_usable"] == pytest.approx(2 / 9)


def test_small_data_end_the_rounds() -> None:
    prompts, metrics, engine, _ = collected(ROWS[:5], [1, 3, 0, 2], (0, 1), rounds=1000)
    assert prompts == [0, 2, 4]  # row 4 is the only one that was left
    assert len(engine.calls) == 2
    assert metrics["groups/missing"] == 1
    _, metrics, engine, _ = collected(ROWS[:2], [1, 1, 1, 1], (0, 1), rounds=1000)
    assert len(engine.calls) == 2
    assert metrics["groups/missing"] == 3


def test_further_rows_are_a_pure_function_of_seed_step_round_and_rank() -> None:
    def rows(**changes: int) -> list[int]:
        options = {"seed": 0, "step": 5, "round_": 1, "rank": 0, "world_size": 2, "share": 4}
        return further_rows(100, [3, 4], **{**options, **changes})

    assert rows() == rows()
    everything = [i for rank in (0, 1) for r in range(1, 99) for i in rows(rank=rank, round_=r)]
    assert sorted(everything) == [i for i in range(100) if i not in (3, 4)]
    assert rows() != rows(step=6)
    assert rows() != rows(seed=1)
    seeds = {round_seed(s, t, k, r) for s in (0, 1) for t in (0, 1) for k in (1, 2) for r in (0, 1)}
    assert len(seeds) == 16
    assert all(0 <= s < 2**63 for s in seeds)


def test_masked_completions_keep_place_and_advantage() -> None:
    """Sample 0 of every group has no end token."""
    _, metrics, _, batch = collected(ROWS, [0, 2], (0, 1), mask_truncated=True)
    assert [s.completion_ids for s in batch.sequences] == [[], [1], [2]] * 2
    assert [s.rollout_logprobs for s in batch.sequences] == [[], [-1.0], [-1.0]] * 2
    assert [s.advantage for s in batch.sequences] == [-1.0, 0.0, 1.0] * 2
    assert metrics["completions/masked"] == 2  # a number, not a share
    assert metrics["completions/truncated"] == pytest.approx(1 / 3)
    assert batch.num_sampled == 6  # what was generated, masked or not
    *_, batch = collected(ROWS, [0, 2], (0, 1))
    assert [s.completion_ids for s in batch.sequences] == [[0], [1], [2]] * 2

"""What a run shows of rewards that fail: metrics, lines, the bound, refusals."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crpo_fast import reward_errors, train
from crpo_fast.batch import Row
from crpo_fast.config import load_config
from crpo_fast.metrics import Sums
from crpo_fast.reward_calls import RewardFailure, RewardTable
from crpo_fast.reward_pool import InProcessRewards
from crpo_fast.run_folder import RunFolder
from crpo_fast.task import load_rows, order

TINY = str(Path(__file__).with_name("tiny.toml"))


def test_counts_over_ranks_and_lines():
    nan, rows = math.nan, [Row("t", "l", dataset_id=d) for d in ("A", "A", "B", "B")]
    first = RewardTable([1.0] * 4, {"f": [1.0] * 4})
    failed = (RewardFailure("nan", "f", 1, "returned nan"), RewardFailure("crash", "g", 3, "gone"))
    second = RewardTable([1.0, nan, nan, nan], {}, failed, recovered=2, not_run=1)
    sums, notes = [Sums(), Sums()], [{}, {}]
    for s, note, table in zip(sums, notes, (first, second), strict=True):
        reward_errors.record(s, table)
        reward_errors.note(note, table, rows)
    alone = sums[0].means(lambda x: x)
    assert alone == dict.fromkeys(alone, 0.0)
    added = []
    sums[0].means(lambda x: added.append(x) or x)
    metrics = sums[1].means(lambda x: x + added.pop(0) if added else x)
    assert metrics.keys() == alone.keys()
    assert metrics == {
        "reward/error_rate": 3 / 8,
        "reward/errors/exception": 0,
        "reward/errors/timeout": 0,
        "reward/errors/nan": 1,
        "reward/errors/wrong_length": 0,
        "reward/errors/crash": 1,
        "reward/errors/recovered": 2,
        "reward/errors/not_run": 1,
    }
    assert reward_errors.lines(notes, metrics, 7) == [
        "step 7: reward nan x 1, first: function f, rank 1, sample 1, data set A: returned nan",
        "step 7: reward crash x 1, first: function g, rank 1, sample 3, data set B: gone",
    ]
    assert reward_errors.verdict({**metrics, "reward/errors/not_run": 0}, 0.375, 7) is None
    message = reward_errors.verdict(metrics, 0.375, 7)  # a round of several was given up
    assert "at most 37.5% of a round's samples" in message
    assert "got more in one of step 7, 37.5% over all its rounds (1 nan" in message
    message = reward_errors.verdict(metrics, 0.37, 7)
    assert "got 37.5% at step 7 (1 nan, 1 crash, 1 not_run" in message
    assert "--rewards.timeout" in message


FAULTY = [TINY, "--rewards.functions", "faulty_rewards:by_dataset", "--rewards.workers", "2"]
FAULTY += ["--rollout.prompts_per_step", "16", "--rewards.timeout", "1", "--train.max_steps", "2"]


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_counts_what_fails_and_stops_above_the_bound(tmp_path, capsys):
    run_dir = tmp_path / "r"
    arguments = [*FAULTY, "--run.dir", str(run_dir)]
    assert train.main(arguments) == 1  # rows of five of eight data sets fail, the bound is 5 %
    captured = capsys.readouterr()
    assert "expected at most 5.0% of a step's samples without a reward" in captured.err
    assert "The state is saved: the same command continues." in captured.err
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_2"  # no update by bad rewards
    assert [r["phase"] for r in records(run_dir)] == ["sft", "sft"]
    assert train.main([*arguments, "--rewards.max_error_rate", "1"]) == 0
    captured = capsys.readouterr()
    rows = load_rows(load_config(TINY), run_dir, write=False).train
    logged = [r for r in records(run_dir) if r["phase"] == "crpo"]
    assert len(logged) == 2
    found = order(len(rows), 5, 16, 16)
    sets = Counter(rows[i].dataset_id for i in found)  # of the second step, which ran to its end
    step = logged[1]
    expected = {"exception": "Dreaddit", "timeout": "DATD", "crash": "SDCNL", "nan": "FIG"}
    for kind, name in {**expected, "wrong_length": "RSD"}.items():
        assert step[f"reward/errors/{kind}"] == 2 * sets[name]
        if sets[name]:
            assert f"step 4: reward {kind} x {2 * sets[name]}, first: function" in captured.out
            assert f"data set {name}" in captured.out
    failed = sum(2 * sets[n] for n in ("Dreaddit", "DATD", "SDCNL", "FIG", "RSD"))
    assert failed > 8
    assert step["reward/error_rate"] == step["reward/not_usable"] == failed / 32
    assert step["reward"] == step["reward/by_dataset"] == 1.0
    assert step["reward/errors/recovered"] == step["reward/errors/not_run"] == 0
    assert logged[0]["reward/error_rate"] > 0.05
    assert logged[0].keys() == step.keys()
    assert not any(row.text[:20] in captured.out + captured.err for row in rows)


def test_workers_change_nothing_in_a_run(tmp_path):
    timed = ("seconds", "tokens_per_second")
    logs = []
    for workers in ("0", "2"):
        run_dir = tmp_path / workers
        arguments = [TINY, "--run.dir", str(run_dir), "--rewards.workers", workers]
        assert train.main([*arguments, "--train.max_steps", "1"]) == 0
        logs.append(
            [{k: v for k, v in r.items() if not k.startswith(timed)} for r in records(run_dir)]
        )
    assert logs[0] == logs[1]
    assert logs[0][-1]["reward/error_rate"] == 0
    assert logs[0][-1]["reward/errors/timeout"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rewards.functions", "faulty_rewards:nothing"], "'nothing' in faulty_rewards"),
        (["--rewards.functions", "no_such_module_here:f"], "importable module"),
        (["--rewards.workers", "-1"], "rewards.workers: expected 0"),
        (["--rewards.timeout", "0"], "rewards.timeout: expected a positive number"),
        (["--rewards.max_error_rate", "5"], "rewards.max_error_rate: expected a share"),
    ],
)
def test_refusals_come_before_anything_is_written(tmp_path, capsys, arguments, message):
    assert train.main([TINY, "--run.dir", str(tmp_path / "r"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not RunFolder(tmp_path / "r").path.exists()


def test_a_step_without_rewards_leaves_the_state_before_it(tmp_path, capsys, monkeypatch):
    """The steps since the last checkpoint are saved, and the run goes on as if nothing had been."""
    logs, weights = [], []
    for name in ("whole", "stopped"):
        run_dir = tmp_path / name
        arguments = [TINY, "--run.dir", str(run_dir), "--rewards.workers", "0"]
        arguments += ["--train.max_steps", "3", "--checkpoint.every", "0"]
        if name == "stopped":
            with monkeypatch.context() as patch:
                fail_from(patch, calls=2)
                assert train.main(arguments) == 1
            assert "The state is saved: the same command continues." in capsys.readouterr().err
            assert (run_dir / "checkpoints" / "latest").read_text() == "step_5"
            assert len(records(run_dir)) == 5
        assert train.main(arguments) == 0
        timed = ("seconds", "tokens_per_second")
        logs.append(
            [{k: v for k, v in r.items() if not k.startswith(timed)} for r in records(run_dir)]
        )
        weights.append((run_dir / "final" / "model.safetensors").read_bytes())
    assert logs[0] == logs[1]
    assert weights[0] == weights[1]


def fail_from(patch: pytest.MonkeyPatch, *, calls: int) -> None:
    """After some calls every reward is NaN."""
    real, count = InProcessRewards.score, iter(range(999))

    def score(self: InProcessRewards, *args: Any) -> RewardTable:
        table = real(self, *args)
        if next(count) < calls:
            return table
        nan = [math.nan] * len(table.total)
        errors = tuple(RewardFailure("nan", "f", i, "gone") for i in range(len(nan)))
        return replace(table, total=nan, errors=errors)

    patch.setattr(InProcessRewards, "score", score)

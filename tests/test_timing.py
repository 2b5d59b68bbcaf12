"""Seconds by part: each second in one part, and the same parts in every record of a run."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from pathlib import Path

import pytest
import torch

from crpo_fast import distributed, task, timing, train, wall
from crpo_fast.batch import Row
from crpo_fast.distributed import World
from crpo_fast.experience import Experience
from crpo_fast.metrics import Sums
from crpo_fast.packing import Sequence
from crpo_fast.timing import IDLE, NAMES, Stopwatch, rates
from crpo_fast.updates import UpdatePlan
from crpo_fast.watch import tokens_and_seconds

IMPORTED = time.monotonic()
TINY = str(Path(__file__).with_name("tiny.toml"))


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_second_counts_once_and_names_what_goes_on() -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    clock.now += 1  # other
    with watch.timer("generation"):
        clock.now += 2
        assert (watch.activity, watch.seconds_in_activity) == ("generation", 2)
        with watch.timer("sync"):
            clock.now += 4
            assert (watch.activity, watch.seconds_in_activity) == ("sync", 4)
        clock.now += 8
        assert (watch.activity, watch.seconds_in_activity) == ("generation", 14)
    with watch.timer("forward"):
        clock.now += 16
    with watch.timer("backward"):
        clock.now += 32
    assert watch.activity == IDLE
    expected = {"rollout": 10, "sync": 4, "train": 48, "other": 1}
    assert watch.lap() == {name: expected.get(name, 0) for name in NAMES}
    assert watch.lap() == dict.fromkeys(NAMES, 0)


def test_an_exception_ends_its_timer() -> None:
    watch = Stopwatch(Clock())
    with pytest.raises(KeyError), watch.timer("generation"), watch.timer("reward"):
        raise KeyError
    assert watch.activity == IDLE


def test_a_lap_inside_a_timer_is_charged_to_it() -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    with watch.timer("evaluation"):
        clock.now += 3
        assert watch.lap()["eval"] == 3
        clock.now += 5
    assert watch.lap()["eval"] == 5


def test_an_unknown_activity_is_refused() -> None:
    with pytest.raises(AssertionError, match="thinking"), timing.timer("thinking"):
        pass


def test_rates() -> None:
    seconds = {"rollout": 2.0, "train": 0.5, "other": 0.5, "step": 4.0}
    found = rates(seconds, tokens=100.0, trained=150.0, sampled=30.0)
    assert found == {
        "seconds/rollout": 2.0,
        "seconds/train": 0.5,
        "seconds/other": 0.5,
        "seconds/step": 4.0,
        "tokens_per_second": 25.0,
        "tokens_per_second/train": 300.0,
        "tokens_per_second/rollout": 15.0,
    }
    nothing = rates({"rollout": 0.0, "train": 0.0, "step": 0.0}, 100.0, 100.0, 0.0)
    assert nothing["tokens_per_second"] == nothing["tokens_per_second/rollout"] == 0.0


def test_every_record_of_a_run_has_every_part(tmp_path: Path) -> None:
    run_dir = tmp_path / "r"
    arguments = ["--train.max_steps", "2", "--eval.every", "1"]
    assert train.main([TINY, "--run.dir", str(run_dir), *arguments]) == 0
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    sft1, sft2, crpo1, crpo2 = map(json.loads, lines)
    for record in (sft1, sft2, crpo1, crpo2):
        parts = {name: record[f"seconds/{name}"] for name in NAMES}
        assert sum(parts.values()) == pytest.approx(record["seconds/step"])  # one rank: exact
        assert parts["train"] > 0
        assert parts["sync"] > 0
        expected = record["tokens"] / record["seconds/step"]
        assert record["tokens_per_second"] == pytest.approx(expected)
        expected = record["tokens"] / parts["train"]  # one update, every token once
        assert record["tokens_per_second/train"] == pytest.approx(expected)
    assert sft1["seconds/rollout"] == sft1["seconds/reward"] == 0
    assert sft1["tokens_per_second/rollout"] == 0
    assert sft2["seconds/checkpoint"] > 0  # the checkpoint after step 1
    sampled = crpo1["completions/length"] * 4  # 2 prompts x 2 samples
    assert crpo1["tokens_per_second/rollout"] == pytest.approx(sampled / crpo1["seconds/rollout"])
    assert crpo1["seconds/reward"] > 0
    assert crpo1["seconds/eval"] == 0  # "before" belongs to no step
    assert crpo2["seconds/eval"] > 0  # the evaluation after step 3
    assert sft1["seconds"] < sft2["seconds"] < crpo1["seconds"] < crpo2["seconds"]


def test_trained_tokens_are_those_of_all_updates_and_of_no_masked_completion(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distributed, "all_sum", lambda x: x)
    monkeypatch.setattr(distributed, "largest", lambda values, _: values)
    sequences = [Sequence([1] * 5, [2] * 3, [-1] * 3), Sequence([1] * 5, [], [])]
    passes = UpdatePlan(updates=4, minibatches=2).passes(
        {"updates": 2.0, "skipped": 1.0, "skipped_empty": 1.0}
    )
    timing.lap()
    with timing.timer("backward"):
        time.sleep(0.001)
    world = World(0, 1, torch.device("cpu"))
    found = tokens_and_seconds(Experience(sequences, Sums()), world, passes)
    assert found["tokens"] == 13  # with the prompt of the masked one
    assert found["tokens_per_second/train"] * found["seconds/train"] == pytest.approx(2 * 8)


def test_the_parts_of_a_run_sum_to_its_seconds_and_a_scope_takes_what_has_no_part() -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    clock.now += 1  # imports
    watch.enter("")
    with watch.timer("load"):
        clock.now += 2
        with watch.timer("tokenizer"):
            clock.now += 4
    watch.enter(timing.COLD_START)
    with watch.timer("forward"):
        clock.now += 8
    clock.now += 16  # sequences, logs
    with watch.timer("save"):
        clock.now += 32
    watch.enter("")
    with watch.timer("backward"):
        clock.now += 64
    with watch.timer("sync"):
        clock.now += 128
    expected = {timing.START: 1, "data": 2, "tokenizer": 4, timing.COLD_START: 24}
    expected |= {"checkpoints": 32, "train": 64, "other": 128}
    assert watch.run_seconds() == {name: expected.get(name, 0) for name in timing.RUN_NAMES}
    assert sum(watch.run_seconds().values()) == clock.now - 100
    watch.lap()
    assert sum(watch.run_seconds().values()) == clock.now - 100, "a lap forgets nothing of the run"


def test_every_activity_has_a_part_of_the_run_or_is_other() -> None:
    assert set(timing.RUN_PARTS) <= set(timing.PARTS)
    assert set(timing.RUN_PARTS.values()) < set(timing.RUN_NAMES)


def test_what_came_before_the_imports_is_start_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {**dict.fromkeys(timing.RUN_NAMES, 0.0), timing.START: 2.0, "train": 8.0}
    monkeypatch.setattr(timing, "run_seconds", lambda: dict(seconds))
    found = wall.measured(before=13.5)
    assert found["parts"][timing.START] == 5.5
    assert found["seconds"] == sum(found["parts"].values()) == 13.5
    assert wall.line(found) == "wall time 13.5 s: train 8.0, start-up 5.5"
    assert wall.measured(before=0.0)["seconds"] == 10.0, "unknown: the imports of this process"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux says when it began")
def test_a_process_knows_how_long_it_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    first, begin = wall.seconds_before(), time.monotonic()
    assert first >= begin - IMPORTED - 0.02, "older than this module; ticks of 10 ms"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert wall.seconds_before() >= first, "torchrun is older than what it starts"


def test_a_cold_start_row_is_tokenised_once_and_rows_are_shuffled_once_an_epoch() -> None:
    rows = [Row("a", "yes", stages={"x": "1"}), Row("b", "no", stages={"x": "2"})]
    made: list[str] = []

    class Grammar:
        prefill = ""

        def render(self, stages: dict[str, str], label: str) -> str:
            made.append(label)
            return label

        def stage_ids(self, ids: list[int], _tokenizer: object) -> list[int]:
            return [-1] * len(ids)

    names = {f.name: None for f in dataclasses.fields(task.Task) if f.name != "made"}
    built = task.Task(**{**names, "grammar": Grammar()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "encode_completion", lambda text, _: [len(text)])
        patch.setattr(task.Task, "prompt", lambda _, row: ([ord(row.text)], 0))
        first = [built.written(row) for row in rows]
        again = [built.written(row) for row in rows]
    assert made == ["yes", "no"]
    assert [s.completion_ids for s in again] == [[3], [2]]
    assert all(a is b for a, b in zip(first, again, strict=True))
    whole = task.order(10, 7, 0, 10)
    assert task.order(10, 7, 4, 9) == [*whole[4:], *task.order(10, 7, 10, 3)]
    shuffled = random.Random("7/0").sample(range(10), 10)
    assert whole == shuffled, "as a run of an earlier version had them"

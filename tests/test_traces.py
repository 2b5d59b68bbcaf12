"""Traces of sampled completions and probe prompts: the values, and that they change nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from crpo_fast import traces, train
from crpo_fast.batch import Row
from crpo_fast.packing import Sequence, pack
from crpo_fast.probes import probe_rows

TINY = str(Path(__file__).with_name("tiny.toml"))
# all samples of every step, one update of many micro-batches
ALL = ["--report.trace-every", "1", "--report.trace-samples", "4", "--report.probe-every", "2"]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def untimed(file: Path) -> list[dict[str, Any]]:
    clock = ("seconds", "tokens_per_second")
    return [{k: v for k, v in r.items() if not k.startswith(clock)} for r in lines(file)]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traced") / "r"
    assert train.main([TINY, "--run.dir", str(folder), *ALL]) == 0
    return folder


def test_token_values_are_those_of_the_training_pass(traced: Path) -> None:
    """Means over all traced tokens equal the step's metrics, which come from sums on the way."""
    samples = [r for r in lines(traced / "samples.jsonl") if r["kind"] == "sample"]
    for metrics in [r for r in lines(traced / "metrics.jsonl") if r["phase"] == "crpo"]:
        of_step = [r for r in samples if r["step"] == metrics["step"]]
        assert len(of_step) == 4  # 2 prompts x 2 samples
        flat = {
            name: [x for r in of_step for x in r[name]]
            for name in ("logprobs", "rollout_logprobs", "entropy", "stage_ids", "tokens")
        }
        count = len(flat["tokens"])
        assert {len(values) for values in flat.values()} == {count}
        assert sum(flat["entropy"]) / count == pytest.approx(metrics["entropy"], rel=1e-4)
        assert sum(flat["logprobs"]) / count == pytest.approx(metrics["logprobs"], rel=1e-4)
        pairs = zip(flat["entropy"], flat["stage_ids"], strict=True)
        of_first = [e for e, k in pairs if k == 0]
        if of_first:
            mean = sum(of_first) / len(of_first)
            assert mean == pytest.approx(metrics["stage_entropy/0"], rel=1e-4)
        else:
            assert metrics["stage_entropy/0"] is None
        assert metrics["stage_tokens/0"] == flat["stage_ids"].count(0) / 4
        mean = sum(r["reward"] for r in of_step) / 4
        assert mean == pytest.approx(metrics["reward"], rel=1e-6)
        assert sum(sum(r["token_weights"]) for r in of_step) == pytest.approx(1, rel=1e-4)
        for r in of_step:
            assert r["reward"] == pytest.approx(sum(r["rewards"].values()))


def test_records_of_a_step(traced: Path) -> None:
    for record in lines(traced / "samples.jsonl"):
        assert record["post"]
        assert record["dataset_id"]
        assert record["label"]
        assert record["finish_reason"] in ("stop", "length")
        assert len(record["tokens"]) == len(record["stage_ids"]) == len(record["entropy"])
        assert all(x <= 0 for x in record["logprobs"])
    probes = [r for r in lines(traced / "samples.jsonl") if r["kind"] == "probe"]
    # before (4), after the 1st, 2nd and 4th step of the phase; the last evaluation adds none
    assert sorted({r["step"] for r in probes}) == [4, 5, 6, 8]
    assert all([r["probe"] for r in probes if r["step"] == s] == [0, 1, 2, 3] for s in (4, 8))
    posts = {r["probe"]: r["post"] for r in probes}
    assert all(r["post"] == posts[r["probe"]] for r in probes)


def test_tracing_changes_no_bit(traced: Path, tmp_path: Path) -> None:
    off = ["--report.trace-every", "0", "--report.probe-prompts", "0"]
    assert train.main([TINY, "--run.dir", str(tmp_path / "r"), *off]) == 0
    assert (tmp_path / "r" / "samples.jsonl").exists() is False
    assert untimed(tmp_path / "r" / "metrics.jsonl") == untimed(traced / "metrics.jsonl")
    a, b = (load_file(d / "final" / "model.safetensors") for d in (tmp_path / "r", traced))
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_a_resumed_run_writes_the_same_traces(traced: Path, tmp_path: Path) -> None:
    """Capped after 2 steps of each phase, then continued with the records of later steps cut."""
    folder, evaluations = tmp_path / "r", []
    for cap in ("2", "0"):
        assert train.main([TINY, "--run.dir", str(folder), *ALL, "--train.max_steps", cap]) == 0
        evaluations.append(json.loads((folder / "evaluations.json").read_text()))
    assert [(e["before"]["step"], e["after"]["step"]) for e in evaluations] == [(2, 4), (4, 8)]

    def records(folder: Path) -> set[Any]:
        found = lines(folder / "samples.jsonl")
        return {(r["kind"], r["step"], r.get("probe"), str(r["entropy"])) for r in found}

    assert records(folder) == records(traced)


def test_is_due_thins_out_with_the_logarithm() -> None:
    due = [s for s in range(1, 2001) if traces.is_due(s, 5)]
    assert due[:4] == [1, 5, 10, 15]
    assert [s for s in due if 240 <= s <= 290] == [240, 245, 250, 260, 270, 280, 290]
    assert [s for s in due if 500 < s <= 560] == [520, 540, 560]
    assert [s for s in due if 1000 < s <= 1100] == [1040, 1080]
    assert len(due) == 1 + 50 + 25 + 25 + 25
    assert not any(traces.is_due(s, 0) for s in range(1, 100))


def test_choose_best_and_worst_of_each_group() -> None:
    rewards = [1.0, 3.0, 2.0, 0.5, float("nan"), 0.5]
    assert traces.choose(rewards, 3, 4) == [1, 0, 3, 4]
    assert traces.choose([0.0, 0.0], 2, 9) == [0, 1]


def test_positions_follow_the_sequences_through_packing() -> None:
    sequences = [
        Sequence([1], [2, 3], [0, 0], trace=4),
        Sequence([1, 1, 1], [5], [0]),
        Sequence([1], [6, 7, 8], [-1, 0, 0], trace=0),
    ]
    flat = traces.positions(sequences)
    assert flat is not None
    assert flat.tolist() == [4, 5, -1, 0, 1, 2]
    trace = traces.TokenTrace([{"name": "b"}, {"name": "a"}], [4, 2])
    for batch in pack(sequences, 4):
        batch = batch.attach(trace=flat, token_weights=torch.ones(6))
        stats = type(
            "S", (), {"logprobs": batch.labels.double(), "entropy": -batch.labels.double()}
        )
        trace.add(batch, stats, world_size=2)
        stats.logprobs = stats.logprobs * 100  # a second pass over the same rollout
        trace.add(batch, stats, world_size=2)
    b, a = trace.records()
    assert b["logprobs"] == [6.0, 7.0, 8.0, None]
    assert (a["logprobs"], a["entropy"], a["token_weights"]) == (
        [2.0, 3.0],
        [-2.0, -3.0],
        [0.5] * 2,
    )
    assert traces.positions(sequences[1:2]) is None


class Bytes:
    """A tokenizer of single bytes."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode(errors="replace")


def test_token_strings_join_to_the_text_with_split_characters() -> None:
    text = "a\u00e9\U0001f600!"
    pieces = traces.token_strings(list(text.encode()), Bytes())
    assert "".join(pieces) == text
    assert len(pieces) == len(text.encode())


def test_probe_rows_are_spread_over_data_sets() -> None:
    rows = [Row(f"t{i}", "Yes", dataset_id=f"d{i % 4}") for i in range(40)]
    assert [r.dataset_id for r in probe_rows(rows, 2)] == ["d0", "d2"]
    assert [r.dataset_id for r in probe_rows(rows, 4)] == ["d0", "d1", "d2", "d3"]
    assert len(probe_rows(rows, 6)) == 6
    assert probe_rows(rows, 0) == []


def test_evaluations_may_be_longer_than_rollouts(tmp_path: Path) -> None:
    """The probes' own pass and the positions of a built model follow ``eval.max_tokens``."""
    arguments = [TINY, "--run.dir", str(tmp_path / "r"), "--eval.max_tokens", "300"]
    arguments += ["--train.max_steps", "1", "--report.probe-every", "1"]
    assert train.main(arguments) == 0
    probes = [r for r in lines(tmp_path / "r" / "samples.jsonl") if r["kind"] == "probe"]
    assert max(len(r["entropy"]) for r in probes) == 300 > 256  # train.token_budget
    config = json.loads((tmp_path / "r" / "final" / "config.json").read_text())
    assert config["max_position_embeddings"] == 96 + 300


def test_written_completions_longer_than_the_budget_are_refused_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [TINY, "--run.dir", str(tmp_path / "r"), "--train.token_budget", "112"]
    assert train.main(arguments) == 2
    error = capsys.readouterr().err
    assert "train.token_budget: expected at least the longest written completion" in error
    found = re.search(r"got 112: cold-start row \d+ of data set \w+ has (\d+) tokens", error)
    assert found
    assert int(found[1]) > 112
    (needed,) = re.findall(r"Type --train.token_budget (\d+),", error)
    enough = [*arguments[:-1], needed, "--run.resume", "never", "--train.max_steps", "1"]
    assert train.main(enough) == 0

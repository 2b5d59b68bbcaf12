"""`python -m benchmarks rollout`: engines beside plain generate on a very small model."""

from __future__ import annotations

import csv
import json
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plot
from benchmarks.__main__ import main
from benchmarks.rollout import case as rollout_case
from benchmarks.rollout import command as rollout
from benchmarks.rollout.case import Completions, RolloutCase
from model_cases import save_tiny_config

pytestmark = pytest.mark.usefixtures("keep_threads")
OPTIONS = ["--prompts", "3", "--group-size", "2", "--median-prompt", "6", "--max-tokens", "5"]
OPTIONS += ["--rounds", "2", "--threads", "1", "--dtype", "float32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_config(tmp_path_factory.mktemp("model"))


def report_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "rollout_cpu.json").read_text("utf-8"))


def test_all_three_generate_and_every_logprob_is_the_trainers(folder: Path, tmp_path: Path) -> None:
    words = ["rollout", "--model", str(folder), "--out", str(tmp_path), *OPTIONS]
    assert main(words) == 0
    report = report_of(tmp_path)
    (case,) = report["cases"]
    rows = {row["key"]: row for row in case["rows"]}
    assert set(rows) == {"static", "hf", "generate"}
    prompts = RolloutCase("own", 3, 2, 6, 5).prompts(320)
    assert case["prompt_tokens"] == sum(map(len, prompts))
    assert len({len(p) for p in prompts}) > 1, "ragged"
    for row in rows.values():
        assert 6 <= row["mismatch"]["tokens"] <= 30, row  # 6 samples of 1 to 5 tokens, every one
        assert row["mismatch"]["max"] < 1e-5
        assert row["wrong"] == ""
        first, whole = row["prefill_seconds"]["median"], row["seconds"]["warm"]["median"]
        assert min(first, whole) > 0
        assert row["seconds"]["warm"]["count"] == 2
        speed = row["tokens_per_second"]
        assert speed["low"] <= speed["median"] <= speed["high"] < 30 / (0.5 * whole)
    assert rows["generate"]["over_generate"] == 1.0
    assert "thread" in rows["hf"]["lacks"]["peak_bytes"]
    cache = 2 * 2 * 16 * 4 * 6 * 8  # keys and values, layers, head_dim, fp32, rows, tokens
    assert min(rows[key]["peak_bytes"] for key in ("static", "generate")) > cache
    page = (tmp_path / "rollout_cpu.md").read_text("utf-8")
    assert f"{rows['static']['tokens_per_second']['median']:,.0f} (" in page
    ET.fromstring((tmp_path / "rollout_cpu.svg").read_text("utf-8"))
    with (tmp_path / "rollout_cpu.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    median = rows["hf"]["tokens_per_second"]["median"]
    assert float(lines[1]["tokens_per_second_median"]) == median
    assert plot.drawer(report).page(report) == page


def test_logprobs_of_another_temperature_are_marked_wrong(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    title, kind, generate, note = rollout_case.CANDIDATES["static"]

    def shifted(*arguments: Any) -> Completions:
        found = generate(*arguments)
        assert found.logprobs is not None
        return Completions(found.ids, [[x - 0.2 for x in row] for row in found.logprobs])

    monkeypatch.setitem(rollout_case.CANDIDATES, "static", (title, kind, shifted, note))
    words = ["rollout", "--model", str(folder), "--out", str(tmp_path), "--only", "static"]
    assert main([*words, *OPTIONS]) == 1
    (row,) = report_of(tmp_path)["cases"][0]["rows"]
    assert row["mismatch"]["mean"] == pytest.approx(0.2, abs=1e-3)
    assert "0.2 nats, at most 0.1" in row["wrong"]
    assert "**wrong**" in (tmp_path / "rollout_cpu.md").read_text("utf-8")


def test_what_comes_too_late_is_dropped_with_the_reason(folder: Path) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    rollout.add_arguments(parser)
    options = parser.parse_args(["--model", str(folder), *OPTIONS])
    report = rollout.measure_rollout(options, time.monotonic() - 1)
    rows = report["cases"][0]["rows"]
    assert [row["missing"] for row in rows] == ["dropped for lack of time"] * 3
    drawn = plot.drawer({**report, "command": ""})
    page = drawn.page({**report, "command": ""})
    assert "dropped for lack of time" in page
    assert "engine static: \n" not in page  # nothing to say about it, so no line
    ET.fromstring(drawn.svg(report))


def test_a_case_that_goes_on_after_its_time_is_dropped_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rollout, "GRACE", 0.05)
    monkeypatch.setattr(rollout, "measure_case", lambda *_: time.sleep(5))
    case = RolloutCase("slow", 1, 1, 4, 4)
    begin = time.monotonic()
    found = rollout.bounded(case, None, ["static", "hf"], 1, begin + 0.05)
    assert time.monotonic() - begin < 2
    assert [row["missing"] for row in found["rows"]] == ["dropped for lack of time"] * 2
    assert found["name"] == "slow"


def test_speeds_are_tokens_of_a_round_over_its_own_seconds() -> None:
    case = RolloutCase("x", 2, 4, 10, 5)
    found = rollout.speeds([(1.0, 3.0), (2.0, 4.0), (1.0, 2.0)], [28, 18, 12], 20, case)
    assert found["tokens_per_second"]["median"] == pytest.approx(6.0)  # 28/3, 18/4, 12/2
    assert found["decode_tokens_per_second"]["median"] == pytest.approx(5.0)  # 20/2, 10/2, 4/1
    assert found["prefill_tokens_per_second"]["median"] == pytest.approx(20.0)
    assert found["sampled_tokens"] == pytest.approx(58 / 3)


def test_padding_behind_an_end_token_is_no_completion() -> None:
    assert rollout_case.cut([5, 6, 9, 0, 0], (8, 9)) == [5, 6, 9]
    assert rollout_case.cut([5, 6, 7], (9,)) == [5, 6, 7]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-tokens", "1"], "--max-tokens: expected at least 2, got 1. Type --max-tokens 2."),
        (["--model", "nobody"], "--model: expected one of qwen3-0.6b, tiny, or a folder"),
        (["--prompts", "0"], "--prompts: expected at least 1, got 0."),
    ],
)
def test_options_that_cannot_be_right_say_what_to_type(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rollout", *words]) == 2
    assert message in capsys.readouterr().out

"""`--against old.json`: what counts as a regression, and files that do not fit."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import report_cases
from benchmarks import against
from benchmarks.__main__ import main

Change = Callable[[dict[str, Any]], None]


def ours(report: dict[str, Any]) -> dict[str, Any]:
    """The row of one pass at the first shape."""
    return report["cases"][0]["rows"][1]


def times(report: dict[str, Any], factor: float, width: float = 0.01) -> None:
    """One pass takes ``factor`` times as long."""
    warm = ours(report)["seconds"]["warm"]
    median = factor * warm["median"]
    warm |= {"median": median, "low": (1 - width) * median, "high": (1 + width) * median}


def other_machine(report: dict[str, Any]) -> None:
    """All seconds doubled on a machine of another name."""
    report["machine"]["cpu"] = "Another CPU"
    for case in report["cases"]:
        for row in case["rows"]:
            for found in row.get("seconds", {}).values():
                found |= {name: 2 * found[name] for name in ("median", "low", "high")}


def gone(report: dict[str, Any]) -> None:
    """One pass cannot run any more."""
    row = ours(report)
    report["cases"][0]["rows"][1] = {**{k: row[k] for k in ("key", "title")}, "missing": "broke"}


def grow(name: str, factor: float) -> Change:
    """Larger memory, or a larger error."""

    def change(report: dict[str, Any]) -> None:
        row = ours(report)
        if name == "peak_bytes":
            row[name] = int(factor * row[name])
        else:
            row["errors"][name]["rms"] *= factor

    return change


CHANGES: dict[str, tuple[Change, str]] = {
    "nothing": (lambda report: None, ""),
    "slower": (lambda report: times(report, 1.08), "slower: x1.08, limit x1.05"),
    "slower within 5 %": (lambda report: times(report, 1.04, 0.0), ""),
    "slower within its band": (lambda report: times(report, 1.08, 0.09), ""),
    "faster": (lambda report: times(report, 0.5), ""),
    "another machine": (other_machine, ""),
    "memory": (grow("peak_bytes", 1.03), "more memory: 320 to 330 MiB, limit x1.02"),
    "little memory": (grow("peak_bytes", 1.01), ""),
    "error": (grow("d_weight", 1.6), "d_weight rms error 9.4e-3 to 1.5e-2, limit x1.5"),
    "small error": (grow("d_weight", 1.4), ""),
    "not a number": (grow("entropy", float("nan")), "entropy rms error 9.2e-3 to nan"),
    "no error": (lambda report: ours(report)["errors"].pop("entropy"), "no entropy error any more"),
    "missing": (gone, "went missing: broke"),
    "removed": (lambda report: report["cases"][0]["rows"].pop(1), "went missing: it is not in"),
    "wrong": (lambda report: ours(report).update(wrong="NaN"), "is wrong now: NaN"),
    "no gradient": (
        lambda report: ours(report).update(has_entropy_gradient=False),
        "lost its entropy gradient",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_regression_is_flagged(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, said = CHANGES[name]
    old = copy.deepcopy(report_cases.report())
    new = copy.deepcopy(old)
    change(new)
    assert against.check(new, old) == (1 if said else 0)
    out = capsys.readouterr().out
    assert f"{1 if said else 0} regression(s)" in out
    assert said in out
    assert "Liger chunked GRPO" in out


def test_ratios_on_another_machine_milliseconds_on_the_same(
    capsys: pytest.CaptureFixture[str],
) -> None:
    old, new = (copy.deepcopy(report_cases.report()) for _ in range(2))
    times(new, 1.2)
    against.check(new, old)
    line = "| 1.042, 1.250 | +20.0 % | 1250, 1500 | 320, 320 | slower: x1.20, limit x1.05 |"
    assert f"| qwen3-0.6b: crpo_kernels, one pass {line}" in capsys.readouterr().out
    other_machine(new)
    assert against.check(new, old) == 1
    assert line.replace("1250, 1500", "other machine") in capsys.readouterr().out


def test_rows_that_were_not_asked_for_are_not_missed(capsys: pytest.CaptureFixture[str]) -> None:
    old, new = (copy.deepcopy(report_cases.report()) for _ in range(2))
    for case in new["cases"]:
        case["rows"] = case["rows"][:2]
    assert against.check(new, old) == 1
    assert "went missing" in capsys.readouterr().out
    assert against.check(new, old, only=["one_pass"]) == 0
    new["cases"].pop()
    assert against.check(new, old, only=["one_pass"]) == 0
    said = "not compared, as this run has no such shape: T128 V151936 D4096 bfloat16, spectrum"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"kind": "score"}, "got one of 'score' (o.json). Type python -m benchmarks score --ag"),
        (
            {"machine": {**report_cases.MACHINE, "gpu": report_cases.GPU}},
            "a report of a run on cpu, got one on cuda (Some GPU, o.json). Type --device cuda",
        ),
        (
            {"cases": [report_cases.case("ragged", 509, 1000)]},
            "spectrum (o.json). Type --shape ragged --rows 509 --dtype bfloat16",
        ),
    ],
)
def test_files_that_do_not_fit_say_what_to_type(
    changed: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    old = {**report_cases.report(), **changed, "file": "o.json"}
    assert against.check(report_cases.report(), old) == 2
    assert said in capsys.readouterr().out


def test_another_kind_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "old.json"
    file.write_text(json.dumps(report_cases.report("score")))
    for command in ("loss", "memory", "step"):
        with pytest.raises(SystemExit):
            main([command, "--against", str(file)])
        said = " ".join(capsys.readouterr().err.split())
        assert f"expected a report of '{command}', got one of 'score'" in said
        assert f"Type python -m benchmarks score --against {file}" in said
    words = ["--only", "loss", "step", "--out", str(tmp_path), "--against", str(file)]
    assert main(["all", *words]) == 2
    assert "expected files of loss, step, the parts of this run" in capsys.readouterr().out


NO_MACHINE = '{"kind": "loss", "cases": [{"name": "a", "rows": []}]}'
NO_TITLE = (
    '{"machine": {"cpu": "x"}, "kind": "loss", "cases": [{"name": "a", "rows": [{"key": 1}]}]}'
)


@pytest.mark.parametrize(
    "text", ["{", "{}", "[]", '{"cases": [1]}', '{"kind": "step"}', NO_MACHINE, NO_TITLE, None]
)
def test_what_is_no_result_file_is_refused_before_the_work(
    text: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "old.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(
        argparse.ArgumentTypeError, match=r"expected a result file .* Type --against"
    ):
        against.old_report(str(file))
    file.write_text(json.dumps(report_cases.report()))
    assert against.old_report(str(file))["kind"] == "loss"


def step_report(peak: int) -> dict[str, Any]:
    """A report of kind step with one trainer."""
    names = ("model", "dtype", "attention", "objective", "prompts", "group_size", "micro_batch")
    row = {"key": "ours", "title": "crpo_fast", "seconds": report_cases.times(1.0)["warm"]}
    return {
        "kind": "step",
        "command": "python -m benchmarks step",
        "machine": report_cases.MACHINE,
        "case": dict.fromkeys(names, "x"),
        "rows": [{**row, "memory": {"peak": peak}}, {"key": "t", "title": "TRL", "missing": "no"}],
    }


def test_trainers_of_a_step_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    old, new = step_report(2**30), step_report(2**31)
    assert against.check(old, copy.deepcopy(old)) == 0
    assert against.check(new, old) == 1
    assert "step: crpo_fast: more memory: 1024 to 2048 MiB" in capsys.readouterr().out
    new["rows"][0]["seconds"] = report_cases.times(1.2)["warm"]
    assert against.check(new, old) == 1
    assert "step: crpo_fast: slower: x1.20, limit x1.05" in capsys.readouterr().out
    new["machine"] = {**report_cases.MACHINE, "cpu": "Another"}
    assert against.check(new, old) == 1
    assert "slower" not in capsys.readouterr().out  # no floor: milliseconds of two machines
    new["case"]["model"] = "y"
    assert against.check(new, old) == 2
    assert "Type python -m benchmarks step" in capsys.readouterr().out


def growth_report(seconds: float, size: int) -> dict[str, Any]:
    """A report of kind growth: one line of seconds and one of bytes."""
    band = {"x": 256.0, "y": seconds, "low": 0.99 * seconds, "high": 1.01 * seconds}
    line = {"key": "one_pass", "title": "one pass"}
    dropped = [{"x": 1024.0, "reason": "late"}]
    fixed = {"fixed": "V 8"}
    timed = {"name": "t", "title": "Seconds", "unit": "s", **fixed}
    held = {"name": "b", "title": "Bytes", "unit": "bytes", **fixed}
    points = [{"x": 256.0, "y": size}]
    return {
        "kind": "growth",
        "command": "python -m benchmarks growth",
        "machine": report_cases.MACHINE,
        "sweeps": [
            {**timed, "series": [{**line, "points": [band], "dropped": dropped}]},
            {**held, "series": [{**line, "points": points, "dropped": []}]},
        ],
    }


def test_points_of_growth_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    old = growth_report(1.0, 100)
    assert against.has_rows(old)
    assert against.check(copy.deepcopy(old), old) == 0
    assert against.check(growth_report(1.1, 100), old) == 1
    assert "t: one pass, 256: slower: x1.10, limit x1.05" in capsys.readouterr().out
    assert against.check(growth_report(1.0, 3 << 20), old) == 1
    assert "b: one pass, 256: more memory" in capsys.readouterr().out
    gone = growth_report(1.0, 100)
    gone["sweeps"][0]["series"][0] |= {"points": [], "dropped": [{"x": 256.0, "reason": "late"}]}
    assert against.check(gone, old) == 1
    assert "t: one pass, 256: went missing: late" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["loss", "score", "memory", "growth", "rollout", "step"])
def test_every_command_takes_an_old_file_of_its_kind(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "old.json"
    kind = "score" if command == "loss" else "loss"
    other.write_text(json.dumps(report_cases.report(kind)))
    with pytest.raises(SystemExit):
        main([command, "--device", "cpu", "--against", str(other)])
    assert f"expected a report of {command!r}, got one of {kind!r}" in capsys.readouterr().err


def test_rows_without_seconds_are_compared_by_memory(capsys: pytest.CaptureFixture[str]) -> None:
    old = copy.deepcopy(report_cases.report("memory"))
    for row in old["cases"][0]["rows"]:
        row.pop("seconds", None)
    new = copy.deepcopy(old)
    assert against.check(new, old) == 0
    ours(new)["peak_bytes"] *= 2
    assert against.check(new, old) == 1
    said = "| - | - | - | 320, 640 | more memory: 320 to 640 MiB, limit x1.02 |"
    assert f"| qwen3-0.6b: crpo_kernels, one pass {said}" in capsys.readouterr().out

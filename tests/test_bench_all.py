"""`python -m benchmarks --device cpu`: shares of the time, failures, files."""

from __future__ import annotations

import argparse
import inspect
import json
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import report_cases
from benchmarks import all as everything
from benchmarks import plot
from benchmarks.__main__ import main
from benchmarks.commands import COMMANDS, command_module

Measure = Callable[[argparse.Namespace, float], dict[str, Any]]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Installs parts in place of the real ones; what they were called with."""

    def install(**measures: Measure) -> list[Any]:
        calls: list[Any] = []
        real = everything.command_module

        def add_arguments(parser: argparse.ArgumentParser) -> None:
            parser.add_argument("--device", default="none")
            parser.add_argument("--rounds", type=int, default=3)
            parser.add_argument("--out", type=Path)

        def module(name: str) -> Any:
            if name not in measures:
                return real(name)

            def measure(options: argparse.Namespace, deadline: float) -> dict[str, Any]:
                calls.append((name, options, deadline - time.monotonic()))
                return measures[name](options, deadline)

            attributes = {"add_arguments": add_arguments, f"measure_{name}": measure}
            return types.SimpleNamespace(**attributes)

        monkeypatch.setattr(everything, "command_module", module)
        shares = {name: share for name, share in everything.SHARES.items() if name in measures}
        monkeypatch.setattr(everything, "SHARES", shares)
        return calls

    return install


def made(kind: str) -> Measure:
    """A part that works."""
    return lambda options, deadline: report_cases.report(kind)


def broken(options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """A part that fails."""
    raise RuntimeError("the peer is broken")


def hangs(options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """A part that does not end."""
    time.sleep(30)
    return {}


def test_every_part_of_the_issue_has_a_share() -> None:
    assert list(everything.SHARES) == ["loss", "score", "memory", "growth", "rollout", "step"]
    assert sum(everything.SHARES.values()) == pytest.approx(1)
    assert everything.SECONDS + everything.GRACE < 590  # seconds of ten minutes


@pytest.mark.parametrize("name", everything.SHARES)
def test_every_part_takes_options_and_a_deadline(name: str, tmp_path: Path) -> None:
    module = command_module(name)
    asked = argparse.Namespace(device="cpu", threads=1, out=tmp_path)
    options = everything.options_of(module, asked)
    assert (options.device, options.out) == ("cpu", tmp_path)
    assert name in COMMANDS
    assert name in plot.DRAWERS
    names = list(inspect.signature(getattr(module, f"measure_{name}")).parameters)
    assert names == ["options", "deadline"]


def test_options_without_a_command_run_all_and_write_the_files(
    parts: Callable[..., list[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = parts(loss=made("loss"), score=made("score"))
    assert main(["--device", "cpu", "--out", str(tmp_path), "--seconds", "100"]) == 0
    assert [name for name, *_ in calls] == ["loss", "score"]
    (_, options, first), (_, _, second) = calls
    assert (options.device, options.rounds, options.out) == ("cpu", 3, tmp_path)
    loss, score = everything.SHARES["loss"], everything.SHARES["score"]
    assert first == pytest.approx(100 * loss / (loss + score), abs=1)
    assert second == pytest.approx(100, abs=1)  # what the first one left is not lost
    names = {f"{part}_cpu{end}" for part in calls_of(calls) for end in ENDS} | {"all_cpu.json"}
    assert {file.name for file in tmp_path.iterdir()} == names
    report = json.loads((tmp_path / "score_cpu.json").read_text())
    command = f"python -m benchmarks all --device cpu --out {tmp_path} --seconds 100"
    assert report["command"] == command
    said = capsys.readouterr().out
    assert "| loss | " in said
    assert "All parts are done in" in said


ENDS = (".json", ".md", ".svg", "_shapes.svg", ".csv")


def calls_of(calls: list[Any]) -> list[str]:
    """Names of the parts that were called."""
    return [name for name, *_ in calls]


def test_a_part_that_fails_or_hangs_ends_no_other(
    parts: Callable[..., list[Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(everything, "GRACE", 0.1)
    calls = parts(loss=broken, score=hangs, step=made("score"))
    assert main(["all", "--out", str(tmp_path), "--seconds", "5"]) == 1
    assert calls_of(calls) == ["loss", "score", "step"]
    states = json.loads((tmp_path / "all_cpu.json").read_text())["parts"]
    assert states["loss"]["why"] == "RuntimeError: the peer is broken"
    assert states["score"]["why"].startswith("out of time: stopped after")
    assert states["step"]["state"] == "done"
    assert (tmp_path / "step_cpu.csv").exists()
    assert not (tmp_path / "loss_cpu.json").exists()
    said = capsys.readouterr().out
    assert "FAILED: loss, score in" in said


def test_parts_can_be_chosen(parts: Callable[..., list[Any]], tmp_path: Path) -> None:
    calls = parts(loss=made("loss"), score=made("score"))
    assert main(["--device", "cpu", "--only", "score", "--out", str(tmp_path)]) == 0
    assert calls_of(calls) == ["score"]


def test_parts_are_compared_with_earlier_files(
    parts: Callable[..., list[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts(loss=made("loss"), score=made("score"))
    old = report_cases.report("score")
    old["cases"][0]["rows"][1]["peak_bytes"] //= 2
    file = tmp_path / "old.json"
    file.write_text(json.dumps(old))
    assert main(["all", "--out", str(tmp_path), "--against", str(file)]) == 1
    said = capsys.readouterr().out
    assert "more memory: 160 to 320 MiB" in said
    assert "FAILED: score in" in said
    old["cases"][0]["rows"][1]["peak_bytes"] *= 2
    file.write_text(json.dumps(old))
    assert main(["all", "--out", str(tmp_path), "--against", str(file)]) == 0


def test_help_is_no_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "gpu-gate" in capsys.readouterr().out

"""A run that is started again goes on where it was, whatever it was started with."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from crpo_fast import checkpoint, phases, run_folder
from crpo_fast.run_folder import RunFolder
from test_run_folder import SHORT, logged, run, steps


def stop_at(patch: pytest.MonkeyPatch, last: int) -> None:
    """SIGTERM comes in this step of the run."""
    real = phases.Phase._log

    def log(self: Any, step: int, metrics: dict[str, float], batch: Any) -> None:
        real(self, step, metrics, batch)
        if self.run.progress.step == last:
            self.run.stop(signal.SIGTERM, None)

    patch.setattr(phases.Phase, "_log", log)


@pytest.mark.parametrize("again", ["same", "auto"])
def test_a_run_begun_within_a_phase_of_another_run_goes_on_by_itself(
    tmp_path: Path,
    again: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It has the KL reference of its phase, and the same command does not go back to the other."""
    a, b = tmp_path / "a", tmp_path / "b"
    assert run(a, *SHORT, "--checkpoint.keep", "9") == 0
    assert run(b, *SHORT, "--train.max_steps", "1") == 0  # in its way: another run's steps 1 and 2
    (b / "summary.json").unlink()
    start = str(a / "checkpoints" / "step_4")
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        assert run(b, *SHORT, "--run.resume", start) == 0
    assert "The same command continues" in capsys.readouterr().out
    assert steps(b) == {"step_2", "step_5"}
    files = [r / "checkpoints" / "step_2" / "model.safetensors" for r in (a, b)]
    assert files[0].read_bytes() == files[1].read_bytes()
    a.rename(tmp_path / "gone")
    assert run(b, *SHORT, "--run.resume", start if again == "same" else "auto") == 0
    out = capsys.readouterr().out
    assert "step_5 (step 5)" in out
    assert ("the last start went to" in out) == (again == "same")
    assert logged(b)[-2:] == [5, 6]
    ends = [r / "final" / "model.safetensors" for r in (tmp_path / "gone", b)]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_a_start_killed_before_its_first_save_goes_there_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The copied end of the phase before is no step of this run."""
    a, b = tmp_path / "a", tmp_path / "b"
    assert run(a, *SHORT) == 0
    start = a / "checkpoints" / "step_4"
    assert run(b, *SHORT, "--run.resume", str(start)) == 0
    (b / "summary.json").unlink()
    for name in ("step_4", "step_5", "step_6"):
        shutil.rmtree(b / "checkpoints" / name, ignore_errors=True)
    capsys.readouterr()
    assert run(b, *SHORT, "--run.resume", str(start)) == 0
    assert f"resumed from {start} (step 4)" in capsys.readouterr().out


def test_the_command_that_went_back_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A scheduler that starts it again must not lose its steps; another command in between may."""
    run_dir = tmp_path / "r"
    assert run(run_dir, *SHORT) == 0
    back = ("--run.resume", str(run_dir / "checkpoints" / "step_4"))
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        assert run(run_dir, *SHORT, *back) == 0
    assert "step_4 (step 4)" in capsys.readouterr().out
    assert run(run_dir, *SHORT, *back) == 0
    assert "step_5 (step 5)" in capsys.readouterr().out
    for _ in range(2):
        assert run(run_dir, *SHORT, *back) == 0
        assert "is finished" in capsys.readouterr().out
    assert run(run_dir, *SHORT) == 0
    assert run(run_dir, *SHORT, *back) == 0
    assert "step_4 (step 4)" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "[]", '{"step": "x"}', '{"step": 1}'])
def test_a_torn_origin_leads_nowhere(tmp_path: Path, content: str) -> None:
    folder = RunFolder(tmp_path)
    folder.origin.write_text(content)
    assert run_folder._step_of_origin(folder, "best") is None


def test_a_stop_in_the_last_step_of_a_phase_costs_no_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save comes before it; the start after evaluates what is due."""
    options = (*SHORT, "--train.max_steps", "2", "--eval.every", "2")
    assert run(tmp_path / "whole", *options) == 0
    stop_at(monkeypatch, 4)
    assert run(tmp_path / "r", *options) == 0
    assert not (tmp_path / "r" / "summary.json").exists()
    monkeypatch.undo()
    assert run(tmp_path / "r", *options) == 0
    names = [
        list(json.loads((tmp_path / r / "evaluations.json").read_text())) for r in ("whole", "r")
    ]
    assert "step_4" in names[0]
    assert names[0] == names[1]


def test_a_save_before_the_probes_costs_none_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that ends the run saves at once; the start after answers what is due."""
    options = (*SHORT, "--train.max_steps", "2", "--report.probe_every", "1")
    assert run(tmp_path / "whole", *options) == 0

    def stop(self: Any) -> None:
        if self.run.progress.step == 3:
            self.run.save(self.optimizer)
            raise checkpoint.SaveError("as an error of the rewards does")

    monkeypatch.setattr(phases.Phase, "_check_finite", stop)
    assert run(tmp_path / "r", *options) == 1
    monkeypatch.undo()
    assert run(tmp_path / "r", *options) == 0
    probes = []
    for name in ("whole", "r"):
        lines = (tmp_path / name / "samples.jsonl").read_text().splitlines()
        samples = [json.loads(line) for line in lines]
        probes.append([(r["step"], r["probe"]) for r in samples if r["kind"] == "probe"])
    assert {step for step, _ in probes[0]} >= {3, 4}
    assert probes[0] == probes[1]

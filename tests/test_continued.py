"""A run that is started again goes on where it was, whatever it was started with."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from crpo_fast import checkpoint, phases
from test_run_folder import SHORT, run


def test_a_stop_in_the_last_step_of_a_phase_costs_no_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save comes before it; the start after evaluates what is due."""
    options = (*SHORT, "--train.max_steps", "2", "--eval.every", "2")
    assert run(tmp_path / "whole", *options) == 0
    real = phases.Phase._log

    def log(self: Any, step: int, metrics: dict[str, float], batch: Any) -> None:
        real(self, step, metrics, batch)
        if self.run.progress.step == 4:
            self.run.stop(signal.SIGTERM, None)

    monkeypatch.setattr(phases.Phase, "_log", log)
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

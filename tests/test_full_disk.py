"""A full disk costs what does not fit, says so, and leaves what was there."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from crpo_fast import checkpoint_files, results
from crpo_fast.metrics import JsonLines
from test_run_folder import SHORT, logged, run, steps


def test_lines_that_do_not_fit_wait(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = JsonLines(tmp_path / "m.jsonl")
    log.write({"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        log.write({"step": 2})
        log.write({"step": 3})
        failure = log.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "m.jsonl could not be written (" in failure
    assert capsys.readouterr().out.count("warning") == 1
    assert [r["step"] for r in log.read()] == [1]
    assert log.sync() == ""
    assert [r["step"] for r in log.read()] == [1, 2, 3]


def limited(monkeypatch: pytest.MonkeyPatch, size: int, calls: range, stop_at: int) -> None:
    """The tensor files with these numbers may not grow beyond ``size`` bytes: a real failure.

    SIGTERM comes while number ``stop_at`` is written.
    """
    real, count = checkpoint_files.save_file, iter(range(1, 99))

    def save_file(*args: Any) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        number = next(count)
        if number == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if number in calls:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            real(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(checkpoint_files, "save_file", save_file)


def test_a_full_disk_costs_the_checkpoint_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Saves 3 to 5 fail (a tensor file each): step 2 stays usable, nothing half is left."""
    run_dir, whole = tmp_path / "r", tmp_path / "whole"
    assert run(whole, *SHORT) == 0
    capsys.readouterr()
    limited(monkeypatch, 1000, range(5, 8), stop_at=6)
    assert run(run_dir, *SHORT) == 1  # asked to stop when it cannot save
    captured = capsys.readouterr()
    for step in (3, 4, 5):
        assert f"step_{step} could not be written (" in captured.out
    assert captured.out.count("MiB are free there); step_2 stays the newest") == 3
    assert "stopped by signal 15; step 5 is lost" in captured.err
    assert steps(run_dir) == {"step_1", "step_2"}
    monkeypatch.undo()
    assert run(run_dir, *SHORT) == 0
    out = capsys.readouterr().out
    assert "step_2 (step 2)" in out
    assert "skipping" not in out
    files = [(r / "final" / "model.safetensors").read_bytes() for r in (run_dir, whole)]
    assert files[0] == files[1]
    assert logged(run_dir) == [1, 2, 3, 4, 5, 6]


def test_results_that_do_not_fit_end_with_status_1_and_can_be_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run_dir = tmp_path / "r"
    monkeypatch.setattr(results.models, "export_model", full)
    assert run(run_dir, *SHORT) == 1
    error = capsys.readouterr().err
    assert "the results could not be written" in error
    assert "type the same command: it continues from step 6" in error
    assert not (run_dir / "summary.json").exists()
    monkeypatch.undo()
    assert run(run_dir, *SHORT) == 0
    assert "step_6 (step 6)" in capsys.readouterr().out
    assert (run_dir / "final" / "model.safetensors").exists()

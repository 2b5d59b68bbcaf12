"""A full disk costs what does not fit, says so, and leaves what was there."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from crpo_fast import checkpoint, checkpoint_files, results
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


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_end_of_a_phase_that_the_next_one_needs_must_be_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else no checkpoint of the next phase, whose KL reference it is, could be resumed."""
    limited(monkeypatch, 1000, range(3, 4), stop_at=99)
    assert run(tmp_path / "r", *SHORT) == 1
    error = capsys.readouterr().err
    assert "phase 1 could not be saved at its end" in error
    assert "type the same command: it continues from step 1." in error
    assert steps(tmp_path / "r") == {"step_1"}
    monkeypatch.undo()
    assert run(tmp_path / "r", *SHORT) == 0
    assert logged(tmp_path / "r") == [1, 2, 3, 4, 5, 6]
    limited(monkeypatch, 1000, range(3, 4), stop_at=99)  # without a KL term nothing needs it
    assert run(tmp_path / "n", *SHORT, "--objective.kl_coef", "0") == 0
    assert "step_2 could not be written" in capsys.readouterr().out
    assert "step_6" in steps(tmp_path / "n")


@pytest.mark.parametrize(
    ("name", "what"),
    [("mark_latest", "writing latest"), ("mark_best", "writing best"), ("prune", "removing old")],
)
def test_what_a_whole_checkpoint_does_not_need_costs_a_warning(
    tmp_path: Path,
    name: str,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, calls = getattr(checkpoint, name), []

    def first_fails(*arguments: Any) -> None:
        calls.append(arguments)
        (full if len(calls) == (2 if name == "mark_best" else 1) else real)(*arguments)

    monkeypatch.setattr(checkpoint, name, first_fails)  # mark_best is called at the start as well
    assert run(tmp_path / "r", *SHORT, "--train.max_steps", "1") == 0
    out = capsys.readouterr().out
    assert f"checkpoints: {what}" in out
    assert "1 such failure(s) since the start; step_1 is whole and training goes on" in out
    assert "could not be written" not in out
    assert (tmp_path / "r" / "checkpoints" / "latest").read_text() == "step_2"

"""One run a folder; what is saved, kept and best; what a full disk leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import children
from crpo_fast import checkpoint, phases, train
from crpo_fast.checkpoint import Best
from crpo_fast.config_file import ConfigError
from crpo_fast.lock import RunLock
from crpo_fast.metrics import JsonLines

TINY = str(Path(__file__).with_name("tiny.toml"))
ROOT = Path(__file__).resolve().parent.parent
SHORT = ("--phases.0.steps", "2", "--phases.1.steps", "4")  # steps 1 and 2, 3 to 6


def run(run_dir: Path, *arguments: str) -> int:
    return train.main([TINY, "--run.dir", str(run_dir), "--train.threads", "1", *arguments])


def steps(run_dir: Path) -> set[str]:
    return {p.name for p in (run_dir / "checkpoints").iterdir() if p.is_dir()}


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


def logged(run_dir: Path) -> list[int]:
    return [json.loads(x)["step"] for x in (run_dir / "metrics.jsonl").read_text().splitlines()]


# --- lock


def test_a_second_run_is_refused_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "r"
    assert run(run_dir, "--train.max_steps", "1") == 0
    (run_dir / "checkpoints" / "step_9.tmp").mkdir()
    lock = RunLock(run_dir)
    before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")}
    for resume in ("auto", "never", "best", str(run_dir / "checkpoints" / "step_1")):
        assert run(run_dir, "--run.resume", resume) == 2
        error = capsys.readouterr().err
        assert f"in use by process {os.getpid()} on " in error
        assert "Type --run.dir <new folder>" in error
    assert {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")} == before
    lock.release()
    assert run(run_dir, "--train.max_steps", "1") == 0
    assert not (run_dir / "lock").exists()


HOLDER = """
import os, subprocess, sys, time
from pathlib import Path
from crpo_fast.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
if (forked := os.fork()) == 0:
    time.sleep(60)
print(worker.pid, forked, flush=True)
time.sleep(60)
"""


def acquired(folder: Path) -> RunLock:
    """A forked child lets go of the lock when it first runs, which may be a moment later."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return RunLock(folder)
        except ConfigError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def test_the_lock_ends_with_its_holder_not_with_its_children(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=children.environment(),
    )
    assert holder.stdout is not None
    pids = [int(pid) for pid in holder.stdout.readline().split()]
    with pytest.raises(ConfigError, match=f"in use by process {holder.pid} on "):
        RunLock(tmp_path)
    holder.kill()
    holder.wait()
    try:
        for pid in pids:
            os.kill(pid, 0)  # both live
        acquired(tmp_path).release()
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)


def test_a_lock_that_is_released_while_it_is_opened_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the file and locking it, its holder removes it: the name is another file."""
    first, real = RunLock(tmp_path), os.open
    calls = []

    def slow_open(*args: Any) -> int:
        descriptor = real(*args)
        calls.append(args)
        if len(calls) == 1:
            first.release()
        return descriptor

    monkeypatch.setattr("crpo_fast.lock.os.open", slow_open)
    second = RunLock(tmp_path)
    assert len(calls) == 2
    monkeypatch.undo()
    with pytest.raises(ConfigError):
        RunLock(tmp_path)
    second.release()


def test_never_moves_the_old_run_aside_and_locks_the_new_folder(tmp_path: Path) -> None:
    run_dir = tmp_path / "r"
    assert run(run_dir, "--train.max_steps", "1") == 0
    assert run(run_dir, "--train.max_steps", "1", "--run.resume", "never") == 0
    assert not list(tmp_path.rglob("lock"))
    assert len(list(tmp_path.glob("r.old-*"))) == 1


# --- keep and best


def scored(monkeypatch: pytest.MonkeyPatch, scores: list[float]) -> None:
    """Evaluations give these weighted F1, in the order they are asked for."""
    left, real = iter(scores), phases.evaluate

    def evaluate(*args: Any, **options: Any) -> dict[str, Any]:
        return {**real(*args, **options), "weighted_f1": next(left)}

    monkeypatch.setattr(phases, "evaluate", evaluate)


def test_the_best_evaluation_stays_beside_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is saved out of turn, never pruned, recorded, and the run can go back to it."""
    run_dir = tmp_path / "r"
    # before (step 2), steps 3, 4, 5, 6, after
    scored(monkeypatch, [10.0, 20.0, 50.0, 40.0, 50.0, 50.0])
    options = (*SHORT, "--eval.every", "1", "--checkpoint.keep", "1", "--checkpoint.every", "5")
    assert run(run_dir, *options) == 0
    assert steps(run_dir) == {"step_2", "step_4", "step_6"}  # end of SFT, best, end
    assert (run_dir / "checkpoints" / "best").read_text() == "step_4"
    best = {"step": 4, "score": 50.0, "metric": "weighted_f1"}
    assert summary(run_dir)["best"] == best
    end = (run_dir / "final" / "model.safetensors").read_bytes()
    monkeypatch.undo()
    scored(monkeypatch, [40.0, 30.0, 30.0])
    capsys.readouterr()
    assert run(run_dir, *options, "--run.resume", "best") == 0
    out = capsys.readouterr().out
    assert "step_4 (step 4)" in out
    assert "going on from step 4: renamed step_6 to step_<n>.aside" in out
    assert logged(run_dir) == [1, 2, 3, 4, 5, 6]
    assert summary(run_dir)["best"] == best
    assert (run_dir / "final" / "model.safetensors").read_bytes() == end
    assert steps(run_dir) == {"step_2", "step_4", "step_6"}  # the old step_6 is gone again


def test_the_best_reward_is_the_mean_since_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards = {3: 0.0, 4: 4.0, 5: 1.0, 6: 1.5}  # per checkpoint: 2.0 at step 4, 1.25 at step 6
    real = phases.Phase._log

    def log(self: Any, step: int, metrics: dict[str, float], batch: Any) -> None:
        real(self, step, metrics, batch)
        metrics.update({"reward": rewards[s]} if (s := self.run.progress.step) in rewards else {})

    monkeypatch.setattr(phases.Phase, "_log", log)
    options = (*SHORT, "--checkpoint.every", "2", "--checkpoint.keep", "1")
    assert run(tmp_path / "r", *options) == 0
    assert summary(tmp_path / "r")["best"] == {"step": 4, "score": 2.0, "metric": "reward"}
    assert steps(tmp_path / "r") == {"step_2", "step_4", "step_6"}
    assert run(tmp_path / "n", *options, "--checkpoint.best", "none") == 0
    assert steps(tmp_path / "n") == {"step_2", "step_6"}
    assert "best" not in summary(tmp_path / "n")
    assert not (tmp_path / "n" / "checkpoints" / "best").exists()


@pytest.mark.parametrize("keep", [1, 3])
def test_keep(tmp_path: Path, keep: int) -> None:
    options = ("--checkpoint.keep", str(keep), "--checkpoint.best", "none")
    assert run(tmp_path / "r", *SHORT, *options) == 0
    expected = {f"step_{n}" for n in range(7 - keep, 7)} | {"step_2"}
    assert steps(tmp_path / "r") == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint.keep", "0"], "checkpoint.keep: expected a positive number, got 0"),
        (["--checkpoint.every", "-1"], "checkpoint.every: expected 0"),
        (["--checkpoint.best", "weighted_f1"], "Type --eval.every 50"),
        (["--checkpoint.best", "rewards"], "Did you mean 'reward'?"),
    ],
)
def test_refusals(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "r", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


# --- a longer run than before


def test_a_longer_run_evaluates_its_own_end(tmp_path: Path) -> None:
    """And the KL reference of its second phase is the end of its first, not of the shorter one."""
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    assert run(whole) == 0
    for cap in ("1", "3"):
        assert run(grown, "--train.max_steps", cap) == 0
    assert run(grown, "--phases.1.steps", "4", "--train.max_steps", "0") == 0
    files = [load_file(r / "final" / "model.safetensors") for r in (whole, grown)]
    assert all((files[1][name] == value).all() for name, value in files[0].items())
    evaluations = [json.loads((r / "evaluations.json").read_text()) for r in (whole, grown)]
    assert evaluations[0] == evaluations[1]
    assert steps(whole) == steps(grown)


# --- logs


def test_logs_are_cut_back_to_the_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = JsonLines(tmp_path / "m.jsonl")
    for step in (1, 2, 2, 3):
        log.write({"step": step, "x": [step]})
    whole = log.path.read_bytes()
    with log.path.open("ab") as file:
        file.write(b'{"step": 4, "x"')  # torn by a kill
    log.cut(3, 4)
    assert log.path.read_bytes() == whole
    log.cut(3, 3)  # the third is of step 2 and was written before the checkpoint, the last after it
    assert [r["step"] for r in log.read()] == [1, 2, 2]
    assert capsys.readouterr().out == ""
    log.write({"step": 3, "x": [3]})
    assert log.path.read_bytes() == whole
    assert log.position == 4
    log.path.write_bytes(whole.replace(b'{"step": 2, "x": [2]}', b"\0" * 21, 1))
    log.cut(3, 4)
    assert [r["step"] for r in log.read()] == [1]
    assert "3 of the 4 lines before the checkpoint of step 3 are lost" in capsys.readouterr().out


# --- starts


def test_a_checkpoint_that_was_being_replaced_comes_back(tmp_path: Path) -> None:
    """Killed between the two renames, with nothing else to go on from."""
    folder = tmp_path / "c"
    for name in ("step_1.old", "step_2", "step_2.old", "step_3.tmp"):
        (folder / name).mkdir(parents=True)
        (folder / name / "name").write_text(name)
    (folder / "latest.tmp").write_text("")
    checkpoint.tidy(folder)
    assert {p.name for p in folder.iterdir()} == {"step_1", "step_2"}
    assert (folder / "step_1" / "name").read_text() == "step_1.old"
    assert (folder / "step_2" / "name").read_text() == "step_2"


def test_best_and_latest_are_read_as_names_only(tmp_path: Path) -> None:
    checkpoint.mark_best(tmp_path, Best(3, 1.0, "reward"))
    assert checkpoint.best_path(tmp_path) == tmp_path / "step_3"
    checkpoint.mark_best(tmp_path, None)
    assert checkpoint.best_path(tmp_path) is None


def test_a_run_of_another_folder_is_a_start_for_this_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its phase's end is saved here as well, so that this run can be resumed on its own."""
    assert run(tmp_path / "a", *SHORT) == 0
    start = tmp_path / "b0" / "checkpoints" / "step_2"
    shutil.copytree(tmp_path / "a" / "checkpoints" / "step_2", start)
    assert run(tmp_path / "b", *SHORT, "--run.resume", str(start)) == 0
    assert {"step_2", "step_6"} <= steps(tmp_path / "b")
    shutil.rmtree(tmp_path / "b0")
    (tmp_path / "b" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step_6")
    capsys.readouterr()
    assert run(tmp_path / "b", *SHORT) == 0
    assert "step_5 (step 5)" in capsys.readouterr().out
    files = [(tmp_path / r / "final" / "model.safetensors").read_bytes() for r in ("a", "b")]
    assert files[0] == files[1]


def test_a_start_that_was_killed_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the config, the corpus or the tokenizer is written, or refused at once."""
    run_dir, whole = tmp_path / "r", tmp_path / "whole"
    assert run(whole, "--train.max_steps", "1") == 0
    assert run(run_dir, "--run.resume", str(whole / "checkpoints" / "step_9")) == 2
    assert list(run_dir.iterdir()) == []
    for name in ("lock", "config.toml.tmp"):
        (run_dir / name).write_text("half")
    for part in ("data", "tokenizer"):

        def killed(*_: Any, part: str = part) -> None:
            raise KeyboardInterrupt(part)

        monkeypatch.setattr("crpo_fast.checkpoint_files.os.replace", real_replace(part, killed))
        with pytest.raises(KeyboardInterrupt, match=part):
            run(run_dir, "--train.max_steps", "1")
        torch.distributed.destroy_process_group()
        monkeypatch.undo()
        assert (run_dir / f"{part}.tmp").is_dir()
    assert run(run_dir, "--train.max_steps", "1") == 0
    files = [(r / "final" / "model.safetensors").read_bytes() for r in (run_dir, whole)]
    assert files[0] == files[1]
    assert not list(run_dir.glob("*.tmp"))


def real_replace(part: str, killed: Any) -> Any:
    real = os.replace
    return lambda a, b: killed() if Path(b).name == part else real(a, b)


def test_without_any_whole_checkpoint_a_line_says_that_it_starts_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "r"
    assert run(run_dir, "--train.max_steps", "1") == 0
    for state in run_dir.rglob("state.json"):
        state.write_text("{}")
    (run_dir / "summary.json").unlink()
    metrics = logged(run_dir)
    capsys.readouterr()
    assert run(run_dir, "--train.max_steps", "1") == 0
    assert "no whole checkpoint is left in " in capsys.readouterr().out
    assert logged(run_dir) == metrics

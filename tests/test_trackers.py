"""TensorBoard, Weights & Biases (offline), Trackio: what they wrote is read back and compared."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crpo_fast import session, tracker_backends, trackers, train
from crpo_fast.config import TrackConfig, load_config
from crpo_fast.data import LABEL_SETS
from crpo_fast.task import Rows, Task
from crpo_fast.tracker_backends import wandb_history

TINY = str(Path(__file__).with_name("tiny.toml"))
CANARY = "zanzibarcanary"
ALL = ("tensorboard", "wandb", "trackio")
Series = dict[str, dict[int, float]]  # metric -> step -> value


@pytest.fixture(scope="module", autouse=True)
def trackio_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Trackio reads its folder when it is imported."""
    folder = tmp_path_factory.mktemp("trackio")
    before = os.environ.get("TRACKIO_DIR")
    os.environ["TRACKIO_DIR"] = str(folder)
    yield folder
    if before is None:
        del os.environ["TRACKIO_DIR"]
    else:
        os.environ["TRACKIO_DIR"] = before


def needs(*names: str) -> None:
    for name in names:
        pytest.importorskip(trackers.PACKAGES[name], reason=f"needs the extra {name}")


def read_tensorboard(folder: Path) -> Series:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    series: Series = {}
    for tag in found.Tags()["scalars"]:
        events = found.Scalars(tag)
        assert len({e.step for e in events}) == len(events), f"{tag} has a step twice"
        series[tag] = {e.step: e.value for e in events}
    return series


def read_wandb(folder: Path) -> Series:
    series: Series = {}
    for path in sorted(folder.glob("offline-run-*/*.wandb")):
        for row in wandb_history(path):
            for name, value in row.items():
                if not name.startswith("_"):
                    steps = series.setdefault(name, {})
                    assert row["_step"] not in steps, f"{name} has step {row['_step']} twice"
                    steps[row["_step"]] = value
    return series


def read_trackio(project: str, identity: str) -> Series:
    from trackio.sqlite_storage import SQLiteStorage

    series: Series = {}
    for row in SQLiteStorage.get_logs(project, identity):
        for name, value in row.items():
            if name not in ("step", "timestamp"):
                steps = series.setdefault(name, {})
                assert row["step"] not in steps, f"{name} has step {row['step']} twice"
                steps[row["step"]] = value
    return series


def expected(run_dir: Path) -> Series:
    """What the run folder says, as series."""
    series: Series = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in trackers.numbers(record).items():
            series.setdefault(name, {})[record["step"]] = value
    for evaluation in json.loads((run_dir / "evaluations.json").read_text()).values():
        for name, value in trackers.evaluation_numbers(evaluation).items():
            series.setdefault(name, {})[evaluation["step"]] = value
    return series


def assert_holds(found: Series, run_dir: Path, rel: float = 0.0) -> None:
    wanted = expected(run_dir)
    assert found.keys() == wanted.keys()
    for name, steps in wanted.items():
        assert found[name] == pytest.approx(steps, rel=rel, abs=1e-37), name


def identity(run_dir: Path) -> str:
    return json.loads((run_dir / "trackers.json").read_text())["id"]


def run(run_dir: Path, *arguments: str) -> int:
    return train.main([TINY, "--run.dir", str(run_dir), *arguments])


def assert_all_hold(run_dir: Path, project: str) -> None:
    assert_holds(read_tensorboard(run_dir / "tensorboard"), run_dir, rel=1e-6)  # fp32
    assert_holds(read_wandb(run_dir / "wandb"), run_dir)
    assert_holds(read_trackio(project, identity(run_dir)), run_dir)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run with all trackers, whose posts and completions hold a canary."""
    needs(*ALL)
    run_dir = tmp_path_factory.mktemp("run") / "r"
    with pytest.MonkeyPatch.context() as patch:
        load_rows, decode = session.load_rows, Task.decode

        def marked(*args: Any, **kwargs: Any) -> Rows:
            rows = load_rows(*args, **kwargs)
            return replace(rows, train=[replace(r, text=f"{CANARY} {r.text}") for r in rows.train])

        patch.setattr(session, "load_rows", marked)
        patch.setattr(Task, "decode", lambda self, ids: f"{decode(self, ids)} {CANARY}")
        arguments = ["--train.max_steps", "2", "--eval.every", "1", "--track.project", "first"]
        assert run(run_dir, *arguments, "--track.to", *ALL) == 0
        yield run_dir


def test_all_three_hold_what_the_run_folder_says(tracked: Path) -> None:
    assert_all_hold(tracked, "first")
    steps = expected(tracked)
    assert sorted(steps["loss"]) == [1, 2, 3, 4]
    assert sorted(steps["eval/weighted_f1"]) == [2, 3, 4]  # before, step_3, step_4 = after
    assert {"reward", "seconds/rollout", "tokens_per_second"} <= steps.keys()


def test_no_text_reaches_a_tracker(tracked: Path, trackio_folder: Path) -> None:
    assert CANARY in (tracked / "samples.jsonl").read_text()  # it is where it may be
    labels = {label for labels in LABEL_SETS.values() for label in labels if len(label) > 8}
    assert labels
    files = [f for folder in ("tensorboard", "wandb") for f in (tracked / folder).rglob("*")]
    files = [f for f in (*files, *trackio_folder.rglob("*")) if f.is_file()]
    assert len(files) >= 3
    for file in files:
        data = file.read_bytes()
        assert CANARY.encode() not in data, file
        if file.parent.name != "logs":  # of wandb's own, local; they name the folder of the run
            assert str(tracked).encode() not in data, file
            assert not [x for x in labels if x.encode() in data], file
            assert b"crpo_fast.rewards:" not in data, file


def test_a_continued_run_has_every_step_once_and_keeps_its_identity(
    tracked: Path, tmp_path: Path
) -> None:
    """Killed after step 4 was told, with its last checkpoint at step 2."""
    run_dir = tmp_path / "r"
    shutil.copytree(tracked, run_dir)
    before = identity(run_dir)
    (run_dir / "summary.json").unlink()
    for step in (3, 4):
        shutil.rmtree(run_dir / "checkpoints" / f"step_{step}")
    arguments = ["--train.max_steps", "2", "--eval.every", "1", "--track.project", "first"]
    assert run(run_dir, *arguments, "--track.to", *ALL) == 0
    assert identity(run_dir) == before
    assert len(list((run_dir / "wandb").glob(f"offline-run-*-{before}"))) == 2
    stored = [read_wandb(run_dir / "wandb"), read_tensorboard(run_dir / "tensorboard")]
    for series in (*stored, read_trackio("first", before)):
        for name, steps in expected(run_dir).items():
            assert series[name].keys() == steps.keys(), name
            if not name.startswith(("seconds", "tokens_per_second")):
                assert series[name] == pytest.approx(steps, rel=1e-6, abs=1e-37), name


def test_a_tracker_that_joins_later_is_told_all(tracked: Path, tmp_path: Path) -> None:
    entries = [json.loads(x) for x in (tracked / "metrics.jsonl").read_text().splitlines()]
    evaluations = json.loads((tracked / "evaluations.json").read_text())
    config = replace(load_config(TINY), track=TrackConfig(to=("tensorboard",)))
    shutil.copy(tracked / "evaluations.json", tmp_path)
    shutil.copy(tracked / "metrics.jsonl", tmp_path)
    trackers.start(config, tmp_path, lambda: entries, evaluations, pytest.fail).close()
    assert_holds(read_tensorboard(tmp_path / "tensorboard"), tmp_path, rel=1e-6)


def test_identity_changes_with_steps_that_were_told_otherwise(tmp_path: Path) -> None:
    first = trackers._identity(tmp_path, [2, 2], 0)
    assert trackers._identity(tmp_path, [2, 2], 3) == first
    assert trackers._identity(tmp_path, [2, 4], 4) == first  # goes on after the last step
    other = trackers._identity(tmp_path, [3, 3], 2)  # step 3 was another one
    assert other != first
    assert trackers._identity(tmp_path, [3, 3], 2) == other


class Failing:
    """A tracker whose connection is gone after the first step."""

    held = -1.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.calls = 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.calls += 1
        if self.calls > 1:
            raise ConnectionError("no route\nto host")

    def close(self) -> None:
        raise TimeoutError("still no route")


def test_a_failing_tracker_warns_once_is_counted_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("tensorboard")
    monkeypatch.setattr(tracker_backends, "TensorBoard", Failing)
    arguments = ["--train.max_steps", "1", "--track.to", "tensorboard"]
    assert run(tmp_path / "r", *arguments) == 0
    warnings = [x for x in capsys.readouterr().out.splitlines() if x.startswith("warning: tens")]
    first = "warning: tensorboard failed at step 1: ConnectionError: no route to host. "
    assert warnings == [
        f"{first}The run goes on; metrics.jsonl has everything.",
        # the evaluations before and after, step 2, and close
        "warning: tensorboard: 4 calls failed; metrics.jsonl has everything.",
    ]
    assert (tmp_path / "r" / "summary.json").exists()


def test_a_tracker_that_cannot_be_opened_is_left_out() -> None:
    said: list[str] = []
    opened = trackers.Trackers(said.append)
    opened.add("wandb", lambda: (_ for _ in ()).throw(OSError("no key")))
    opened.metrics({"step": 1, "loss": 1.0})
    opened.close()
    expected = "wandb could not be opened: OSError: no key. The run goes on; "
    assert said == [f"{expected}metrics.jsonl has everything."]


def test_half_an_event_does_not_hide_later_ones(tmp_path: Path) -> None:
    """A full disk takes half of an event; what comes after there is room again is readable."""
    needs("tensorboard")
    board = tracker_backends.TensorBoard(tmp_path, -1)
    board.log(1, {"loss": 0.5})
    file = board._file

    class Full:
        tell, truncate, seek = file.tell, file.truncate, file.seek

        def write(self, data: bytes) -> int:
            return file.write(data[: len(data) // 2])

    board._file = Full()  # type: ignore[assignment]
    with pytest.raises(OSError, match="wrote"):
        board.log(2, {"loss": 0.25})
    board._file = file
    board.log(3, {"loss": 0.125})
    board.close()
    assert read_tensorboard(tmp_path) == {"loss": {1: 0.5, 3: 0.125}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--track.to", "wandb"], 'pip install "crpo-fast[wandb]"'),
        (["--track.to", "tensorbored"], "tensorboard, wandb, trackio, got 'tensorbored'"),
        (["--track.wandb_mode", "maybe"], "expected offline or online, got 'maybe'"),
    ],
)
def test_refusals(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)  # nothing is installed
    assert run(tmp_path / "r", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_hyper_parameters_are_numbers() -> None:
    found = trackers.hyper_parameters(replace(load_config(TINY), stages=()))
    assert found["optim.lr"] == 0.01
    assert found["phases.1.steps"] == 4
    assert {type(v) for v in found.values()} <= {int, float, bool}
    assert not any("dir" in key or "path" in key for key in found)


def test_numbers_leave_out_text_and_what_is_not_finite() -> None:
    record = {"step": 3, "phase": "crpo", "loss": 0.5, "kl": None, "a": float("nan"), "n": 2}
    assert trackers.numbers(record) == {"loss": 0.5, "n": 2.0}

"""A loss or gradient that is not finite: skipped, counted, saved, and the end after some in a row.

Which files, messages and endings a run has is also in test_faults.py, two ranks in
test_loop_ranks.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from crpo_fast import distributed, nonfinite, step, train
from crpo_fast.distributed import World
from crpo_fast.metrics import JsonLines, Sums
from crpo_fast.packing import Sequence, pack

TINY = str(Path(__file__).with_name("tiny.toml"))
CPU = World(0, 1, torch.device("cpu"))


def run(run_dir: Path, *arguments: str) -> int:
    every = ["--checkpoint.every", "1", "--checkpoint.keep", "20", "--train.threads", "1"]
    return train.main([TINY, "--run.dir", str(run_dir), *every, *arguments])


def records(run_dir: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """The loss of these steps of the run is NaN (tiny.toml has a micro-batch or two a step)."""
    original, run_updates = step.micro_batch_loss, train.run_updates
    now = [0]

    def updates(*args: Any, where: str, **kwargs: Any) -> Any:
        now[0] = int(where.removeprefix("step_"))
        return run_updates(*args, where=where, **kwargs)

    def loss(*args: Any, **kwargs: Any) -> Any:
        value, stats = original(*args, **kwargs)
        return (value * torch.nan if now[0] in steps else value), stats

    monkeypatch.setattr(train, "run_updates", updates)
    monkeypatch.setattr(step, "micro_batch_loss", loss)


def state(run_dir: Path, number: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / f"step_{number}" / f"{name}.safetensors")


def test_a_run_whose_first_update_is_skipped_resumes_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither saving nor loading gives the optimizer the state of an update that was not done."""
    poison(monkeypatch, {1})
    ends, options = [], ("--phases.1.steps", "1", "--checkpoint.best", "none")
    for name, caps in (("saved", [2]), ("stopped", [1, 2]), ("unsaved", [2])):
        for cap in caps:
            every = ("--checkpoint.every", "0") if name == "unsaved" else ()
            assert run(tmp_path / name, *options, *every, "--train.max_steps", str(cap)) == 0
        if name == "stopped":
            assert state(tmp_path / name, 1, "optimizer") == {}
        ends.append(state(tmp_path / name, 2, "optimizer"))
    for end in ends:
        assert {float(v) for k, v in end.items() if k.endswith("|step")} == {1.0}
        assert all(torch.equal(v, ends[0][k]) for k, v in end.items())


def test_saving_does_no_update_for_an_optimizer_that_did_none() -> None:
    """As after steps in which dynamic sampling found nothing: there are no gradients either."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    saved = distributed.optimizer_state(model, optimizer)
    assert saved["state"] == {}
    assert not optimizer.state
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert distributed.optimizer_state(model, optimizer)["param_groups"] == saved["param_groups"]


def test_skipped_steps_change_nothing_but_the_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, {2, 3})
    run_dir = tmp_path / "r"
    assert run(run_dir) == 0
    for name in ("model", "optimizer"):
        before, after = state(run_dir, 1, name), state(run_dir, 3, name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) for k in before)
        assert any(not torch.equal(v, state(run_dir, 4, name)[k]) for k, v in after.items())
    logged = records(run_dir)
    assert [r["skipped"] for r in logged] == [0, 1, 1, 0, 0, 0, 0, 0]
    assert [r["skipped_total"] for r in logged] == [0, 1, 2, 2, 2, 2, 2, 2]
    assert [r["updates"] for r in logged[:4]] == [1, 0, 0, 1]
    assert [r["loss"] is None for r in logged[:4]] == [False, True, True, False]
    assert [r["lr"] for r in logged[:4]] == pytest.approx([0.01, 0.01, 0.01 * 2 / 3, 0.01 / 3])
    out = capsys.readouterr().out
    saved = run_dir / "nonfinite" / "step_3" / "rank_0.safetensors"
    assert "step_3: loss nan" in out
    assert f"safetensors.torch.load_file('{saved}')" in out.replace("\n", "")
    tensors = load_file(saved)
    rows, ids = tensors["0.rows"], tensors["0.input_ids"].flatten()
    assert torch.equal(ids[rows + 1], tensors["0.labels"])
    for name in ("token_weights", "stage_ids", "logprobs"):
        assert tensors[f"0.{name}"].shape == rows.shape
    assert tensors["0.logprobs"].isfinite().all()
    record = json.loads(saved.with_suffix(".json").read_text())
    assert record["metrics"]["loss"] == "nan"
    assert "model.embed_tokens.weight" in record["gradients_not_finite"]
    assert record["weights_not_finite"] == []


def test_the_count_in_a_row_survives_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, {2, 3, 4, 5, 6})
    run_dir = tmp_path / "r"
    assert run(run_dir, "--train.max_nonfinite", "2") == 1
    assert [r["step"] for r in records(run_dir)] == [1, 2, 3]
    error = capsys.readouterr().err
    assert "2 updates in a row not finite (train.max_nonfinite 2)" in error
    assert "--optim.lr" in error
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_3"
    kept = state(run_dir, 3, "model")
    assert all(torch.equal(kept[k], v) for k, v in state(run_dir, 1, "model").items())
    # killed after step 2, one skip in a row: the next one is the second, and not the first
    shutil.rmtree(run_dir / "checkpoints" / "step_3")
    assert run(run_dir, "--train.max_nonfinite", "2") == 1
    assert [r["skipped_total"] for r in records(run_dir)] == [0, 1, 2]
    # the limit may be raised for the same run; over the end of a phase the count goes on
    assert run(run_dir, "--train.max_nonfinite", "5") == 1
    assert [r["skipped_total"] for r in records(run_dir)] == [0, 1, 2, 3, 4, 5]
    assert records(run_dir)[-1]["phase"] == "crpo"


def test_weights_that_are_not_finite_are_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = train.run_updates

    def overflow(policy: Any, *args: Any, where: str, **kwargs: Any) -> Any:
        metrics = original(policy, *args, where=where, **kwargs)
        if where == "step_1":
            with torch.no_grad():
                policy.model.get_input_embeddings().weight.mul_(torch.inf)
        return metrics

    monkeypatch.setattr(train, "run_updates", overflow)
    run_dir = tmp_path / "r"
    assert run(run_dir) == 1
    captured = capsys.readouterr()
    assert "the weights themselves are not finite" in captured.out
    assert "these weights could not be saved" in captured.err
    assert not list((run_dir / "checkpoints").glob("step_*"))


def test_only_the_newest_folders_are_kept(tmp_path: Path) -> None:
    lines: list[str] = []
    guard = nonfinite.Guard(100, tmp_path / "nonfinite", CPU, lines.append)
    model = torch.nn.Linear(2, 2)
    model.weight.grad = torch.full((2, 2), torch.inf)
    batches = pack([Sequence([1, 2], [3], [-1])], 9)
    for number in range(1, 9):
        metrics = {"loss": 1.0, "grad_norm": torch.inf}
        guard.skipped(f"step_{number}", model, batches, [torch.zeros(1)], metrics)
    kept = sorted(p.name for p in (tmp_path / "nonfinite").iterdir())
    assert kept == [f"step_{n}" for n in range(9 - nonfinite.KEPT, 9)]
    assert (guard.in_a_row, guard.total) == (8, 8)
    assert "8 in a row, the run stops at 100" in lines[-1]
    guard.done()
    assert (guard.in_a_row, guard.total, guard.is_exhausted) == (0, 8, False)
    other = nonfinite.Guard(9, tmp_path, CPU, lines.append)
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert (other.in_a_row, other.total) == (0, 8)


@pytest.mark.parametrize("error", [None, SafetensorError("I/O error: no space left on device")])
def test_a_folder_that_cannot_be_written_is_named_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    lines: list[str] = []
    if error is None:
        (tmp_path / "nonfinite").write_text("a file in the way")
    else:
        monkeypatch.setattr(nonfinite, "save_file", Mock(side_effect=error))
    guard = nonfinite.Guard(3, tmp_path / "nonfinite", CPU, lines.append)
    batches = pack([Sequence([1, 2], [3], [-1])], 9)
    metrics = {"loss": torch.nan, "grad_norm": torch.nan}
    guard.skipped("step_1", torch.nn.Linear(1, 1), batches, [torch.zeros(1)], metrics)
    assert "could not be saved" in lines[0]
    assert guard.in_a_row == 1


def test_sums_pool_means_totals_and_extremes() -> None:
    """Two updates of two ranks with other counts: no average of averages."""

    def update(x: list[float]) -> Sums:
        sums = Sums()
        sums.add("mean", sum(x), len(x))
        sums.add_total("total", len(x))
        sums.add_extremes("peak", torch.tensor(x), minimum=True)
        return sums

    pooled = Sums()
    for mine, theirs in (([1.0, 2.0], [6.0]), ([-3.0], [])):
        other, vectors = update(theirs), []
        other.reduced(lambda x, seen=vectors: (seen.append(x), x)[1])

        def all_max(x: dict[str, float], other: Sums = other) -> dict[str, float]:
            return {k: max(v, other._peaks[k]) for k, v in x.items()}

        (theirs_summed,) = vectors
        pooled.merge(update(mine).reduced(theirs_summed.__add__, all_max))
    assert pooled.means() == {"mean": 1.5, "total": 4.0, "peak/max": 6.0, "peak/min": -3.0}
    assert update([]).means() == {"mean": None, "total": 0, "peak/max": None, "peak/min": None}
    poisoned = update([1.0, torch.nan]).means()
    assert all(v != v for k, v in poisoned.items() if k != "total")


def test_metrics_are_strict_json(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "metrics.jsonl")
    values = {"a": torch.nan, "b": [1.0, -torch.inf], "c": {"d": torch.inf}, "e": 2}
    log.write({"step": 1, **values})
    log.sync()
    assert records(tmp_path) == [{"step": 1, "a": None, "b": [1.0, None], "c": {"d": None}, "e": 2}]

"""`python -m benchmarks step`: parts, comparison with TRL, and the command on a tiny model."""

from __future__ import annotations

import importlib.util
import itertools
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import plot
from benchmarks.__main__ import main
from benchmarks.step import command as step
from benchmarks.step import plot as step_plot
from benchmarks.step.case import StepCase, distribution, make_sequences, model_config
from benchmarks.step.command import Worker
from benchmarks.step.flops import forward_flops, step_flops
from benchmarks.step.parts import OVERHEAD, PARTS, Timeline, overhead
from benchmarks.step.report import agreement, row_of, targets
from crpo_fast.packing import pack
from model_cases import save_tiny_config

HAS_TRL = all(importlib.util.find_spec(name) for name in ("trl", "datasets", "accelerate"))

pytestmark = pytest.mark.usefixtures("keep_threads")
OPTIONS = ["--prompts", "2", "--group-size", "4", "--median-prompt", "6", "--threads", "1"]
OPTIONS += ["--median-completion", "9", "--max-completion", "20", "--steps", "3"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_config(tmp_path / "model")


def clocked(readings: list[float]) -> Timeline:
    return Timeline(iter(readings).__next__)


def test_each_second_is_in_one_part_and_all_sum_to_the_step() -> None:
    timeline = clocked([0, 1, 3, 6, 10, 15, 21, 28, 36, 45])
    timeline.start()  # 0
    with timeline.part("packing"), timeline.part("reference"):  # 1, 3
        timeline.switch("head_forward")  # inside a reference pass nothing else begins
        with timeline.part("metrics"):
            pass
    # the reference ends at 6, the packing at 10
    with timeline.part("blocks_forward"):  # 15
        timeline.switch("head_forward")  # 21
        with timeline.part("sharding"):  # 28
            pass
        # 36
    seconds = timeline_stop(timeline, 45, 50)
    assert seconds["packing"] == (3 - 1) + (10 - 6)
    assert seconds["reference"] == 6 - 3
    assert seconds["blocks_forward"] == 21 - 15
    assert seconds["head_forward"] == (28 - 21) + (45 - 36)
    assert seconds["sharding"] == 36 - 28
    assert seconds["loop"] == 1 + (15 - 10) + (50 - 45)
    assert sum(seconds.values()) == 50
    assert list(seconds) == list(PARTS)


def timeline_stop(timeline: Timeline, *rest: float) -> dict[str, float]:
    """``stop``, after the readings that a block's end and the step's end still take."""
    timeline._stamp = iter(rest[1:]).__next__
    return timeline.stop()


def test_a_step_that_is_not_timed_costs_no_marks() -> None:
    timeline = clocked([])
    with timeline.part("optimizer"):
        timeline.switch("metrics")


def test_backward_is_cut_where_the_gradient_reaches_the_blocks() -> None:
    class Base(torch.nn.Linear):
        def forward(self, x: Any) -> Any:
            return type("Output", (), {"last_hidden_state": super().forward(x)})

    timeline = Timeline(itertools.count().__next__)
    base, plain = Base(3, 3), torch.Tensor.backward
    try:
        timeline.watch_backward()
        timeline.watch_blocks(base)
        timeline.start()
        with timeline.part("blocks_forward"):
            loss = base(torch.randn(2, 3)).last_hidden_state.sum()
        loss.backward()
        seconds = timeline.stop()
    finally:
        torch.Tensor.backward = plain
    cut = ("blocks_forward", "head_forward", "head_backward", "blocks_backward")
    assert {name: seconds[name] for name in cut} == dict.fromkeys(cut, 1)


def test_overhead_is_what_is_outside_model_kernel_and_optimizer() -> None:
    parts = dict.fromkeys(PARTS, 10.0)
    parts |= dict(zip(OVERHEAD, (1.0, 2.0, 3.0, 4.0), strict=True))
    assert OVERHEAD == ("packing", "metrics", "sharding", "loop")
    assert overhead(parts) == pytest.approx(10 / 70)


def answer(seconds: float, **parts: float) -> dict[str, Any]:
    given = dict.fromkeys(PARTS, 0.0) | parts
    rest = seconds - sum(given.values())
    return {"seconds": seconds, "parts": given | {"blocks_forward": rest}}


def test_a_row_of_planted_timings() -> None:
    answers = [answer(s, metrics=0.02 * s, loop=0.03 * s) for s in (2.0, 4.0, 3.0, 5.0, 100.0)]
    found = {"tokens": 800, "completion_tokens": 400}
    row = row_of(answers, {"peak": 3, "over": 1}, found, flops=6e9, peak=4e9)
    assert row["seconds"] == pytest.approx({"median": 4.0, "low": 2.8, "high": 24.0, "count": 5})
    assert row["overhead"]["median"] == pytest.approx(0.05)
    assert row["tokens_per_second"] == 200
    assert row["completion_tokens_per_second"] == 100
    assert row["mfu"] == pytest.approx(6 / 4 / 4)
    assert row["parts"]["loop"]["median"] == pytest.approx(0.12)
    missed = targets([{"key": "ours", **row}], [], is_gpu=False)
    assert [(t["limit"], round(t["value"], 6), t["met"]) for t in missed] == [(0.03, 0.05, False)]


@pytest.mark.parametrize(("is_gpu", "met"), [(True, [True, False]), (False, [None, None])])
def test_the_rival_is_a_target_on_a_gpu_alone(is_gpu: bool, met: list[Any]) -> None:
    found = {"tokens": 1, "completion_tokens": 1}
    rows = [
        {"key": key, **row_of([answer(s)], {"peak": peak}, found, 1.0, 1.0)}
        for key, s, peak in (("ours", 1.0, 8), ("trl", 1.5, 8))
    ]
    speed, memory = targets(rows, [], is_gpu=is_gpu)[1:]
    assert (speed["value"], memory["value"]) == (1.5, 1.0)
    assert [speed["met"], memory["met"]] == met


def first_step(scale: float = 1.0, **changes: Any) -> dict[str, Any]:
    gradients = {"a": scale * torch.tensor([3.0, 4.0]), "b": scale * torch.ones(2)}
    return {"loss": 1.0, "grad_norm": 2.0, "gradients": gradients, **changes}


@pytest.mark.parametrize(
    ("theirs", "error", "agrees"),
    [
        (first_step(), 0.0, True),
        (first_step(1.25), 0.2, False),
        (first_step(loss=1.0001), 0.0, False),
        (first_step(grad_norm=2.1), 0.0, False),
        (first_step(gradients={"a": torch.tensor([3.0, 4.0])}), 0.0, False),
    ],
)
def test_other_gradients_are_seen(theirs: dict, error: float, agrees: bool) -> None:
    (row,) = agreement({"ours": first_step(), "trl": theirs}, "float32")
    assert row["gradient_error"] == pytest.approx(error)
    assert row["agrees"] is agrees


def test_rollouts_are_ragged_and_a_function_of_the_seed() -> None:
    case = StepCase("tiny", "", "", prompts=4, group_size=8)
    sequences = make_sequences(case, 500)
    assert sequences == make_sequences(case, 500)
    found = distribution(sequences, 8)
    assert found["tokens"] == sum(map(len, sequences))
    assert found["squares"] == sum(len(s) ** 2 for s in sequences)
    low, *_, high = found["completion_quantiles"]
    assert high <= case.max_completion
    assert high > 3 * low
    for group in range(4):  # the group's advantages are those of one group
        mine = [s.advantage for s in sequences[8 * group :][:8]]
        assert sum(mine) == pytest.approx(0.0, abs=1e-9)
    batches = pack(sequences, 8 * found["padded"] // 32)
    assert sum(b.input_ids.numel() for b in batches) == found["tokens"]
    assert len(batches) <= found["micro_batches"]


def test_flops_of_a_step() -> None:
    config = model_config("qwen3-0.6b")
    # 2 N T of 440 M block parameters, causal attention, head
    per_layer = 1024 * (2048 + 1024 + 1024 + 2048) + 3 * 1024 * 3072
    expected = 2 * 28 * per_layer * 100 + 2 * 28 * 16 * 128 * 5000 + 2 * 151936 * 1024 * 60
    assert forward_flops(config, 100, 60, 5000) == expected
    found = {"tokens": 100, "completion_tokens": 60, "squares": 5000}
    flops = step_flops(config, found, has_reference=True)
    assert flops == {"training": 3 * expected, "reference": expected}
    assert step_flops(config, found, has_reference=False)["reference"] == 0


class FakeWorker(Worker):
    """Answers at once; every request takes ten seconds of a fake clock."""

    def __init__(self, key: str, clock: list[float]) -> None:
        self.key, self.failure, self.clock, self.asked = key, "", clock, []
        self.answers, self.memory, self.gradients = [], {}, {}

    def ask(self, request: str) -> dict[str, Any]:
        if self.failure:
            return {}
        self.asked.append(request)
        self.clock[0] += 10
        return {**answer(10.0), "memory": {"peak": 1}}


@pytest.mark.parametrize(
    ("deadline", "ours", "theirs"), [(None, 5, 5), (70, 1, 1), (85, 2, 2), (55, 1, 0), (5, 1, 0)]
)
def test_what_is_late_is_dropped_with_the_reason(
    deadline: Any, ours: int, theirs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(step.time, "monotonic", lambda: clock[0])
    workers = [FakeWorker("ours", clock), FakeWorker("trl", clock)]
    step.rounds(workers, 5, deadline)
    assert [len(worker.answers) for worker in workers] == [ours, theirs]
    assert workers[0].failure == ""
    assert workers[1].failure == ("" if theirs else "dropped for lack of time")


def read(path: Path) -> dict[str, Any]:
    return json.loads((path / "step_cpu.json").read_text())


def test_the_command_measures_and_writes(folder: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["step", *OPTIONS, "--model", str(folder), "--out", str(tmp_path), "--only"]
    assert main([*arguments, "ours", "trl_liger"]) == 0
    report = read(tmp_path)
    ours, liger = report["rows"]
    assert "missing" in liger
    assert ours["seconds"]["count"] == 3
    for seconds, parts in zip(ours["all_seconds"], ours["all_parts"], strict=True):
        assert sum(parts.values()) == pytest.approx(seconds, rel=0.02, abs=1e-3)
    needed = set(PARTS) - {"loop"}
    assert {name for name in needed if not ours["parts"][name]["median"] > 0} == set()
    memory = ours["memory"]
    assert memory["optimizer"] >= 2 * memory["parameters"]
    held = sum(memory[name] for name in ("parameters", "gradients", "optimizer", "reference"))
    assert memory["peak"] == held + memory["over"]
    page = (tmp_path / "step_cpu.md").read_text()
    assert page in capsys.readouterr().out
    assert liger["missing"] in page
    ET.parse(tmp_path / "step_cpu.svg")
    assert report["machine"]["cpu"] in (tmp_path / "step_cpu.svg").read_text()
    table = (tmp_path / "step_cpu.csv").read_text().splitlines()
    assert len(table) == 1 + 1 + len(PARTS) + 1
    assert plot.drawer(report) is step_plot


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "--model: expected one of qwen3-0.6b, tiny, or a folder"),
        (["--micro-batch", "5"], "--micro-batch: expected a divisor of 24"),
        (["--objective", "bnpo"], "--micro-batch: expected all sequences in one for bnpo"),
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--group-size", "1"], "--group-size: expected at least 2"),
        (["--max-completion", "0"], "--max-completion: expected at least 2, got 0"),
        (["--median-completion", "-3"], "--median-completion: expected at least 2, got -3"),
        (["--kl-coef", "-1"], "--kl-coef: expected at least 0"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str, capsys: Any) -> None:
    assert main(["step", *arguments]) == 2
    assert capsys.readouterr().out.startswith(message)


@pytest.mark.skipif(not HAS_TRL, reason="trl is not installed (pip install 'crpo-fast[bench]')")
@pytest.mark.parametrize(
    ("objective", "dtype", "micro_batch"),
    [("dapo", "float32", 4), ("bnpo", "float32", 8), ("grpo", "bfloat16", 2)],
)
def test_loss_and_gradients_are_those_of_trl(
    folder: Path, tmp_path: Path, objective: str, dtype: str, micro_batch: int
) -> None:
    arguments = ["step", *OPTIONS, "--model", str(folder), "--out", str(tmp_path)]
    arguments += ["--objective", objective, "--dtype", dtype, "--micro-batch", str(micro_batch)]
    assert main([*arguments, "--steps", "1", "--kl-coef", "0.1", "--only", "ours", "trl"]) == 0
    report = read(tmp_path)
    (row,) = report["agreement"]
    assert row["agrees"], row
    assert row["only_one_has"] == []
    if dtype == "float32":
        assert row["gradient_error"] < 1e-5
    trl = report["rows"][1]
    for seconds, parts in zip(trl["all_seconds"], trl["all_parts"], strict=True):
        assert sum(parts.values()) == pytest.approx(seconds, rel=0.02, abs=1e-3)
    assert min(trl["parts"][name]["median"] for name in ("reference", "head_backward")) > 0

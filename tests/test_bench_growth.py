"""The commands `growth` and `memory`: exponents, flatness, planned bytes, ranks, what is drawn."""

from __future__ import annotations

import csv
import json
import math
import re
import time
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.__main__ import main
from benchmarks.clock import Clock
from benchmarks.deadline import LATE
from benchmarks.drawing import log_plot
from benchmarks.drawing.log_plot import UNITS, LogAxis, exponent_text
from benchmarks.growth import ranks as growth_ranks
from benchmarks.growth import sweeps as growth_sweeps
from benchmarks.growth.command import measure_growth
from benchmarks.growth.fit import fit_exponent, flatness
from benchmarks.growth.sweeps import Series, Watch, candidates, late_reason, memory_reason
from benchmarks.live_bytes import memory_of
from benchmarks.losses.baselines import Candidate, Result
from benchmarks.losses.cases import Case, Inputs, make_inputs
from benchmarks.memory import command as memory_table
from benchmarks.memory.planned import KEYS, bound_bytes, planned_bytes
from crpo_kernels import compilation

SMALL = ["--at-vocab", "64", "--at-dim", "16", "--threads", "1"]
ROWS = ["growth", "--only", "rows", "--rows", "256", "4096", "16384", "--seconds", "900", *SMALL]


pytestmark = pytest.mark.usefixtures("keep_threads")


@pytest.fixture(autouse=True)
def no_generated_code(monkeypatch):
    """It would take longer than all the rest."""
    monkeypatch.setattr(compilation, "missing_toolchain", lambda: "no C++ compiler (test)")


def test_the_exponent_of_a_power_law_and_its_range():
    points = [(x, 3 * x**1.5) for x in (1.0, 2.0, 8.0, 64.0)]
    fit = fit_exponent(points)
    assert fit is not None
    assert (fit.exponent, fit.factor) == (pytest.approx(1.5), pytest.approx(3))
    assert fit.residual < 1e-12
    bent = [*points, (1000.0, 1.0)]
    fit = fit_exponent(bent, 2, 64)
    assert fit is not None
    assert (fit.exponent, fit.first, fit.last, fit.count) == (pytest.approx(1.5), 2, 64, 3)
    assert fit_exponent(points, first=60) is None
    with pytest.raises(ValueError, match="above 0"):
        fit_exponent([(1, 1), (2, 0)])


def test_the_band_of_an_exponent_by_hand():
    # logarithms to base 2: (0, 0), (1, 2), (2, 3): slope 1.5, errors -1/6, 1/3, -1/6 of ln 2
    fit = fit_exponent([(1, 1), (2, 4), (4, 8)])
    assert fit is not None
    half = 12.706 * math.sqrt((1 / 6) / 2)
    assert (fit.exponent, fit.low, fit.high) == (
        pytest.approx(1.5),
        pytest.approx(1.5 - half),
        pytest.approx(1.5 + half),
    )
    assert fit.residual == pytest.approx(math.log(2) * math.sqrt(1 / 18))
    two = fit_exponent([(1, 1), (2, 4)])
    assert two is not None
    assert (two.low, exponent_text(two.as_json())) == (None, "2.00")


def test_flatness_sees_bytes_that_grow_with_rows():
    flat = [(256, 1e6), (4096, 9e6), (8192, 9e6 + 100 * 4096)]
    assert flatness("x", flat, first=4096, allowed=128)["met"]
    planted = [(x, y + 100 * x) for x, y in flat]
    found = flatness("x", planted, first=4096, allowed=128)
    assert (found["met"], found["value"]) == (False, pytest.approx(200))
    assert flatness("x", flat[:2], first=4096, allowed=128)["met"] is None


def test_planted_memory_of_size_rows_fails_the_command(tmp_path, monkeypatch, capsys):
    assert main([*ROWS, "--out", str(tmp_path)]) == 0
    clean = json.loads((tmp_path / "growth_cpu.json").read_text())
    assert {check["met"] for check in clean["checks"]} == {True}
    assert sum("one more row" in check["text"] for check in clean["checks"]) == 3
    plain = growth_sweeps.memory_of

    def leaking(candidate, inputs):
        found = plain(candidate, inputs)
        return {**found, "extra_bytes": found["extra_bytes"] + 256 * inputs.case.num_rows}

    monkeypatch.setattr(growth_sweeps, "memory_of", leaking)
    assert main([*ROWS, "--out", str(tmp_path)]) == 1
    assert "| **no** |" in capsys.readouterr().out
    found = json.loads((tmp_path / "growth_cpu.json").read_text())
    assert sum(check["met"] is False for check in found["checks"]) == 3  # of each of ours


def test_drawn_numbers_are_those_of_the_json(tmp_path, capsys):
    parts = ["--only", "vocab", "dim", "workspace", "chunk", "--vocab", "300", "600"]
    sizes = ["--dim", "16", "32", "--workspace", "1", "2", "--chunk", "8", "16"]
    command = ["growth", *parts, *sizes, "--at-vocab", "2000", "--at-dim", "16"]
    command += ["--at-rows", "300", "--threads", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    report = json.loads((tmp_path / "growth_cpu.json").read_text())
    assert report["kind"] == "growth"
    names = {sweep["name"] for sweep in report["sweeps"]}
    kinds = ("seconds", "bytes")
    assert names == {f"{n}_{k}" for n in ("vocab", "dim", "workspace", "chunk") for k in kinds}
    page = (tmp_path / "growth_cpu.md").read_text()
    assert capsys.readouterr().out.startswith(page)
    picture = (tmp_path / "growth_cpu.svg").read_text()
    assert ET.fromstring(picture).tag.endswith("svg")
    with (tmp_path / "growth_cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    drawn = 0
    for sweep in report["sweeps"]:
        text = UNITS[sweep["unit"]][1]
        for line in sweep["series"]:
            assert f"| {line['title']} | {exponent_text(line['fit'])} |" in page
            assert f"{line['title']}: exponent {exponent_text(line['fit'])}" in picture
            own = [r for r in rows if (r["sweep"], r["line"]) == (sweep["name"], line["key"])]
            assert [(float(r["x"]), float(r["y"])) for r in own] == [
                (p["x"], p["y"]) for p in line["points"]
            ]
            for point in line["points"]:
                drawn += 1
                row = next(x for x in page.splitlines() if x.startswith(f"| {point['x']:g} |"))
                assert row
                assert f" {text(point['y'])} |" in page
    assert drawn == picture.count("<circle") == len(rows)


def test_bytes_of_the_chunk_follow_the_ring(tmp_path):
    command = ["growth", "--only", "chunk", "--chunk", "16", "64", "--at-rows", "512", *SMALL]
    assert main([*command, "--at-vocab", "16384", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "growth_cpu.json").read_text())
    line = report["sweeps"][0]["series"][0]
    small, large = (point["y"] for point in line["points"])
    # 32 and 128 bf16 rows, and the same scratch
    assert large - small == pytest.approx(96 * 16_384 * 2, rel=0.02)


def test_what_comes_too_late_says_so():
    report = measure_growth(type("Options", (), {"device": "cpu"})(), time.monotonic() - 1)
    assert set(report["dropped"].values()) == {LATE}
    watch = Watch(Clock(torch.device("cpu")), 1, time.monotonic() + 10)
    line = Series("x", "x", 1.0)
    assert late_reason(line, 256, watch) is None
    line.points.append({"x": 256, "y": 4.0, "cost": 4.0})
    assert late_reason(line, 512, watch) is None
    reason = late_reason(line, 1024, watch)
    assert reason is not None
    assert reason.startswith(f"{LATE}: about 16 s needed, ")


def test_plain_torch_is_run_up_to_where_it_fits(monkeypatch):
    cpu, case = torch.device("cpu"), Case(1024, 4096, 16, torch.bfloat16)
    needed = planned_bytes(case, "naive")["extra_bytes"]
    assert needed == pytest.approx(20 * 1024 * 4096, rel=0.1)
    monkeypatch.setattr(growth_sweeps, "free_bytes", lambda _: 3 * needed + 3)
    assert memory_reason(case, cpu) is None
    monkeypatch.setattr(growth_sweeps, "free_bytes", lambda _: 3 * needed - 3)
    assert str(memory_reason(case, cpu)).startswith("does not fit: 0.1 GiB, of 0.2 GiB")


@pytest.mark.parametrize("key", KEYS)
def test_planned_bytes_are_those_of_a_real_call(key):
    case = Case(300, 2000, 64, torch.float32)
    candidate = candidates()[key]
    real = memory_of(candidate, candidate.inputs_of(make_inputs(case)))["extra_bytes"]
    assert planned_bytes(case, key, backend="torch")["extra_bytes"] == pytest.approx(real, rel=0.02)


def test_a_call_of_a_gpus_size_is_planned_flat_in_t():
    def rest(rows):
        case = Case(rows, 131_072, 4096, torch.bfloat16)
        found = planned_bytes(case, "one_pass")
        assert found["extra_bytes"] <= bound_bytes(case, "one_pass", is_gpu=True)
        return found["extra_bytes"] - found["output_bytes"] - 2 * 4096 * rows

    few, many = rest(16_384), rest(65_536)
    assert many == pytest.approx(few, rel=0.01)
    assert many == pytest.approx(4 * 131_072 * 4096, rel=0.01)  # the fp32 sum of d_weight
    plain = planned_bytes(Case(65_536, 131_072, 4096, torch.bfloat16), "naive")["extra_bytes"]
    assert plain > 100 * 2**30


def test_ticks_are_powers():
    axis = LogAxis(256, 65_536, 0, 100, 2)
    assert axis.ticks() == [256, 1024, 4096, 16_384, 65_536]
    assert [log_plot.count_text(x) for x in axis.ticks()] == ["256", "1k", "4k", "16k", "64k"]
    assert (axis(256), axis(4096), axis(65_536)) == (0, pytest.approx(50), 100)
    assert LogAxis(0.002, 30, 0, 1, 10).ticks() == pytest.approx([0.01, 0.1, 1, 10])
    assert LogAxis(0.3, 3, 0, 1, 10).ticks() == pytest.approx([0.5, 1, 2])
    assert [log_plot.seconds_text(x) for x in (1, 0.02, 3e-6)] == ["1 s", "20 ms", "3 us"]
    assert log_plot.bytes_text(3 * 2**29) == "1.5 GiB"


@pytest.mark.multirank
def test_the_line_of_a_fit_stays_inside_the_picture():
    points = [{"x": x, "y": y, "low": y, "high": y} for x, y in ((1, 1.0), (2, 9.0), (4, 9.0))]
    line = growth_sweeps.Series("one_pass", "ours", 1.0, points=points)
    found = growth_sweeps.sweep_json("rows_seconds", "rows T", "s", "V 8", [line])
    picture = "".join(log_plot.panel(found))
    (ends,) = re.findall(r'polyline class="fit"[^>]*points="([^"]*)"', picture)
    heights = [float(end.split(",")[1]) for end in ends.split()]
    top = log_plot.TITLE + log_plot.ROW
    assert all(top + 8 <= y <= top + log_plot.PLOT for y in heights)


def test_the_training_step_over_ranks_and_group_sizes(monkeypatch):
    monkeypatch.setattr(growth_ranks, "ROUNDS", 1)
    monkeypatch.setattr(growth_ranks, "TASK", {**growth_ranks.TASK, "completion": 16})
    report, sweeps, checks = growth_ranks.measure_ranks([1, 2], [2, 4], seconds=120)
    assert report["missing"] == {}
    one, two = report["rows"]
    assert one["strong"]["tokens"] == two["strong"]["tokens"] == 32 * 32
    assert two["weak"]["tokens"] == 2 * one["weak"]["tokens"] == 16 * 32
    ideal = one["strong"]["seconds"]["median"] / 2 * max(1.0, 2 / growth_ranks.num_cores())
    assert two["strong"]["ideal"] == pytest.approx(ideal)
    assert two["strong"]["peak_bytes"] < one["strong"]["peak_bytes"]
    assert [check["met"] for check in checks] == [True, True]
    assert two["gradient_error"] <= 2e-6
    names = ["ranks_seconds", "ranks_bytes", "group_seconds", "group_bytes"]
    assert [sweep["name"] for sweep in sweeps] == names
    assert [point["x"] for point in sweeps[2]["series"][0]["points"]] == [2, 4]
    wrong = [one, {**two, "gradient_error": 1e-3}]
    assert [c["met"] for c in growth_ranks.equality_checks(wrong)] == [True, False]


def test_gradients_are_compared_tensor_by_tensor(tmp_path):
    large, small = torch.full((4,), 100.0), torch.full((4,), 1e-3)
    save_file({"a": large, "b": small}, tmp_path / "gradients_1.safetensors")
    save_file({"a": large, "b": small * 1.01}, tmp_path / "gradients_2.safetensors")
    assert growth_ranks.worst_error(tmp_path, 2, 1) == pytest.approx(0.01, rel=1e-3)
    assert growth_ranks.worst_error(tmp_path, 1, 1) == 0.0
    assert growth_ranks.worst_error(tmp_path, 4, 1) is None


@pytest.mark.multirank
def test_ranks_that_hang_are_killed(monkeypatch, tmp_path):
    worker = tmp_path / "worker.py"
    pids = tmp_path / "pids"
    worker.write_text(
        f"import os, time\nopen({str(pids)!r}, 'a').write(f'{{os.getpid()}}\\n')\ntime.sleep(60)\n"
    )
    monkeypatch.setattr(growth_ranks, "WORKER", worker)
    begin = time.monotonic()
    report, sweeps, checks = growth_ranks.measure_ranks([1], [], seconds=8)
    assert time.monotonic() - begin < 30
    assert report["missing"]["1"].startswith("killed after 8 s")
    assert (sweeps, checks) == ([], [])
    states = [Path(f"/proc/{pid}/stat") for pid in pids.read_text().split()]
    alive = [file for file in states if file.exists() and ") Z " not in file.read_text()]
    assert (len(states), alive) == (1, [])


def test_memory_by_shape_and_its_files(tmp_path, monkeypatch, capsys):
    command = ["memory", "--rows", "64", "--vocab", "700", "--dim", "32", "--threads", "1"]
    command += ["--only", "one_pass", "two_pass", "scored", "naive", "naive_scored"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "memory_cpu.json").read_text())
    (case,) = report["cases"]
    rows = {row["key"]: row for row in case["rows"]}
    assert list(rows) == ["one_pass", "two_pass", "scored", "naive", "naive_scored"]
    assert 64 * 700 * 2 < rows["one_pass"]["peak_bytes"] < rows["naive"]["peak_bytes"] / 1.5
    assert [row["key"] for row in case["planned"]] == list(KEYS)
    page = (tmp_path / "memory_cpu.md").read_text()
    assert capsys.readouterr().out.startswith(page)
    assert "PLANNED, not measured: T64 V700 D32 bfloat16 on a GPU" in page
    picture = (tmp_path / "memory_cpu.svg").read_text()
    for row in (*case["rows"], *case["planned"]):
        sizes = [f"{row[name] / 2**20:.1f}" for name in ("peak_bytes", "extra_bytes")]
        line = f"| {row['title']} | {' | '.join(sizes)} | "
        assert line in page
        assert f">{log_plot.bytes_text(row['peak_bytes'])}</text>" in picture
    with (tmp_path / "memory_cpu.csv").open() as file:
        found = [(r["how"], r["key"], int(r["peak_bytes"])) for r in csv.DictReader(file)]
    assert found == [("measured", r["key"], r["peak_bytes"]) for r in case["rows"]] + [
        ("planned", r["key"], r["peak_bytes"]) for r in case["planned"]
    ]
    monkeypatch.setattr(memory_table, "bound_bytes", lambda *_, **__: 1000)
    assert main([*command, "--out", str(tmp_path)]) == 1
    assert "| **no** |" in capsys.readouterr().out


def test_memory_that_comes_too_late_says_so(tmp_path):
    command = ["memory", "--rows", "8", "--vocab", "50", "--dim", "16", "--seconds", "1e-9"]
    assert main([*command, "--threads", "1", "--out", str(tmp_path)]) == 0
    (case,) = json.loads((tmp_path / "memory_cpu.json").read_text())["cases"]
    reasons = {row["key"]: row["missing"] for row in case["rows"]}
    assert reasons["one_pass"] == LATE
    picture = (tmp_path / "memory_cpu.svg").read_text()
    late = sum(reason == LATE for reason in reasons.values())
    assert f"{late} not measured: {LATE}" in picture
    assert picture.count(LATE) == 1  # a line for the reason, not for each of them


def test_a_peer_that_takes_too_long_costs_its_row_and_not_the_command() -> None:
    def step(inputs: Inputs) -> Result:
        time.sleep(30)
        return Result()

    case = Case(8, 64, 16, torch.float32)
    inputs = memory_table.plain_inputs(case, torch.device("cpu"))
    assert (
        memory_table.plain_inputs(replace(case, num_rows=17), inputs.hidden.device).sequence_rows
        == 3
    )
    slow = Candidate("slow", "slow", step, "peer")
    begin = time.monotonic()
    row = memory_table.one_row(slow, case, inputs, None, 0.2)
    assert row["missing"] == "OutOfTime: stopped after 0.2 s"
    assert time.monotonic() - begin < 20

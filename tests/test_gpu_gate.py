"""The gate of one GPU, rehearsed in Triton's interpreter: it runs whole, and it notices faults."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.compile_gate.shipped_calls import shipped_kernels
from benchmarks.deadline import LATE, OutOfTime, at_most_seconds
from benchmarks.gpu_gate import behaviour as gpu_behaviour
from benchmarks.gpu_gate import command as gpu_gate
from benchmarks.gpu_gate import scoring as gpu_scoring
from benchmarks.gpu_gate.report import CannotRun, Part, plain
from benchmarks.gpu_gate.scale import real_scale, rehearsal_scale
from benchmarks.gpu_gate.scorers import paste
from benchmarks.losses.cases import make_inputs
from crpo_kernels import linear_triton, work_triton
from crpo_kernels.score_table import Measured, nearest

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled here: the gate itself is the test"
)
SETTINGS = argparse.Namespace(seconds=500.0, json=None)


def run(*names, **changed):
    settings = argparse.Namespace(**{**vars(SETTINGS), **changed})
    return gpu_gate.run_parts(list(names), rehearsal_scale(), settings, "the command")


def failed(report, name):
    return [check["name"] for check in report["parts"][name]["checks"] if not check["is_met"]]


@interpreted
def test_the_whole_command_is_rehearsed(root, tmp_path):
    file = tmp_path / "out" / "gate.json"
    command = ["gpu-gate", "--rehearse", "--sweep", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *command],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rehearsal: interpreter, no timing claim" in done.stdout
    report = json.loads(file.read_text())
    assert list(report["parts"]) == list(gpu_gate.ENTRIES)
    assert not any(part["has_failed"] or part["error"] for part in report["parts"].values())
    checks = [check for part in report["parts"].values() for check in part["checks"]]
    assert len(checks) > 350
    assert all("value" in check and "limit" in check for check in checks)
    assert report["note"] == "rehearsal: interpreter, no timing claim"
    assert report["machine"]["versions"]["triton"]
    assert report["device"] == report["machine"]["cpu"]
    assert done.stdout.splitlines()[-1].startswith("Passed in ")
    assert {"date", "commit", "cpu", "python"} <= set(report["machine"])
    tables = report["parts"]["table"]["tables"]
    assert [table["stands_for"].split(" bf")[0] for table in tables] == [
        *("T8192 V131072 D4096", "T8192 V151936 D4096", "T4096 V131072 D1024"),
    ]
    keys = [row["key"] for row in tables[0]["rows"] if "missing" not in row]
    ours = {"one_pass", "two_pass", "recompute", "frozen", "scored"}
    assert {"products", "products_2", "products_1", "naive"} | ours <= set(keys)
    assert all(target["met"] is None for table in tables for target in table["targets"])
    ours = r"\| \*\*crpo_kernels, one pass\*\* (\| - \[\d+\] ){4}\|"
    assert re.search(ours, done.stdout)  # no time, no share of a floor, no rate
    not_run = [item["why"] for item in report["parts"]["graphs"]["not_run"]]
    assert not_run == ["no CUDA device: the step ran uncaptured with rows="] * 3
    kernels = {row["kernel"] for row in report["parts"]["sweep"]["launches"]}
    assert kernels == {
        *("row_stats_kernel", "row_stats_kernel with loss", "row_exp_kernel"),
        *("row_grad_kernel", "row_grad_kernel of E"),
    }
    assert len(report["parts"]["sweep"]["chunks"]) == 4
    rows = report["parts"]["scorers"]["rows"]
    shapes = {(row["dtype"], row["num_rows"], row["vocab_size"], row["dim"]) for row in rows}
    assert len(shapes) == len(rows) == 8
    assert f"    {paste(rows[0])},\n" in done.stderr
    made = eval(paste(rows[0]), {"Measured": Measured})
    assert nearest((made,), made.device, made.dtype, made[2:5]) is made


@interpreted
def test_a_wrong_gradient_fails_and_values_pass(monkeypatch, tmp_path):
    right = work_triton.row_grad

    def wrong(raw, d_raw, *rest, **options):
        right(raw, d_raw, *rest, **options)
        d_raw.mul_(1.01)

    monkeypatch.setattr(work_triton, "row_grad", wrong)
    report = run("precision", json=tmp_path / "gate.json")
    names = failed(report, "precision")
    assert len(names) == 9  # d_hidden of five modes, d_weight of four
    assert all("relative rms" in name for name in names)
    written = json.loads((tmp_path / "gate.json").read_text())["parts"]["precision"]
    assert written["has_failed"]
    values = [check["value"] for check in written["checks"] if not check["is_met"]]
    assert all(value == pytest.approx(0.01, rel=0.01) for value in values)
    assert "failed: one pass: d_hidden" in gpu_gate.page(report)


@interpreted
def test_a_wrong_logprob_fails(monkeypatch):
    right, fused = work_triton.row_stats, linear_triton.linear_stats

    def wrong(raw, labels, view, table, rows, *rest):
        right(raw, labels, view, table, rows, *rest)
        table.column("logprobs", rows).add_(3e-5)

    def wrong_too(hidden, weight, labels, view, table, rows, **options):
        fused(hidden, weight, labels, view, table, rows, **options)
        table.column("logprobs", rows).add_(3e-5)

    monkeypatch.setattr(work_triton, "row_stats", wrong)
    monkeypatch.setattr(linear_triton, "linear_stats", wrong_too)
    names = failed(run("precision"), "precision")
    assert sum("logprobs" in name for name in names) == 6


@interpreted
def test_every_shipped_kernel_is_checked(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # stage weights ask for it on a CPU
    started = set()
    ours = (m for name, m in list(sys.modules.items()) if name.startswith("crpo_kernels."))
    for module in (m for m in ours if hasattr(m, "launch")):

        def noted(kernel, *rest, run=module.launch, **meta):
            started.add(kernel.__name__)
            run(kernel, *rest, **meta)

        monkeypatch.setattr(module, "launch", noted)
    report = run("precision", "options")
    assert not any(part["has_failed"] for part in report["parts"].values())
    assert started == shipped_kernels()


def spoil_stats(monkeypatch, spoil):
    right = work_triton.row_stats

    def spoiled(raw, labels, view, table, *rest):
        right(raw, labels, view, table, *rest)
        spoil(table)

    monkeypatch.setattr(work_triton, "row_stats", spoiled)


@interpreted
def test_a_nan_that_is_lost_fails(monkeypatch):
    spoil_stats(monkeypatch, lambda table: table.values.nan_to_num_())
    assert "NaN in hidden, one_pass: counted, the loss is NaN" in failed(run("nan"), "nan")


@interpreted
def test_a_lost_scale_of_an_eight_bit_row_fails(monkeypatch):
    part, scale = Part("scoring", 100.0), rehearsal_scale()
    inputs = make_inputs(scale.behaviour, device=scale.device)
    gpu_scoring.check_narrow(part, inputs)
    assert all(check["is_met"] for check in part.checks)
    right = linear_triton.linear_stats

    def wrong(*arguments, scales, **options):
        right(*arguments, scales=(scales[0] * 1.1, scales[1]), **options)

    monkeypatch.setattr(linear_triton, "linear_stats", wrong)
    gpu_scoring.check_narrow(part, inputs)
    assert {check["name"].split(": ")[-1] for check in part.checks if not check["is_met"]} == {
        "logprobs"
    }


@interpreted
@pytest.mark.parametrize("part", ["repeatability", "memory"])
def test_noise_and_memory_are_noticed(monkeypatch, part):
    kept = []

    def spoil(table):
        table.values.mul_(1 + 1e-6 * torch.rand(()))
        kept.append(torch.empty(100_000))

    spoil_stats(monkeypatch, spoil)
    first = gpu_behaviour.modes()[:1]
    monkeypatch.setattr(gpu_behaviour, "modes", lambda: first)
    assert failed(run(part), part)


def test_without_time_checks_are_dropped_and_the_gate_fails():
    report = run("precision", "table", seconds=-1.0)
    assert [part["has_failed"] for part in report["parts"].values()] == [True, False]
    assert report["parts"]["table"]["not_run"] == [{"name": "all of table", "why": LATE}]
    assert "not run: all of precision: dropped for lack of time" in gpu_gate.page(report)


def test_a_part_that_breaks_leaves_its_error_and_the_others(monkeypatch, tmp_path):
    def breaks(part, scale):
        part.at_most("before", 1.0, 2.0)
        raise RuntimeError("the device fell off")

    def holds(part, scale):
        part.at_most("after", math.nan, 2.0)

    entries = {"a": gpu_gate.Entry(breaks, 5), "b": gpu_gate.Entry(holds, 5)}
    monkeypatch.setattr(gpu_gate, "ENTRIES", entries)
    file = tmp_path / "gate.json"
    report = run("a", "b", json=file)
    assert "the device fell off" in report["parts"]["a"]["error"]
    assert "RuntimeError: the device fell off" in gpu_gate.page(report)
    written = json.loads(file.read_text(), parse_constant=pytest.fail)["parts"]
    assert written["a"]["checks"][0]["value"] == 1.0
    assert written["b"]["checks"][0] == {
        "name": "after", "value": "nan", "limit": 2.0, "is_met": False,
    }  # fmt: skip
    assert written["b"]["has_failed"]


def test_a_part_that_goes_on_is_stopped(monkeypatch):
    def hangs(part, scale):
        part.run("first", lambda: part.at_most("x", 0.0, 1.0))
        part.run("endless", lambda: time.sleep(60))

    monkeypatch.setattr(gpu_gate, "GRACE", 0.2)
    monkeypatch.setattr(gpu_gate, "ENTRIES", {"a": gpu_gate.Entry(hangs, 0.1)})
    begin = time.monotonic()
    part = gpu_gate.run_part("a", rehearsal_scale(), left=100)
    assert time.monotonic() - begin < 10
    assert [item["why"] for item in part.not_run] == [LATE, LATE]
    assert part.has_failed
    assert part.checks[0]["is_met"]


def test_a_check_that_this_card_cannot_hold_is_no_failure():
    part = Part("wrap", 10.0)

    def refuse():
        raise CannotRun("needs 50 GiB")

    part.run("loss", refuse)
    assert part.not_run == [{"name": "loss", "why": "needs 50 GiB"}]
    assert not part.has_failed
    part.run("bug", lambda: 1 / 0)
    assert part.has_failed
    assert "ZeroDivisionError" in part.checks[0]["error"]


def test_a_card_too_small_for_the_wrap_shape_says_so(monkeypatch):
    def too_small(scale, gib):
        raise CannotRun(f"needs {gib} GiB of free device memory, got 1.0")

    monkeypatch.setattr(gpu_behaviour, "needs_memory", too_small)
    report = run("wrap")
    assert not report["parts"]["wrap"]["has_failed"]
    assert [item["name"] for item in report["parts"]["wrap"]["not_run"]] == ["loss", "kernels"]


def test_errors_of_candidates_do_not_hide_the_end_of_time():
    def step():
        with contextlib.suppress(Exception):  # as around a peer
            time.sleep(5)

    with pytest.raises(OutOfTime), at_most_seconds(0.05):
        step()


def test_an_end_of_time_in_a_destructor_comes_again(capfd):
    class Slow:
        def __del__(self):
            time.sleep(0.15)

    def goes_on():
        slow = Slow()
        del slow  # the limit falls into its destructor, whose exceptions Python drops
        time.sleep(1)

    hook = sys.unraisablehook
    begin = time.monotonic()
    with pytest.raises(OutOfTime), at_most_seconds(0.05):
        goes_on()
    assert time.monotonic() - begin < 0.9
    assert sys.unraisablehook is hook
    assert "OutOfTime" not in capfd.readouterr().err


def test_a_limit_within_a_limit_leaves_the_outer_one():
    def goes_on():
        with at_most_seconds(100):
            time.sleep(0.01)
        time.sleep(10)

    with pytest.raises(OutOfTime), at_most_seconds(0.3):
        goes_on()
    with at_most_seconds(0.2), contextlib.suppress(OutOfTime), at_most_seconds(0.05):
        time.sleep(10)
    time.sleep(0.3)  # nothing is left running


def test_numbers_that_json_has_not():
    value = {"a": [1.0, math.inf], "b": {"c": math.nan}}
    assert plain(value) == {"a": [1.0, "inf"], "b": {"c": "nan"}}


def test_real_sizes_pass_int32_and_are_no_multiples_of_blocks():
    scale = real_scale(torch.device("cpu"))
    vocab_size = scale.wrap.vocab_size
    assert (scale.late + 1) * vocab_size > 2**31 > scale.late * vocab_size  # within the first row
    assert scale.wrap.num_rows <= 2 * scale.wrap.dim  # all rows of dZ are kept: offsets pass 2^31
    assert scale.precision.vocab_size % 16
    assert scale.precision.num_rows % 128
    usual = (v for name, v in gpu_gate.ENTRIES.items() if name not in gpu_gate.TUNING)
    assert sum(entry.seconds for entry in usual) < 601
    assert gpu_gate.TOTAL_SECONDS + gpu_gate.GRACE < 9 * 60


def test_interpreted_kernels_are_not_timed(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["gpu-gate"]) == 2
    assert "Type unset TRITON_INTERPRET" in capsys.readouterr().out


def test_without_a_gpu_it_says_what_to_type(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["gpu-gate", "--json", "never.json"]) == 2
    assert "python -m benchmarks gpu-gate --rehearse" in capsys.readouterr().out


@pytest.mark.gpu
def test_the_checks_hold_on_this_gpu(tmp_path):
    parts = ["precision", "nan", "repeatability", "memory", "graphs", "options"]
    assert main(["gpu-gate", "--only", *parts, "--json", str(tmp_path / "gate.json")]) == 0

"""The benchmark command on a tiny shape: it runs, is fair, and writes what it says."""

from __future__ import annotations

import argparse
import json
import time
import xml.etree.ElementTree as ET

import pytest
import torch

from benchmarks import plot
from benchmarks.__main__ import main
from benchmarks.clock import Clock
from benchmarks.deadline import LATE, at_most_seconds
from benchmarks.gpu_gate.targets import gpu_targets, target_state
from benchmarks.live_bytes import LiveBytes, counting, memory_of
from benchmarks.losses import baselines, loss, suite
from benchmarks.losses import plot as loss_plot
from benchmarks.losses.candidates import cpu_candidates
from benchmarks.losses.cases import Case, make_inputs
from benchmarks.losses.loss import cpu_targets
from gpu_fakes import fake_cuda

pytestmark = pytest.mark.usefixtures("keep_threads")
TINY = ["loss", "--rows", "32", "--vocab", "500", "--dim", "64", "--threads", "1"]


def test_the_command_writes_json_table_and_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        baselines.Candidate,
        "missing",
        lambda self, *_: "" if self.kind != "peer" else "not here",
    )
    assert main([*TINY, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "loss_cpu.json").read_text())
    (case,) = report["cases"]
    rows = {row["key"]: row for row in case["rows"]}
    assert list(rows) == [candidate.key for candidate in cpu_candidates()]
    assert rows["trl"]["missing"] == "not here"
    for key in ("one_pass", "two_pass", "recompute", "naive"):
        row = rows[key]
        assert row["seconds"]["warm"]["count"] == row["seconds"]["cold"]["count"] == 3
        assert row["extra_bytes"] > row["peak_bytes"] > 0
        assert set(row["errors"]) == {
            *("logprobs", "entropy", "d_hidden", "d_weight", "d_weight_tail")
        }
        assert all(0 < e["rms"] <= e["max"] and e["rms"] < 0.1 for e in row["errors"].values())
        assert row["wrong"] == ""
        warm = row["seconds"]["warm"]["median"]
        assert row["tflops"] == pytest.approx(3 * 2 * 32 * 500 * 64 / warm / 1e12)
        floor = rows["products"]["seconds"]["warm"]["median"]
        assert row["floor_share"] == pytest.approx(floor / warm)
    assert rows["products"]["over_products"] == 1.0
    assert report["machine"]["versions"]["torch"] == torch.__version__
    assert (case["name"], case["case"]) == ("own", "T32 V500 D64 bfloat16")
    assert (case["rows_t"], case["vocab"], case["dim"], case["dtype"]) == (32, 500, 64, "bfloat16")
    page = (tmp_path / "loss_cpu.md").read_text()
    assert page == loss_plot.page(report)
    assert report["machine"]["cpu"] in page
    assert capsys.readouterr().out.startswith("# Fused loss on ")
    assert ET.parse(tmp_path / "loss_cpu.svg").getroot().tag.endswith("svg")


def test_gate_fails_when_a_target_is_missed(tmp_path, monkeypatch):
    fast = {"text": "t", "limit": 1.0, "value": 2.0, "met": False}
    monkeypatch.setattr("benchmarks.losses.loss.cpu_targets", lambda rows, num_rows: [fast])
    only = ["--only", "one_pass", "--out", str(tmp_path)]
    assert main([*TINY, *only]) == 0
    assert main([*TINY, *only, "--gate"]) == 1


def test_targets_compare_what_the_issue_says():
    def row(seconds, size, products, kind="ours"):
        return {
            "title": "x",
            "kind": kind,
            "num_products": 3,
            "seconds": {"warm": {"median": seconds}},
            "peak_bytes": size,
            "over_products": products,
            "over_naive": seconds / 10.0,
        }

    rows = {
        "one_pass": row(3.0, 100, 1.6),
        "naive": row(10.0, 400, 5.0, "plain"),
        "one_pass_eager": row(5.0, 100, 2.9),
        "liger": row(2.0, 100, 1.0, "peer"),
        "trl": {"title": "x", "missing": "no"},
    }
    got = {c["text"]: (c["limit"], c["value"], c["met"]) for c in cpu_targets(rows, 512)}
    assert got == {
        "one pass / three products": (1.5, 1.6, False),
        "one pass / plain torch, time": (0.4, 0.3, True),
        "without a C++ compiler / three products": (2.8, 2.9, False),
        "one pass / plain torch, peak memory": (0.333, 0.25, True),
        "one pass / x, time": (1.0, 1.5, False),
    }
    assert [c["text"] for c in cpu_targets(rows, 511)] == list(got)[3:]


@pytest.mark.parametrize("key", ["one_pass", "two_pass", "one_pass_eager"])
def test_candidates_compute_the_same_gradients(key):
    candidate = next(c for c in cpu_candidates() if c.key == key)
    case = Case(64, 300, 256, torch.float32)
    inputs = make_inputs(case)
    truth, got = baselines.naive(inputs), candidate.step(inputs)
    for name in ("d_hidden", "d_weight"):
        a, b = getattr(got, name), getattr(truth, name)
        assert float((a - b).abs().max() / b.abs().max()) < 1e-4, name


def test_inputs_have_the_entropy_of_text():
    inputs = make_inputs(Case(256, 20_000, 256, torch.float32))
    entropy = baselines.naive(inputs).entropy
    low, high = entropy.quantile(torch.tensor([0.1, 0.9])).tolist()
    assert 0.25 < low < 0.6
    assert 2.0 < high < 3.2


def test_live_bytes_counts_storages_once_and_only_while_they_live():
    with LiveBytes() as counter:
        a = torch.ones(1000)
        b = a[10:].view(-1)
        assert counter.live == 4000
        c = a * 2
        del a
        assert counter.live == 8000  # b holds a's storage
        del b
        assert counter.live == 4000
        del c
    assert (counter.live, counter.peak) == (0, 8000)


GPU_ROW = {
    "key": "one_pass",
    "title": "crpo_kernels, one pass",
    "seconds": {"warm": {"median": 0.0405}},
    "over_products": 1.125,
    "peak_bytes": 2**31,
}


def test_gpu_targets_ask_milliseconds_of_an_h100_alone():
    case, rows = (8192, 131072, 4096), {"one_pass": GPU_ROW}
    found = {c["text"]: c for c in gpu_targets(case, rows, "NVIDIA H100 80GB HBM3")}
    assert found["crpo_kernels, one pass, ms"]["limit"] == 41.0
    assert found["crpo_kernels, one pass, ms"]["met"]
    ratio = found["crpo_kernels, one pass / 3 bare products"]
    assert (ratio["limit"], ratio["value"], ratio["met"]) == (1.12, 1.125, False)
    assert found["crpo_kernels, one pass, workspace in GiB"]["met"]
    assert target_state(list(found.values()), "one_pass") == "**missed**"
    assert target_state(list(found.values()), "naive") == "-"
    assert {c["key"] for c in found.values()} == {"one_pass"}
    other = {c["text"]: c for c in gpu_targets(case, rows, "NVIDIA A100")}
    assert list(other) == [text for text in found if not text.endswith(", ms")]
    rows = {"two_pass": rows["one_pass"], "scored": {"missing": "x"}}
    # 42 ms over three products of 2 T V D = 8.796e12 operations at 720 TFLOP/s
    (check,) = gpu_targets(case, rows)
    assert check["limit"] == pytest.approx(42 / 36.65, abs=1e-3)


def test_memory_is_counted_in_forward_and_in_backward():
    case = Case(32, 300, 64, torch.float32)
    inputs = make_inputs(case)

    def step(inputs):
        kept, scratch = torch.ones(1000), torch.ones(5000)  # 4000 bytes, 20000 bytes
        del scratch
        inputs.on_backward()
        d_hidden = torch.ones(3000)
        return baselines.Result(d_hidden=d_hidden, loss=kept)

    found = memory_of(baselines.Candidate("x", "x", step), inputs)
    assert found == {"extra_bytes": 24_000, "peak_bytes": 20_000}  # the loss is an output

    def later(inputs):
        inputs.on_backward()
        scratch = torch.ones(5000)
        d_hidden = scratch[:3000].clone()
        return baselines.Result(d_hidden=d_hidden)

    found = memory_of(baselines.Candidate("x", "x", later), inputs)
    assert found == {"extra_bytes": 32_000, "peak_bytes": 20_000}


def test_cuda_without_a_gpu_says_what_to_type(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["loss", "--device", "cuda"]) == 2
    assert "Type --device cpu" in capsys.readouterr().out


def test_a_gpu_is_timed_by_events_and_counted_by_its_allocator(monkeypatch):
    log, peaks, device = [], iter([900, 700]), torch.device("cuda", 0)
    fake_cuda(
        monkeypatch,
        log,
        12.5,
        memory_allocated=lambda _: 100,
        max_memory_allocated=lambda _: next(peaks),
        reset_peak_memory_stats=lambda _: log.append("reset"),
    )
    assert Clock(device).seconds(lambda: log.append("step")) == pytest.approx(0.0125)
    assert log == ["synchronize", "record", "step", "record", "wait"]
    log.clear()
    with counting(device, []) as counter:
        assert counter.restart() == 800  # beyond what was there before
        assert counter.peak == 600
    assert log == ["synchronize", "reset", "reset"]


def test_what_a_limit_around_the_command_stops_costs_a_case_and_no_file(tmp_path, monkeypatch):
    words = ["loss", "--shape", "ragged", "qwen3.5", "--rows", "8", "--vocab", "60", "--dim", "16"]
    real, calls = suite.measure, []

    def stalls(case, *rest, **options):
        calls.append(case.shape)
        if len(calls) == 2:
            time.sleep(30)
        return real(case, *rest, **options)

    monkeypatch.setattr(suite, "measure", stalls)
    parser = argparse.ArgumentParser()
    loss.add_arguments(parser)
    options = parser.parse_args([*words[1:], "--only", "one_pass", "--threads", "1"])
    with at_most_seconds(5.0):
        report = loss.measure_loss(options, time.monotonic() + 100)
    first, second = report["cases"]
    assert [row["key"] for row in first["rows"] if "missing" not in row] == [
        *("products", "one_pass", "naive"),
    ]
    assert (second["name"], second["missing"]) == ("qwen3.5", "stopped after 5 s")
    assert {target["case"] for target in report["targets"]} == {"ragged"}
    report = loss.measure_loss(options, time.monotonic())
    assert [case["missing"] for case in report["cases"]] == [LATE, LATE]
    for made in plot.write({**report, "command": "c"}, tmp_path / "loss_cpu"):
        assert made.read_text() != ""
    assert LATE in (tmp_path / "loss_cpu.md").read_text()


@pytest.mark.parametrize("asked", [[], ["--seconds", "1200"]])
def test_ten_minutes_hold_every_candidate_at_the_first_and_the_smallest_shape(asked, monkeypatch):
    ran = {}

    def notes(case, candidates, *_, **__):
        ran[case.shape] = {c.key for c in candidates if c.obstacle != suite.ELSEWHERE}
        return {"name": case.shape, "missing": LATE, "rows": []}

    monkeypatch.setattr(suite, "measure", notes)
    parser = argparse.ArgumentParser()
    loss.add_arguments(parser)
    loss.measure_loss(parser.parse_args(asked), time.monotonic() + 100)
    few = {shape for shape, keys in ran.items() if "liger" not in keys}
    assert "liger" in ran["qwen3-0.6b"] & ran["ragged"]
    assert few == (set() if asked else set(ran) - {"qwen3-0.6b", "ragged"})
    assert all({"products", "one_pass", "naive"} <= keys for keys in ran.values())

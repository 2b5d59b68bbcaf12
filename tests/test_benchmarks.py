"""The benchmark command on a tiny shape: it runs, is fair, and writes what it says."""

from __future__ import annotations

import contextlib
import json
import time
import xml.etree.ElementTree as ET

import pytest
import torch

from benchmarks import baselines, clock, plot
from benchmarks.__main__ import main
from benchmarks.candidates import all_gradients, cpu_candidates, frozen_head, scoring
from benchmarks.cases import CASES, Case, make_inputs
from benchmarks.clock import Clock
from benchmarks.gpu_targets import gpu_targets, target_state
from benchmarks.loss import targets
from benchmarks.measure import measure
from benchmarks.memory import LiveBytes, counting, memory_of

TINY = ["loss", "--rows", "32", "--vocab", "500", "--dim", "64", "--threads", "1"]


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_command_writes_json_table_and_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        baselines.Candidate,
        "missing",
        lambda self: "not here" if self.key in ("liger", "trl") else None,
    )
    assert main([*TINY, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "loss_cpu.json").read_text())
    rows = {row["key"]: row for row in report["rows"]}
    assert list(rows) == [candidate.key for candidate in cpu_candidates()]
    assert rows["trl"]["missing"] == "not here"
    for key in ("one_pass", "two_pass", "one_pass_eager", "naive"):
        assert rows[key]["seconds"]["median"] > 0
        assert rows[key]["extra_bytes"] > 0
        assert rows[key]["errors"]["d_weight_rel_rms"] < 0.1
        assert rows[key]["errors"]["logprobs_rms"] < 0.1
    assert rows["products"]["over_products"] == 1.0
    assert report["machine"]["cpu"]
    assert report["machine"]["versions"]["torch"] == torch.__version__
    assert report["case"] == "T32 V500 D64 bfloat16"
    page = (tmp_path / "loss_cpu.md").read_text()
    assert "| TRL chunked | - | - | - | - | - | - | - | - | not here |" in page
    assert report["machine"]["cpu"] in page
    assert capsys.readouterr().out.startswith("# Fused loss on a CPU")
    assert ET.parse(tmp_path / "loss_cpu.svg").getroot().tag.endswith("svg")


def test_gate_fails_when_a_target_is_missed(tmp_path, monkeypatch):
    fast = {"text": "t", "limit": 1.0, "value": 2.0, "met": False}
    monkeypatch.setattr("benchmarks.loss.targets", lambda rows: [fast])
    only = ["--only", "one_pass", "--out", str(tmp_path)]
    assert main([*TINY, *only]) == 0
    assert main([*TINY, *only, "--gate"]) == 1


def test_targets_compare_what_the_issue_says():
    def row(seconds, size, products):
        return {
            "title": "x",
            "seconds": {"median": seconds},
            "extra_bytes": size,
            "over_products": products,
            "over_naive": seconds / 10.0,
        }

    rows = {
        "one_pass": row(3.0, 100, 1.5),
        "one_pass_eager": row(6.0, 100, 3.0),
        "naive": row(10.0, 400, 5.0),
        "liger": row(2.0, 100, 1.0),
        "trl": {"title": "x", "missing": "no"},
    }
    got = {check["text"]: (check["limit"], check["value"], check["met"]) for check in targets(rows)}
    assert got == {
        "one pass / three products": (1.6, 1.5, True),
        "one pass / plain torch, time": (0.4, 0.3, True),
        "one pass / plain torch, extra memory": (0.333, 0.25, True),
        "one pass / x, time": (1.0, 1.5, False),
        "without a C++ compiler / three products": (2.8, 3.0, False),
    }


@pytest.mark.parametrize("key", ["one_pass", "two_pass", "one_pass_eager", "liger", "trl"])
def test_candidates_compute_the_same_gradients(key):
    candidate = next(c for c in cpu_candidates() if c.key == key)
    if candidate.missing():
        pytest.skip(candidate.missing())
    case = Case(64, 300, 256, torch.float32)
    inputs = make_inputs(case)
    if not candidate.has_entropy_gradient:
        inputs.entropy_weights.zero_()
    truth, got = baselines.naive(inputs), candidate.step(inputs)
    for name in ("d_hidden", "d_weight"):
        a, b = getattr(got, name), getattr(truth, name)
        assert float((a - b).abs().max() / b.abs().max()) < 1e-4, name


def test_inputs_have_the_entropy_of_text():
    inputs = make_inputs(Case(256, 20_000, 256, torch.float32))
    entropy = baselines.naive(inputs).entropy
    low, high = entropy.quantile(torch.tensor([0.1, 0.9])).tolist()
    assert 0.2 < low < 0.8
    assert 2.0 < high < 4.0


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


def test_every_row_says_its_share_of_the_floor_of_its_own_run(root):
    report = json.loads((root / "benchmarks" / "results" / "loss_cpu.json").read_text())
    page = plot.page(report)
    assert (root / "benchmarks" / "results" / "loss_cpu.md").read_text() == page
    head = next(line for line in page.splitlines() if line.startswith("| | s |"))
    place = head.split(" | ").index("% of floor")
    products = next(row for row in report["rows"] if row["key"] == "products")
    for row in report["rows"]:
        line = next(x for x in page.splitlines() if x.startswith(f"| {row['title']}"))
        share = 100 * products["seconds"]["median"] / row["seconds"]["median"]
        assert line.split(" | ")[place] == f"{share:.0f}", line


def gpu_report(**changed):
    row = {
        "key": "one_pass",
        "title": "crpo_kernels, mode A",
        "note": "",
        "version": "",
        "seconds": {"median": 0.0405},
        "over_products": 1.125,
        "over_products_fp32": 1.08,
        "extra_bytes": 3 * 2**30,
        "workspace_bytes": 2**31,
        "target": "met",
        "errors": {},
    }
    gpu = {
        "name": "Some GPU",
        "memory_gib": 80.0,
        "driver": "1.2",
        "cuda": "13.0",
        "clocks_and_power": "x",
    }
    return {
        "command": "c",
        "case": "T8192 V131072 D4096 bf16",
        "machine": {"date": "d", "commit": "e", "python": "3.12", "versions": {}, "gpu": gpu},
        "product_tflops": 700.0,
        "entropy_quantiles": [0.3, 3.0],
        "error_rows": 32,
        "rows": [{**row, **changed}],
        "targets": [],
    }


def test_a_gpu_page_has_milliseconds_peaks_and_both_floors():
    page = plot.page(gpu_report())
    row = next(line for line in page.splitlines() if line.startswith("| crpo_kernels"))
    assert [cell.strip() for cell in row.split("|")[1:10]] == [
        *("crpo_kernels, mode A", "40.50", "1.12", "89", "1.08", "-", "3072", "2048", "met"),
    ]
    assert "Some GPU, 80.0 GiB, driver 1.2, CUDA 13.0" in page
    assert "40.50 ms" in plot.bars(gpu_report())


def test_gpu_targets_ask_milliseconds_of_an_h100_alone():
    case = CASES["cuda"]
    rows = {row["key"]: row for row in gpu_report()["rows"]}
    found = {c["text"]: c for c in gpu_targets(case, rows, "NVIDIA H100 80GB HBM3")}
    assert found["crpo_kernels, mode A, ms"]["limit"] == 41.0
    assert found["crpo_kernels, mode A, ms"]["met"]
    ratio = found["crpo_kernels, mode A / 3 bare products"]
    assert (ratio["limit"], ratio["value"], ratio["met"]) == (1.12, 1.125, False)
    assert found["crpo_kernels, mode A, workspace in GiB"]["met"]
    assert target_state(list(found.values()), "one_pass") == "**missed**"
    assert target_state(list(found.values()), "naive") == "-"
    assert {c["key"] for c in found.values()} == {"one_pass"}
    other = {c["text"]: c for c in gpu_targets(case, rows, "NVIDIA A100")}
    assert list(other) == [text for text in found if not text.endswith(", ms")]
    rows = {"two_pass": rows["one_pass"], "scored": {"missing": "x"}}
    # 42 ms over three products of 2 T V D = 8.796e12 operations at 720 TFLOP/s
    (check,) = gpu_targets(case, rows)
    assert check["limit"] == pytest.approx(42 / 36.65, abs=1e-3)


def test_a_frozen_head_has_two_products_as_floor_and_scoring_one():
    case = Case(32, 300, 64, torch.float32)
    candidates = [
        *all_gradients("torch", has_fp32_out=False)[:5],
        *frozen_head("torch", has_fp32_out=False),
        *scoring("torch", has_fp32_out=False),
    ]
    report = measure(case, candidates, Clock(torch.device("cpu")), lambda _: 2)
    rows = {row["key"]: row for row in report["rows"]}
    floors = {"one_pass": "products", "frozen": "products_2", "scored": "products_1"}
    for key, floor in floors.items():
        share = rows[key]["seconds"]["median"] / rows[floor]["seconds"]["median"]
        assert rows[key]["over_products"] == pytest.approx(share)
        assert rows[key]["errors"]["logprobs_rms"] < 1e-5
    assert "d_weight_rel_rms" in rows["one_pass"]["errors"]
    assert set(rows["frozen"]["errors"]) == {"d_hidden_rel_rms", "logprobs_rms", "entropy_rms"}
    assert set(rows["scored"]["errors"]) == {"logprobs_rms", "entropy_rms"}
    assert rows["one_pass"]["extra_bytes"] > rows["frozen"]["extra_bytes"]
    assert rows["products"]["extra_bytes"] == 0


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
    assert found == {"extra_bytes": 24_000, "workspace_bytes": 24_000}

    def later(inputs):
        inputs.on_backward()
        scratch = torch.ones(5000)
        d_hidden = scratch[:3000].clone()
        return baselines.Result(d_hidden=d_hidden)

    found = memory_of(baselines.Candidate("x", "x", later), inputs)
    assert found == {"extra_bytes": 32_000, "workspace_bytes": 20_000}


def test_candidates_that_fail_hang_or_come_too_late_say_so():
    case = Case(8, 50, 16, torch.float32)

    def fails(inputs):
        raise RuntimeError("out of something")

    floor, ours = cpu_candidates()[:2]
    peer = baselines.Candidate("peer", "a peer", fails)
    answers = iter([False, False, False, True])
    late = baselines.Candidate("late", "late", baselines.naive)
    report = measure(
        case,
        [floor, ours, peer, late],
        Clock(torch.device("cpu")),
        lambda _: 1,
        lambda: next(answers),
    )
    rows = {row["key"]: row for row in report["rows"]}
    assert rows["peer"]["missing"] == "RuntimeError: out of something"
    assert rows["late"]["missing"] == "dropped for lack of time"
    slow = baselines.Candidate("slow", "slow", lambda _: time.sleep(20))
    cpu = Clock(torch.device("cpu"))
    report = measure(case, [floor, slow], cpu, lambda _: 1, peer_seconds=0.1)
    assert report["rows"][1]["missing"] == "OutOfTime: stopped after 0.1 s"
    broken = baselines.Candidate("one_pass", "crpo_kernels, x", fails)
    with pytest.raises(RuntimeError, match="out of something"):
        measure(case, [floor, broken], Clock(torch.device("cpu")), lambda _: 1)


def test_inputs_that_fit_the_cache_are_used_in_turn():
    inputs = make_inputs(Case(8, 50, 16, torch.float32))
    size = sum(t.numel() * t.element_size() for t in inputs.tensors())
    sets = clock.rotation(inputs, cache_bytes=2 * size)
    turn = [next(sets) for _ in range(5)]
    assert turn[0] is turn[4] is inputs
    assert len({t.weight.data_ptr() for t in turn}) == 4
    assert all(torch.equal(t.hidden, inputs.hidden) and t.hidden.requires_grad for t in turn)
    assert next(clock.rotation(inputs, cache_bytes=size // 2)) is inputs
    sets = clock.rotation(inputs, cache_bytes=size // 2)
    assert next(sets) is next(sets)


def test_cuda_without_a_gpu_says_what_to_type(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["loss", "--device", "cuda"]) == 2
    assert "Type --device cpu" in capsys.readouterr().out


def test_a_gpu_is_timed_by_events_and_counted_by_its_allocator(monkeypatch):
    log, allocated, peaks = [], [100, 100], iter([900, 700])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 12.5  # ms

    device = torch.device("cuda", 0)
    fakes = {
        "device": lambda _: contextlib.nullcontext(),
        "Event": Event,
        "synchronize": lambda *_: log.append("synchronize"),
        "memory_allocated": lambda _: allocated[0],
        "max_memory_allocated": lambda _: next(peaks),
        "reset_peak_memory_stats": lambda _: log.append("reset"),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    assert Clock(device).seconds(lambda: log.append("step")) == pytest.approx(0.0125)
    assert log == ["synchronize", "record", "step", "record", "wait"]
    log.clear()
    with counting(device, []) as counter:
        assert counter.restart() == 800  # beyond what was there before
        assert counter.peak == 600
    assert log == ["synchronize", "reset", "reset"]

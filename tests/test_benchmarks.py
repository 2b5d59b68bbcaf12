"""The benchmark command on a tiny shape: it runs, is fair, and writes what it says."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest
import torch

from benchmarks import baselines
from benchmarks.__main__ import main
from benchmarks.cases import CASES, make_inputs
from benchmarks.loss import targets
from benchmarks.memory import LiveBytes

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
    assert list(rows) == [candidate.key for candidate in baselines.CANDIDATES]
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
    assert "| TRL chunked | - | - | - | - | - | - | - | not here |" in page
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
    candidate = next(c for c in baselines.CANDIDATES if c.key == key)
    if candidate.missing():
        pytest.skip(candidate.missing())
    case = CASES["cpu"].__class__("tiny", 64, 300, 256, torch.float32)
    inputs = make_inputs(case)
    if not candidate.has_entropy_gradient:
        inputs.entropy_weights.zero_()
    truth, got = baselines.naive(inputs), candidate.step(inputs)
    for name in ("d_hidden", "d_weight"):
        a, b = getattr(got, name), getattr(truth, name)
        assert float((a - b).abs().max() / b.abs().max()) < 1e-4, name


def test_inputs_have_the_entropy_of_text():
    inputs = make_inputs(CASES["cpu"].__class__("small", 256, 20_000, 256, torch.float32))
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

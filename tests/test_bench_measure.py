"""One case, measured: its floors, what fails, hangs or is late, what is wrong or cannot be told."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch

from benchmarks.clock import Clock
from benchmarks.deadline import LATE
from benchmarks.losses import baselines
from benchmarks.losses.candidates import all_gradients, cpu_candidates, frozen_head, scoring
from benchmarks.losses.cases import Case, make_inputs
from benchmarks.losses.measure import Measurements, measure
from benchmarks.losses.needs import Needs


def measured(candidates, **options):
    case = Case(8, 50, 16, torch.float32)
    report = measure(case, candidates, Clock(torch.device("cpu")), 1, **options)
    return {row["key"]: row for row in report["rows"]}


def fails(inputs):
    raise RuntimeError("out of something")


def test_a_frozen_head_has_two_products_as_floor_and_scoring_one():
    case = Case(32, 300, 64, torch.float32)
    candidates = [
        *all_gradients("torch", has_fp32_out=False)[:5],
        *frozen_head("torch", has_fp32_out=False),
        *scoring("torch", has_fp32_out=False),
    ]
    report = measure(case, candidates, Clock(torch.device("cpu")), 2)
    rows = {row["key"]: row for row in report["rows"]}
    floors = {"one_pass": "products", "frozen": "products_2", "scored": "products_1"}
    for key, floor in floors.items():
        warm, bare = (rows[k]["seconds"]["warm"]["median"] for k in (key, floor))
        assert rows[key]["floor"] == floor
        assert rows[key]["over_products"] == pytest.approx(warm / bare)
        assert rows[key]["errors"]["logprobs"]["rms"] < 1e-5
    values, gradients = {"logprobs", "entropy"}, {"d_hidden", "d_weight", "d_weight_tail"}
    assert set(rows["one_pass"]["errors"]) == values | gradients
    assert set(rows["frozen"]["errors"]) == values | {"d_hidden"}
    assert set(rows["scored"]["errors"]) == values
    assert rows["one_pass"]["extra_bytes"] > rows["frozen"]["extra_bytes"]
    assert rows["products"]["extra_bytes"] == 0
    assert "expected" in rows["scored_fused"]["missing"]  # no torch backend has that kernel


def test_a_peer_that_fails_or_hangs_has_the_reason_and_ours_has_none():
    floor, ours = cpu_candidates()[:2]
    peer = baselines.Candidate("peer", "a peer", fails)
    rows = measured([floor, ours, peer])
    assert rows["peer"]["missing"] == "RuntimeError: out of something"
    assert rows["one_pass"]["seconds"]["warm"]["count"] == 1
    slow = baselines.Candidate("slow", "slow", lambda _: time.sleep(20))
    rows = measured([floor, slow], peer_seconds=0.1)
    assert rows["slow"]["missing"] == "OutOfTime: stopped after 0.1 s"
    broken = baselines.Candidate("one_pass", "crpo_kernels, x", fails, "ours")
    with pytest.raises(RuntimeError, match="out of something"):
        measured([floor, broken])
    rows = measured([floor, replace(broken, may_refuse=True)])
    assert rows["one_pass"]["missing"] == "RuntimeError: out of something"


def test_a_peer_that_hangs_only_when_it_is_timed_is_broken_off():
    floor, steps = cpu_candidates()[0], []

    def stalls(inputs):
        steps.append(1)
        if len(steps) > 2:  # errors and memory are done
            time.sleep(20)
        return baselines.naive(inputs)

    peer = baselines.Candidate("peer", "a peer", stalls)
    begin = time.monotonic()
    rows = measured([floor, peer], until=begin + 2.0)
    assert rows["peer"]["missing"].startswith("OutOfTime: stopped after")
    assert time.monotonic() - begin < 6


def test_rounds_that_were_dropped_are_told():
    floor, ours = cpu_candidates()[:2]
    case, cpu = Case(8, 50, 16, torch.float32), Clock(torch.device("cpu"))

    assert "rounds" not in measure(case, [floor, ours], cpu, 2)["rows"][1]["lacks"]
    once = replace(ours, rounds=1)
    assert "rounds" not in measure(case, [floor, once], cpu, 2)["rows"][1]["lacks"]
    found = Measurements(4, memory={"one_pass": {"peak_bytes": 5}})
    found.times = {"one_pass": {"warm": [1.0], "cold": [2.0]}}
    row = found.row(ours, case)
    assert row["lacks"] == {"rounds": f"1 of 4 rounds, the others {LATE}"}


def test_memory_that_cannot_be_counted_is_no_zero():
    def hidden(inputs):
        with torch.no_grad():
            return baselines.Result(logprobs=inputs.ref_logprobs)

    floor = cpu_candidates()[0]
    compiled = baselines.Candidate(
        "a", "a", baselines.naive, needs=Needs(generates_code=True), has_errors=False
    )
    inside = baselines.Candidate("b", "b", hidden, has_errors=False)
    rows = measured([floor, compiled, inside])
    assert "peak_bytes" not in rows["a"]
    assert "generated code" in rows["a"]["lacks"]["peak_bytes"]
    assert "inside an operation" in rows["b"]["lacks"]["peak_bytes"]
    assert "peak_bytes" not in rows["products"]["lacks"]


def test_what_comes_too_late_is_dropped_with_the_reason():
    floor, ours = cpu_candidates()[:2]
    rows = measured([floor, ours], until=time.monotonic())
    assert rows["products"]["missing"] == rows["one_pass"]["missing"] == LATE


def test_bare_products_are_the_three_of_a_head_and_share_their_buffers():
    inputs = make_inputs(Case(6, 50, 16, torch.float32))
    three, two = baselines.BareProducts(), baselines.BareProducts(2)
    three(inputs)
    made = {name: value for (name, _), value in three.buffers.items()}
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    logits = hidden @ weight.t()
    for name, value in {
        "logits": logits,
        "d_hidden": logits @ weight,
        "d_weight": logits.t() @ hidden,
    }.items():
        assert torch.allclose(made[name], value, rtol=1e-4, atol=1e-4), name
    two(inputs)
    assert {name: value.data_ptr() for (name, _), value in two.buffers.items()} == {
        name: value.data_ptr() for name, value in made.items()
    }
    other = make_inputs(Case(5, 50, 16, torch.float32))
    two(other)
    assert two.buffers["logits", torch.float32].shape == (5, 50)
    measured(cpu_candidates()[:2])
    assert baselines.BareProducts.buffers == {}


def test_a_wrong_peer_is_marked_in_its_row_and_nan_is_no_number_of_the_file():
    def scaled(inputs):
        got = baselines.naive(inputs)
        return replace(got, d_weight=1.5 * got.d_weight)

    def lost(inputs):
        got = baselines.naive(inputs)
        return replace(got, entropy=got.entropy * float("nan"))

    floor, ours = cpu_candidates()[:2]
    wrong = baselines.Candidate("wrong", "a wrong peer", scaled)
    rows = measured([floor, ours, wrong, replace(wrong, key="nan", step=lost)])
    assert rows["one_pass"]["wrong"] == ""
    assert rows["wrong"]["wrong"].startswith("d_weight")
    assert "limit" in rows["wrong"]["wrong"]
    assert rows["nan"]["wrong"] == "entropy: not finite"
    assert rows["nan"]["errors"]["entropy"] == {"max": None, "rms": None}
    json.dumps(list(rows.values()), allow_nan=False)

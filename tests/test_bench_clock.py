"""Warm and cold steps, bands, rounds and what a deadline drops."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import clock
from benchmarks.clock import Clock, cpu_cache_bytes, kept_for_others, measure_seconds, summary
from benchmarks.deadline import LATE
from benchmarks.losses.baselines import Candidate, Result
from benchmarks.losses.cases import Case, make_inputs
from gpu_fakes import fake_cuda

CPU = torch.device("cpu")


def test_a_band_is_that_of_the_20th_and_80th_percentile():
    assert summary([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == pytest.approx(
        {"median": 3.5, "low": 2.0, "high": 5.0, "count": 6}
    )
    assert summary([2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0, "count": 1}


def test_the_cache_is_that_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(clock, "CACHES", tmp_path)
    for index, size in enumerate(("32K", "1024K", "36M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert cpu_cache_bytes() == 36 << 20
    assert Clock(CPU).cache_bytes == 36 << 20
    monkeypatch.setattr(clock, "CACHES", tmp_path / "none")
    monkeypatch.setattr(clock.os, "sysconf", lambda _: 0)
    assert cpu_cache_bytes() == clock.ASSUMED_CACHE


def test_cold_steps_come_after_a_flush_of_twice_the_cache(monkeypatch):
    timer, log = Clock(CPU), []
    timer.__dict__["cache_bytes"] = 4000
    monkeypatch.setattr(torch.Tensor, "add_", lambda t, _: log.append(("flush", t.numel())))
    timer.seconds(lambda: log.append("step"))
    timer.seconds(lambda: log.append("step"), cold=True)
    assert log == ["step", ("flush", 2000), "step"]
    assert timer._flusher.numel() == 2000
    timer.forget()
    assert "_flusher" not in timer.__dict__


def test_on_a_gpu_the_flush_comes_before_the_first_event(monkeypatch):
    log = []
    properties = SimpleNamespace(L2_cache_size=50 << 20)
    fake_cuda(monkeypatch, log, 4.0, get_device_properties=lambda _: properties)
    timer = Clock(torch.device("cuda", 0))
    assert timer.cache_bytes == 50 << 20
    monkeypatch.setattr(timer, "flush", lambda: log.append("flush"))
    assert timer.seconds(lambda: log.append("step"), cold=True) == pytest.approx(0.004)
    assert log == ["synchronize", "flush", "record", "step", "record", "wait"]


class Fake(Clock):
    """A clock whose time passes by what a step says."""

    def __init__(self, costs):
        super().__init__(CPU)
        self.costs, self.now, self.log = costs, 0.0, []

    def seconds(self, step, *, cold=False):
        key = step()
        self.now += self.costs[key]
        self.log.append((key, "cold" if cold else "warm"))
        return self.costs[key]


def run(costs, rounds, until, monkeypatch, limits=None):
    fake = Fake(costs)
    monkeypatch.setattr(clock.time, "monotonic", lambda: fake.now)
    made = [
        Candidate(key, key, lambda _, k=key: k, "ours", rounds=(limits or {}).get(key))
        for key in costs
    ]
    inputs = make_inputs(Case(4, 30, 16, torch.float32))
    times, missing = measure_seconds(
        made, inputs, fake, rounds, lambda _: None, expected=costs, until=until
    )
    return fake.log, times, missing


def test_rounds_are_interleaved_and_a_warm_step_follows_its_own_cold_one(monkeypatch):
    log, times, missing = run({"a": 1.0, "b": 2.0}, 2, math.inf, monkeypatch)
    assert log == [("a", "cold"), ("a", "warm"), ("b", "cold"), ("b", "warm")] * 2
    assert times["b"] == {"warm": [2.0, 2.0], "cold": [2.0, 2.0]}
    assert missing == {}
    log, times, _ = run({"a": 1.0, "b": 2.0}, 3, math.inf, monkeypatch, {"b": 1})
    assert [len(times[key]["warm"]) for key in "ab"] == [3, 1]


def test_rounds_go_first_then_cold_steps_then_candidates(monkeypatch):
    _, times, missing = run({"a": 1.0, "b": 2.0}, 5, 9.0, monkeypatch)
    assert [len(times[key]["warm"]) for key in "ab"] == [2, 1]  # 6 s, then 2 of a, then no more
    _, times, missing = run({"a": 1.0, "b": 4.0}, 5, 7.0, monkeypatch)
    assert times["b"] == {"warm": [4.0], "cold": []}
    assert missing == {}
    _, times, missing = run({"a": 1.0, "b": 4.0, "c": 1.0}, 5, 5.5, monkeypatch)
    assert missing == {"c": LATE}


def test_a_peer_that_hangs_is_broken_off_without_a_deadline(monkeypatch):
    monkeypatch.setattr(clock, "LONGEST_STEP", 0.1)
    peer = Candidate("x", "x", lambda _: time.sleep(20))
    inputs = make_inputs(Case(4, 30, 16, torch.float32))
    _, missing = measure_seconds([peer], inputs, Clock(CPU), 1, lambda _: None, expected={"x": 0.0})
    assert missing == {"x": "OutOfTime: stopped after 0.1 s"}


def test_a_peer_that_raises_when_timed_has_the_reason(monkeypatch):
    def fails(_):
        raise ValueError("too odd")

    peers = [Candidate("x", "x", fails), Candidate("y", "y", lambda _: Result())]
    inputs = make_inputs(Case(4, 30, 16, torch.float32))
    times, missing = measure_seconds(
        peers, inputs, Clock(CPU), 2, lambda _: None, expected={"x": 0.0, "y": 0.0}
    )
    assert missing == {"x": "ValueError: too odd"}
    assert len(times["y"]["cold"]) == 2


def test_rounds_of_what_says_most_are_kept_while_peers_run():
    def candidate(key: str, kind: str) -> Candidate:
        return Candidate(key, key, lambda inputs: Result(), kind)

    names = [("products", "floor"), ("one_pass", "ours"), ("trl", "peer"), ("two_pass", "ours")]
    candidates = [candidate(key, kind) for key, kind in names]
    expected = {"products": 1.0, "one_pass": 2.0, "trl": 5.0, "two_pass": 7.0}
    kept = [kept_for_others(candidates, place, expected, 0, 3) for place in range(4)]
    # behind: two steps of the vital, one of the others; before a peer all further rounds
    assert kept == [4 + 5 + 7, 5 + 7, 7 + 4 * 3, 4 * 3]
    assert kept_for_others(candidates, 2, expected, 2, 3) == 0  # the last round, nothing behind

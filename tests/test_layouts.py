"""Gradients and metrics do not depend on ranks, packing, tying, or how tokens are spread.

The checks of one number of ranks share one start of torchrun (layout_worker.py), made by the first
test that asks for it. A rank that waits for another one for ever ends in the timeout.
"""

from __future__ import annotations

import functools
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from layout_cases import FACTORS, covering_set

WORKER = Path(__file__).with_name("layout_worker.py")
RANKS = (1, 2, 4)
BOUNDS = {"float64": 1e-10, "float32": 2e-6}  # max |error| / max |gradient| per tensor
EPS32 = float(torch.finfo(torch.float32).eps)
Results = Callable[[int], tuple[dict[str, Any], Path]]

pytestmark = pytest.mark.multirank


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Number of ranks -> (results.json, folder of everything else)."""

    @functools.cache
    def start(ranks: int) -> tuple[str, Path]:
        """(error or nothing, folder); a start that failed is not tried again by the next test."""
        out = tmp_path_factory.mktemp(f"ranks_{ranks}")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, f"--nproc_per_node={ranks}", str(WORKER), str(out)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        except subprocess.TimeoutExpired as error:
            return f"{error}: does a rank wait for another one?", out
        ours = [line for line in done.stderr.splitlines() if "rank" in line]
        report = "\n".join([f"exit status {done.returncode}", *ours[-40:]])
        return report if done.returncode else "", out

    def read(ranks: int) -> tuple[dict[str, Any], Path]:
        error, out = start(ranks)
        assert not error, error
        return json.loads((out / "results.json").read_text()), out

    return read


def close(got: float | None, want: float | None, bound: float) -> bool:
    if got is None or want is None:  # a stage that does not occur
        return got is want
    return abs(got - want) <= bound * max(1.0, abs(want))


def test_the_cases_cover_every_pair_of_options() -> None:
    cases = covering_set()
    for a, b in itertools.combinations(FACTORS, 2):
        met = {(getattr(case, a), getattr(case, b)) for case in cases}
        assert met == set(itertools.product(FACTORS[a], FACTORS[b])), (a, b)
    assert {case.micro_batches for case in cases} == set(range(1, 9))


@pytest.mark.parametrize("ranks", RANKS)
def test_gradients_equal_the_dense_reference(ranks: int, results: Results) -> None:
    found = results(ranks)[0]["gradients"]
    assert len(found) == len(BOUNDS) * len(covering_set())
    wrong = [r for r in found if not r["error"] <= BOUNDS[r["dtype"]]]
    assert not wrong, [(covering_set()[r["case"]], r["error"], r["tensor"]) for r in wrong]


@pytest.mark.parametrize("ranks", RANKS)
def test_metrics_equal_the_dense_reference_and_one_rank(ranks: int, results: Results) -> None:
    """Loss, entropies by stage, clip fraction, KL (k1, k2, k3), mismatch, gradient norm, ..."""
    alone = results(1)[0]["gradients"]
    for r, one in zip(results(ranks)[0]["gradients"], alone, strict=True):
        case, bound = covering_set()[r["case"]], BOUNDS[r["dtype"]]
        got, dense = r["metrics"], r["expected"]
        assert got.keys() == one["metrics"].keys(), case
        assert dense.keys() <= got.keys(), dense.keys() - got.keys()
        wrong = [n for n in dense if not close(got[n], dense[n], bound)]
        wrong += [n for n in got if not close(got[n], one["metrics"][n], bound)]
        assert not wrong, (case, {n: (got[n], dense.get(n), one["metrics"][n]) for n in wrong})
    clipped = [r["metrics"]["clip_fraction"] for r in results(ranks)[0]["gradients"]]
    assert max(clipped) > 0.1  # something was there to be averaged


@pytest.mark.parametrize("ranks", RANKS)
def test_what_the_cases_did(ranks: int, results: Results) -> None:
    """1 to 8 micro-batches with tokens; ranks without any token; dummies in every layout."""
    found = results(ranks)[0]["gradients"]
    rows = [r["rows"] for r in found]
    busy = [[sum(n > 0 for n in mine) for mine in case] for case in rows]
    assert {max(case) for case in busy} == set(range(1, 9))
    assert all(len({len(mine) for mine in case}) == 1 for case in rows)  # as many on every rank
    if ranks > 1:
        assert any(0 in case for case in busy)
        assert any(min(case) < max(case) for case in busy if 0 not in case)
        uneven = [r["case"] for r, case in zip(found, busy, strict=True) if min(case) < max(case)]
        assert {covering_set()[i].layout for i in uneven} == set(FACTORS["layout"])


@pytest.mark.parametrize("ranks", RANKS)
def test_no_stale_weights_after_a_pass_without_gradients(ranks: int, results: Results) -> None:
    """Also ``Policy.logprobs`` itself, in nats, with activation checkpointing off and on."""
    for errors in results(ranks)[0]["two_steps"]:
        assert max(errors.values()) <= 1e-10, errors


@pytest.mark.parametrize("ranks", RANKS[1:])
@pytest.mark.parametrize("tied", [True, False])
def test_bf16_compute_is_bitwise_where_no_sum_is_reordered(
    ranks: int, tied: bool, results: Results
) -> None:
    """Two micro-batches: a + b whether one rank adds them up or the reduction over ranks does."""
    name = f"bf16_two_{tied}"
    one, many = (load_file(results(n)[1] / f"{name}.safetensors") for n in (1, ranks))
    assert all(torch.equal(one[key], many[key]) for key in one)
    losses = [(results(n)[1] / f"{name}.json").read_text() for n in (1, ranks)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("tied", [True, False])
def test_bf16_compute_differs_by_the_order_of_fp32_sums_alone(
    ranks: int, tied: bool, results: Results
) -> None:
    """Eight micro-batches, each the same whoever computes it; their sum is made in fp32.

    The rival is plain torch's fp32 sum of the very same eight gradients, in rollout order.
    """
    folder, name = results(1)[1], f"bf16_eight_{tied}"
    parts = [load_file(folder / f"{name}_part{i}.safetensors") for i in range(8)]
    many = load_file(results(ranks)[1] / f"{name}.safetensors")
    for key in many:
        exact = torch.stack([p[key].double() for p in parts]).sum(0)
        rival = worst_error(functools.reduce(torch.add, [p[key] for p in parts]), exact)
        floor = EPS32 * float(exact.abs().max())
        assert worst_error(many[key], exact) <= 2 * rival + floor, key
    losses = [json.loads((results(n)[1] / f"{name}.json").read_text()) for n in (1, ranks)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-14)  # fp64 sums of eight fp32 numbers


def worst_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().max())


def records(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, times aside."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    times = ("seconds", "tokens_per_second")
    return [{k: v for k, v in json.loads(x).items() if not k.startswith(times)} for x in lines]


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_metrics_jsonl_of_a_run_does_not_depend_on_the_ranks(ranks: int, results: Results) -> None:
    """SFT, then CRPO with several updates a rollout, on the same completions (layout_run.py)."""
    one, many = records(results(1)[1]), records(results(ranks)[1])
    assert [r["phase"] for r in one] == ["sft", "sft", "crpo", "crpo"]
    for a, b in zip(one, many, strict=True):
        assert a.keys() == b.keys()
        wrong = {k: (a[k], b[k]) for k in a if not same(a[k], b[k])}
        assert not wrong, (a["step"], wrong)
    last = one[-1]
    for name in ("kl", "clip_fraction", "mismatch", "completions/masked", "reward/format_reward"):
        assert last[name] != 0, name
    assert all(last[f"stage_entropy/{k}"] > 1 for k in range(5))
    scores = [
        json.loads((results(n)[1] / "run" / "evaluations.json").read_text()) for n in (1, ranks)
    ]
    assert scores[0] == scores[1]


def same(a: Any, b: Any) -> bool:
    return close(b, a, 1e-9) if isinstance(a, float) else a == b

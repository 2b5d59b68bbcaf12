"""The loss's Triton kernels under FSDP2, DDP, autocast and activation checkpointing, by value.

One worker (triton_layout_worker.py) runs all groups of ranks in Triton's interpreter, over gloo.
Gradients are those of the plain model's dense loss in fp64, as near as the torch backend's are that
runs in one process on the same weights.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import children
import triton_tools
from layout_cases import covering_set
from triton_layout_cases import CASES, TRAINER_CASES, Case, cases_of

WORKER = Path(__file__).with_name("triton_layout_worker.py")
FLOOR = 2e-6  # of max |gradient|: what a perfect rival would leave
BOUND32 = 2e-6  # of the trainer's steps, as in test_layouts
BF16 = 2.0**-6  # of the loss: four roundings of bf16
RUNS = [(ranks, case) for ranks in (1, 2, 4) for case in cases_of(ranks)]
IDS = [f"{ranks}-{case.name}" for ranks, case in RUNS]
Results = Callable[[int], list[dict[str, Any]]]

reason = triton_tools.why_no_triton()
pytestmark = [pytest.mark.multirank, pytest.mark.skipif(bool(reason), reason=str(reason))]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Number of ranks -> what each rank found."""
    out = tmp_path_factory.mktemp("triton_layouts")
    environment = children.environment(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(
        [sys.executable, str(WORKER), str(out)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env=environment,
    )

    def read(ranks: int) -> list[dict[str, Any]]:
        file = out / f"{ranks}.json"
        assert file.exists(), f"exit status {done.returncode}\n{done.stderr[-6000:]}"
        return json.loads(file.read_text(encoding="utf-8"))

    return read


@pytest.mark.parametrize(("ranks", "case"), RUNS, ids=IDS)
def test_gradients_equal_the_dense_ones(ranks: int, case: Case, results: Results) -> None:
    found = results(ranks)[0]["cases"][case.name]
    wrong = {
        name: (error, found["rival"][name])
        for name, error in found["errors"].items()
        if not error <= 2 * found["rival"][name] + FLOOR
    }
    assert not wrong, wrong
    dense, bound = found["dense_loss"], BF16 if case.bf16 or case.autocast else FLOOR
    assert abs(found["loss"] - dense) <= bound * abs(dense)


@pytest.mark.parametrize(("ranks", "case"), RUNS, ids=IDS)
def test_what_ran(ranks: int, case: Case, results: Results) -> None:
    """Kernels on every rank with rows; the weight is gone after forward where FSDP2 reshards."""
    for rank, found in enumerate(results(ranks)):
        run = found["cases"][case.name]
        has_rows = not (case.empty and rank % 2)
        assert bool(run["launches"]) == has_rows, rank
        if has_rows:
            keeps = case.workspace is None and case.mode == "two_pass"
            last = "row_exp_kernel" if keeps else "row_grad_kernel"
            assert {"row_stats_kernel", last} <= set(run["launches"]), run["launches"]
        if case.wrapper == "fsdp":
            assert any(run["kept_weight"]) != case.reshard, rank


def test_the_cases_do_what_they_are_for(results: Results) -> None:
    """A small workspace means several chunks; recomputing means statistics twice as often."""
    cases = results(2)[0]["cases"]
    one = cases["fsdp"]["launches"]
    assert len(cases["fsdp_small"]["launches"]) > 3 * len(one)
    twice = cases["fsdp_checkpointed_loss"]["launches"]
    assert twice.count("row_stats_kernel") == 2 * one.count("row_stats_kernel")
    assert {case.wrapper for case in CASES} == {"ddp", "fsdp"}


@pytest.mark.parametrize(
    ("ranks", "index"), [(r, i) for r, cases in TRAINER_CASES.items() for i in cases]
)
def test_steps_of_the_trainer_equal_the_dense_reference(
    ranks: int, index: int, results: Results
) -> None:
    """Gradients and metrics of packed, accumulated, sharded steps; all 29 cases hold, in minutes.

    A rank without sequences runs dummies, whose backward starts no kernel.
    """
    found, case = results(ranks), covering_set()[index]
    step = found[0]["steps"][str(index)]
    assert step["error"] <= BOUND32, step["tensor"]
    got, wrong = step["metrics"], {}
    for name, dense in step["expected"].items():
        if got[name] is None or dense is None:
            wrong |= {} if got[name] is dense else {name: (got[name], dense)}
        elif not abs(got[name] - dense) <= BOUND32 * max(1.0, abs(dense)):
            wrong[name] = (got[name], dense)
    assert not wrong
    for rank, mine in enumerate(found):
        has_rows = any(mine["steps"][str(index)]["rows"][rank])
        assert bool(mine["steps"][str(index)]["launches"]) == has_rows
        assert has_rows or case.shares == "absent" or case.completions == "tail_empty"


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_sharded_weight_is_refused_with_the_fix(ranks: int, results: Results) -> None:
    for found in results(ranks):
        assert found["refused"].startswith("weight: expected a plain Tensor, got a DTensor")
        assert "inside the forward of the module that owns it" in found["refused"]

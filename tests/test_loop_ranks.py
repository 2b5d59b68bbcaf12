"""The loop at two ranks: updates, skipped updates and dynamic sampling agree with one rank."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from crpo_fast import distributed
from entropy_cases import controlled
from loop_cases import CASES

WORKER = Path(__file__).with_name("loop_worker.py")
pytestmark = pytest.mark.multirank


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, str(WORKER), str(folder / "results.json")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_steps_equal_the_dense_reference(results: dict[str, Any]) -> None:
    """The reference of one rank: so one rank and two are equal."""
    assert results["updates"].keys() == {case.name for case in CASES}
    wrong = {k: r for k, r in results["updates"].items() if not r["weights"] <= 1e-10}
    assert not wrong
    assert all(r["metrics"] == {} for r in results["updates"].values()), results["updates"]


def test_a_gradient_that_is_nan_on_one_rank_is_skipped_on_both(
    results: dict[str, Any], folder: Path
) -> None:
    for rank, found in enumerate(results["not_finite"]):
        assert found["same"], "the weights changed"
        assert found["state"] == 0, "the optimizer has a state"
        assert found["counts"] == [1, 1, 1]
        assert found["loss"] not in ("nan", "inf")  # only the gradient was not finite
        saved = folder / "nonfinite" / "step_4" / f"rank_{rank}"
        assert load_file(saved.with_suffix(".safetensors"))["0.labels"].numel() > 0
        record = json.loads(saved.with_suffix(".json").read_text())
        assert (record["rank"], record["world_size"]) == (rank, 2)
        assert record["metrics"]["grad_norm"] == "nan"
        assert record["gradients_not_finite"]
        assert not record["weights_not_finite"]


def test_ranks_agree_on_the_rounds_of_dynamic_sampling(results: dict[str, Any]) -> None:
    """Rows 0, 2 vary and 1, 3 do not: rank 1 samples on, rank 0 joins without a prompt."""
    first, second = results["dynamic"]
    assert first["prompts"] == [0, 2]
    assert len(first["calls"]) == len(second["calls"]) == first["metrics"]["groups/rounds"]
    assert [len(ids) for ids, _ in first["calls"]] == [2] + [0] * (len(first["calls"]) - 1)
    sampled = [ids[0] for prompts, _ in second["calls"] for ids in prompts]
    assert sampled[:2] == [1, 3]
    assert len(set(sampled)) == len(sampled)
    assert not {0, 2} & set(sampled)  # the other rank's prompts
    assert second["prompts"] == [i for i in sampled if i % 2 == 0]
    counts = {k: v for k, v in second["metrics"].items() if k.startswith("groups/")}
    assert counts["groups/sampled"] == len(sampled)
    assert counts["groups/dropped"] == sum(i % 2 for i in sampled)
    assert counts["groups/missing"] == 2 - len(second["prompts"])


def test_a_rank_without_prompts_joins_the_generation(results: dict[str, Any]) -> None:
    assert results["without_prompts"] == [[2, 2], []]


def test_the_dual_controller_does_the_same_at_two_ranks(
    results: dict[str, Any], tmp_path: Path
) -> None:
    """It sees global means: both ranks have the coefficients of one rank, to rounding."""
    alone = controlled(distributed.init(threads=1), tmp_path)
    distributed.shutdown()
    first, second = results["entropy"]
    assert first == second
    for name, steps in alone.items():
        for ours, theirs in zip(steps, first[name], strict=True):
            assert theirs == pytest.approx(ours, rel=1e-10)
    assert alone["coefs"][0] == [-0.5, 0.0, 0.5]
    assert len({tuple(coefs) for coefs in alone["coefs"]}) == len(alone["coefs"])

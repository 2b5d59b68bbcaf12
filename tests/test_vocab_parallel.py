"""Vocabulary-parallel heads: ranks with shards of one head equal the dense oracle on the whole.

vocab_parallel_worker.py runs 2 and 3 gloo ranks once, on the torch backend, and 2 in Triton's
interpreter; the tests read what every rank found.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import children
import crpo_kernels as ck
from crpo_kernels.vocab_parallel import no_sums
from triton_tools import why_no_triton
from vocab_parallel_cases import LOSSES, SHARDS

WORKER = Path(__file__).with_name("vocab_parallel_worker.py")
BOUND = 1e-6  # max |error| / max |value|, of every result and gradient in fp32
EXACT = 1e-12  # the same in fp64
KERNELS = 3e-6  # the interpreter's exp and log are those of numpy
Results = Callable[..., list[dict[str, Any]]]

pytestmark = pytest.mark.multirank


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Number of ranks (and whether in Triton) -> what each rank found."""

    @functools.cache
    def start(kind: str) -> tuple[str, Path]:
        out = tmp_path_factory.mktemp("vocab_parallel")
        environment = children.environment(**({"TRITON_INTERPRET": "1"} if kind else {}))
        command = [sys.executable, str(WORKER), str(out), *([kind] if kind else [])]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=280, check=False, env=environment
        )
        return done.stderr[-4000:] if done.returncode else "", out

    def read(ranks: int, kind: str = "") -> list[dict[str, Any]]:
        error, out = start(kind)
        assert not error, error
        return json.loads((out / f"{ranks}.json").read_text("utf-8"))

    return read


def beyond(
    errors: dict[str, float], rival: dict[str, float], bound: float = BOUND
) -> dict[str, float]:
    """What is farther from the truth than ``bound`` and than twice plain torch in the same dtype.

    Logits here reach 30, where neighbouring fp32 numbers are 1.9e-6 nats apart; a rounded logit
    moves its probability and the ratio by as much, in plain torch too.
    """
    floors = {"ratio": 4 * bound}  # the exp of a difference of up to 20
    return {
        name: e
        for name, e in errors.items()
        if not e <= max(floors.get(name, bound), 2 * rival.get(name, 0.0))
    }


@pytest.mark.parametrize("ranks", SHARDS)
def test_losses_and_gradients_are_those_of_the_whole_head(ranks: int, results: Results) -> None:
    for rank, found in enumerate(results(ranks)):
        assert {name.split("-")[0] for name in found["losses"]} == set(LOSSES)
        for case, of in found["losses"].items():
            over = beyond(of["errors"], of["rival"])
            assert not over, (rank, case, over)
            assert max(of["exact"].values()) < EXACT, (rank, case, of["exact"])


@pytest.mark.parametrize("ranks", SHARDS)
def test_logprobs_and_gradients_are_those_of_the_whole_head(ranks: int, results: Results) -> None:
    for rank, found in enumerate(results(ranks)):
        assert len(found["logprobs"]) == 2 * len(SHARDS[ranks])
        for case, errors in found["logprobs"].items():
            assert not beyond(errors, {}), (rank, case, beyond(errors, {}))


@pytest.mark.parametrize("ranks", SHARDS)
def test_one_gather_a_chunk_and_one_reduce_of_d_hidden(ranks: int, results: Results) -> None:
    counted, rows, dim = 37 - len(range(0, 37, 5)), 37, 16
    for found in results(ranks):
        sent = found["collectives"]
        for name, calls in sent.items():
            kinds = [kind for kind, *_ in calls]
            assert kinds.count("all_to_all_single") == 1, name  # a few integers, before all else
            assert kinds.count("all_reduce") == (name != "scoring"), name
            gathers = [shape for kind, shape, _ in calls if kind == "all_gather"]
            assert all(shape[0] == 4 for shape in gathers)
            assert sum(shape[1] for shape in gathers) == pytest.approx(counted, abs=1)
            assert (len(gathers) > 1) == (name == "chunks"), name
            reduces = [call for call in calls if call[0] == "all_reduce"]
            assert reduces == [["all_reduce", [rows, dim], "torch.float32"]][: len(reduces)]


@pytest.mark.parametrize("ranks", SHARDS)
def test_ranks_agree_bit_by_bit_and_a_nan_reaches_all(ranks: int, results: Results) -> None:
    for found in results(ranks):
        assert found["bits"]
        assert found["nan"]


@pytest.mark.parametrize("ranks", SHARDS)
def test_the_workspace_bounds_each_rank(ranks: int, results: Results) -> None:
    for found in results(ranks):
        for mode, sizes in found["memory"].items():
            assert sizes["peak"] <= sizes["bound"], mode


@pytest.mark.parametrize("ranks", SHARDS)
def test_the_log_says_over_how_many_ranks(ranks: int, results: Results) -> None:
    for found in results(ranks):
        assert any(f"vocabulary-parallel over {ranks} ranks" in line for line in found["log"])


WRONG = {
    "overlap": "vocab_start: .* rows 0..49 on rank 0, 49..99 on rank 1 of the group. Pass the",
    "gap": "vocab_start: .* rows 0..49 on rank 0, 51..99 on rank 1",
    "first_missing": "vocab_start: .* rows 1..49 on rank 0, 50..99 on rank 1",
    "same": "vocab_start: .* rows 0..49 on rank 0, 0..49 on rank 1 .* the group of the ranks",
    "negative": "vocab_start: .* rows -50..-1 on rank 1, 0..49 on rank 0",
    "start_forgotten": "vocab_start: .* rows 0..49 on rank 0, 0..49 on rank 1",
    "rows": "process_group: expected the same num_rows .* 8 on rank 0 and 7 on rank 1 .* Pass the",
    "labels": "process_group: expected the same labels .* on rank 1 .* Pass the same labels",
    "label_beyond": r"labels: expected ids in 0\.\.99 or -100, got 100 at row 0",
    "gradient": "process_group: expected the same gradients .* on all ranks or on none",
    "workspace": "process_group: expected the same options .* the same options on every rank",
    "function": "process_group: expected the same options .* the same function",
    "scale": "process_group: expected the same options",
    "start_kind": "vocab_start: expected a whole number, got .*0.0. Pass the number of rows",
    "no_group": "process_group: expected a torch.distributed ProcessGroup .* got 'tp'. Pass",
    "dense": "backend: expected 'auto', 'triton' or 'torch' with a process_group, got 'dense'",
}


def test_wrong_calls_say_so_on_every_rank(results: Results) -> None:
    import re

    for rank, found in enumerate(results(2)):
        said = found["refusals"]
        right = [name for name in said if name.startswith("right")]
        assert [said.pop(name) for name in right] == ["", "", ""]
        outsider = said.pop("group_of_others")
        assert rank or "ProcessGroup that this rank belongs to" in outsider
        assert said.keys() == WRONG.keys()
        for name, text in said.items():
            assert re.search(WRONG[name], text), (rank, name, text)


def test_torch_compile_breaks_the_graph_or_refuses(results: Results) -> None:
    for found in results(2):
        assert found["traced"]["error"] == 0
        assert "nor has a call with a process_group" in found["traced"]["refusal"]


@pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))
def test_the_kernels_do_the_same(results: Results) -> None:
    for rank, found in enumerate(results(2, "triton")):
        for case, of in found["losses"].items():
            over = beyond(of["errors"], of["rival"], KERNELS)
            assert not over, (rank, case, over)
        for case, errors in found["logprobs"].items():
            assert not beyond(errors, {}, KERNELS), (rank, case, beyond(errors, {}, KERNELS))


def test_what_a_call_would_choose_says_the_ranks():
    asked = {"num_rows": 64, "vocab_size": 1000, "hidden_size": 16}
    alone, _ = ck.explain_choice(**asked)
    assert "vocabulary-parallel" not in alone
    for options in ({}, {"is_scoring": True}, {"spec": ck.ObjectiveSpec()}):
        choice, _ = ck.explain_choice(**asked, num_ranks=3, **options)
        assert choice.endswith("; vocabulary-parallel over 3 ranks")
    with pytest.raises(ValueError, match="num_ranks: expected a whole number of at least 1, got 0"):
        ck.explain_choice(**asked, num_ranks=0)


def test_ranks_plan_for_the_largest_shard(monkeypatch):
    """Chunks with the same rows everywhere, whatever the own shard and the free memory are."""
    from crpo_kernels import plan

    monkeypatch.setattr(plan, "default_workspace", lambda *_: pytest.fail("asked what is free"))
    hidden, found = torch.zeros(900, 8), set()
    for size in (1, 500, 4000, 0):
        sizes = plan.HeadSizes(hidden, torch.zeros(size, 8), 900, "torch", None, most_rows=4000)
        own = sizes.planned()
        assert own.weight.shape == (4000, 8)
        assert own.workspace_bytes == plan.CPU_WORKSPACE_BYTES
        found.add(
            plan.make_plan(
                own.hidden, own.weight, 900, backend="torch", mode="one_pass", is_compiled=False,
                workspace_bytes=own.workspace_bytes, needs_weight_grad=True,
            )
        )  # fmt: skip
    assert len(found) == 1


def test_no_columns_add_nothing():
    maximum, s, t, _ = no_sums(3, torch.float64, torch.zeros(1))
    assert maximum.tolist() == [-1e30] * 3
    assert not s.any()
    assert not t.any()

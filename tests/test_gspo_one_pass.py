"""Off-policy gspo in one pass: chunks of whole sequences, when they can be and when they pay."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import crpo_kernels as ck
from benchmarks.live_bytes import LiveBytes
from crpo_kernels import aligned, dispatch, plan
from crpo_kernels.aligned import (
    Lengths,
    TooLong,
    align,
    chunk_ends,
    counted_lengths,
    even_limit,
    modelled_cost,
)
from numerics import assert_same_result, make_problem, run_loss, spec_of
from triton_tools import why_no_triton

needs_triton = pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))
BACKENDS = [
    pytest.param("torch", torch.float64, 1e-12, id="torch"),
    pytest.param("triton", torch.float32, 1e-5, id="triton", marks=needs_triton),
]
BF16 = torch.bfloat16
BOUNDS = {
    "ragged": [0, 1, 14, 16, 16, 23, 37],
    "empty at both ends": [0, 0, 0, 20, 37, 37],
    "one sequence": [0, 37],
    "single tokens": list(range(38)),
}


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    """Several tiles of a row, and rings of 8 rows unless a sequence is longer."""
    monkeypatch.setattr(plan, "RING_ROWS", 8)
    monkeypatch.setattr(plan, "GROUP_ROWS", 16)
    monkeypatch.setattr(plan, "ROW_MULTIPLE", 2)
    if not why_no_triton():
        from crpo_kernels import rows_triton

        monkeypatch.setattr(rows_triton, "BLOCK_V", 64)


@pytest.fixture
def plans(monkeypatch):
    """Every aligned plan that is made."""
    made = []

    def noted(*args):
        made.append(align(*args))
        return made[-1]

    monkeypatch.setattr(dispatch, "align", noted)
    return made


def gspo_problem(bounds, backend="torch", dtype=torch.float32):
    """Ragged sequences, one of them wholly ignored where there are several; their host knows."""
    problem = make_problem(num_rows=37, ignored=6)
    problem.cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    if len(bounds) > 3:
        problem.labels[bounds[1] : bounds[2]] = ck.IGNORE_INDEX
    has_device = backend == "triton" and torch.cuda.is_available()
    problem = problem.rounded(dtype, "cuda" if has_device else "cpu")
    problem.cu_seqlens = problem.cu_seqlens.cpu()
    return problem


def counted_of(problem):
    """The rows that count, on the host: on a GPU nobody else may look for them."""
    return (problem.labels != ck.IGNORE_INDEX).nonzero()[:, 0].cpu()


def least_workspace(problem, backend, dtype, **options):
    """What the message of a workspace that is too small names."""
    with pytest.raises(ValueError, match=r"the longest does not fit a chunk") as error:
        run_loss(problem, dtype, backend=backend, mode="one_pass", **options)
    return int(str(error.value).split("workspace_bytes=")[1].split(",")[0])


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)
@pytest.mark.parametrize("bounds", list(BOUNDS))
def test_one_pass_equals_the_oracle_and_two_passes(backend, dtype, tolerance, bounds, plans):
    problem = gspo_problem(BOUNDS[bounds], backend)
    spec = spec_of("gspo", clip_low=0.05, clip_high=0.05, rho_mode="truncate", rho_cap=1.2)
    options = {"spec": spec, "bias": True, "temperature": problem.temperature, "upstream": -1.3}
    truth = run_loss(problem, torch.float64, backend="dense", **options)
    assert truth[2].is_clipped.any()
    assert truth[2].ratio.unique().numel() > min(2, len(BOUNDS[bounds]) - 2)
    for workspace in (None, 60_000):
        rows = counted_of(problem) if backend == "triton" else None
        way = {"backend": backend, "workspace_bytes": workspace, "rows": rows}
        got = run_loss(problem, dtype, mode="one_pass", **way, **options)
        assert_same_result(got, truth, tolerance)
        both = run_loss(problem, dtype, mode="two_pass", **way, **options)
        assert_same_result(got, both, tolerance)
    assert all(isinstance(made, plan.Plan) for made in plans)
    assert_chunks_are_whole(plans, problem)


def assert_chunks_are_whole(plans, problem):
    counted = counted_of(problem)
    ends = set(torch.searchsorted(counted, problem.cu_seqlens.long()).tolist())
    for made in plans:
        assert set(made.chunk_ends) <= ends
        assert made.chunk_ends[-1] == counted.numel()
        slices = [rows for group in made.groups(counted.numel()) for rows in group]
        assert [rows.stop for rows in slices] == list(made.chunk_ends)
        assert max(rows.stop - rows.start for rows in slices) == made.chunk_rows
        for group in made.groups(counted.numel()):
            assert group[-1].stop - group[0].start <= made.group_rows


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)
def test_the_workspace_that_a_message_names_is_enough(backend, dtype, tolerance, plans):
    problem = gspo_problem([0, 9, 37], backend)
    options = {"spec": spec_of("gspo"), "rows": counted_of(problem)}
    named = least_workspace(problem, backend, dtype, workspace_bytes=12_000, **options)
    truth = run_loss(problem, torch.float64, backend="dense", **options)
    got = run_loss(problem, dtype, backend=backend, mode="one_pass", workspace_bytes=named,
                   **options)  # fmt: skip
    assert_same_result(got, truth, tolerance)
    assert isinstance(plans[0], TooLong)
    assert plans[0].longest == 23  # 28 rows without their ignored ones
    assert plans[1].chunk_rows < 37


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)
def test_rows_given_in_any_form_and_order(backend, dtype, tolerance, plans):
    problem = gspo_problem(BOUNDS["ragged"], backend)
    counted = counted_of(problem)
    options = {"spec": spec_of("gspo"), "backend": backend, "mode": "one_pass"}
    truth = run_loss(problem, torch.float64, spec=spec_of("gspo"), backend="dense")
    for rows in (counted, counted.tolist()):
        assert_same_result(run_loss(problem, dtype, rows=rows, **options), truth, tolerance)
    problem.cu_seqlens = problem.cu_seqlens.tolist()
    assert_same_result(run_loss(problem, dtype, rows=counted, **options), truth, tolerance)
    with pytest.raises(ValueError, match=r"'one_pass': .* rows are not in order"):
        run_loss(problem, dtype, rows=counted.flip(0), **options)
    options["mode"] = "auto"
    got = run_loss(problem, dtype, rows=counted.flip(0), **options)
    assert_same_result(got, truth, tolerance)
    assert len(plans) == 3


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)
@pytest.mark.parametrize("num_rows", [0, 5])
def test_no_counted_rows(backend, dtype, tolerance, num_rows):
    has_device = backend == "triton" and torch.cuda.is_available()
    problem = make_problem(num_rows=num_rows).rounded(dtype, "cuda" if has_device else "cpu")
    problem.labels.fill_(ck.IGNORE_INDEX)
    problem.cu_seqlens = torch.tensor([0, num_rows, num_rows])
    loss, grads, stats = run_loss(
        problem, dtype, spec=spec_of("gspo"), backend=backend, mode="one_pass", rows=[]
    )
    assert float(loss) == 0.0
    assert not grads["weight"].any()
    assert stats.ratio.shape == (num_rows,)


def test_six_products_and_the_workspace_holds(plans):
    problem = gspo_problem(BOUNDS["ragged"], dtype=torch.float64)
    num_rows = int((problem.labels != ck.IGNORE_INDEX).sum())
    hidden, weight, _ = problem.leaves(torch.float64)
    added = {torch.ops.aten.addmm_: lambda _, a, b, **_options: 2 * a[0] * a[1] * b[1]}
    vectors = list(problem.vectors.values())
    for workspace in (30_000, 80_000):
        with (
            FlopCounterMode(display=False, custom_mapping=added) as operations,
            LiveBytes(hidden, weight, problem.labels, *vectors) as counter,
        ):
            loss, _ = ck.linear_policy_loss(
                hidden, weight, problem.labels, **problem.vectors, spec=spec_of("gspo"),
                cu_seqlens=problem.cu_seqlens, mode="one_pass", backend="torch",
                workspace_bytes=workspace,
            )  # fmt: skip
            loss.backward()
        assert operations.get_total_flops() == 6 * num_rows * 101 * 16
        gradients = 8 * (37 + 101) * 16
        assert counter.peak <= workspace + 2 * gradients + 8 * 101 * 16
        hidden.grad = weight.grad = None
    assert all(len(made.chunk_ends) > 1 for made in plans)


@given(st.lists(st.integers(1, 20), max_size=30), st.integers(20, 60))
@settings(max_examples=60, deadline=None)
def test_chunks_are_few_and_even(lengths, limit):
    ends = chunk_ends(lengths, even_limit(lengths, limit))
    assert len(ends) == len(chunk_ends(lengths, limit))
    assert set(ends) <= set(itertools.accumulate(lengths))
    assert (ends[-1] if ends else 0) == sum(lengths)
    sizes = [b - a for a, b in itertools.pairwise((0, *ends))]
    assert all(0 < size <= limit for size in sizes)
    if sizes and max(sizes) > max(lengths):
        assert len(chunk_ends(lengths, max(sizes) - 1)) > len(sizes)


@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=40),
    st.sampled_from([1, 101, 5000, 131072]),
    st.sampled_from([1, 16, 1024]),
    st.sampled_from([("torch", torch.float64), ("torch", BF16), ("triton", BF16)]),
    st.integers(10_000, 1 << 28),
)
@settings(max_examples=100, deadline=None)
def test_chunks_stay_within_the_workspace_and_what_is_named_is_enough(
    lengths, vocab, dim, way, workspace
):
    backend, dtype = way
    hidden = torch.empty(1, 1, dtype=dtype).expand(sum(lengths), dim)
    weight = torch.empty(1, 1, dtype=dtype).expand(vocab, dim)

    def aligned_in(workspace):
        sizes = {"backend": backend, "workspace_bytes": workspace, "needs_weight_grad": True}
        room = plan.make_room(hidden, weight, sum(lengths), **sizes)
        any_chunks = plan.make_plan(
            hidden, weight, sum(lengths), mode="one_pass", is_compiled=False, **sizes
        )
        return room, align(any_chunks, room, tuple(lengths))

    room, made = aligned_in(max(workspace, plan.one_row_bytes(hidden, weight, backend)))
    if isinstance(made, TooLong):
        assert (made.longest, made.rows < made.longest) == (max(lengths), True)
        room, made = aligned_in(made.num_bytes)
    assert isinstance(made, plan.Plan)
    used = made.chunk_rows * room.row.raw + min(made.group_rows, sum(lengths)) * room.row.d_raw
    assert used <= room.available or made.chunk_rows == 1
    assert max(lengths) <= made.chunk_rows <= sum(lengths)


def test_what_the_host_does_not_know_is_said_and_not_asked_for():
    bounds, rows = torch.tensor([0, 3, 3, 8]), torch.tensor([0, 2, 4, 7])
    assert counted_lengths(bounds, None, None) == Lengths((3, 5))
    assert counted_lengths(bounds.tolist(), rows, None) == Lengths((2, 2))
    assert counted_lengths(bounds, rows.to("meta"), rows.tolist()) == Lengths((2, 2))
    for given_bounds, counted, given_rows, words in (
        (bounds.to("meta"), None, None, "cu_seqlens is not on the CPU"),
        (bounds, rows.to("meta"), None, "which rows count is not known on the CPU"),
        (bounds, rows.to("meta"), rows.to("meta"), "which rows count is not known on the CPU"),
        (bounds, rows.flip(0), None, "not in order"),
    ):
        values, reason = counted_lengths(given_bounds, counted, given_rows)
        assert values is None
        assert words in reason


def rooms(num_rows, vocab, dim, workspace=None, device="meta"):
    """The room and the plans of both modes on a GPU whose memory is free."""
    hidden = torch.empty(num_rows, dim, dtype=torch.bfloat16, device=device)
    weight = torch.empty(vocab, dim, dtype=torch.bfloat16, device=device)
    if workspace is None:
        workspace = 4 * vocab * dim + 8 * plan.RING_ROWS * vocab
    sizes = {"backend": "triton", "workspace_bytes": workspace, "needs_weight_grad": True}
    room = plan.make_room(hidden, weight, num_rows, **sizes)
    return room, {
        mode: plan.make_plan(hidden, weight, num_rows, mode=mode, is_compiled=False, **sizes)
        for mode in ("one_pass", "two_pass")
    }


def test_auto_takes_what_costs_less(monkeypatch):
    """The rule on a GPU's shapes: nothing runs, only sizes are compared."""
    monkeypatch.undo()
    both = (True, True)

    def choose(num_rows, vocab, dim, lengths, workspace=None):
        room, made = rooms(num_rows, vocab, dim, workspace)
        return dispatch.choose_aligned("auto", Lengths(lengths), made.get, room, both), room, made

    (chosen, reason), room, made = choose(8192, 131072, 4096, (512,) * 16)
    assert chosen.mode == "one_pass"
    assert reason is None
    assert chosen.chunk_ends == tuple(range(1024, 8193, 1024))
    assert made["two_pass"].kept == "exps"
    assert modelled_cost(chosen, room, both) < modelled_cost(made["two_pass"], room, both)
    # sequences of 2050 rows: dZ of all rows no longer fits beside them, E does beside 128
    (chosen, reason), _, made = choose(8200, 131072, 4096, (2050,) * 4)
    assert made["two_pass"].kept == "exps"
    assert chosen.kept == "exps"
    assert "chunks of whole sequences would cost more" in reason
    # E does not fit: a third of a product more is dearer than sums of d_weight
    (chosen, reason), _, made = choose(16384, 131072, 4096, (1024,) * 16, workspace=2 << 30)
    assert made["two_pass"].kept is None
    assert chosen.mode == "one_pass"
    (chosen, reason), _, _ = choose(4096, 131072, 1024, (4096,), workspace=1 << 30)
    assert chosen.mode == "two_pass"
    assert "longest does not fit a chunk of this workspace" in reason


def test_the_choice_is_logged_once(caplog):
    dispatch._log_once.cache_clear()
    caplog.set_level("INFO", logger="crpo_kernels")
    problem = gspo_problem(BOUNDS["ragged"])
    for _ in range(2):
        for way in ({}, {"workspace_bytes": 9_000}, {"mode": "two_pass"}):
            run_loss(problem, torch.float32, spec=spec_of("gspo"), backend="torch", **way)
    start = "backend torch, mode"
    ratio = "the ratio of gspo is a mean over the whole sequence of this call's own logprobs"
    assert [message for message in caplog.messages if message.startswith(start)] == [
        f"{start} one_pass: whole sequences fit a chunk, which then knows the ratios of its rows",
        (
            f"{start} two_pass: {ratio}, and the longest does not fit a chunk of this workspace; "
            "the logits are computed again for the gradient"
        ),
        f"{start} two_pass: asked for; the logits are computed again for the gradient",
    ]


def test_explain_choice_knows_sequences():
    asked = {"num_rows": 60, "vocab_size": 700, "hidden_size": 16, "spec": spec_of("gspo")}
    asked |= {"is_on_policy": False, "dtype": torch.float32, "backend": "torch"}
    for lengths, words in (
        (None, "mode two_pass: the ratio of gspo .*, and the sequences are not known here; "),
        ([20, 0, 40], "mode one_pass: whole sequences fit a chunk"),
    ):
        assert re.search(words, ck.explain_choice(**asked, sequence_lengths=lengths)[0])
    small = ck.explain_choice(**asked, sequence_lengths=[60], workspace_bytes=100_000)[0]
    assert "the longest does not fit a chunk of this workspace" in small
    with pytest.raises(ValueError, match=r"sequence_lengths: expected 60 tokens .* got 59"):
        ck.explain_choice(**asked, sequence_lengths=[59])


def test_on_policy_needs_no_sequences_in_a_chunk(plans):
    problem = gspo_problem(BOUNDS["ragged"])
    run_loss(problem, torch.float32, spec=spec_of("gspo"), mode="one_pass", drop=("old_logprobs",))
    assert plans == []
    assert aligned.OPERATIONS_PER_BYTE_OF_GPU > aligned.OPERATIONS_PER_BYTE_OF_CPU

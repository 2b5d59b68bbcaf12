"""Calls small enough for Triton's interpreter that still have tiles, chunks and groups."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import crpo_kernels as ck
from benchmarks.live_bytes import LiveBytes
from crpo_kernels import plan
from numerics import Problem, make_problem

# a GPU's exponentials and quotients are approximate: some units in the last place, not half a one
LOOSER = 3 if torch.cuda.is_available() else 1
TOLERANCE = 5e-6 * LOOSER  # of the largest value: logits of some tens, rounded in fp32
GROUPS = 3_200  # bytes: two chunks of two rows are a group
WAYS = [{}, {"mode": "two_pass"}, {"workspace_bytes": GROUPS}]
each_way = pytest.mark.parametrize("way", WAYS, ids=["one group", "two_pass", "groups"])


def shrink(monkeypatch: pytest.MonkeyPatch, *, block: int = 16) -> None:
    """Several tiles of a row, chunks of a group and slices of a product at a few rows."""
    from crpo_kernels import rows_triton

    monkeypatch.setattr(rows_triton, "BLOCK_V", block)
    monkeypatch.setattr(plan, "RING_ROWS", 4)
    monkeypatch.setattr(plan, "GROUP_ROWS", 8)
    monkeypatch.setattr(plan, "ROW_MULTIPLE", 2)
    monkeypatch.setattr(plan, "PRODUCT_BYTES", 3 * 4 * 8)  # three rows of D = 8


def note_plans(monkeypatch: pytest.MonkeyPatch) -> list[plan.Plan]:
    """Every plan that is made from here on: a case must be what its name says."""
    from crpo_kernels import dispatch

    made, make_plan = [], dispatch.make_plan

    def noted(*args, **kwargs) -> plan.Plan:
        made.append(make_plan(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(dispatch, "make_plan", noted)
    return made


def small(device: str, num_rows: int = 11, ignored: int = 5) -> Problem:
    """A problem of 40 tokens whose values fp32 holds."""
    made = make_problem(num_rows=num_rows, vocab=40, dim=8, ignored=ignored)
    return made.rounded(torch.float32, device)


def peaks(num_rows, vocab, dim, *, needs_weight=True, ignored=False, **options) -> tuple[int, int]:
    """(forward, backward) peak bytes beyond the inputs, in bf16, counted on fake tensors.

    Kernels are left out, so that shapes may be real ones.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        kind = {"dtype": torch.bfloat16}
        hidden = torch.empty(num_rows, dim, requires_grad=True, **kind)
        weight = torch.empty(vocab, dim, requires_grad=needs_weight, **kind)
    labels, vectors = torch.zeros(num_rows, dtype=torch.int64), torch.zeros(4, num_rows)
    if ignored:
        labels[::8] = ck.IGNORE_INDEX
    names = ("advantages", "token_weights", "entropy_weights", "ref_logprobs")
    with LiveBytes(hidden, weight, labels, vectors) as counter:
        loss, _ = ck.linear_policy_loss(
            hidden, weight, labels, **dict(zip(names, vectors, strict=True)),
            spec=ck.ObjectiveSpec.preset("crpo"), backend="triton", **options,
        )  # fmt: skip
        forward = counter.restart()
        loss.backward()
    assert hidden.grad is not None
    return forward, counter.peak

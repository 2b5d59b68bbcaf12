"""Bytes of calls that this machine could not make: the real code on fake tensors.

Fake tensors have shapes and storages but no values. The package's own chunk loop runs on them as on
a GPU whose memory is free (backend triton; its kernels are left out) and every storage is counted.
So these are bytes that the code asks for, not a measurement: no allocator rounds them up, and no
library keeps a workspace of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import crpo_kernels as ck
from benchmarks.live_bytes import LiveBytes
from benchmarks.losses.baselines import (
    FEWEST_ROWS,
    Result,
    gradients,
    naive,
    policy_arguments,
    scored,
)
from benchmarks.losses.cases import NUM_SEQUENCES, Case, Inputs
from crpo_kernels.plan import BYTES_OF_VECTORS

KEYS = ("one_pass", "two_pass", "scored", "naive")  # what can be planned
TITLES = {
    "one_pass": "crpo_kernels, one pass",
    "two_pass": "crpo_kernels, two passes",
    "scored": "crpo_kernels, scoring",
    "naive": "plain torch",
}


def planned_bytes(
    case: Case, key: str, *, backend: str = "triton", workspace_bytes: int | None = None
) -> dict[str, int]:
    """Peak bytes beyond the inputs of one call of `KEYS`, forward and backward.

    Args:
        case: its sizes and dtype.
        key: "one_pass", "two_pass", "scored" or "naive" (plain torch).
        backend: "triton": as on a GPU; "torch": as on a CPU.
        workspace_bytes: of the call; None: the default.

    Returns:
        extra_bytes of everything, output_bytes of the gradients among them, and peak_bytes beyond
        inputs and outputs.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        hidden, weight = (
            torch.empty(n, case.dim, dtype=case.dtype, requires_grad=True)
            for n in (case.num_rows, case.vocab_size)
        )
    inputs = constant_inputs(case, hidden, weight)
    steps: dict[str, Callable[[Inputs], Result]] = {
        "scored": scored(backend, workspace_bytes=workspace_bytes),
        "naive": lambda given: _naive(given, fake),
    }
    step = steps.get(key, lambda given: _fused(given, key, backend, workspace_bytes, fake))
    with LiveBytes(*inputs.tensors()) as counter:
        made = step(inputs)
        values = [value for value in vars(made).values() if isinstance(value, Tensor)]
        peak, beyond = counter.peak, counter.peak_without(values)
    outputs = sum(g.nbytes for g in (made.d_hidden, made.d_weight) if g is not None)
    return {"extra_bytes": peak, "output_bytes": outputs, "peak_bytes": beyond}


def constant_inputs(
    case: Case,
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    device: torch.device | str = "cpu",
) -> Inputs:
    """Real vectors of constants, also beside fake tensors: the code reads labels on the host."""
    ones = torch.ones(case.num_rows, device=device)
    labels = torch.zeros(case.num_rows, dtype=torch.int64, device=device)
    vectors = (ones, ones.clone(), ones.clone(), ones.clone())
    length = -(-case.num_rows // NUM_SEQUENCES)  # a peer may do its work sequence by sequence
    return Inputs(case, hidden, weight, labels, *vectors, sequence_rows=length)


def _fused(
    inputs: Inputs, mode: str, backend: str, workspace_bytes: int | None, fake: FakeTensorMode
) -> Result:
    loss, _ = ck.linear_policy_loss(
        **policy_arguments(inputs), backend=backend, mode=mode, workspace_bytes=workspace_bytes
    )
    with fake:
        return Result(loss, *gradients(loss, inputs))


def _naive(inputs: Inputs, fake: FakeTensorMode) -> Result:
    with fake:
        return naive(inputs)


def row_bytes(case: Case, key: str) -> int:
    """What the design lets one more row take beyond the gradients that are returned.

    The vectors of one value a row; in one pass a second row of d_hidden, which backward scales into
    another tensor, so that it can run again.
    """
    return copy_bytes(case, key) + BYTES_OF_VECTORS


def copy_bytes(case: Case, key: str) -> int:
    """A row of the second d_hidden."""
    return case.dim * case.dtype.itemsize if key == "one_pass" else 0


def bound_bytes(case: Case, key: str, *, is_gpu: bool) -> int:
    """The most that the design allows beyond the inputs, by default workspace.

    The ring of 1024 fp32 rows; gradient factors of at most 2D rows and a group, or with two passes
    and without gradients what the workspace has; the fp32 sum of d_weight where it accumulates;
    scratch; both gradients; `row_bytes` a row.
    """
    rows, vocab, dim, item = case.num_rows, case.vocab_size, case.dim, case.dtype.itemsize
    vocab = -(-vocab // 16) * 16
    ring, head = 4 * 1024 * vocab, 4 * vocab * dim
    few = row_bytes(case, key) * rows
    if key == "scored":
        return min(ring, 4 * rows * vocab) + SCRATCH + few
    outputs = item * (rows * dim + vocab * dim)
    if key == "recompute":  # a workspace that keeps nothing, hence chunks and a sum of d_weight
        return max(rows, FEWEST_ROWS) * vocab + head + outputs + SCRATCH + few
    kept = 4 * dim // item + (2048 if is_gpu else 0)  # rows of dZ for one product d_weight
    is_summed = rows > (kept if is_gpu else max(kept, 4096 // item))
    factors = min(rows, 2048 if is_gpu and is_summed else kept) * vocab * item
    if is_gpu:
        factors += min(rows, 1024) * 4 * vocab
        if key == "two_pass":  # E of all rows where the default workspace has room
            factors = max(factors, min(head + 2 * ring, rows * vocab * item + ring))
    else:
        factors = max(factors, min(ring, rows * vocab * item))
    return factors + (head if is_summed else 0) + outputs + SCRATCH + few


SCRATCH = 1 << 26  # blocks of the row work, slabs and fp32 parts of products: 64 MiB

"""Started by test_triton_layouts.py with TRITON_INTERPRET=1: the loss's kernels under wrappers.

    python triton_layout_worker.py <folder>        writes <folder>/<ranks>.json

Imports come once; the ranks of each group are forks of this process over gloo.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import layout_cases
import layout_worker
from crpo_fast.distributed import World
from crpo_fast.loss import LossSpec
from crpo_kernels import exps_triton, launch_triton, linear_policy_loss, rows_triton
from forked_ranks import run_group
from triton_layout_cases import (
    BLOCK_V,
    TRAINER_CASES,
    VOCAB,
    Case,
    Net,
    Piece,
    cases_of,
    gradients_of,
    loss_of,
    make_pieces,
)

KERNELS = (rows_triton.__name__, exps_triton.__name__)  # modules that start them
Results = dict[str, Any]


def wrapped(case: Case, size: int) -> nn.Module:
    """The model, sharded as the trainer does it, or replicated."""
    net = Net(case)
    if case.wrapper == "ddp":
        return DistributedDataParallel(net)
    policy = MixedPrecisionPolicy()
    if case.bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = {"mesh": init_device_mesh("cpu", (size,)), "mp_policy": policy}
    for block in net.blocks:
        fully_shard(block, **options)
    if not case.tied:
        fully_shard(net.embedding, **options)
        fully_shard([net.norm, net.head], reshard_after_forward=case.reshard, **options)
    fully_shard(net, reshard_after_forward=case.reshard and case.tied, **options)
    return net


def accumulate(
    case: Case, net: nn.Module, pieces: list[Piece], size: int
) -> tuple[float, list[bool]]:
    """Forward and backward of this rank's pieces.

    Returns:
        its loss without the number of ranks, and whether each forward left the head's whole weight
        in memory.
    """
    total, kept, heads = 0.0, [], []
    for i, piece in enumerate(pieces):
        is_last = i == len(pieces) - 1 or not case.syncs
        waits = contextlib.nullcontext()
        if case.wrapper == "fsdp":
            net.set_requires_gradient_sync(is_last)
        elif not is_last:
            waits = net.no_sync()
        with waits:
            compute = loss_of(piece, case, "triton", torch.float32, scale=float(size))

            def watched(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                heads.append(weight.untyped_storage())
                return compute(hidden, weight, bias)  # noqa: B023  (called at once)

            with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
                loss = net(piece.ids, piece.num_rows, watched)
            kept.append(heads[-1].size() > 0)
            loss.backward()
        total += float(loss.detach()) / size
    return total, kept


def grads_of(net: nn.Module) -> dict[str, Tensor]:
    """Whole gradients by the plain model's names. A collective."""
    found = {}
    for name, p in net.named_parameters():
        if p.grad is not None:
            whole = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            found[name.removeprefix("module.")] = whole
    return found


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Max |error| / max |gradient| of each tensor."""
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    assert all(t.abs().max() > 0 for t in want.values()), "a gradient of zero shows nothing"
    return {
        name: float((got[name].double() - truth).abs().max() / truth.abs().max())
        for name, truth in want.items()
    }


@contextlib.contextmanager
def noted(launches: list[str]) -> Iterator[None]:
    """Append the names of the kernels that start inside."""
    plain = launch_triton.launch

    def launch(kernel: Any, *args: Any, **meta: int) -> None:
        launches.append(kernel.__name__)
        plain(kernel, *args, **meta)

    with contextlib.ExitStack() as patches:
        for name in KERNELS:
            patches.enter_context(mock.patch.object(sys.modules[name], "launch", launch))
        yield


def one_case(case: Case, rank: int, size: int) -> Results:
    """Gradients of the wrapped model, beside the dense ones of this process in fp64."""
    start, net = time.monotonic(), wrapped(case, size)
    launches: list[str] = []
    with noted(launches):
        loss, kept = accumulate(case, net, make_pieces(case)[rank::size], size)
    total = torch.tensor(loss, dtype=torch.float64)
    dist.all_reduce(total)
    got = grads_of(net)
    result: Results = {"launches": launches, "kept_weight": kept}
    result["seconds"] = time.monotonic() - start
    if rank:
        return result
    loss, want = gradients_of(case, "dense", torch.float64)
    result |= {"loss": float(total), "dense_loss": loss, "errors": errors(got, want)}
    compute_dtype = torch.bfloat16 if case.bf16 else None
    _, rival = gradients_of(case, "torch", torch.float32, compute_dtype)
    result["rival"] = errors(rival, want)
    return result


class TritonCase(layout_cases.Case):
    """A case of the trainer's layout tests with the loss's kernels."""

    @property
    def spec(self) -> LossSpec:
        """As without kernels."""
        return replace(super().spec, options=(("backend", "triton"),))


def trained(rank: int, size: int) -> Results:
    """Steps of the trainer: packing, dummies, reference and old logprobs, FSDP2, metrics."""
    world, found = World(rank, size, torch.device("cpu")), {}
    for index in TRAINER_CASES[size]:
        case, launches = TritonCase(**vars(layout_cases.covering_set()[index])), []
        with noted(launches):
            found[str(index)] = layout_worker.one_case(case, world, "float32")
        found[str(index)]["launches"] = len(launches)
    return found


def refused(size: int) -> str:
    """What is said to somebody who hands over a sharded weight."""
    net = Net(Case("refused"))
    fully_shard(net, mesh=init_device_mesh("cpu", (size,)))
    weight, labels = net.head.weight, torch.zeros(3, dtype=torch.long)
    assert isinstance(weight, DTensor)
    hidden = torch.zeros(3, weight.shape[1])
    try:
        linear_policy_loss(
            hidden, weight, labels, advantages=hidden[:, 0], token_weights=hidden[:, 0],
            backend="triton",
        )  # fmt: skip
    except ValueError as error:
        return str(error)
    return ""


def checks(rank: int, size: int) -> Results:
    """Everything of one group."""
    cases = {case.name: one_case(case, rank, size) for case in cases_of(size)}
    return {"cases": cases, "steps": trained(rank, size), "refused": refused(size)}


def main() -> int:
    out = Path(sys.argv[1])
    assert launch_triton.is_interpreted(), "expected TRITON_INTERPRET=1"
    assert VOCAB > 2 * BLOCK_V
    rows_triton.BLOCK_V = BLOCK_V
    return int(not all(run_group(size, out, checks) for size in (1, 2, 4)))


if __name__ == "__main__":
    sys.exit(main())

"""Started by test_vocab_parallel.py: ranks that share one head over gloo.

    python vocab_parallel_worker.py <folder> [triton]        writes <folder>/<ranks>.json

Imports come once; the ranks of each group are forks of this process. Every case is checked on every
rank against the dense oracle on the whole head in fp64.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import crpo_kernels as ck
from benchmarks.live_bytes import LiveBytes
from forked_ranks import run_group
from numerics import TINY, make_problem
from vocab_parallel_cases import (
    LOSSES,
    SHARDS,
    TRITON,
    Case,
    beside,
    error,
    problem_of,
    run,
)

COLLECTIVES = ("all_gather", "all_reduce", "all_to_all_single")
Results = dict[str, Any]


def loss_errors(case: Case, shards: list[tuple[int, int]], dtype: torch.dtype) -> Results:
    """How far this rank is from the oracle in fp64, by name; and so is plain torch in ``dtype``.

    Values are those that ``dtype`` holds; "exact" is this rank in fp64. A CPU rounds products of
    bf16, and the oracle makes them in fp32: there the rival is our own loss on the whole head.
    """
    problem = problem_of(case, shards).rounded(dtype)
    own = slice(*shards[dist.get_rank()])
    ways = {key: case[key] for key in ("mode", "workspace_bytes", "backend") if key in case}
    group = {"process_group": dist.group.WORLD, "vocab_start": own.start, **ways}
    truth = run(problem, case, torch.float64, slice(None), backend="dense")
    rival = run(
        problem, case, dtype, slice(None), backend="torch" if dtype.itemsize == 2 else "dense"
    )
    found = {
        "errors": beside(run(problem, case, dtype, own, **group), truth, own),
        "rival": beside(rival, truth, own, is_whole=True),
    }
    if ways.get("backend") != "triton":
        found["exact"] = beside(run(problem, case, torch.float64, own, **group), truth, own)
    return found


def logprobs_errors(
    shards: list[tuple[int, int]], dtype: torch.dtype, num_rows: int = 37, **ways: Any
) -> Results:
    """`linear_logprobs` with a loss on each output, twice backward, and without gradients."""
    problem = make_problem(num_rows).rounded(dtype)
    own = slice(*shards[dist.get_rank()])
    weights = torch.randn(
        3, num_rows, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )

    def outputs(
        dtype: torch.dtype, shard: slice, is_scoring: bool = False, **options: Any
    ) -> tuple:
        leaves = problem.hidden.to(dtype), problem.weight[shard].to(dtype), problem.bias[shard]
        leaves = [leaf.to(dtype).clone().requires_grad_(not is_scoring) for leaf in leaves]
        out = ck.linear_logprobs(
            *leaves[:2],
            problem.labels,
            bias=leaves[2],
            temperature=0.8,
            logit_softcap=6.0,
            **options,
        )
        if not is_scoring:
            loss = (torch.stack(out) * weights).sum()
            loss.backward(retain_graph=True)
            loss.backward()
        return torch.stack(out).detach(), [leaf.grad for leaf in leaves]

    group = {"process_group": dist.group.WORLD, "vocab_start": own.start, **ways}
    got, grads = outputs(dtype, own, **group)
    want, true_grads = outputs(torch.float64, slice(None), backend="dense")
    scored, _ = outputs(dtype, own, is_scoring=True, **group)
    true_grads = [true_grads[0], *(grad[own] for grad in true_grads[1:])]
    eight = {"is_scoring": True, "head_dtype": torch.float8_e4m3fn}
    found = {
        "outputs": error(got, want),
        "scored": error(scored, want),
        "eight_bits": error(
            outputs(dtype, own, **eight, **group)[0],
            outputs(dtype, slice(None), **eight, backend="dense")[0],
        ),
    }
    names = ("d_hidden", "d_weight", "d_bias")
    return found | {n: error(a, b) for n, a, b in zip(names, grads, true_grads, strict=True)}


@contextlib.contextmanager
def counted(calls: list[tuple[str, list[int], str]]) -> Iterator[None]:
    """Append (name, shape sent, dtype) of the collectives that run inside."""
    with contextlib.ExitStack() as patches:
        for name in COLLECTIVES:
            plain = getattr(dist, name)

            def noted(*args: Any, name: str = name, plain: Any = plain, **kwargs: Any) -> Any:
                sent = args[0] if name == "all_reduce" else args[1]
                calls.append((name, list(sent.shape), str(sent.dtype)))
                return plain(*args, **kwargs)

            patches.enter_context(mock.patch.object(dist, name, noted))
        yield


def collectives(shards: list[tuple[int, int]]) -> Results:
    """What is sent by each kind of call."""
    problem, found = make_problem(), {}
    own = slice(*shards[dist.get_rank()])
    group = {"process_group": dist.group.WORLD, "vocab_start": own.start}
    ways = {
        "one_pass": {"mode": "one_pass"},
        "chunks": {"mode": "one_pass", "workspace_bytes": TINY},
        "two_pass": {"mode": "two_pass", "workspace_bytes": TINY},
    }
    for name, way in ways.items():
        calls: list = []
        with counted(calls):
            run(problem, {"preset": "dapo"}, torch.float32, own, **group, **way)
        found[name] = calls
    calls = []
    with counted(calls), torch.no_grad():
        hidden, weight = problem.hidden.float(), problem.weight[own].float()
        ck.linear_logprobs(hidden, weight, problem.labels, workspace_bytes=TINY, **group)
    found["scoring"] = calls
    return found


def same_bits(shards: list[tuple[int, int]]) -> bool:
    """Whether loss, statistics and d_hidden have the same bits on every rank."""
    own = slice(*shards[dist.get_rank()])
    loss, grads, stats = run(
        make_problem(), {"preset": "crpo"}, torch.float32, own,
        process_group=dist.group.WORLD, vocab_start=own.start,
    )  # fmt: skip
    mine = torch.cat(
        [loss.reshape(1), grads["hidden"].reshape(-1), torch.stack(stats[:7]).reshape(-1)]
    )
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return all(torch.equal(other, mine) for other in everyone)


def not_a_number(shards: list[tuple[int, int]]) -> bool:
    """Whether a NaN in one row of the last shard reaches the loss of every rank."""
    problem = make_problem()
    problem.weight[100, 3] = float("nan")
    own = slice(*shards[dist.get_rank()])
    group = {"process_group": dist.group.WORLD, "vocab_start": own.start}
    loss, _, stats = run(problem, {}, torch.float32, own, **group)
    scored = ck.linear_logprobs(
        problem.hidden.float(), problem.weight[own].float(), problem.labels, **group
    )
    counted_rows = problem.labels != ck.IGNORE_INDEX
    return bool(
        loss.isnan() and scored.lse[counted_rows].isnan().all() and stats.logprobs.isnan().any()
    )


def message(rank: int, *functions: Callable[..., Any], **changes: Any) -> str:
    """What a wrong call says on this rank; ``changes`` may be one value for each rank."""
    function = functions[rank] if functions else ck.linear_policy_loss
    problem = make_problem(num_rows=8)
    given = {
        name: value[rank] if isinstance(value, list) else value for name, value in changes.items()
    }
    first, stop = given.pop("shard", (50 * rank, 50 * rank + 50))
    num_rows = given.pop("num_rows", 8)
    arguments: dict[str, Any] = {
        "hidden": problem.hidden[:num_rows].float(),
        "weight": problem.weight[first:stop].float(),
        "labels": problem.labels[:num_rows].clamp(max=99),
        "process_group": dist.group.WORLD,
        "vocab_start": first,
    }
    if function is ck.linear_policy_loss:
        arguments |= {"advantages": torch.ones(num_rows), "token_weights": torch.ones(num_rows)}
    arguments |= given
    try:
        function(**arguments)
    except ValueError as refusal:
        return str(refusal)
    return ""


def refusals(rank: int) -> Results:
    """Wrong calls of two ranks, after right ones and before them."""
    labels = make_problem(num_rows=8).labels.clamp(max=99)
    needing = make_problem(num_rows=8).hidden.float()
    outsiders = dist.new_group([1])
    return {
        "right": message(rank),
        "overlap": message(rank, shard=[(0, 50), (49, 100)]),
        "gap": message(rank, shard=[(0, 50), (51, 100)]),
        "first_missing": message(rank, shard=[(1, 50), (50, 100)]),
        "same": message(rank, shard=[(0, 50), (0, 50)]),
        "negative": message(rank, vocab_start=[0, -50]),
        "start_forgotten": message(rank, vocab_start=0),
        "rows": message(rank, num_rows=[8, 7]),
        "labels": message(rank, labels=[labels, labels.flip(0)]),
        "label_beyond": message(rank, labels=torch.full((8,), 100)),
        "gradient": message(rank, hidden=[needing.clone().requires_grad_(), needing]),
        "workspace": message(rank, workspace_bytes=[1 << 20, 1 << 21]),
        "function": message(rank, ck.linear_policy_loss, ck.linear_logprobs),
        "scale": message(rank, logit_scale=[1.0, 2.0]),
        "start_kind": message(rank, vocab_start=[0.0, 50.0]),
        "no_group": message(rank, process_group="tp"),
        "dense": message(rank, backend="dense"),
        "right_after_all": message(rank),
        "right_of_no_rows": message(rank, num_rows=0),
        "group_of_others": message(rank, process_group=outsiders) if rank == 0 else "",
    }


def traced(shards: list[tuple[int, int]]) -> Results:
    """Under torch.compile: the whole graph is refused, pieces are as in eager."""
    problem, own = make_problem(num_rows=8), slice(*shards[dist.get_rank()])
    hidden, weight = problem.hidden.float(), problem.weight[own].float()

    def call(hidden: Tensor, weight: Tensor) -> Tensor:
        out = ck.linear_logprobs(
            hidden * 1.0,
            weight,
            problem.labels,
            process_group=dist.group.WORLD,
            vocab_start=own.start,
        )
        return out.logprobs * 2.0

    found = {
        "error": error(torch.compile(call, backend="eager")(hidden, weight), call(hidden, weight))
    }
    torch._dynamo.reset()
    try:
        torch.compile(call, backend="eager", fullgraph=True)(hidden, weight)
    except torch._dynamo.exc.Unsupported as refusal:
        found["refusal"] = str(refusal)
    return found


def memory(num_ranks: int) -> Results:
    """Peak bytes beyond the inputs of one rank's call, and what may be there."""
    vocab, dim, num_rows, workspace = 3000, 32, 1024, 1 << 20
    sizes = [vocab // num_ranks + (rank == 0) * (vocab % num_ranks) for rank in range(num_ranks)]
    start = sum(sizes[: dist.get_rank()])
    found = {}
    for mode in ("one_pass", "two_pass"):
        torch.manual_seed(0)
        hidden = torch.randn(num_rows, dim).requires_grad_()
        weight = (
            torch.randn(vocab, dim)[start : start + sizes[dist.get_rank()]].clone().requires_grad_()
        )
        labels, vectors = torch.randint(0, vocab, (num_rows,)), torch.randn(4, num_rows)
        with LiveBytes(hidden, weight, labels, vectors) as counter:
            loss, _ = ck.linear_policy_loss(
                hidden, weight, labels, advantages=vectors[0], token_weights=vectors[1],
                entropy_weights=vectors[2], ref_logprobs=vectors[3], mode=mode,
                spec=ck.ObjectiveSpec.preset("crpo"), workspace_bytes=workspace,
                process_group=dist.group.WORLD, vocab_start=start,
            )  # fmt: skip
            loss.backward()
        gradients = 4 * (hidden.numel() + 2 * weight.numel())
        found[mode] = {"peak": counter.peak, "bound": workspace + gradients}
    return found


def told(shards: list[tuple[int, int]]) -> list[str]:
    """What the log says of a call."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("crpo_kernels")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    ck.dispatch._log_once.cache_clear()
    own = slice(*shards[dist.get_rank()])
    run(
        make_problem(),
        {},
        torch.float32,
        own,
        process_group=dist.group.WORLD,
        vocab_start=own.start,
    )
    logger.removeHandler(handler)
    return lines


def checks(rank: int, size: int) -> Results:
    """Everything of one group on the torch backend."""
    shards = SHARDS[size]
    results: Results = {"losses": {}, "logprobs": {}}
    for name, case in LOSSES.items():
        for layout, bounds in shards.items():
            if layout != "uneven" and name not in ("everything_in_chunks", "two_pass"):
                continue
            dtype = case.get("dtype", torch.float32)
            results["losses"][f"{name}-{layout}"] = loss_errors(case, bounds, dtype)
    for layout, bounds in shards.items():
        for name, ways in {"whole": {}, "chunks": {"workspace_bytes": TINY}}.items():
            found = logprobs_errors(bounds, torch.float32, **ways)
            results["logprobs"][f"{name}-{layout}"] = found
    results |= {"collectives": collectives(shards["uneven"]), "memory": memory(size)}
    results |= {"nan": not_a_number(shards["uneven"]), "bits": same_bits(shards["uneven"])}
    results["log"] = told(shards["uneven"])
    if size == 2:
        results |= {"refusals": refusals(rank), "traced": traced(shards["uneven"])}
    return results


def triton_checks(_rank: int, size: int) -> Results:
    """The kernels in Triton's interpreter."""
    from crpo_kernels import rows_triton

    rows_triton.BLOCK_V = 32  # several tiles a row
    shards, results = SHARDS[size]["uneven"], {"losses": {}}
    for name, case in TRITON.items():
        results["losses"][name] = loss_errors(case, shards, torch.float32)
    ways = {"backend": "triton", "workspace_bytes": 1 << 16, "num_rows": 13}
    results["logprobs"] = {
        "none": logprobs_errors(SHARDS[size]["none"], torch.float32, **ways),
    }
    return results


def main() -> int:
    out, is_triton = Path(sys.argv[1]), "triton" in sys.argv[2:]
    work = triton_checks if is_triton else checks
    return int(not all(run_group(size, out, work) for size in ((2,) if is_triton else (2, 3))))


if __name__ == "__main__":
    sys.exit(main())

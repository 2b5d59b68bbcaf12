"""Gate: the targets' table, and a sweep of launch options for tuning.

Every row has its share of the bare products measured in the same rounds. A peer that is not
installed or cannot run has the reason instead.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.clock import Clock, summary
from benchmarks.deadline import LATE
from benchmarks.losses.baselines import Candidate, fused
from benchmarks.losses.candidates import all_gradients, frozen_head, scoring
from benchmarks.losses.cases import Case, make_inputs
from benchmarks.losses.measure import measure, release
from benchmarks.losses.peers import score_peers
from benchmarks.machine import gpu_name, machine
from benchmarks.output import say
from crpo_kernels import plan

from .behaviour import needs_memory
from .report import Part
from .scale import Scale
from .scoring import sweep_tiles
from .targets import gpu_targets, target_state

PEAKED = (0.2, 3.5)  # nats, tenth and ninetieth percentile of the inputs' entropies
PEER_SECONDS = 90.0
NO_CLAIM = "rehearsal: interpreter, no timing claim"


def table(part: Part, scale: Scale) -> None:
    """Every shape with targets: all modes, plain torch, its compiler and the peers."""
    part.results["tables"] = []
    for number, (named, case) in enumerate(scale.tables):
        part.run(named.name, lambda n=named, c=case, i=number: one_table(part, scale, n, c, i))
        release(scale.device)


def one_table(part: Part, scale: Scale, named: Case, case: Case, number: int) -> None:
    """One shape; its targets are those of ``named``."""
    is_gpu = scale.device.type == "cuda"
    logits, weights = case.num_rows * case.vocab_size, case.vocab_size * case.dim
    needs_memory(scale, (8 * logits + 12 * weights) / 2**30 + 4)  # bare products and ours
    makers = [all_gradients, *([frozen_head, scoring] if number == 0 else [])]
    candidates = [c for make in makers for c in make("triton", has_fp32_out=is_gpu)]
    candidates += score_peers("cuda") if number == 0 else []
    if scale.is_rehearsal:
        candidates = [rehearsed(candidate) for candidate in candidates]
    candidates.sort(key=lambda c: 0 if c.is_floor or c.is_ours else 1 + c.needs.generates_code)
    clock = Clock(scale.device)
    until = part.begin + part.seconds
    found = measure(case, candidates, clock, scale.rounds, until=until, peer_seconds=PEER_SECONDS)
    rows = {row["key"]: row for row in found["rows"]}
    shape = (named.num_rows, named.vocab_size, named.dim)
    checks = gpu_targets(shape, rows, gpu_name(machine(scale.device)))
    if scale.is_rehearsal:
        checks = [{**check, "met": None, "note": NO_CLAIM} for check in checks]
        found["note"] = NO_CLAIM
        found["rows"] = [without_times(row) for row in found["rows"]]
    else:
        low, high = found["entropy_quantiles"]
        is_peaked = PEAKED[0] <= low and high <= PEAKED[1]
        part.holds(f"{named.name}: entropy as in sampled text", is_peaked, nats=[low, high])
    for row in found["rows"]:
        if "missing" in row:
            part.skip(f"{named.name}: {row['title']}", row["missing"])
        row["target"] = target_state(checks, row["key"])
    part.results["tables"].append({**found, "stands_for": named.name, "targets": checks})


def without_times(row: dict) -> dict:
    """A row of a rehearsal: what it says of time is not shown."""
    columns = ("warm", "cold", "floor_share", "tflops")
    return {**row, "lacks": {**row.get("lacks", {}), **dict.fromkeys(columns, NO_CLAIM)}}


def rehearsed(candidate: Candidate) -> Candidate:
    """A candidate for the rehearsal, which generates no code."""
    if not candidate.needs.generates_code:
        return candidate
    return replace(candidate, obstacle="not part of a rehearsal: it would compile for minutes")


def ceilings(part: Part, scale: Scale) -> None:
    """What this card does at its best: a large product; a large copy, bytes read and written."""
    clock, device = Clock(scale.device), scale.device
    size, elements = (128, 1 << 16) if scale.is_rehearsal else (8192, 1 << 29)
    kind = scale.tables[0][1].dtype
    a, b = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
    source = torch.randn(elements, device=device)
    target, out = torch.empty_like(source), torch.empty_like(a)
    steps = {
        "product_tflops": (lambda: torch.mm(a, b, out=out), 2e-12 * size**3),
        "copy_tb_per_s": (lambda: target.copy_(source), 8e-12 * elements),
    }
    for name, (step, amount) in steps.items():
        step()
        seconds = [clock.seconds(step) for _ in range(scale.rounds)]
        part.results[name] = amount / summary(seconds)["median"]
        say(f"{name}: {part.results[name]:.3g}" + f" ({NO_CLAIM})" * scale.is_rehearsal)
    if scale.is_rehearsal:
        part.results["note"] = NO_CLAIM


def sweep(part: Part, scale: Scale) -> None:
    """Launch options of the row kernels, rows of a chunk, tiles of scoring: data, no check."""
    part.results["launches"], part.results["chunks"] = [], []
    part.run("row kernels", lambda: sweep_launches(part, scale))
    for _, case in scale.tables[:: len(scale.tables) - 1]:
        part.run(f"chunk rows, {case.name}", lambda c=case: sweep_chunks(part, scale, c))
        release(scale.device)
    sweep_tiles(part, scale)
    if scale.is_rehearsal:
        part.results["note"] = NO_CLAIM


def sweep_launches(part: Part, scale: Scale) -> None:
    """Both row kernels on one chunk, as their launchers start them, with other tiles and warps."""
    from crpo_kernels.launch_triton import launch, recording

    case, clock = scale.tables[0][1], Clock(scale.device)
    inputs = make_inputs(case, device=scale.device)
    few = inputs.first(min(case.num_rows, plan.RING_ROWS))
    with recording() as launches:
        for mode in ("one_pass", "two_pass"):
            fused(mode, "triton")(few)
    chosen = {launch_name(one): one for one in reversed(launches) if "BLOCK_V" in one.arguments}
    blocks = (64, 256) if scale.is_rehearsal else (1024, 2048, 4096, 8192)
    for (name, one), block, warps in product(reversed(chosen.items()), blocks, (4, 8, 16)):
        if part.is_late():
            part.skip(f"{name}, BLOCK_V {block}, {warps} warps", LATE)
            continue
        arguments: dict[str, Any] = {**one.arguments, "BLOCK_V": block}
        arguments["raw_ptr"].normal_()  # row_stats, which comes first, fills the rest
        meta = {**one.meta, "num_warps": warps}

        def step(one: Any = one, arguments: Any = arguments, meta: Any = meta) -> None:
            launch(one.kernel, one.grid, arguments, **meta)

        step()
        seconds = summary([clock.seconds(step) for _ in range(scale.rounds)])
        buffers = [arguments.get(key) for key in ("raw_ptr", "d_raw_ptr", "exps_ptr")]
        item = sum(0 if buffer is None else buffer.element_size() for buffer in buffers)
        part.results["launches"].append(
            {
                "kernel": name,
                "BLOCK_V": block,
                **meta,
                "rows": one.grid[0],
                "vocab_size": case.vocab_size,
                "seconds": seconds,
                "tb_per_s": item * one.grid[0] * case.vocab_size / seconds["median"] / 1e12,
            }
        )


def launch_name(one: Any) -> str:
    """The kernel, with what it does for its policy."""
    arguments = one.arguments
    has_loss = arguments.get("POLICY") is not None
    return one.kernel.__name__ + " with loss" * has_loss + " of E" * bool(arguments.get("IS_EXP"))


def sweep_chunks(part: Part, scale: Scale, case: Case) -> None:
    """One pass with rings of other sizes."""
    clock, inputs = Clock(scale.device), make_inputs(case, device=scale.device)
    step = fused("one_pass", "triton")
    for ring in (4, 8) if scale.is_rehearsal else (256, 512, 1024, 2048, 4096):
        if part.is_late():
            part.skip(f"{case.name}, {ring} rows", LATE)
            continue
        with patch.multiple(plan, RING_ROWS=ring, GROUP_ROWS=2 * ring):
            step(inputs)
            seconds = summary([clock.seconds(lambda: step(inputs)) for _ in range(scale.rounds)])
        part.results["chunks"].append(
            {"case": case.name, "ring_rows": ring, "group_rows": 2 * ring, "seconds": seconds}
        )

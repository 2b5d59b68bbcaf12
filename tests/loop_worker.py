"""Started by torchrun from test_loop_ranks.py: the loop's cases at two ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from crpo_fast import distributed
from crpo_fast import policy as policies
from crpo_fast.batch import SamplingParams
from crpo_fast.distributed import World
from crpo_fast.rollout.static import StaticEngine
from crpo_fast.step import micro_batches
from crpo_fast.updates import run_updates
from entropy_cases import controlled
from layout_cases import make_model
from loop_cases import CASES, ROWS, collected, errors, guard_of, sequences_of, spec_of, whole


def not_finite(world: World, folder: Path) -> dict[str, Any]:
    """One rank's gradient is NaN: what becomes of weights, counts and files on every rank."""
    model = make_model(True, torch.float32)
    if world.rank == 1:
        model.lm_head.register_forward_hook(poison)
    policy = policies.create(model, world, compute_dtype=torch.float32)
    case = CASES[0]
    spec, guard = spec_of(case), guard_of(world, folder)
    before = {k: whole(v) for k, v in policy.model.named_parameters()}
    mine = sequences_of(case)[world.rank * 4 :][:4]
    packed = micro_batches(mine, spec, policy, token_budget=60, layout="packed", reference=policy)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1.0)
    options: dict[str, Any] = {"updates": 1, "max_grad_norm": 1.0, "guard": guard}
    metrics = run_updates(policy, optimizer, [packed], spec, **options, where="step_4")
    after = policy.model.named_parameters()
    return {
        "same": all(torch.equal(whole(v), before[k]) for k, v in after),
        "state": len(optimizer.state),
        "counts": [metrics["skipped"], metrics["skipped_total"], guard.in_a_row],
        "loss": str(metrics["loss"]),
    }


def poison(module: object, inputs: object, output: Any) -> Any:
    loss = output[0] if isinstance(output, tuple) else output
    if loss.requires_grad:
        loss.register_hook(lambda gradient: gradient * torch.nan)
    return output


def dynamic(world: World) -> dict[str, Any]:
    """Rank 0 is full after the first round; rank 1 needs further ones."""
    prompts, metrics, engine, _ = collected(
        ROWS,
        [0, 2, 1, 3],
        (world.rank, world.size),
        all_max=lambda value: distributed.all_max(value, world),
    )
    return {"prompts": prompts, "metrics": metrics, "calls": engine.calls}


def without_prompts(world: World) -> list[int]:
    """Generation gathers a sharded model: a rank without a prompt has to take part in it."""
    model = make_model(True, torch.float32)
    policy = policies.create(model, world, compute_dtype=torch.float32)
    engine = StaticEngine(policy.model, gathered=policy.gathered)
    engine.sync(policy.model, 0)
    prompts = [[[2, 3], [4]], []][world.rank]
    return [len(g.samples) for g in engine.generate(prompts, 2, SamplingParams(3, (1,)), 5)]


def main(out: Path) -> None:
    world = distributed.init(threads=1)
    results = {
        "updates": {case.name: errors(case, world, out.parent) for case in CASES},
        "not_finite": distributed.all_gather(not_finite(world, out.parent), world),
        "dynamic": distributed.all_gather(dynamic(world), world),
        "without_prompts": distributed.all_gather(without_prompts(world), world),
        "entropy": distributed.all_gather(controlled(world, out.parent), world),
    }
    if world.is_main:
        out.write_text(json.dumps(results))
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

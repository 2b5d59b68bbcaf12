"""A few steps under the dual controller on fixed sequences; the same at any number of ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from crpo_fast import policy as policies
from crpo_fast.controller import DualAscent, DualOptions, StageController
from crpo_fast.distributed import World
from crpo_fast.entropy_watch import EntropyWatch
from crpo_fast.loss import LossSpec
from crpo_fast.step import micro_batches
from crpo_fast.updates import run_updates
from crpo_kernels import ObjectiveSpec
from layout_cases import make_model, make_sequences
from loop_cases import guard_of

STEPS = 6


def controlled(world: World, folder: Path) -> dict[str, list[list[float]]]:
    """Coefficients and stage entropies of every step; the policy term is off."""
    dual = DualAscent(
        ["a", "b", "c"], [-0.5, 0.0, 0.5], DualOptions(bound=2.0, targets=(2.0, 2.05, 2.15))
    )
    watch = EntropyWatch(controller=StageController([-0.5, 0.0, 0.5], dual=dual))
    policy = policies.create(make_model(True, torch.float64), world, compute_dtype=torch.float64)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.2)
    sequences = [replace(s, advantage=0.0) for s in make_sequences()]
    share = len(sequences) // world.size
    mine = sequences[world.rank * share :][:share]
    found: dict[str, list[list[float]]] = {"coefs": [], "entropies": []}
    for step in range(STEPS):
        coefs = watch.coefs(step, ())
        spec = LossSpec(ObjectiveSpec(policy="clip"), "token_mean", coefs)
        metrics = run_updates(
            policy,
            optimizer,
            [micro_batches(mine, spec, policy, token_budget=60, layout="packed")],
            spec,
            updates=1,
            max_grad_norm=10.0,
            guard=guard_of(world, folder),
            where=f"step_{step + 1}",
        )
        watch.update(metrics, 3, step=step, at=step + 1)
        found["coefs"].append(list(coefs))
        found["entropies"].append([metrics[f"stage_entropy/{k}"] for k in range(3)])
    return found

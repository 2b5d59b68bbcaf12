"""One rank of the training step that `ranks` starts with torchrun; rank 0 writes JSON.

    torchrun --nproc_per_node 4 benchmarks/growth/rank_worker.py '{"out": "...", "ranks": [1, 2]}'

One start serves all numbers of ranks, the largest first: ranks that a smaller world does not need
end. Each world is a process group of its own, and a group of one for the sweep over group sizes.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from crpo_fast import policy as policies
from crpo_fast.distributed import World, all_gather, barrier
from crpo_fast.live_bytes import LiveBytes
from crpo_fast.loss import LossSpec
from crpo_fast.models_build import build_model
from crpo_fast.packing import Sequence
from crpo_fast.policy import Policy
from crpo_fast.step import accumulate, micro_batches, optimizer_step
from crpo_kernels import ObjectiveSpec, stage_entropy_weights

MODEL = {"hidden_size": 128, "num_layers": 2, "num_heads": 4, "intermediate_size": 256}
VOCAB, COEFS = 4096, (0.01, -0.01)
SPEC = LossSpec(ObjectiveSpec.preset("crpo", kl_coef=0.0), "token_mean", COEFS)


def sequences_of(prompts: int, group: int, prompt: int, completion: int) -> list[Sequence]:
    """Made-up rollouts, the same on every rank: ``group`` samples of each prompt."""
    draw = random.Random(0)
    made = []
    for _ in range(prompts):
        question = [draw.randrange(2, VOCAB) for _ in range(prompt)]
        for _ in range(group):
            ids = [draw.randrange(2, VOCAB) for _ in range(completion)]
            stages = [int(2 * i >= completion) for i in range(completion)]
            logprobs = [-8.3 - draw.random() / 10 for _ in ids]
            made.append(Sequence(question, ids, stages, logprobs, draw.gauss(0, 1)))
    return made


def new_policy(world: World, seed: int = 0) -> Policy:
    """The same tiny decoder on every rank, sharded."""
    model = build_model("llama", vocab_size=VOCAB, seed=seed, **MODEL)
    return policies.create(model, world, compute_dtype=torch.float32)


def step_of(policy: Policy, mine: list[Sequence], budget: int) -> Callable[[], float]:
    """A training step on this rank's sequences; returns the loss."""
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)  # every step is the same

    def step() -> float:
        batches = micro_batches(mine, SPEC, policy, token_budget=budget, layout="packed")
        return optimizer_step(policy, optimizer, batches, SPEC, max_grad_norm=1.0).loss

    return step


def timed(step: Callable[[], float], world: World, rounds: int) -> list[float]:
    """Seconds of steps that all ranks begin together and that end when the last one does."""
    step()
    found = []
    for _ in range(rounds):
        barrier()
        begin = time.perf_counter()
        step()
        barrier()
        found.append(time.perf_counter() - begin)
    return [max(times) for times in zip(*all_gather(found, world), strict=True)]


def peak_bytes(step: Callable[[], float], policy: Policy) -> int:
    """The most live tensor bytes of a step of this rank, its weights included."""
    counter = LiveBytes()
    counter.add([*policy.model.parameters(), *policy.model.buffers()], "weights, sharded")
    with counter:
        step()
    return counter.peak


def share(sequences: list[Sequence], world: World) -> list[Sequence]:
    """This rank's part: equally many, in order."""
    size = len(sequences) // world.size
    return sequences[world.rank * size :][:size]


def save_gradients(policy: Policy, mine: list[Sequence], budget: int, path: Path) -> float:
    """The whole gradient of one step into a file; returns the loss, the same on every rank."""
    policy.model.zero_grad()
    batches = micro_batches(mine, SPEC, policy, token_budget=budget, layout="packed")
    loss, _, _ = accumulate(policy, batches, SPEC)
    whole = {}
    for name, parameter in policy.model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, f"{name} takes part in the loss"
        full = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        whole[name] = full.contiguous().clone()
    if policy.world.is_main:
        save_file(whole, path)
    losses = all_gather(loss, policy.world)
    return sum(losses) / len(losses)


def scaling(world: World, task: dict[str, Any]) -> dict[str, Any]:
    """Strong scaling (the same batch for any number of ranks) and weak (the same for each rank)."""
    sizes = (task["prompt"], task["completion"])
    strong = sequences_of(task["prompts"], task["samples"], *sizes)
    weak = sequences_of(world.size, task["per_rank"], *sizes)
    policy = new_policy(world)
    found: dict[str, Any] = {"ranks": world.size}
    for name, everything in (("strong", strong), ("weak", weak)):
        mine = share(everything, world)
        step = step_of(policy, mine, task["budget"])
        seconds = timed(step, world, task["rounds"])
        peaks = all_gather(peak_bytes(step, policy), world)
        tokens = sum(len(s) for s in everything)
        found[name] = {"seconds": seconds, "peak_bytes": max(peaks), "tokens": tokens}
    file = Path(task["out"]) / f"gradients_{world.size}.safetensors"
    found["loss"] = save_gradients(policy, share(strong, world), task["budget"], file)
    return found


def groups(world: World, task: dict[str, Any]) -> list[dict[str, Any]]:
    """The training step and the stage weights with more samples a prompt; the rest stays."""
    policy, found = new_policy(world), []
    for size in task["group"]:
        sequences = sequences_of(2, size, task["prompt"], task["completion"])
        step = step_of(policy, sequences, task["budget"])
        found.append(
            {
                "group": size,
                "tokens": sum(len(s) for s in sequences),
                "seconds": timed(step, world, task["rounds"]),
                "peak_bytes": peak_bytes(step, policy),
                "stage_weights": stage_seconds(2 * 512 * size, task["rounds"]),
            }
        )
    return found


def stage_seconds(count: int, rounds: int, length: int = 64) -> list[float]:
    """Entropy weights of ``count`` completions of ``length`` tokens."""
    stage_ids = torch.arange(count * length) % length * len(COEFS) // length
    bounds = torch.arange(0, count * length + 1, length, dtype=torch.int32)
    found = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        stage_entropy_weights(stage_ids, bounds, torch.tensor(COEFS))
        found.append(time.perf_counter() - begin)
    return found[1:]


def main(text: str) -> None:
    """All worlds; rank 0 of each writes ``ranks_<size>.json``, the last one ``groups.json``."""
    task = json.loads(text)
    out, rank = Path(task["out"]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    for size in sorted(task["ranks"], reverse=True):
        if rank >= size:
            break
        store = dist.FileStore(str(out / f"store_{size}"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        world = World(rank, size, torch.device("cpu"), store)
        found = scaling(world, task)
        if rank == 0:
            (out / f"ranks_{size}.json").write_text(json.dumps(found), encoding="utf-8")
        barrier()
        dist.destroy_process_group()
    if rank == 0 and task["group"]:
        store = dist.FileStore(str(out / "store_group"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        found = groups(World(0, 1, torch.device("cpu"), store), task)
        (out / "groups.json").write_text(json.dumps(found), encoding="utf-8")
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])

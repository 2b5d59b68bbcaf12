"""Started by torchrun from test_layouts.py with a folder to write into; all checks of one world.

gradients   every case of the covering set in fp64 and fp32, against the dense reference
two_steps   a no-grad pass between backward and update must not leave stale weights behind
bf16        fp32 masters with bf16 compute: the gradients themselves, for the test to compare
runs        whole runs of train.py (layout_run.py): their metrics.jsonl
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

import layout_run
from crpo_fast import distributed
from crpo_fast import policy as policies
from crpo_fast.distributed import World
from crpo_fast.packing import MicroBatch, Sequence
from crpo_fast.policy import Policy
from crpo_fast.step import accumulate, micro_batches, optimizer_step
from layout_cases import SHARES, TEMPERATURE, Case, covering_set, make_model, old_logprobs, split
from layout_reference import dense, expect

DTYPES = {"float64": torch.float64, "float32": torch.float32}
BASE = Case("bnpo", "clip", "sequence_mean", "k3", True, "packed", False, False, "whole", "even")


def make_policy(case: Case, world: World, dtype: torch.dtype, compute: torch.dtype) -> Policy:
    return policies.create(
        make_model(case.tied, dtype),
        world,
        compute_dtype=compute,
        activation_checkpointing=case.checkpointing,
        freeze_head=case.frozen_head,
    )


def make_reference(case: Case, world: World, dtype: torch.dtype) -> Policy | None:
    if case.kl == "none":
        return None
    model = make_model(case.tied, dtype, seed=2)
    return policies.create(model, world, compute_dtype=dtype, trainable=False)


def make_batches(
    case: Case, policy: Policy, reference: Policy | None, sequences: list[Sequence] | None = None
) -> list[MicroBatch]:
    """This rank's micro-batches, with old logprobs where the case has them."""
    world = policy.world
    everything = case.sequences() if sequences is None else sequences
    counts = SHARES[case.shares][world.size]
    mine = split(everything, counts)[world.rank]
    batches = micro_batches(
        mine,
        case.spec,
        policy,
        token_budget=case.token_budget(world.size),
        layout=case.layout,
        reference=reference,
    )
    if not case.objective.endswith("_old"):
        return batches
    old = split(old_logprobs(everything), counts)[world.rank]
    flat = torch.tensor([x for xs in old for x in xs], dtype=batches[0].vectors["advantages"].dtype)
    return [b.with_vectors(old_logprobs=flat[b.source]) for b in batches]


def whole(tensor: Tensor) -> Tensor:
    """A collective where ``tensor`` is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def grads_of(policy: Policy) -> dict[str, Tensor]:
    """Whole gradients by name. A collective."""
    named = list(policy.model.named_parameters())
    return {name: whole(p.grad).clone() for name, p in named if p.grad is not None}


def worst(grads: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Largest max |error| / max |gradient| of a tensor, and its name."""
    assert grads.keys() == expected.keys(), grads.keys() ^ expected.keys()
    errors = {}
    for name, want in expected.items():
        assert want.abs().max() > 0, f"{name}: a gradient of zero shows nothing"
        errors[name] = float((grads[name] - want).abs().max() / want.abs().max())
    name = max(errors, key=errors.__getitem__)
    return errors[name], name


def one_case(case: Case, world: World, name: str) -> dict[str, Any]:
    """One real optimizer step with learning rate 0; rank 0 has the dense reference beside it."""
    dtype = DTYPES[name]
    policy = make_policy(case, world, dtype, dtype)
    batches = make_batches(case, policy, make_reference(case, world, dtype))
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0)
    grads: dict[str, Tensor] = {}  # seen just before the update, which drops them
    optimizer.register_step_pre_hook(lambda *_: grads.update(grads_of(policy)))
    update = optimizer_step(policy, optimizer, batches, case.spec, max_grad_norm=1e9)
    rows = distributed.all_gather([b.labels.numel() for b in batches], world)
    result: dict[str, Any] = {"dtype": name, "metrics": update.metrics(), "rows": rows}
    if world.is_main:
        plain, frozen = make_model(case.tied, dtype), make_model(case.tied, dtype, seed=2)
        expected = expect(case, plain, frozen, old_logprobs(case.sequences()))
        result["error"], result["tensor"] = worst(grads, expected.grads)
        result["expected"] = expected.metrics
    return result


def gradients(world: World) -> list[dict[str, Any]]:
    """Every case in both dtypes."""
    cases = list(enumerate(covering_set()))
    return [{"case": i, **one_case(case, world, n)} for i, case in cases for n in DTYPES]


def two_steps(world: World, case: Case) -> dict[str, float]:
    """Backward, a pass without gradients, an update, and the gradients at the new weights."""
    policy = make_policy(case, world, torch.float64, torch.float64)
    batches = make_batches(case, policy, None)
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    plain = make_model(case.tied, torch.float64)
    before = logprob_error(policy, batches, plain, case)  # nothing was updated yet
    accumulate(policy, batches, case.spec)
    logprob_error(policy, batches, plain, case)
    optimizer.step()
    optimizer.zero_grad()
    accumulate(policy, batches, case.spec)
    grads, error = grads_of(policy), 0.0
    state = distributed.model_state(policy.model)  # before the forward it would drop stale weights
    if world.is_main:
        plain.load_state_dict(state)
        error, _ = worst(grads, expect(case, plain, plain, old_logprobs(case.sequences())).grads)
    return {"logprobs": before, "gradient": error}


def logprob_error(
    policy: Policy, batches: list[MicroBatch], plain: torch.nn.Module, case: Case
) -> float:
    """Largest difference of ``Policy.logprobs`` from the plain model's, in nats."""
    mine = split(case.sequences(), SHARES[case.shares][policy.world.size])[policy.world.rank]
    with torch.no_grad():
        parts = [dense(plain, s)[0] for s in mine if s.completion_ids]
    want = torch.cat([torch.zeros(0, dtype=torch.float64), *parts])
    got = torch.full_like(want, torch.nan)
    for batch in batches:
        got[batch.source] = policy.logprobs(batch, TEMPERATURE)
    return float((got - want).abs().max()) if len(want) else 0.0


def bf16(world: World, out: Path) -> None:
    """Gradients with one sequence a micro-batch; at one rank also those of each micro-batch."""
    for name, count in (("two", 2), ("eight", 8)):
        for tied in (True, False):
            case = replace(BASE, tied=tied, shares=name, micro_batches=8)
            save_bf16(world, case, case.sequences()[:count], out / f"bf16_{name}_{tied}")


def save_bf16(world: World, case: Case, sequences: list[Sequence], out: Path) -> None:
    reference = make_reference(case, world, torch.bfloat16)
    policy = make_policy(case, world, torch.float32, torch.bfloat16)
    batches = make_batches(case, policy, reference, sequences)
    metrics = distributed.all_gather(accumulate(policy, batches, case.spec)[0], world)
    grads = grads_of(policy)
    assert all(g.dtype == torch.float32 for g in grads.values())
    if world.is_main:
        save_file(grads, out.with_suffix(".safetensors"))
        out.with_suffix(".json").write_text(json.dumps(sum(metrics) / world.size))
    if world.size > 1:
        return
    assert len(batches) == len(sequences)  # each is a micro-batch of its own at every world size
    for i, batch in enumerate(batches):
        policy.model.zero_grad(set_to_none=True)
        accumulate(policy, [batch], case.spec)
        save_file(grads_of(policy), out.with_name(f"{out.name}_part{i}.safetensors"))


def main() -> None:
    world, out = distributed.init(threads=1), Path(sys.argv[1])
    start = time.monotonic()
    results: dict[str, Any] = {"gradients": gradients(world)}
    base = replace(BASE, kl="none", shares="skewed")
    results["two_steps"] = [
        two_steps(world, replace(base, tied=tied, checkpointing=not tied, layout=layout))
        for tied, layout in ((True, "packed"), (False, "shared"))
    ]
    bf16(world, out)
    if world.is_main:
        (out / "results.json").write_text(json.dumps(results), encoding="utf-8")
    layout_run.main(world, out)
    print(f"{time.monotonic() - start:.0f} s")
    distributed.shutdown()


if __name__ == "__main__":
    main()

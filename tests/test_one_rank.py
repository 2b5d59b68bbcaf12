"""One rank alone: nothing is copied for sharding that is not there, and no weight is stale."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from crpo_fast import distributed
from crpo_fast import policy as policies
from crpo_fast.distributed import World
from crpo_fast.loss import LossSpec
from crpo_fast.step import micro_batches, optimizer_step
from crpo_kernels import ObjectiveSpec
from layout_cases import make_model, make_sequences

SPEC = LossSpec(ObjectiveSpec.preset("dapo"), "token_mean", stage_coefs=(0.0,) * 3)


@pytest.fixture
def alone() -> Iterator[World]:
    yield distributed.init(threads=1)
    distributed.shutdown()


def make(world: World, dtype: torch.dtype, *, tied: bool) -> tuple[policies.Policy, list[Any]]:
    policy = policies.create(make_model(tied, torch.float32), world, compute_dtype=dtype)
    batches = micro_batches(make_sequences(), SPEC, policy, token_budget=30, layout="packed")
    assert len(batches) >= 3
    return policy, batches


def update(policy: policies.Policy, batches: list[Any], steps: int) -> None:
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.5)
    for _ in range(steps):
        assert optimizer_step(policy, optimizer, batches, SPEC, max_grad_norm=1.0).is_finite


def test_without_a_cast_there_is_no_sharding(alone: World) -> None:
    policy, batches = make(alone, torch.float32, tied=True)
    assert not any(isinstance(module, FSDPModule) for module in policy.model.modules())
    before = policy.logprobs(batches[0], 1.0)
    update(policy, batches, 1)
    after = policy.logprobs(batches[0], 1.0)
    assert (after - before).abs().max() > 1e-3
    with policy.gathered() as model:
        assert model is policy.model


@pytest.mark.parametrize("tied", [True, False])
def test_each_weight_is_cast_once_a_step_and_is_never_stale(
    tied: bool, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    plain = FSDPParamGroup._to_unsharded

    def counted(self: Any) -> None:
        calls.append(self)
        plain(self)

    policy, batches = make(alone, torch.bfloat16, tied=tied)
    update(policy, batches, 1)
    monkeypatch.setattr(FSDPParamGroup, "_to_unsharded", counted)
    update(policy, batches, 2)
    # two blocks and the root; untied: embedding, two blocks, norm and head
    assert len(set(map(id, calls))) == (3 if tied else 4)
    assert len(calls) == 2 * len(set(map(id, calls)))  # two steps, every unit once in each
    monkeypatch.undo()

    state = {name: p.full_tensor() for name, p in policy.model.named_parameters()}
    fresh, _ = make(alone, torch.bfloat16, tied=tied)
    with torch.no_grad():
        for name, parameter in fresh.model.named_parameters():
            parameter.to_local().copy_(state[name])
    for batch in batches:
        assert torch.equal(policy.logprobs(batch, 1.0), fresh.logprobs(batch, 1.0))


def test_a_group_of_one_leaves_the_environment_as_it_was() -> None:
    """Otherwise accelerate, asked later in this process, would join a group that is not there."""
    before = dict(os.environ)
    world = distributed.init(threads=1)
    distributed.shutdown()
    assert (world.rank, world.size) == (0, 1)
    assert dict(os.environ) == before

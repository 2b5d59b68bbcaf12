"""Processes, collectives, FSDP2: the trainer's only file that says mesh, FSDP or process group.

The patterns here were measured to be exact (tied and untied heads, gloo and NCCL); the comments say
which neighbours of them are silently wrong.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from crpo_fast.config import ConfigError
from crpo_fast.timing import exchange

BackendError = dist.DistError  # of a store or a collective of NCCL; gloo raises RuntimeError


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device
    store: Any = None  # shared by all ranks

    @property
    def is_main(self) -> bool:
        """Rank 0 writes files and talks to people."""
        return self.rank == 0


def init(threads: int = 0, timeout: float = 1800.0) -> World:
    """Join the process group that torchrun describes; without torchrun, a group of one.

    Args:
        threads: CPU threads of this process; 0 divides the cores by the ranks of this machine
            (torchrun alone would leave several ranks with one thread each).
        timeout: seconds that a collective waits for the other ranks.

    Raises:
        ConfigError: more ranks than GPUs on this machine.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of this machine
    if torch.cuda.is_available():
        _check_devices(ranks, torch.cuda.device_count())
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        _keep_freed_memory()
        torch.set_num_threads(threads or max(1, num_cores() // ranks))
    limit = timedelta(seconds=timeout)
    if "RANK" in os.environ and "MASTER_PORT" in os.environ:
        store, rank, size = next(dist.rendezvous("env://", timeout=limit))
    else:
        store, rank, size = dist.HashStore(), 0, 1
    store.set_timeout(limit)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    return World(rank, size, device, store)


def _check_devices(ranks: int, count: int) -> None:
    """NCCL wants a GPU of its own for every rank of this machine."""
    if ranks > count:
        raise ConfigError(
            f"--nproc_per_node: expected at most {count}, the GPUs of this machine, got {ranks}. "
            f"Type torchrun --nproc_per_node {count}, or CUDA_VISIBLE_DEVICES= before torchrun for "
            "ranks on the CPU."
        )


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _keep_freed_memory() -> None:
    """Let glibc reuse freed buffers of up to 32 MiB instead of giving them back to the kernel.

    Otherwise every large activation costs page faults again (docs/log.md).
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 32 * 2**20)
    libc.mallopt(trim_threshold, 2**31 - 1)


def shutdown(*, together: bool = True) -> None:
    """Leave the process group.

    Args:
        together: wait for the others first; without that some ranks abort at exit while others
            still talk. False after an error that the others may not share.
    """
    if dist.is_initialized():
        if together:
            barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def pretended(size: int) -> Iterator[World]:
    """A group of ``size`` ranks of which only this one exists: collectives move no data.

    For planning: sharding, and what a rank allocates, are as in a real group.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield World(0, size, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def all_sum(values: Tensor) -> Tensor:
    """Sum of ``values`` over ranks (a new tensor)."""
    total = values.clone()
    with exchange():
        dist.all_reduce(total)
    return total


def all_max(value: int, world: World) -> int:
    """Largest ``value`` of any rank."""
    tensor = torch.tensor(value, device=world.device)
    with exchange():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def largest(values: dict[str, float], world: World) -> dict[str, float]:
    """By name the largest value of any rank; every rank must hold the same names."""
    tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=world.device)
    with exchange():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return dict(zip(values, tensor.tolist(), strict=True))


def all_gather(value: Any, world: World) -> list[Any]:
    """The picklable ``value`` of every rank, in rank order (trusted peers of one run only)."""
    values: list[Any] = [None] * world.size
    with exchange():
        dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for all ranks."""
    with exchange():
        dist.barrier()


@contextlib.contextmanager
def main_first(world: World) -> Iterator[None]:
    """Rank 0 runs the block (and writes files), then the others do (and find them)."""
    if not world.is_main:
        barrier()
    yield
    if world.is_main:
        barrier()


def shard(
    model: Any, world: World, *, methods: tuple[str, ...], compute_dtype: torch.dtype
) -> None:
    """FSDP2 in place: a unit per block, the head, the root; activations in ``compute_dtype``.

    The masters keep the dtype that ``model`` has (fp32).

    An untied head is one unit with the final norm and keeps its weights after forward; a tied head
    stays in the root unit with the embedding. ``methods`` are forwards besides ``forward`` that
    must unshard the root.

    A rank alone that computes in the masters' dtype stays as it is: FSDP would copy every weight
    in every forward and backward, and every gradient, for nothing. One that casts keeps what it
    has cast until the step's last backward: to drop it would only mean to cast again.
    """
    params = next(model.parameters())
    if world.size == 1 and compute_dtype == params.dtype:
        return
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy()
    if compute_dtype != params.dtype:
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=params.dtype)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    reshards = world.size > 1
    for block in _blocks(model.base_model):
        _unit(block, reshards, mesh=mesh, mp_policy=policy)
    if head.weight is not embedding.weight:
        _unit(embedding, reshards, mesh=mesh, mp_policy=policy)
        last = [*_final_norm(model.base_model), head]
        fully_shard(last, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        for module in last:
            module._crpo_reshard = False
    _unit(model, False, mesh=mesh, mp_policy=policy)
    for method in methods:
        register_fsdp_forward_method(model, method)


def _blocks(decoder: nn.Module) -> nn.ModuleList:
    """The decoder's list of blocks, whatever its name is."""
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    if not lists:
        raise ConfigError(
            f"model: expected a list of blocks to shard, got {type(decoder).__name__} without "
            "one. Train it on one rank in its own dtype: --model.compute_dtype float32."
        )
    return max(lists, key=len)


def _final_norm(decoder: Any) -> list[Any]:
    """The norm before the head, as architectures call it; without one the root holds it."""
    names = ("norm", "final_layernorm", "final_layer_norm", "ln_f")
    return [getattr(decoder, name) for name in names if hasattr(decoder, name)]


def _unit(module: Any, reshard: bool, **kwargs: Any) -> None:
    fully_shard(module, reshard_after_forward=reshard, **kwargs)
    module._crpo_reshard = reshard


def _units(model: nn.Module) -> list[Any]:  # FSDPModules with the mark of ``_unit``
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Drop unsharded weights; needed after every no-grad pass.

    A unit that keeps its weights after forward would otherwise serve those from before the next
    optimizer step, silently.
    """
    for unit in _units(model):
        unit.reshard()


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[nn.Module]:
    """All weights unsharded and in the compute dtype.

    Inside, ranks may make different numbers of forwards.
    """
    units = _units(model)
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield model
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit._crpo_reshard, recurse=False)
            unit.reshard()


def set_gradient_sync(model: nn.Module, on: bool) -> None:
    """Reduce gradients in the next backward (on the last micro-batch only).

    One rank alone also keeps its cast weights for the next micro-batch until then.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)
        if dist.get_world_size() == 1:
            model.set_reshard_after_backward(on)


def wait_for_device(world: World) -> None:
    """Wait until the device has done what it was given, so that times are of what took them."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def clip_grad_norm(model: nn.Module, max_norm: float) -> float:
    """Clip in place; returns the global L2 norm before clipping.

    Where it is not finite the gradients stay as they are, to be looked at.
    """
    parameters = list(model.parameters())
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if math.isfinite(value):
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return value


_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
_LOAD = StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)


def model_state(model: nn.Module, *, trained_only: bool = False) -> dict[str, Tensor]:
    """Whole, unsharded weights on the CPU of rank 0 (empty on the others). A collective."""
    options = dataclasses.replace(_FULL, ignore_frozen_params=trained_only)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return state


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Whole optimizer state on the CPU of rank 0 (empty on the others). A collective."""
    if not optimizer.state:  # before the first update; torch would do one with zero gradients
        names = {parameter: name for name, parameter in model.named_parameters()}
        own = optimizer.param_groups
        groups = [{**group, "params": [names[p] for p in group["params"]]} for group in own]
        return {"state": {}, "param_groups": groups}
    return get_optimizer_state_dict(model, optimizer, options=_FULL)


def load_model_state(model: nn.Module, state: dict[str, Any], *, strict: bool = True) -> None:
    """Every rank passes the whole state (not ``strict``: a part) and keeps its shard."""
    set_model_state_dict(model, state, options=dataclasses.replace(_LOAD, strict=strict))


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Every rank passes the whole state and keeps its shard."""
    set_optimizer_state_dict(model, optimizer, state, options=_LOAD)

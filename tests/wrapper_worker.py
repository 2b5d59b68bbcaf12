"""Started by torchrun from test_wrappers.py with a file to write: every wrapper on two ranks.

Each case takes one SGD step of rate 1 with the fused loss on this rank's half of the batch; what
the parameters lost is the gradient, whatever the wrapper keeps of it.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from crpo_fast.integrations.causal_lm import add_fused_head
from crpo_kernels import linear_logprobs
from wrapper_cases import (
    fused_loss,
    largest_error,
    make_batch,
    make_model,
    part,
    plain_loss,
    step,
    trained,
    trained_by_trainer,
)

RANKS = 2
CASES: dict[str, Callable[[], dict[str, float]]] = {}


def case(function: Callable[[], dict[str, float]]) -> Callable[[], dict[str, float]]:
    """Register a case under its name."""
    CASES[function.__name__] = function
    return function


def mine(index: int = 0, count: int = 1) -> dict[str, Tensor]:
    """This rank's half of the batch, or one of ``count`` parts of it."""
    half = part(make_batch(), dist.get_rank(), RANKS, times=RANKS)
    return part(half, index, count)


def compare(
    wrap: Callable[[Any], Any], *, tied: bool = False, parts: int = 1, layers: int = 2
) -> dict[str, float]:
    """Losses and gradients of the wrapped model against those from all logits of one process."""
    plain, model = make_model(tied, layers=layers), make_model(tied, layers=layers)
    truth_loss = plain_loss(plain, make_batch())
    truth = step(plain, truth_loss)
    before = trained(model)
    wrapped = wrap(add_fused_head(model))
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1.0)
    total = torch.zeros((), dtype=torch.float64)
    for index in range(parts):
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.require_backward_grad_sync = index == parts - 1  # as no_sync does
        loss = fused_loss(wrapped, mine(index, parts))
        loss.backward()
        total += loss.detach() / RANKS
    optimizer.step()
    dist.all_reduce(total)
    after = get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True))
    lost = {name: value - after[name] for name, value in before.items()}
    loss_error = abs(float(total / truth_loss.detach()) - 1)
    return {"loss": loss_error, "gradients": largest_error(lost, truth)}


@case
def ddp() -> dict[str, float]:
    return compare(DistributedDataParallel)


@case
def ddp_tied() -> dict[str, float]:
    return compare(DistributedDataParallel, tied=True)


@case
def ddp_accumulated() -> dict[str, float]:
    return compare(DistributedDataParallel, parts=2)


@case
def ddp_compiled() -> dict[str, float]:
    def wrap(model: Any) -> Any:
        return DistributedDataParallel(torch.compile(model, fullgraph=True, backend="eager"))

    return compare(wrap, layers=1)


def fsdp1(model: nn.Module, units: set[type[nn.Module]], original: bool = True) -> nn.Module:
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy(units) if units else None,
        use_orig_params=original,
        device_id=torch.device("cpu"),
    )


@case
def fsdp1_flat() -> dict[str, float]:
    return compare(functools.partial(fsdp1, units=set(), original=False))


@case
def fsdp1_blocks_tied() -> dict[str, float]:
    return compare(functools.partial(fsdp1, units={LlamaDecoderLayer}), tied=True)


@case
def fsdp1_a_unit_of_a_tied_embedding_is_refused() -> dict[str, float]:
    try:
        compare(functools.partial(fsdp1, units={nn.Embedding}), tied=True)
    except ValueError as error:
        return {"named": 1.0 - ("tied" in str(error) and "blocks alone" in str(error))}
    return {"named": 1.0}


@case
def fsdp1_a_unit_of_the_head() -> dict[str, float]:
    return compare(functools.partial(fsdp1, units={LlamaDecoderLayer, nn.Linear}, original=False))


def fsdp2(model: Any, head: bool = False, checkpointing: bool = False) -> Any:
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    if head:
        fully_shard(model.lm_head, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@case
def fsdp2_blocks_tied() -> dict[str, float]:
    return compare(fsdp2, tied=True)


@case
def fsdp2_a_unit_of_the_head() -> dict[str, float]:
    return compare(functools.partial(fsdp2, head=True))


@case
def fsdp2_checkpointed() -> dict[str, float]:
    return compare(functools.partial(fsdp2, checkpointing=True))


@case
def fsdp2_accumulated() -> dict[str, float]:
    return compare(functools.partial(fsdp2, head=True), parts=2)


@case
def fsdp2_keeps_the_vectors_in_fp32() -> dict[str, float]:
    """A policy that casts floats to bf16 finds none among the arguments."""
    mesh = init_device_mesh("cpu", (RANKS,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = fully_shard(
        add_fused_head(make_model(dtype=torch.float32)), mesh=mesh, mp_policy=policy
    )
    batch = part(make_batch(torch.float32), dist.get_rank(), RANKS)
    seen = {}

    def look(hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
        seen["cast"] = float(hidden.dtype == weight.dtype == torch.bfloat16)
        seen["vectors"] = float(batch["token_weights"].dtype == torch.float32)
        return linear_logprobs(hidden, weight, batch["labels"], **options).logprobs.sum()

    model(batch["input_ids"], attention_mask=batch["attention_mask"], head=look).backward()
    return {"loss": 1.0 - seen["cast"], "gradients": 1.0 - seen["vectors"]}


@case
def fsdp2_a_weight_from_outside_is_refused() -> dict[str, float]:
    model = fsdp2(add_fused_head(make_model()))
    hidden = torch.zeros(12, 16, dtype=torch.float64)
    try:
        linear_logprobs(hidden, model.lm_head.weight, torch.zeros(12, dtype=torch.long))
    except ValueError as error:
        is_named = "DTensor" in str(error) and "full_tensor" in str(error)
        return {"loss": 0.0, "gradients": 1.0 - is_named}
    return {"loss": 1.0, "gradients": 1.0}


def adapted(model: Any) -> Any:
    """The same adapters each time, on blocks and head, and a whole copy of the last norm."""
    peft = importlib.import_module("peft")
    made = peft.LoraConfig(
        r=2, target_modules=["q_proj", "lm_head"], modules_to_save=["norm"], init_lora_weights=False
    )
    torch.manual_seed(3)
    return peft.get_peft_model(model, made).double()


def compare_adapted(wrap: Callable[[Any], Any]) -> dict[str, float]:
    plain, model = adapted(make_model()), adapted(add_fused_head(make_model()))
    truth = step(plain, plain_loss(plain, make_batch()))
    wrapped = wrap(model)  # DDP must live until the backward
    found = step(model, fused_loss(wrapped, mine()))
    whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}
    return {"gradients": largest_error(whole, truth)}


@case
def ddp_peft() -> dict[str, float]:
    return compare_adapted(DistributedDataParallel)


@case
def fsdp2_peft() -> dict[str, float]:
    return compare_adapted(lambda model: fully_shard(fsdp2(model.get_base_model()) and model))


@case
def fsdp2_a_unit_of_an_adapted_head_is_refused_peft() -> dict[str, float]:
    model = adapted(add_fused_head(make_model()))
    try:
        fused_loss(fsdp2(model.get_base_model(), head=True) and model, mine())
    except ValueError as error:
        return {"named": 1.0 - ("adapter" in str(error) and "not the head" in str(error))}
    return {"named": 1.0}


@case
def trainer() -> dict[str, float]:
    """transformers' Trainer on two ranks, two micro-batches a step, DDP around the model."""
    plain, batch = make_model(), make_batch()
    truth = step(plain, plain_loss(plain, batch))
    with tempfile.TemporaryDirectory() as folder:
        lost = trained_by_trainer(
            batch,
            folder,
            RANKS,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            ddp_backend="gloo",
        )
    return {"gradients": largest_error(lost, truth)}


def deepspeed(stage: int) -> dict[str, float]:
    """Two micro-batches, in fp32, as ZeRO has no fp64."""
    import deepspeed
    from deepspeed.ops import __compatible_ops__
    from deepspeed.utils import safe_get_full_grad

    __compatible_ops__["deepspeed_shm_comm"] = False  # 30 s of C++ for two ranks of one test
    plain, model = make_model(dtype=torch.float32), make_model(dtype=torch.float32)
    truth_loss = plain_loss(plain, make_batch(torch.float32))
    truth = step(plain, truth_loss)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(
        model=add_fused_head(model), optimizer=optimizer, config=config
    )
    half = part(make_batch(torch.float32), dist.get_rank(), RANKS, times=RANKS)
    total = torch.zeros(())
    for index in range(2):
        loss = fused_loss(engine, part(half, index, 2))
        engine.backward(loss, scale_wrt_gas=False)
        total += loss.detach() / RANKS
        if index == 0:
            engine.step()
    found = {name: safe_get_full_grad(p) for name, p in model.named_parameters()}
    dist.all_reduce(total)
    loss_error = abs(float(total / truth_loss.detach()) - 1)
    return {"loss": loss_error, "gradients": largest_error(found, truth)}


@case
def deepspeed_zero2() -> dict[str, float]:
    return deepspeed(stage=2)


@case
def deepspeed_zero3() -> dict[str, float]:
    return deepspeed(stage=3)


def why_not(name: str) -> str | None:
    """Why a case cannot run here."""
    needed = next((package for package in ("deepspeed", "peft") if package in name), None)
    is_missing = needed is not None and importlib.util.find_spec(needed) is None
    return f"{needed} is not installed" if is_missing else None


def main(out: Path, names: list[str]) -> None:
    """Run the cases, or those that are named, and write their errors."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for name, function in CASES.items():
        if names and name not in names:
            continue
        found[name] = why_not(name) or function()
        torch._dynamo.reset()
        dist.barrier()
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

"""LoRA beside what it must equal: a plain peft model with all its logits, no packing, no FSDP.

As a script (torchrun): `measure` at any number of ranks, into the file that is named.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crpo_fast import checkpoint, distributed, lora
from crpo_fast import policy as policies
from crpo_fast.checkpoint import Progress
from crpo_fast.config import LoraConfig, OptimConfig
from crpo_fast.distributed import World
from crpo_fast.loss import LossSpec
from crpo_fast.optim import build_optimizer
from crpo_fast.packing import Sequence
from crpo_fast.step import accumulate, micro_batches
from crpo_kernels import ObjectiveSpec
from layout_cases import COEFS, TEMPERATURE, make_model, make_sequences
from loop_cases import whole

KL = 0.3
SETTINGS = LoraConfig(rank=3, alpha=6.0, targets=("q_proj", "down_proj"), head=True)  # 3: uneven
SPEC = LossSpec(
    ObjectiveSpec.preset("dapo", kl_coef=KL), "token_mean", COEFS, temperature=TEMPERATURE
)
OPTIM = OptimConfig(lr=0.05)


def sequences() -> list[Sequence]:
    return make_sequences()[:6]


def fill(model: Any, seed: int = 5) -> None:
    """B away from 0, the same numbers for every model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.4 * drawn)


def adapted(tied: bool, dtype: torch.dtype = torch.float64, settings: Any = SETTINGS) -> Any:
    model = make_model(tied, dtype)
    lora.attach(model, settings, seed=1)
    fill(model)
    return model


def peft_model(tied: bool, weights: dict[str, Tensor]) -> Any:
    """As somebody with peft alone makes it, with these adapters."""
    import peft

    made = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "down_proj", "lm_head"], lora_dropout=0.0
    )
    model = peft.get_peft_model(make_model(tied, torch.float64), made)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            own[f"base_model.model.{name}"].copy_(value)
    return model


def dense_loss(model: Any) -> Tensor:
    """The loss of all sequences from their logits; the reference is the base model."""
    parts, batch = [], sequences()
    count = sum(len(s.completion_ids) for s in batch)
    for sequence in batch:
        with torch.no_grad(), model.disable_adapter():
            ref, _ = _logprobs(model, sequence)
        logp, entropy = _logprobs(model, sequence)
        kl = torch.exp(ref - logp) - 1 - (ref - logp)
        ratio = torch.exp(logp - logp.detach())
        parts.append((-ratio * sequence.advantage + KL * kl).sum() / count)
        stages = torch.tensor(sequence.stage_ids)
        for k, coef in enumerate(COEFS):
            if (stages == k).any():
                parts.append(coef / len(batch) * entropy[stages == k].mean())
    return torch.stack(parts).sum()


def _logprobs(model: Any, sequence: Sequence) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([*sequence.prompt_ids, *sequence.completion_ids])
    logits = model(input_ids=ids[None], use_cache=False).logits[
        0, len(sequence.prompt_ids) - 1 : -1
    ]
    log_p = (logits / TEMPERATURE).log_softmax(-1)
    chosen = log_p.gather(1, torch.tensor(sequence.completion_ids)[:, None])[:, 0]
    return chosen, -(log_p.exp() * log_p).sum(-1)


def shares(world: World) -> list[Sequence]:
    """Unevenly: rank 0 has all but two of them."""
    batch = sequences()
    return batch if world.size == 1 else [batch[:-2], batch[-2:]][world.rank]


def measure(world: World, tied: bool, folder: Path) -> dict[str, Any]:
    """Gradients, an update, a checkpoint and its way back; errors as max |difference| / max."""
    options: dict[str, Any] = {"activation_checkpointing": not tied}
    policy = policies.create(adapted(tied), world, compute_dtype=torch.float64, **options)
    before = {k: whole(v) for k, v in policy.model.named_parameters() if ".lora_" in k}
    plain = peft_model(tied, before)
    dense_loss(plain).backward()
    reference = policies.BasePolicy(**vars(policy))
    batches = micro_batches(
        shares(world), SPEC, policy, token_budget=60, layout="packed", reference=reference
    )
    optimizer = build_optimizer(policy.model, OPTIM)
    accumulate(policy, batches, SPEC)
    expected = {
        k.removeprefix("base_model.model."): p.grad
        for k, p in plain.named_parameters()
        if p.grad is not None
    }
    found = {k: whole(p.grad) for k, p in policy.model.named_parameters() if p.grad is not None}
    optimizer.step()
    after = {k: whole(v) for k, v in policy.model.named_parameters()}
    path = checkpoint.save(folder, policy.model, optimizer, Progress(step=1), world)
    again = make_model(tied, torch.float64)
    lora.attach(again, SETTINGS, seed=99)
    other = policies.create(again, world, compute_dtype=torch.float64)
    loaded = build_optimizer(other.model, OPTIM)
    checkpoint.load_model(path, other.model)
    checkpoint.load_optimizer(path, other.model, loaded)
    states = [{k: whole(v) for k, v in s.items()} for s in loaded.state.values()]
    kept = [{k: whole(v) for k, v in s.items()} for s in optimizer.state.values()]
    weights = distributed.model_state(policy.model)  # whole ones, on rank 0 alone
    return {
        "names": sorted(found) == sorted(expected) == sorted(before),
        "gradients": max(_error(found[k], expected[k]) for k in expected),
        "smallest": min(float(expected[k].abs().max()) for k in expected),
        "loaded": all(torch.equal(whole(v), after[k]) for k, v in other.model.named_parameters()),
        "state": all(torch.equal(a[k], b[k]) for a, b in zip(states, kept, strict=True) for k in b),
        "trained": len(states) == len(before),
        "merged": _merged_error(policy.model, weights, tied) if world.is_main else 0.0,
    }


def _merged_error(model: Any, weights: dict[str, Tensor], tied: bool) -> float:
    """Logits of the merged plain model against those of peft's."""
    plain = lora.plain_model(model).to_empty(device="cpu")
    state = lora.merged(weights, SETTINGS)
    rotary = make_model(tied, torch.float64)  # norms in fp64, and buffers that no state has
    if not plain.config.tie_word_embeddings:
        head = torch.nn.Linear(16, 11, bias=False, dtype=torch.float64)
        rotary.set_output_embeddings(head)
    rotary.load_state_dict(state)
    truth = peft_model(tied, lora.adapters_among(weights))
    ids = torch.arange(2, 11)[None]
    with torch.no_grad():
        return _error(rotary(ids).logits, truth(ids).logits)


def _error(value: Tensor, truth: Tensor) -> float:
    return float((value - truth).abs().max() / truth.abs().max())


def main() -> None:
    world = distributed.init(threads=1)
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(distributed.all_gather(folder, world)[0])
        found = [measure(world, tied, shared / str(tied)) for tied in (True, False)]
        found = distributed.all_gather(found, world)
        distributed.barrier()
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")
    distributed.shutdown()


if __name__ == "__main__":
    main()

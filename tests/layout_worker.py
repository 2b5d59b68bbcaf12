"""Started by torchrun from test_layouts.py: one step's gradients against a dense reference.

The reference knows nothing of packing, sharding or the fused loss: one sequence at a time through
the plain model, log-softmax of its logits, the formulas of the design written out with global
counts.
"""

from __future__ import annotations

import json
import sys
import types

import torch
from torch.distributed.tensor import DTensor

from crpo_fast import distributed
from crpo_fast import policy as policies
from crpo_fast.loss import LossSpec
from crpo_fast.models import build_model
from crpo_fast.packing import Sequence
from crpo_fast.step import accumulate, micro_batches
from crpo_kernels import ObjectiveSpec

COEFS = (-0.05, 0.02, 0.04)
KL, TEMPERATURE, MAX_LENGTH = 0.01, 0.85, 24
LENGTHS = [(7, 5), (3, 20), (9, 1), (4, 11), (30, 9), (5, 16), (2, 3), (12, 12)]
VOCAB = 53


def make_model(tied: bool, dtype: torch.dtype, seed: int = 1) -> torch.nn.Module:
    model = build_model(
        "llama",
        vocab_size=VOCAB,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        intermediate_size=24,
        tie_word_embeddings=tied,
        eos_token_id=1,
        pad_token_id=0,
        seed=seed,
    ).to(dtype)
    for module in model.modules():  # transformers' norm computes in fp32 whatever the dtype
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(norm, module)
    with torch.no_grad():  # norm weights away from one
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype))
    return model


def norm(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


def make_sequences() -> list[Sequence]:
    generator = torch.Generator().manual_seed(3)
    sequences = []
    for prompt, completion in LENGTHS:
        ids = torch.randint(2, VOCAB, (prompt + completion,), generator=generator).tolist()
        stages = sorted(torch.randint(-1, 3, (completion,), generator=generator).tolist())
        logprobs = (-torch.rand(completion, generator=generator, dtype=torch.float64) * 4).tolist()
        advantage = float(torch.randn((), generator=generator, dtype=torch.float64))
        sequences.append(Sequence(ids[:prompt], ids[prompt:], stages, logprobs, advantage))
    return sequences


def dense(model: torch.nn.Module, sequence: Sequence) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([*sequence.prompt_ids, *sequence.completion_ids])
    logits = model(input_ids=ids[None], use_cache=False).logits[
        0, len(sequence.prompt_ids) - 1 : -1
    ]
    logp = torch.log_softmax(logits / TEMPERATURE, -1)
    chosen = logp.gather(1, torch.tensor(sequence.completion_ids)[:, None])[:, 0]
    return chosen, -(logp.exp() * logp).sum(-1)


def reference_loss(
    model: torch.nn.Module, frozen: torch.nn.Module, sequences: list[Sequence], aggregation: str
) -> torch.Tensor:
    counts = [len(s.completion_ids) for s in sequences]
    total = torch.zeros((), dtype=next(model.parameters()).dtype)
    for i, sequence in enumerate(sequences):
        logp, entropy = dense(model, sequence)
        with torch.no_grad():
            ref, _ = dense(frozen, sequence)
        rho = torch.exp(logp.detach() - torch.tensor(sequence.rollout_logprobs, dtype=logp.dtype))
        policy = -rho.clamp(max=2.0) * torch.exp(logp - logp.detach()) * sequence.advantage
        kl = torch.exp(ref - logp) - 1 - (ref - logp)
        group = sum(counts[i // 4 * 4 : i // 4 * 4 + 4])
        weight = {
            "token_mean": 1 / sum(counts),
            "sequence_mean": 1 / (counts[i] * len(counts)),
            "constant": 1 / (len(counts) * MAX_LENGTH),
            "bnpo": 1 / (len(counts) / 4 * group),
        }[aggregation]
        total = total + weight * (policy + KL * kl).sum()
        for k, coef in enumerate(COEFS):
            mask = torch.tensor(sequence.stage_ids) == k
            if mask.any():
                total = total + coef / len(counts) * entropy[mask].mean()
    return total


def whole_grad(parameter: torch.Tensor) -> torch.Tensor:
    grad = parameter.grad
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def error(
    world: distributed.World,
    aggregation: str,
    tied: bool,
    layout: str,
    dtype: torch.dtype,
    budget: int,
) -> tuple[float, str, list[int]]:
    sequences = make_sequences()
    plain, frozen = make_model(tied, dtype), make_model(tied, dtype, seed=2)
    loss = reference_loss(plain, frozen, sequences, aggregation)
    loss.backward()
    expected_loss = float(loss.detach())
    policy = policies.create(make_model(tied, dtype), world, compute_dtype=dtype)
    reference = policies.create(frozen, world, compute_dtype=dtype, trainable=False)
    spec = LossSpec(
        objective=ObjectiveSpec.preset("crpo", kl_coef=KL, rho_mode="truncate"),
        aggregation=aggregation,
        stage_coefs=COEFS,
        temperature=TEMPERATURE,
        max_length=MAX_LENGTH,
        group=4,
    )
    share = len(sequences) // world.size
    mine = sequences[world.rank * share : (world.rank + 1) * share]
    batches = micro_batches(
        mine, spec, policy, token_budget=budget, layout=layout, reference=reference
    )
    real = distributed.all_gather(sum(b.labels.numel() > 0 for b in batches), world)
    total, *_ = accumulate(policy, batches, spec)
    mean = float(distributed.all_sum(torch.tensor(total, dtype=torch.float64))) / world.size
    worst, name = abs(mean - expected_loss) / abs(expected_loss), "loss"
    expected = dict(plain.named_parameters())
    for key, parameter in policy.model.named_parameters():
        want, got = expected[key].grad, whole_grad(parameter)
        assert want.abs().max() > 0, key
        delta = float((got - want).abs().max() / want.abs().max())
        if not delta <= worst:
            worst, name = delta, key
    return worst, name, real


def main() -> None:
    world = distributed.init(threads=1)
    results = []
    for dtype in (torch.float64, torch.float32):
        for aggregation in ("token_mean", "sequence_mean", "constant", "bnpo"):
            for tied in (True, False):
                for layout in ("packed", "padded"):
                    worst, name, counts = error(world, aggregation, tied, layout, dtype, budget=60)
                    results.append(
                        {
                            "dtype": str(dtype),
                            "aggregation": aggregation,
                            "tied": tied,
                            "layout": layout,
                            "error": worst,
                            "tensor": name,
                            "micro_batches": counts,
                        }
                    )
    if world.is_main:
        with open(sys.argv[1], "w", encoding="utf-8") as file:
            json.dump(results, file)
    distributed.shutdown()


if __name__ == "__main__":
    main()

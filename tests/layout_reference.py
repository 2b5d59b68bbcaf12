"""One step's loss, metrics and gradients, dense: it knows nothing of packing, ranks or kernels.

One sequence at a time through the plain model, log-softmax of its logits, and the formulas of the
design written out with counts over all sequences.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from crpo_fast.packing import Sequence
from layout_cases import (
    COEFS,
    GROUP,
    KL,
    MAX_LENGTH,
    REFERENCE_LENGTH,
    RHO_CAP,
    RHO_FLOOR,
    TEMPERATURE,
    Case,
)


@dataclass(frozen=True)
class Expected:
    """What every layout must give."""

    loss: float
    metrics: dict[str, float]
    grads: dict[str, Tensor]


def dense(model: torch.nn.Module, sequence: Sequence) -> tuple[Tensor, Tensor]:
    """Logprobs and entropies of the completion."""
    ids = torch.tensor([*sequence.prompt_ids, *sequence.completion_ids])
    logits = model(input_ids=ids[None], use_cache=False).logits[
        0, len(sequence.prompt_ids) - 1 : -1
    ]
    logp = torch.log_softmax(logits / TEMPERATURE, -1)
    chosen = logp.gather(1, torch.tensor(sequence.completion_ids)[:, None])[:, 0]
    return chosen, -(logp.exp() * logp).sum(-1)


def token_terms(
    case: Case, logp: Tensor, ref: Tensor, sequence: Sequence, old_values: list[float]
) -> dict[str, Tensor]:
    """rho * policy term + KL of every token, and what is logged of it."""
    policy, _, off = case.objective.partition("_")
    sg, one = logp.detach(), torch.ones_like(logp)
    old = torch.tensor(old_values, dtype=logp.dtype) if off else sg
    ratio = torch.exp(logp - old)
    if policy == "gspo":
        ratio = torch.exp((sg - old).mean()) * torch.exp(logp - sg)
    a, clipped = sequence.advantage, one < 0
    if policy == "sft":
        value = -logp
    elif policy == "cispo":
        value, clipped = -ratio.detach().clamp(max=1.2) * a * logp, ratio > 1.2
    else:
        value = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.3) * a)
        clipped = ratio > 1.3 if a > 0 else ratio < 0.8
    bare = rho = one
    if sequence.rollout_logprobs is not None:
        bare = torch.exp(old - torch.tensor(sequence.rollout_logprobs, dtype=logp.dtype))
        is_kept = (bare >= RHO_FLOOR) & (bare <= RHO_CAP)
        rho = torch.where(is_kept, bare, 0) if off else bare.clamp(max=RHO_CAP)
    x = ref - logp
    kl = {"k1": -x, "k2": x * x / 2, "k3": torch.exp(x) - 1 - x, "none": 0 * x}[case.kl]
    return {
        "token_loss": rho * value + KL * kl,
        "ratio": ratio,
        "kl": kl,
        "rho": rho,
        "rho/mean": bare,
        "clip_fraction": clipped,
    }


def token_weight(case: Case, index: int, counts: list[int]) -> float:
    """The weight of each token of one sequence; an empty one counts as a sequence."""
    first = index // GROUP * GROUP
    num_groups = -(-len(counts) // GROUP)
    return {
        "token_mean": 1 / sum(counts),
        "sequence_mean": 1 / (counts[index] * len(counts)),
        "constant": 1 / (len(counts) * MAX_LENGTH),
        "bnpo": 1 / (num_groups * sum(counts[first : first + GROUP])),
    }[case.aggregation]


def entropy_term(
    case: Case, entropy: Tensor, k: int, stages: list[list[int]], index: int
) -> Tensor:
    """Stage k's share in the loss of one sequence that has the stage."""
    mine = entropy[torch.tensor(stages[index]) == k]
    if case.entropy == "token_mean":
        return COEFS[k] * mine.sum() / sum(ids.count(k) for ids in stages)
    if case.entropy == "present_only":
        return COEFS[k] * mine.mean() / sum(k in ids for ids in stages)
    scale = min(1, len(mine) / REFERENCE_LENGTH) if case.entropy == "reference_length" else 1
    return COEFS[k] * scale * mine.mean() / len(stages)


def expect(
    case: Case, model: torch.nn.Module, frozen: torch.nn.Module, old: list[list[float]]
) -> Expected:
    """Backward of the whole loss through ``model``; its gradients are left in it as well."""
    sequences = case.sequences()
    counts = [len(s.completion_ids) for s in sequences]
    stages = [s.stage_ids for s in sequences]
    if case.frozen_head:
        model.get_output_embeddings().weight.requires_grad_(False)
    total = torch.zeros((), dtype=next(model.parameters()).dtype)
    logged: dict[str, list[Tensor]] = defaultdict(list)
    for i, sequence in enumerate(sequences):
        if not counts[i]:
            continue
        logp, entropy = dense(model, sequence)
        with torch.no_grad():
            ref, _ = dense(frozen, sequence)
        terms = token_terms(case, logp, ref, sequence, old[i])
        total = total + token_weight(case, i, counts) * terms["token_loss"].sum()
        for k in set(sequence.stage_ids) - {-1}:
            logged[f"stage_entropy/{k}"].append(entropy[torch.tensor(sequence.stage_ids) == k])
            if case.entropy != "none":
                total = total + entropy_term(case, entropy, k, stages, i)
        for name, value in {**terms, "logprobs": logp, "entropy": entropy}.items():
            logged[name].append(value)
    total.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    metrics = {name: float(torch.cat(v).double().mean().detach()) for name, v in logged.items()}
    bare = torch.cat(logged["rho/mean"]).detach()
    if case.objective == "sft":
        del metrics["rho/mean"]
    else:
        log_rho = bare.log()
        metrics["mismatch"] = float(log_rho.abs().mean())
        metrics["mismatch/max"] = float(log_rho.abs().max())
        metrics["mismatch/kl"] = float((bare - 1 - log_rho).mean())
        metrics |= {"rho/min": float(bare.min()), "rho/max": float(bare.max())}
    norm = torch.stack([g.norm() for g in grads.values()]).norm()
    metrics |= {"loss": float(total.detach()), "grad_norm": float(norm)}
    return Expected(float(total.detach()), metrics, grads)

"""What test_vocab_parallel.py compares: losses on shards of a head, and how they are run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import crpo_kernels as ck
from numerics import TINY, Problem, make_problem, spec_of

FIELDS = [name for name in ck.TokenStats._fields if name != "is_counted"]
Case = dict[str, Any]

# rows of the vocabulary of each rank, in the order of the ranks
SHARDS = {
    2: {
        "uneven": [(0, 64), (64, 101)],
        "one_row": [(1, 101), (0, 1)],
        "none": [(0, 101), (101, 101)],
    },
    3: {
        "uneven": [(0, 7), (7, 60), (60, 101)],
        "turned": [(60, 101), (0, 59), (59, 60)],
        "none": [(0, 50), (50, 50), (50, 101)],
    },
}
EVERYTHING = {"bias": True, "logit_softcap": 8.0, "logit_scale": 1.5, "temperature": "each"}
LOSSES: dict[str, Case] = {
    "plain": {},
    "everything": EVERYTHING,
    "everything_in_chunks": {**EVERYTHING, "mode": "one_pass", "workspace_bytes": TINY},
    "two_pass": {**EVERYTHING, "mode": "two_pass"},
    "two_pass_in_chunks": {**EVERYTHING, "mode": "two_pass", "workspace_bytes": TINY},
    "on_policy": {"drop": ("old_logprobs",), "mode": "one_pass"},
    "no_entropy": {"drop": ("entropy_weights", "z_loss_weights"), "preset": "dapo"},
    "gspo": {"preset": "gspo"},
    "gspo_two_pass": {"preset": "gspo", "mode": "two_pass", "bias": True},
    "gspo_on_policy": {"preset": "gspo", "drop": ("old_logprobs",)},
    "cispo": {"preset": "cispo", "rho_mode": "truncate"},
    "sft": {"preset": "sft", "rows": "given"},
    "frozen_head": {"needs": ("hidden",)},
    "frozen_head_two_pass": {"needs": ("hidden",), "mode": "two_pass", "workspace_bytes": TINY},
    "head_only": {"needs": ("weight", "bias"), "bias": True},
    "no_gradient": {"needs": ()},
    "leading": {"problem": "leading"},
    "lowest": {"problem": "lowest"},
    "no_rows": {"problem": "no_rows"},
    "lora": {"lora": True, "needs": ("hidden", "A", "B")},
    "lora_two_pass": {"lora": True, "mode": "two_pass", "workspace_bytes": TINY},
    "bf16": {"dtype": torch.bfloat16, "bias": True, "workspace_bytes": TINY},
}
TRITON: dict[str, Case] = {
    name: {**LOSSES[name], "backend": "triton", "problem": "small"}
    for name in ("everything_in_chunks", "two_pass", "gspo")
}


def problem_of(case: Case, shards: list[tuple[int, int]]) -> Problem:
    """The whole call; labels on both sides of every border."""
    kind = case.get("problem", "plain")
    problem = make_problem(num_rows=13 if kind == "small" else 37)
    edges = sorted({x for first, stop in shards for x in (first, stop - 1) if first < stop})
    problem.labels[1 : 1 + len(edges)] = torch.tensor(edges)
    if kind == "leading":  # offsets of 1000 nats: nothing may cancel
        problem.hidden[:, 0] = 1.0
        problem.weight[:, 0] += 1000.0
    if kind == "lowest":  # every logit of one shard is -inf
        problem.bias[shards[0][0] : shards[0][1]] = -torch.inf
    if kind == "no_rows":
        problem.labels[:] = ck.IGNORE_INDEX
    return problem


def run(problem: Problem, case: Case, dtype: torch.dtype, shard: slice, **options: Any) -> tuple:
    """(loss, gradients, stats) of one call on some rows of the vocabulary."""
    needs = case.get("needs", ("hidden", "weight", "bias"))
    has_bias = case.get("bias", False) or case.get("problem") == "lowest"
    hidden = problem.hidden.to(dtype).clone().requires_grad_("hidden" in needs)
    weight = problem.weight[shard].to(dtype).clone().requires_grad_("weight" in needs)
    bias = (
        problem.bias[shard].to(dtype).clone().requires_grad_("bias" in needs) if has_bias else None
    )
    vectors = {k: v for k, v in problem.vectors.items() if k not in case.get("drop", ())}
    each = {"temperature": problem.temperature} if "temperature" in case else {}
    generator, adapter = torch.Generator().manual_seed(2), {}
    if "lora" in case:
        down, up = torch.randn(3, 117, generator=generator, dtype=torch.float64).split((16, 101), 1)
        adapter = {"A": down.to(dtype).clone(), "B": up.t()[shard].to(dtype).clone()}
        for name, leaf in adapter.items():
            leaf.requires_grad_("needs" not in case or name in needs)
        each["lora_head"] = (*adapter.values(), 0.1)
    if "rows" in case:
        each["rows"] = (problem.labels != ck.IGNORE_INDEX).nonzero()
    loss, stats = ck.linear_policy_loss(
        hidden, weight, problem.labels, bias=bias, cu_seqlens=problem.cu_seqlens,
        spec=spec_of(case.get("preset", "crpo"), rho_mode=case.get("rho_mode")),
        logit_scale=case.get("logit_scale", 1.0), logit_softcap=case.get("logit_softcap"),
        **vectors, **each, **options,
    )  # fmt: skip
    if needs:
        (3 * loss).backward()
    leaves = {"hidden": hidden, "weight": weight, "bias": bias, **adapter}
    return loss.detach(), {k: leaf.grad for k, leaf in leaves.items() if leaf is not None}, stats


def error(got: Tensor, want: Tensor) -> float:
    """Max |error| / max(1, max |value|); 0 where there is nothing."""
    if not want.numel():
        return 0.0 if got.shape == want.shape else float("inf")
    bound = want.double().abs().max().clamp(min=1e-30)
    return float((got.double() - want.double()).abs().max() / bound)


def beside(got: tuple, want: tuple, own: slice, *, is_whole: bool = False) -> dict[str, float]:
    """Errors by name; gradients of the head are compared on the own rows."""
    (loss, grads, stats), (true_loss, true_grads, true_stats) = got, want
    found = {"loss": error(loss, true_loss)}
    for name in FIELDS:
        a, b = getattr(stats, name), getattr(true_stats, name)
        found[name] = error(a, b) if a.is_floating_point() else float((a != b).sum())
    for name, truth in true_grads.items():
        if truth is None:
            assert grads[name] is None, name
            continue
        is_split = name not in ("hidden", "A")
        mine = grads[name][own] if is_split and is_whole else grads[name]
        found[f"d_{name}"] = error(mine, truth[own] if is_split else truth)
    return found

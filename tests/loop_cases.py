"""Cases of several updates per rollout, and what each must give: dense, one sequence at a time.

The reference knows nothing of packing, ranks, minibatch objects or the fused loss: log-softmax of
the plain model's logits, the papers' formulas, plain SGD.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from crpo_fast import policy as policies
from crpo_fast.batch import RolloutGroup, Row, Sample, SamplingParams
from crpo_fast.distributed import World
from crpo_fast.dynamic_sampling import Resampling, further_rows, round_seed
from crpo_fast.experience import Experience, collect
from crpo_fast.loss import LossSpec
from crpo_fast.nonfinite import Guard
from crpo_fast.packing import Sequence
from crpo_fast.reward_calls import RewardTable
from crpo_fast.step import micro_batches
from crpo_fast.updates import UpdatePlan, add_old_logprobs, run_updates
from crpo_kernels import ObjectiveSpec
from layout_cases import COEFS, TEMPERATURE, make_model, make_sequences

GROUP_SIZE, LR, MAX_NORM, KL = 2, 0.3, 0.5, 0.01


@dataclass(frozen=True)
class Case:
    """One rollout of four groups; ``edges`` are clip_low and clip_high."""

    name: str
    updates: int
    minibatches: int
    policy: str = "clip"
    edges: tuple[float, float] = (0.05, 0.02)
    aggregation: str = "sequence_mean"
    rho: tuple[str, float, float] | None = None  # mode, cap, floor
    empty: tuple[int, ...] = ()  # sequences whose completion is masked
    must_clip: bool = True


CASES = [
    Case("ppo epochs", 3, 1),
    Case("ppo minibatches", 2, 2, aggregation="token_mean"),
    Case("ppo epochs of minibatches", 4, 2, aggregation="bnpo"),
    Case("gspo", 4, 2, "gspo", (3e-3, 4e-3)),
    Case("cispo", 3, 1, "cispo", (0.2, 0.02), "token_mean"),
    Case("truncated rho", 4, 2, rho=("truncate", 1.5, 0.0)),
    Case("masked rho", 3, 1, rho=("mask", 3.0, 0.5), aggregation="token_mean"),
    Case("masked completions", 2, 2, empty=(1, 4, 5)),
    Case("one update", 1, 1, rho=("truncate", 1.5, 0.0), must_clip=False),
]


def sequences_of(case: Case) -> list[Sequence]:
    return [
        Sequence(s.prompt_ids, [], [], [], s.advantage) if i in case.empty else s
        for i, s in enumerate(make_sequences()[:8])
    ]


def dense(model: Any, sequence: Sequence) -> tuple[Tensor, Tensor]:
    """Logprobs and entropies of the completion."""
    ids = torch.tensor([*sequence.prompt_ids, *sequence.completion_ids])
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    logp = torch.log_softmax(logits[len(sequence.prompt_ids) - 1 : -1] / TEMPERATURE, -1)
    chosen = logp.gather(1, torch.tensor(sequence.completion_ids)[:, None])[:, 0]
    return chosen, -(logp.exp() * logp).sum(-1)


def term(case: Case, logp: Tensor, old: Tensor, a: float) -> tuple[Tensor, Tensor, Tensor]:
    """Policy term, ratio, and whether the clip holds."""
    low, high = 1 - case.edges[0], 1 + case.edges[1]
    ratio = torch.exp(logp - old)
    if case.policy == "cispo":
        return -ratio.detach().clamp(max=high) * a * logp, ratio, ratio > high
    if case.policy == "gspo":
        ratio = torch.exp((logp.detach() - old).mean()) * torch.exp(logp - logp.detach())
    clipped = (ratio > high) if a > 0 else (ratio < low)
    return -torch.minimum(ratio * a, ratio.clamp(low, high) * a), ratio, clipped


def weight(case: Case, lengths: list[int], i: int) -> float:
    group = sum(lengths[i // 4 * 4 : i // 4 * 4 + 4])
    return {
        "token_mean": 1 / sum(lengths),
        "sequence_mean": 1 / (max(1, lengths[i]) * len(lengths)),
        "bnpo": 1 / (math.ceil(len(lengths) / 4) * max(1, group)),
    }[case.aggregation]


def rho_of(case: Case, bare: Tensor) -> Tensor:
    if case.rho is None:
        return torch.ones_like(bare)
    mode, cap, floor = case.rho
    if mode == "truncate":
        return bare.clamp(max=cap)
    return torch.where((bare > cap) | (bare < floor), 0.0, bare)


def minibatch_loss(
    case: Case, model: Any, part: list[int], old: list[Tensor], ref: list[Tensor], seen: dict
) -> Tensor:
    """The loss of some sequences; what is logged of their tokens goes to ``seen``."""
    sequences = sequences_of(case)
    lengths = [len(sequences[i].completion_ids) for i in part]
    total = torch.zeros((), dtype=torch.float64)
    for place, i in enumerate(part):
        sequence = sequences[i]
        if not sequence.completion_ids:
            continue
        logp, entropy = dense(model, sequence)
        value, ratio, clipped = term(case, logp, old[i], sequence.advantage)
        x = old[i] - torch.tensor(sequence.rollout_logprobs, dtype=torch.float64)
        kl = torch.exp(ref[i] - logp) - 1 - (ref[i] - logp)
        rho = rho_of(case, x.exp())
        total = total + weight(case, lengths, place) * (rho * value + KL * kl).sum()
        for k, coef in enumerate(COEFS):
            mask = torch.tensor(sequence.stage_ids) == k
            if mask.any():
                total = total + coef / len(part) * entropy[mask].mean()
        columns = {"ratio": ratio, "clip": clipped, "rho": rho, "x": x, "kl": kl, "h": entropy}
        for name, column in columns.items():
            seen[name].append(column.detach().double())
    return total


def expect(case: Case) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Change of every weight, and the step's metrics."""
    model, frozen = make_model(True, torch.float64), make_model(True, torch.float64, seed=2)
    before = {k: v.detach().clone() for k, v in model.named_parameters()}
    sequences, seen = sequences_of(case), defaultdict(list)
    with torch.no_grad():
        old = [dense(model, s)[0] for s in sequences]
        ref = [dense(frozen, s)[0] for s in sequences]
    losses, norms = [], []
    for u in range(case.updates):
        m = u % case.minibatches
        part = [i for i in range(len(sequences)) if i // GROUP_SIZE % case.minibatches == m]
        model.zero_grad()
        loss = minibatch_loss(case, model, part, old, ref, seen)
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
        with torch.no_grad():
            for p in model.parameters():
                p -= LR * min(1.0, MAX_NORM / (norm + 1e-6)) * p.grad
        losses.append(float(loss.detach()))
        norms.append(norm)
    pooled = {name: torch.cat(columns) for name, columns in seen.items()}
    changes = {k: v.detach() - before[k] for k, v in model.named_parameters()}
    return changes, metrics_of(case, pooled, losses, norms)


def metrics_of(
    case: Case, t: dict[str, Tensor], losses: list[float], norms: list[float]
) -> dict[str, float]:
    rho, cut = t["x"].exp(), torch.zeros(1)
    if case.rho is not None:
        cut = (rho > case.rho[1]) | ((rho < case.rho[2]) & (case.rho[0] == "mask"))
    values = {
        "loss": sum(losses) / len(losses),
        "grad_norm": sum(norms) / len(norms),
        "clip_fraction": t["clip"].mean(),
        "ratio": t["ratio"].mean(),
        "kl": t["kl"].mean(),
        "entropy": t["h"].mean(),
        "rho": t["rho"].mean(),
        "mismatch": t["x"].abs().mean(),
        "mismatch/max": t["x"].abs().max(),
        "mismatch/kl": (rho - 1 - t["x"]).mean(),
        "rho/mean": rho.mean(),
        "rho/min": rho.min(),
        "rho/max": rho.max(),
        "rho/ess": rho.sum() ** 2 / (len(rho) * rho.square().sum()),
        "rho/cut": cut.double().mean(),
        "updates": case.updates,
        "skipped": 0,
        "skipped_empty": 0,
        "skipped_total": 0,
    }
    return {name: float(value) for name, value in values.items()}


def spec_of(case: Case) -> LossSpec:
    mode, cap, floor = case.rho or (None, 2.0, 0.0)
    objective = ObjectiveSpec(
        policy=case.policy,
        clip_low=case.edges[0],
        clip_high=case.edges[1],
        kl_coef=KL,
        rho_mode=mode,
        rho_cap=cap,
        rho_floor=floor,
    )
    return LossSpec(objective, case.aggregation, COEFS, temperature=TEMPERATURE, group=4)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def guard_of(world: World, folder: Path, limit: int = 3) -> Guard:
    return Guard(limit, folder / "nonfinite", world, lambda _: None)


def measure(
    case: Case, world: World, folder: Path, budget: int = 60
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What the trainer makes of it: change of every weight, and the metrics."""
    dtype = torch.float64
    policy = policies.create(make_model(True, dtype), world, compute_dtype=dtype)
    frozen = make_model(True, dtype, seed=2)
    reference = policies.create(frozen, world, compute_dtype=dtype, trainable=False)
    before = {k: whole(v) for k, v in policy.model.named_parameters()}
    spec, plan = spec_of(case), UpdatePlan(case.updates, case.minibatches, GROUP_SIZE)
    share = 8 // world.size
    mine = sequences_of(case)[world.rank * share :][:share]
    packed = [
        micro_batches(part, spec, policy, token_budget=budget, layout="packed", reference=reference)
        for part in plan.split(mine)
    ]
    metrics = run_updates(
        policy,
        torch.optim.SGD(policy.model.parameters(), lr=LR),
        add_old_logprobs(packed, spec, policy),
        spec,
        updates=case.updates,
        max_grad_norm=MAX_NORM,
        guard=guard_of(world, folder),
        where="step_1",
    )
    after = policy.model.named_parameters()
    return {k: whole(v) - before[k] for k, v in after}, metrics


def errors(case: Case, world: World, folder: Path) -> dict[str, Any]:
    """Largest relative errors of weights and metrics."""
    changes, metrics = expect(case)
    found, logged = measure(case, world, folder)
    worst = max(float((found[k] - v).abs().max() / v.abs().max()) for k, v in changes.items())
    off = {
        k: abs(logged[k] - v) / max(1e-3, abs(v))
        for k, v in metrics.items()
        if not abs(logged[k] - v) <= 1e-10 * max(1e-3, abs(v))
    }
    return {"weights": worst, "metrics": off, "clip_fraction": logged["clip_fraction"]}


ROWS = [
    Row(f"post {i}", label) for i, label in enumerate("vc" * 10)
]  # v: rewards vary, c: constant


class ScriptedEngine:
    """Completions of one token each: the position of the sample in its group."""

    renormalises = False

    def __init__(self) -> None:
        self.calls: list[tuple[list[list[int]], int]] = []

    def generate(
        self,
        prompt_ids: list[list[int]],
        group_size: int,
        params: SamplingParams,
        seed: int,
        first: int = 0,
    ) -> list[RolloutGroup]:
        self.calls.append((prompt_ids, seed))
        samples = [Sample([g], [-1.0], "stop" if g else "length", 0) for g in range(group_size)]
        return [RolloutGroup(ids, samples) for ids in prompt_ids]


@dataclass(frozen=True)
class ScriptedTask:
    """Prompt ids are the number of the row; rewards follow the row's label."""

    balance: str = "none"
    tokenizer: Any = range(100)  # which has a length

    @property
    def grammar(self) -> ScriptedTask:
        return self

    def stage_ids(self, ids: list[int], tokenizer: Any) -> list[int]:
        return [-1] * len(ids)

    def prompt(self, row: Row) -> tuple[list[int], int]:
        return [int(row.text.split()[1])], 0

    def decode(self, ids: list[int]) -> str:
        return str(ids[0])

    def is_right(self, row: Row, completion: str) -> bool:
        return completion == "1"

    def score(self, rows: list[Row], completions: list[str], group_size: int) -> RewardTable:
        assert len(completions) % group_size == 0
        assert completions, "reward functions are never called without a completion"
        of_label = {
            "v": lambda g: float(g),
            "c": lambda g: 1.0,
            "n": lambda g: 2.0 if g == 0 else math.nan,
        }
        pairs = zip(rows, completions, strict=True)
        total = [of_label[r.label](int(c)) for r, c in pairs]
        return RewardTable(total, {"scripted": list(total)})


def collected(
    rows: list[Row], chosen: list[int], world_rank: tuple[int, int], **options: Any
) -> tuple[list[int], dict[str, float], ScriptedEngine, Experience]:
    """Prompts that are trained on, metrics of this rank, and the engine's calls."""
    rank, size = world_rank
    share = len(chosen) // size
    all_max = options.pop("all_max", lambda value: value)
    rounds = options.pop("rounds", 3)

    def further(round_: int, count: int) -> list[Row]:
        options = {"seed": 7, "step": 3, "round_": round_, "rank": rank, "world_size": size}
        return [rows[i] for i in further_rows(len(rows), chosen, share=share, **options)][:count]

    engine, task = ScriptedEngine(), ScriptedTask()
    batch = collect(
        cast(Any, task),
        cast(Any, engine),
        [rows[i] for i in chosen[rank * share :][:share]],
        group_size=3,
        params=SamplingParams(4, (0,)),
        seed=1,
        scale="none",
        resampling=Resampling(rounds, further, lambda r: round_seed(7, 3, r, rank), all_max),
        **options,
    )
    return [s.prompt_ids[0] for s in batch.sequences[::3]], batch.sums.means(), engine, batch

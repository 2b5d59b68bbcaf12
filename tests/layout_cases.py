"""What the layout tests vary: a set of cases in which every two options of two factors meet."""

from __future__ import annotations

import functools
import itertools
import random
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from crpo_fast.loss import LossSpec
from crpo_fast.models import build_model
from crpo_fast.packing import Sequence, pack
from crpo_kernels import ObjectiveSpec

COEFS = (-0.05, 0.02, 0.04)
KL, TEMPERATURE, MAX_LENGTH, GROUP = 0.05, 0.85, 24, 5
RHO_CAP, RHO_FLOOR, REFERENCE_LENGTH = 1.5, 0.6, 6
VOCAB, SEED = 11, 3  # few tokens: logprobs near log 11 = 2.4 keep more of fp32's digits
NOISE = 0.05  # added to every initial weight
# prompt and completion tokens; of the first eight, no two fit into 30 tokens
LENGTHS = [(7, 13), (3, 20), (17, 1), (4, 14), (21, 9), (5, 16), (12, 5), (12, 12)]
LENGTHS += [(2, 3), (9, 2), (1, 8), (3, 4)]
GROUPS = (5, 3, 1, 3)  # samples of each prompt where the layout shares prompts

FACTORS: dict[str, tuple[str | bool, ...]] = {
    "aggregation": ("token_mean", "sequence_mean", "constant", "bnpo"),
    "objective": ("clip", "clip_old", "gspo_old", "cispo_old", "sft"),
    "entropy": ("sequence_mean", "present_only", "token_mean", "reference_length", "none"),
    "kl": ("k3", "none", "k1", "k2"),
    "tied": (True, False),
    "layout": ("packed", "padded", "shared"),
    "checkpointing": (False, True),
    "frozen_head": (False, True),
    "completions": ("whole", "some_empty", "tail_empty"),
    "shares": ("skewed", "even", "absent"),
}
# sequences of each rank, in rollout order
SHARES = {
    "even": {1: [12], 2: [6, 6], 4: [3, 3, 3, 3]},
    "skewed": {1: [12], 2: [9, 3], 4: [8, 3, 0, 1]},
    "absent": {1: [12], 2: [12, 0], 4: [8, 0, 4, 0]},
    "two": {1: [2], 2: [1, 1], 4: [0, 1, 0, 1]},
    "eight": {1: [8], 2: [3, 5], 4: [2, 3, 1, 2]},
}
EMPTY = {"whole": (), "some_empty": (1, 6, 11), "tail_empty": tuple(range(6, 12))}


@dataclass(frozen=True)
class Case:
    """One option of each factor, and the number of micro-batches of the busiest rank."""

    aggregation: str
    objective: str
    entropy: str
    kl: str
    tied: bool
    layout: str
    checkpointing: bool
    frozen_head: bool
    completions: str
    shares: str
    micro_batches: int = 1

    @property
    def spec(self) -> LossSpec:
        """The loss; "mask" and "truncate" of the mismatch correction both occur."""
        policy, _, old = self.objective.partition("_")
        rho = None if policy == "sft" else "mask" if old else "truncate"
        options = {} if self.kl == "none" else {"kl_coef": KL, "kl_estimator": self.kl}
        if policy != "cispo":
            options |= {"clip_low": 0.2, "clip_high": 0.3}
        objective = ObjectiveSpec(
            policy=policy,
            rho_mode=rho,
            rho_cap=RHO_CAP,
            rho_floor=RHO_FLOOR if rho == "mask" else 0.0,
            **options,
        )
        is_scaled = self.entropy == "reference_length"
        return LossSpec(
            objective=objective,
            aggregation=self.aggregation,
            stage_coefs=COEFS if self.entropy != "none" else (0.0,) * len(COEFS),
            reduction="sequence_mean" if is_scaled or self.entropy == "none" else self.entropy,
            reference_length=REFERENCE_LENGTH if is_scaled else None,
            temperature=TEMPERATURE,
            max_length=MAX_LENGTH,
            group=GROUP,
        )

    def sequences(self) -> list[Sequence]:
        """Those of all ranks; completions that are kept out of the loss are empty."""
        sequences = make_sequences()
        if self.layout == "shared":
            sequences = grouped(sequences)
        if self.objective == "sft":
            sequences = [replace(s, rollout_logprobs=None) for s in sequences]
        return [emptied(s) if i in EMPTY[self.completions] else s for i, s in enumerate(sequences)]

    def token_budget(self, world_size: int) -> int:
        """A small one with which no rank has more than ``micro_batches``, or the smallest."""
        parts = split(self.sequences(), SHARES[self.shares][world_size])
        longest = max(len(s) for mine in parts for s in mine if s.completion_ids)
        for budget in itertools.count(longest, 2):
            if max(len(pack(p, budget, layout=self.layout)) for p in parts) <= self.micro_batches:
                return budget
        raise AssertionError("one sequence is one micro-batch")


def emptied(sequence: Sequence) -> Sequence:
    return replace(sequence, completion_ids=[], stage_ids=[], rollout_logprobs=None)


def grouped(sequences: list[Sequence]) -> list[Sequence]:
    """The same completions; those of a group have its first one's prompt."""
    ends = itertools.accumulate(GROUPS)
    prompts = [
        sequences[e - n].prompt_ids for e, n in zip(ends, GROUPS, strict=True) for _ in range(n)
    ]
    return [replace(s, prompt_ids=ids) for s, ids in zip(sequences, prompts, strict=True)]


def split(sequences: list[Sequence], counts: list[int]) -> list[list[Sequence]]:
    ends = list(itertools.accumulate(counts))
    return [sequences[end - count : end] for end, count in zip(ends, counts, strict=True)]


def pairs_of(values: dict[str, str | bool]) -> Iterator[tuple[tuple[str, str | bool], ...]]:
    return itertools.combinations(values.items(), 2)


@functools.cache
def covering_set(seed: int = 1, tries: int = 60) -> list[Case]:
    """Cases in which every option of a factor meets every option of every other factor.

    Greedy: the best of some random cases, until no pair is missing. The numbers of micro-batches
    go round from 1 to 8; cases in which one rank of four holds eight whole sequences begin with 8.
    """
    rng = random.Random(seed)
    missing = set()
    for (a, options_a), (b, options_b) in itertools.combinations(FACTORS.items(), 2):
        missing |= {((a, x), (b, y)) for x in options_a for y in options_b}
    cases = []
    while missing:
        wanted = dict(rng.choice(sorted(missing, key=str)))
        drawn = [
            {name: wanted.get(name, rng.choice(options)) for name, options in FACTORS.items()}
            for _ in range(tries)
        ]
        best = max(drawn, key=lambda values: len(missing & set(pairs_of(values))))
        missing -= set(pairs_of(best))
        cases.append(Case(**best))
    small, large = itertools.cycle(range(1, 9)), itertools.cycle(range(8, 0, -1))
    is_large = [c.shares != "even" and c.completions == "whole" for c in cases]
    numbers = [next(large if is_one else small) for is_one in is_large]
    return [replace(c, micro_batches=n) for c, n in zip(cases, numbers, strict=True)]


def make_model(tied: bool, dtype: torch.dtype, seed: int = 1) -> torch.nn.Module:
    """Two blocks; the weights are the same fp32 numbers in every dtype."""
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
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # norm weights away from one
        for p in model.parameters():
            p.add_(NOISE * torch.randn(p.shape, generator=generator))
    for module in model.modules():  # transformers' norm computes in fp32 whatever the dtype
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(norm, module)
    return model.to(dtype)


def norm(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


def make_sequences() -> list[Sequence]:
    """Their numbers are fp32 ones, so that both dtypes work on the same."""
    generator = torch.Generator().manual_seed(SEED)
    sequences = []
    for prompt, completion in LENGTHS:
        ids = torch.randint(2, VOCAB, (prompt + completion,), generator=generator).tolist()
        stages = sorted(torch.randint(-1, 3, (completion,), generator=generator).tolist())
        logprobs = (torch.randn(completion, generator=generator) - 2.4).tolist()
        advantage = float(torch.randn((), generator=generator))
        sequences.append(Sequence(ids[:prompt], ids[prompt:], stages, logprobs, advantage))
    return sequences


def old_logprobs(sequences: list[Sequence]) -> list[list[float]]:
    """Of each sequence's completion, such that ratios lie on both sides of the clip's edges."""
    generator = torch.Generator().manual_seed(4)
    drawn = [torch.rand(24, generator=generator) - 2.9 for _ in sequences]
    return [x[: len(s.completion_ids)].tolist() for x, s in zip(drawn, sequences, strict=True)]

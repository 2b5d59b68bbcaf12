"""What `rollout` measures: a model, requests, and who generates.

Weights are random, so the speed is that of the shape and the text means nothing; completions end at
one of many end tokens, so that their lengths are ragged (or never, and all are as long).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crpo_fast.attention import SDPA_PACKED, choose_attention
from crpo_fast.batch import SamplingParams
from crpo_fast.model_check import head_options
from crpo_fast.packing import Sequence, pack
from crpo_fast.policy import install_head
from crpo_fast.rollout.hf import HFEngine
from crpo_fast.rollout.static import StaticEngine
from crpo_kernels import linear_logprobs

TEMPERATURE = 1.0
TOKEN_BUDGET = 4096  # of the trainer's micro-batches


@dataclass(frozen=True)
class Completions:
    """What came out: ids of each sample, prompt by prompt, and their logprobs or None."""

    ids: list[list[int]]
    logprobs: list[list[float]] | None

    @property
    def num_tokens(self) -> int:
        """Sampled tokens."""
        return sum(map(len, self.ids))


@dataclass(frozen=True)
class RolloutCase:
    """One batch of requests.

    Attributes:
        name: for people.
        num_prompts: different prompts.
        group_size: samples of each.
        median_prompt: tokens.
        max_tokens: most tokens of a completion.
        is_ragged: prompts of many lengths and completions that end; else all are as long.
    """

    name: str
    num_prompts: int
    group_size: int
    median_prompt: int
    max_tokens: int
    is_ragged: bool = True

    @property
    def shape(self) -> str:
        """Sizes, for people."""
        ends = "up to " if self.is_ragged else ""
        about = "about " if self.is_ragged else ""
        return (
            f"{self.num_prompts} prompt{'s' * (self.num_prompts > 1)} of {about}"
            f"{self.median_prompt} tokens x {self.group_size} samples of {ends}{self.max_tokens}"
        )

    def prompts(self, vocab_size: int, seed: int = 0) -> list[list[int]]:
        """Token ids, the same for every candidate."""
        rng, found = random.Random(seed), []
        for _ in range(self.num_prompts):
            wanted = self.median_prompt
            if self.is_ragged:
                wanted = max(2, min(4 * wanted, round(rng.lognormvariate(0.0, 0.6) * wanted)))
            found.append([rng.randrange(3, vocab_size) for _ in range(wanted)])
        return found

    def params(self, vocab_size: int, max_tokens: int | None = None) -> SamplingParams:
        """Sampling; of nearly equal probabilities, half of the rows end by half of the limit."""
        count = max(1, round(1.4 * vocab_size / self.max_tokens)) if self.is_ragged else 0
        ends = tuple(range(vocab_size - count, vocab_size))
        return SamplingParams(max_tokens or self.max_tokens, ends, TEMPERATURE)


# who generates: (model, prompts, group size, params, seed, whether logprobs are wanted)
Generate = Callable[[Any, list[list[int]], int, SamplingParams, int, bool], Completions]


def engine_of(make: Callable[[Any], Any]) -> Generate:
    """An embedded engine as a candidate: its logprobs come with the tokens."""

    def generate(
        model: Any,
        prompts: list[list[int]],
        group_size: int,
        params: SamplingParams,
        seed: int,
        logprobs: bool,  # noqa: ARG001
    ) -> Completions:
        engine = make(model)
        engine.sync(model, 0)
        groups = engine.generate(prompts, group_size, params, seed)
        samples = [sample for group in groups for sample in group.samples]
        return Completions([s.token_ids for s in samples], [s.logprobs for s in samples])

    return generate


@torch.no_grad()
def plain_generate(
    model: Any,
    prompts: list[list[int]],
    group_size: int,
    params: SamplingParams,
    seed: int,
    logprobs: bool,
) -> Completions:
    """`model.generate` on one left-padded batch; logprobs cost all logits and are for checking."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    torch.manual_seed(seed)
    name = model.config._attn_implementation
    model.set_attn_implementation("sdpa" if name == SDPA_PACKED else name)
    try:
        out = model.generate(
            input_ids=ids,
            attention_mask=mask.to(model.device),
            do_sample=True,
            temperature=params.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=params.max_tokens,
            num_return_sequences=group_size,
            eos_token_id=list(params.eos_ids) or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=logprobs,
        )
    finally:
        model.set_attn_implementation(name)
    rows = [cut(row, params.eos_ids) for row in out.sequences[:, longest:].tolist()]
    if not logprobs:
        return Completions(rows, None)
    tokens = out.sequences[:, longest:]  # [n, L]
    steps = [s.float().log_softmax(-1).gather(1, tokens[:, i : i + 1])
             for i, s in enumerate(out.scores)]  # fmt: skip
    values = torch.cat(steps, 1).tolist()  # [n, L]
    return Completions(rows, [v[: len(r)] for r, v in zip(rows, values, strict=True)])


def cut(row: list[int], ends: tuple[int, ...]) -> list[int]:
    """Up to and including the first end token: what follows is padding."""
    stop = next((i for i, token in enumerate(row) if token in set(ends)), len(row) - 1)
    return row[: stop + 1]


CANDIDATES: dict[str, tuple[str, str, Generate, str]] = {  # key: title, kind, how, note
    "static": (
        "engine static",
        "ours",
        engine_of(StaticEngine),
        "one padded batch, finished rows dropped, each prompt prefilled once; with logprobs",
    ),
    "hf": (
        "engine hf",
        "ours",
        engine_of(HFEngine),
        "transformers' continuous batching on a paged cache; with logprobs",
    ),
    "generate": (
        "transformers generate",
        "plain",
        plain_generate,
        "left-padded, no logprobs; checked by a run of its own that keeps all logits",
    ),
}


def attention_of(device: torch.device, dtype: str) -> str:
    """What `model.attention = "auto"` means there."""
    return choose_attention("auto", device.type, dtype)[0]


@torch.no_grad()
def trainer_differences(
    model: Any, prompts: list[list[int]], group_size: int, found: Completions
) -> Tensor:
    """|trainer - rollout logprob| of every sampled token, nats: the trainer's own forward and loss.

    Packed micro-batches through `policy_forward` and the fused log-probabilities, in the dtype of
    the model's weights.
    """
    assert found.logprobs is not None, "only completions with logprobs can be compared"
    sequences = [
        Sequence(prompts[i // group_size], ids, [-1] * len(ids), found.logprobs[i])
        for i, ids in enumerate(found.ids)
    ]
    if not hasattr(model, "policy_forward"):
        install_head(model)
    flat = torch.tensor([value for row in found.logprobs for value in row])
    differences, options = [], head_options(model)
    for batch in pack(sequences, max(TOKEN_BUDGET, max(map(len, sequences)))):
        batch = batch.attach(rollout=flat).to(model.device)

        def logprobs(hidden: Tensor, weight: Tensor, batch: Any = batch, **head: Any) -> Tensor:
            out = linear_logprobs(hidden, weight, batch.labels, temperature=TEMPERATURE, **head)
            return out.logprobs

        values = model.policy_forward(batch, logprobs, options)
        differences.append((values.double() - batch.vectors["rollout"].double()).abs().cpu())
    return torch.cat(differences)

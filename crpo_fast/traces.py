"""Per-token records of some completions, for samples.jsonl: what the report's viewer shows.

    kind "sample"  some rollouts of a step, with what the training pass computed for their tokens
    kind "probe"   greedy answers to fixed rows of the test split (`probes`)

Sampled ones come from rank 0: best and worst by reward of its first prompts. Their logprobs,
entropies and weights are read off the training pass itself (its first one, where a rollout is used
for several updates), so they cost a copy of some hundred numbers. Nothing here draws a random
number or changes a weight.

Which steps are recorded is a function of the step alone (`is_due`), so that a resumed run records
the same ones, and their number grows with the logarithm of the length of a run.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor

from crpo_fast.batch import Row, Sample
from crpo_fast.packing import MicroBatch, Sequence
from crpo_fast.scoring import classify
from crpo_fast.task import Task
from crpo_fast.token_text import read_tokens

DENSE = 50  # recorded steps before every doubling of the steps between them
_FIELDS = ("logprobs", "entropy", "token_weights", "entropy_weights")


def is_due(step: int, every: int) -> bool:
    """Whether step 1, 2, ... is recorded: the first, and every ``every``-th (0: none at all).

    Beyond ``DENSE * every`` steps every second of those, beyond twice as many every fourth, and
    so on.
    """
    if every <= 0:
        return False
    doublings = max(0, (step - 1) // (DENSE * every)).bit_length()
    return step == 1 or step % (every << doublings) == 0


class TokenTrace:
    """What the training pass computes for the tokens of the sequences that are traced.

    Args:
        records: one per traced sequence, without the per-token numbers.
        lengths: completion tokens of each. Sequence i has ``trace`` = sum(lengths[:i]).
    """

    def __init__(self, records: Seq[dict[str, Any]], lengths: Seq[int]) -> None:
        self._records, self._lengths = list(records), list(lengths)
        empty = torch.full((sum(lengths),), float("nan"), dtype=torch.float64)
        self._values = {name: empty.clone() for name in _FIELDS}

    def add(self, batch: MicroBatch, stats: Any, world_size: int = 1) -> None:
        """Take over the traced rows of a micro-batch, unless an earlier pass filled them.

        Args:
            batch: with the vector ``trace`` of `positions`; without it nothing is traced.
            stats: the kernel's TokenStats of its rows.
            world_size: is taken out of the weights, which carry it.
        """
        where = batch.vectors.get("trace")
        if where is None:
            return
        rows = (where >= 0).nonzero().squeeze(1)
        target = where[rows].cpu()
        fresh = self._values["logprobs"][target].isnan()
        rows, target = rows[fresh.to(rows.device)], target[fresh]
        found = {
            "logprobs": stats.logprobs,
            "entropy": stats.entropy,
            **{name: v / world_size for name, v in batch.vectors.items() if name in _FIELDS},
        }
        for name, values in found.items():
            self._values[name][target] = values.detach()[rows].cpu().double()

    def records(self) -> list[dict[str, Any]]:
        """The records with the numbers of their tokens; null where no pass saw a token."""
        parts = {name: values.split(self._lengths) for name, values in self._values.items()}
        return [
            {**record, **{name: numbers(split[i]) for name, split in parts.items()}}
            for i, record in enumerate(self._records)
        ]


def positions(sequences: Seq[Sequence]) -> Tensor | None:
    """[N] int64 over completion tokens: the place in a ``TokenTrace``, -1 = not traced.

    None where no sequence is traced.
    """
    if all(s.trace < 0 for s in sequences):
        return None
    return torch.tensor(
        [s.trace + i if s.trace >= 0 else -1 for s in sequences for i in range(len(s.stage_ids))],
        dtype=torch.long,
    )


def choose(rewards: Seq[float], group_size: int, count: int) -> list[int]:
    """Indices of ``count`` samples: of each group in turn the best and the worst by reward.

    An unusable reward (NaN) counts as the worst.
    """
    chosen: list[int] = []
    for start in range(0, len(rewards), group_size):
        members = range(start, start + group_size)
        key = {i: (rewards[i] == rewards[i], rewards[i]) for i in members}
        best = max(members, key=lambda i: (key[i], -i))
        worst = min((i for i in members if i != best), key=lambda i: (key[i], i))
        chosen += [best, worst]
    return chosen[:count]


def sample_record(task: Task, row: Row, sample: Sample, **more: Any) -> dict[str, Any]:
    """The record of one completion, without the training pass's numbers."""
    text = task.decode(sample.token_ids)
    labels = task.rows.label_sets()[row.dataset_id]
    return {
        "dataset_id": row.dataset_id,
        "label": row.label,
        "predicted": classify(task.grammar.extract_answer(text), labels, match=task.match),
        "well_formed": task.grammar.is_well_formed(text),
        "finish_reason": sample.finish_reason,
        "post": row.text,
        "tokens": token_strings(sample.token_ids, task.tokenizer),
        "stage_ids": task.grammar.stage_ids(sample.token_ids, task.tokenizer),
        "rollout_logprobs": [round(x, 5) for x in sample.logprobs],
        **more,
    }


def token_strings(token_ids: Seq[int], tokenizer: Any) -> list[str]:
    """The text of every token; a character split over tokens belongs to the one that ends it.

    Joined, they are the text, special tokens included.
    """
    found = read_tokens(token_ids, tokenizer)
    ends = [found.ends[i] for i in range(len(token_ids))]
    starts = [0, *ends[:-1]]
    if isinstance(found.text, str):
        return [found.text[a:b] for a, b in zip(starts, ends, strict=True)]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    last = len(ends) - 1
    return [
        decoder.decode(found.text[a:b], final=i == last)
        for i, (a, b) in enumerate(zip(starts, ends, strict=True))
    ]


def numbers(values: Tensor) -> list[float | None]:
    """Six significant digits; null for NaN."""
    return [None if x != x else float(f"{x:.6g}") for x in values.tolist()]

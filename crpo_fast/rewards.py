"""The two built-in rewards and their balance weights.

    format   +0.5 if the completion is well formed (`StageGrammar.is_well_formed`), else -0.5
    answer   +W[d, c] if the answer starts with the gold label, else -W[d, c]; missing is wrong

W[d, c] = sqrt(w_c w_d) of data set d and class c, where w_d and w_c are inverse train frequencies,
normalised to mean 1 over the data sets and over the classes of one; 1 for an unknown pair.

Trap: all samples of a prompt share W, so advantages divided by the group's std cancel it whenever
formats agree, and with W < .5 a correct but malformed sample ranks below a wrong well-formed one.
That is the paper's behaviour and the default; config: rewards.balance = "advantage",
advantages.scale = "batch_std" or "none".
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from crpo_fast.reward_calls import (
    Completion,
    RewardError,
    RewardTable,
    completion_text,
    load_reward,
    score,
)

__all__ = [
    "RewardError",
    "RewardTable",
    "answer_reward",
    "balance_weights",
    "format_reward",
    "load_reward",
    "score",
]


class Grammar(Protocol):
    """What rewards need to know of a `stages.StageGrammar`."""

    def is_well_formed(self, completion: str) -> bool:
        """Strict format."""
        ...

    def extract_answer(self, completion: str) -> str | None:
        """The answer, stripped, or None."""
        ...


def format_reward(
    completions: Sequence[Completion], *, grammar: Grammar, **columns: Any
) -> list[float]:
    """+0.5 for a well-formed completion, -0.5 for any other."""
    del columns
    return [0.5 if grammar.is_well_formed(completion_text(c)) else -0.5 for c in completions]


def answer_reward(
    completions: Sequence[Completion],
    *,
    answer: Sequence[str],
    dataset_id: Sequence[str] | None = None,
    balance_weights: Mapping[tuple[str, str], float] | None = None,
    grammar: Grammar | None = None,
    match: str = "prefix",
    **columns: Any,
) -> list[float]:
    """+W for a correct answer, -W for a wrong or missing one.

    Args:
        completions: N texts, or conversations whose last message is the completion.
        answer: N gold labels.
        dataset_id: N data set names for the lookup of W; None: all "default".
        balance_weights: (data set, label) -> W; None: W = 1.
        grammar: finds the answer; None: what the first ``<answer>`` tag holds. A missing tag is a
            missing answer, unless the grammar has none (``answer_tag = ""``: the whole completion).
        match: "prefix" (the answer starts with the label, followed by no word character) or "exact"
            (the answer is the label); both ignore case.
        columns: other columns, not used.

    Raises:
        ValueError: lengths differ, an empty label, unknown ``match``.
    """
    del columns
    if match not in ("prefix", "exact"):
        raise ValueError(
            f"match: expected 'prefix' or 'exact', got {match!r}. Write match = 'prefix'."
        )
    names = ["default"] * len(completions) if dataset_id is None else dataset_id
    for name, column in (("answer", answer), ("dataset_id", names)):
        if isinstance(column, str) or len(column) != len(completions):
            got = repr(column) if isinstance(column, str) else f"{len(column)} of them"
            raise ValueError(
                f"{name}: expected a list with one entry per completion, {len(completions)}, got "
                f"{got}. Repeat a prompt's value for each of its samples."
            )
    weights = balance_weights or {}
    extract = _answer_tag if grammar is None else grammar.extract_answer
    rewards = []
    for completion, label, name in zip(completions, answer, names, strict=True):
        given = extract(completion_text(completion))
        correct = given is not None and _pattern(label, match).match(given) is not None
        weight = weights.get((name, label), 1.0)
        rewards.append(weight if correct else -weight)
    return rewards


def balance_weights(rows: Iterable[Any]) -> dict[tuple[str, str], float]:
    """W[data set, label] of the train rows (formula above).

    Args:
        rows: `batch.Row` records, or (dataset_id, label) pairs.
    """
    pairs = Counter((r.dataset_id, r.label) if hasattr(r, "dataset_id") else tuple(r) for r in rows)
    sizes: Counter[str] = Counter()
    for (name, _), count in pairs.items():
        sizes[name] += count
    of_dataset = _inverse_frequencies(sizes)
    of_class = {
        name: _inverse_frequencies({c: n for (d, c), n in pairs.items() if d == name})
        for name in sizes
    }
    return {(d, c): math.sqrt(of_class[d][c] * of_dataset[d]) for d, c in pairs}


def _answer_tag(completion: str) -> str | None:
    _, opened, rest = completion.partition("<answer>")
    content, close, _ = rest.partition("</answer>")
    return content.strip() if opened and close else None


@functools.lru_cache(maxsize=1024)
def _pattern(label: str, match: str) -> re.Pattern[str]:
    if not label.strip():
        raise ValueError(f"answer: expected a label, got {label!r}. Fill the answer column.")
    end = r"(?!\w)" if match == "prefix" else r"\Z"
    return re.compile(re.escape(label.strip()) + end, re.IGNORECASE)


def _inverse_frequencies(counts: Mapping[str, int]) -> dict[str, float]:
    """1 / count, normalised to mean 1."""
    mean = math.fsum(1 / n for n in counts.values()) / max(1, len(counts))
    return {key: 1 / n / mean for key, n in counts.items()}

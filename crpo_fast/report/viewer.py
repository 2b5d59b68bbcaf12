"""samples.jsonl -> what the trace viewer shows: text hidden, numbers short, steps thinned.

A run's traces take at most ``budget`` bytes. Where they would take more, only every k-th recorded
step is kept (k = 2, 4, 8, ...) with the first and the last one; the page says so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby
from typing import Any

from crpo_fast.report.privacy import hide

BUDGET = 1_800_000  # bytes of one page


@dataclass(frozen=True)
class View:
    """How records become what is shown.

    Attributes:
        labels: data set -> its labels, where they are a closed set.
        tags: literal tags of the grammar.
        show_text: nothing is hidden, and posts are shown.
    """

    labels: dict[str, list[str]]
    tags: tuple[str, ...]
    show_text: bool = False

    def tokens(self, record: dict[str, Any]) -> list[str]:
        """The tokens, hidden where they must be."""
        tokens = [str(t) for t in record.get("tokens", [])]
        if self.show_text:
            return tokens
        ends = tokens[-1:] if record.get("finish_reason") == "stop" else []
        return hide(
            tokens,
            post=str(record.get("post", "")),
            labels=self.labels.get(record.get("dataset_id", ""), ()),
            tags=(*self.tags, *(e for e in ends if e.startswith("<") and e.endswith(">"))),
        )

    def answer(self, record: dict[str, Any], key: str) -> str | None:
        """A label; hidden like any text where the data set's answers are free."""
        value = record.get(key)
        known = self.labels.get(record.get("dataset_id", ""), ())
        if value is None or self.show_text or value in known:
            return value
        return "".join(hide([str(value)], post=str(record.get("post", ""))))

    def completion(self, record: dict[str, Any]) -> dict[str, Any]:
        """What samples and probes have in common."""
        tokens = self.tokens(record)
        shown = {
            "set": record.get("dataset_id", ""),
            "gold": self.answer(record, "label"),
            "answer": self.answer(record, "predicted"),
            "right": record.get("predicted") == record.get("label"),
            "formed": record.get("well_formed"),
            "finish": record.get("finish_reason"),
            "tokens": tokens,
            "stages": _runs(_fitted(record.get("stage_ids"), len(tokens))),
            "logprobs": _short(record.get("logprobs"), len(tokens)),
            "entropy": _short(record.get("entropy"), len(tokens)),
        }
        if self.show_text:
            shown["post"] = record.get("post")
        return shown

    def sample(self, record: dict[str, Any]) -> dict[str, Any]:
        """A sampled completion with its rewards and weights."""
        shown = self.completion(record)
        count = len(shown["tokens"])
        return {
            **shown,
            "prompt": record.get("prompt", 0),
            "reward": record.get("reward"),
            "rewards": record.get("rewards", {}),
            "advantage": record.get("advantage"),
            "weights": _runs(_fitted(record.get("token_weights"), count)),
            "pressure": _runs(_fitted(record.get("entropy_weights"), count)),
        }


def samples(records: list[dict[str, Any]], view: View, budget: int) -> dict[str, Any]:
    """Sampled completions by step.

    Returns:
        steps: [{step, samples}], recorded: how many steps there are in samples.jsonl.
    """
    by_step: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        if record.get("kind") == "sample":
            by_step.setdefault(record.get("step", 0), []).append(view.sample(record))
    steps = _within(dict(sorted(by_step.items())), budget)
    return {
        "steps": [{"step": step, "samples": by_step[step]} for step in steps],
        "recorded": len(by_step),
    }


def probes(records: list[dict[str, Any]], view: View, budget: int) -> dict[str, Any]:
    """Answers to each probe prompt by step, with what changed since the step shown before.

    Returns:
        prompts: [{set, gold, post (only with text), answers: [{step, ..., changes}]}]; ``changes``:
        [[i, j, k, l], ...]: tokens i..j of the answer before became tokens k..l of this one.
        recorded: how many steps there are in samples.jsonl.
    """
    by_step: dict[int, dict[int, tuple[dict[str, Any], list[str]]]] = {}
    for record in records:
        if record.get("kind") == "probe":  # a step that was answered twice counts once
            answer = view.completion(record), list(record.get("tokens", []))
            by_step.setdefault(record.get("step", 0), {})[record.get("probe", 0)] = answer
    steps = _within({s: [a for a, _ in by_step[s].values()] for s in sorted(by_step)}, budget)
    numbers = sorted({number for answers in by_step.values() for number in answers})
    prompts = [[(s, *by_step[s][n]) for s in steps if n in by_step[s]] for n in numbers]
    return {"prompts": [_prompt(p) for p in prompts if p], "recorded": len(by_step)}


def _prompt(answers: list[tuple[int, dict[str, Any], list[str]]]) -> dict[str, Any]:
    """What is the same for all answers once, the answers with their changes."""
    common = {key: answers[0][1][key] for key in ("set", "gold", "post") if key in answers[0][1]}
    shown, before = [], None
    for step, completion, tokens in answers:
        own = {key: value for key, value in completion.items() if key not in common}
        changes = [] if before is None else _changes(before, tokens)
        shown.append({"step": step, **own, "changes": changes})
        before = tokens
    return {**common, "answers": shown}


def _changes(before: list[str], after: list[str]) -> list[list[int]]:
    is_long = len(after) > 400  # then frequent tokens may not anchor a match: quadratic otherwise
    matcher = SequenceMatcher(None, before, after, autojunk=is_long)
    return [[i, j, k, m] for tag, i, j, k, m in matcher.get_opcodes() if tag != "equal"]


def _within(shown: dict[int, Any], budget: int) -> list[int]:
    """As many steps, evenly taken, as fit into ``budget`` bytes; ``shown``: step -> its data."""
    sizes = {step: len(json.dumps(value, separators=(",", ":"))) for step, value in shown.items()}
    steps, every = list(shown), 1
    while True:
        kept = [s for i, s in enumerate(steps) if i % every == 0 or i == len(steps) - 1]
        if len(kept) <= 2 or sum(sizes[s] for s in kept) <= budget:
            return kept
        every *= 2


def _fitted(values: Any, count: int) -> list[Any]:
    """``count`` values; None where there are none (a masked completion has no numbers)."""
    found = list(values or [])[:count]
    return found + [None] * (count - len(found))


def _short(values: Any, count: int) -> list[float | None]:
    """Three decimals."""
    return [None if v is None else round(float(v), 3) for v in _fitted(values, count)]


def _runs(values: list[Any]) -> list[list[Any]]:
    """[[value, how many times in a row], ...]; numbers with four significant digits."""
    short = [float(f"{v:.4g}") if isinstance(v, float) else v for v in values]
    return [[value, len(list(members))] for value, members in groupby(short)]

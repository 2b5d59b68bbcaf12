r"""Stages of a completion: where each is, which tokens it holds, what their entropy costs.

    <think>
    <stimulus> ... </stimulus><primary_appraisal> ... </primary_appraisal> ... </think>
    <answer> ... </answer>

Spans. Stage k holds the text between the first ``<tag>`` and the first ``</tag>``, if the open tag
comes first; the prompt ends with the prefill ``<think>\n<stimulus>``, so where the first stage
has a close tag and no open tag it begins at offset 0. A token belongs to a stage when it lies
wholly inside its span, every other token has -1; where malformed text makes spans overlap, the
later stage wins. Offsets come from the sampled ids.

Schedule. beta_k for k = 1..K, tau = (K + 2) / 2 unless given, h = max(tau - 1, K - tau); all are
odd about tau and bounded by the magnitude M. beta_k > 0 is a penalty on entropy (commit), beta_k
< 0 a bonus (explore):

    tanh      M tanh(k - tau)                       the paper's; M = .06
    linear    M (k - tau) / h
    cosine    M sin(pi (k - tau) / (2 h))           half a cosine wave, flat where it ends
    step      M sign(k - tau)
    explicit  every stage's own ``coef``            elsewhere a ``coef`` replaces its stage's beta_k

    >>> [round(beta, 4) for beta in StageGrammar.preset("mental_r1").coefs()]
    [-0.0592, -0.0543, -0.0277, 0.0277, 0.0543]

Source: CRPO (arXiv 2606.13176) and its authors' code.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from crpo_fast.stage_presets import PRESETS
from crpo_fast.token_text import read_tokens

__all__ = ["SCHEDULES", "Stage", "StageGrammar"]

SCHEDULES = ("tanh", "linear", "cosine", "step", "explicit")  # formulas above
_TAG = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: how metrics, tables and cold-start files call it.
        tag: what stands between ``<`` and ``>``; empty means the name.
        instruction: what the system prompt asks for.
        coef: entropy coefficient in place of the schedule's (> 0 penalty, < 0 bonus).
    """

    name: str
    tag: str = ""
    instruction: str = ""
    coef: float | None = None

    def __post_init__(self) -> None:
        if not self.tag:
            object.__setattr__(self, "tag", self.name)

    @property
    def open(self) -> str:
        """``<tag>``."""
        return f"<{self.tag}>"

    @property
    def close(self) -> str:
        """``</tag>``."""
        return f"</{self.tag}>"


@dataclass(frozen=True)
class StageGrammar:
    """The stages of a completion, in order, and the schedule of their entropy coefficients.

    Without stages there is no prefill and no thinking part, and the format is the answer tag
    alone. An empty ``answer_tag`` (only without stages) makes the whole completion the answer.

    Attributes:
        stages: in the order of the completion.
        schedule: of the coefficients, one of `SCHEDULES`.
        magnitude: M, the largest |coefficient| of the schedule.
        tau: the stage number, from 1, where the sign changes; None: (K + 2) / 2.
        think_tag: around all stages.
        answer_tag: around the answer.

    Raises:
        ValueError: an unknown schedule, numbers out of range, or tags that clash.

    Example:
        >>> grammar = StageGrammar.preset("mental_r1")
        >>> text = grammar.render(dict.fromkeys(grammar.names, "..."), answer="stress")
        >>> grammar.is_well_formed(text), grammar.extract_answer(text)
        (True, 'stress')
        >>> grammar.is_well_formed(text.replace("<answer>", ""))
        False
    """

    stages: tuple[Stage, ...] = ()
    schedule: str = "tanh"
    magnitude: float = 0.06
    tau: float | None = None
    think_tag: str = "think"
    answer_tag: str = "answer"

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        self._check_schedule()
        self._check_tags()

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> StageGrammar:
        """A named stage list.

        Args:
            name: of the list, such as "mental_r1"; "none": no stages.
            **overrides: fields of the grammar.

        Raises:
            ValueError: unknown preset or field; the nearest valid name is offered.
        """
        if name not in PRESETS:
            raise ValueError(_unknown("preset", name, PRESETS))
        valid = [field.name for field in fields(cls)]
        for key in overrides:
            if key not in valid:
                raise ValueError(_unknown("StageGrammar.preset", key, valid))
        stages = tuple(Stage(tag, tag, instruction) for tag, instruction in PRESETS[name].items())
        arguments: dict[str, Any] = {"stages": stages, **overrides}
        return cls(**arguments)

    @property
    def names(self) -> list[str]:
        """Of the stages, in order."""
        return [stage.name for stage in self.stages]

    @property
    def num_stages(self) -> int:
        """K."""
        return len(self.stages)

    @property
    def prefill(self) -> str:
        """The text that ends the prompt: the completion starts inside the first stage."""
        return f"<{self.think_tag}>\n{self.stages[0].open}" if self.stages else ""

    @cached_property
    def tags(self) -> tuple[str, ...]:
        """Every tag of a well-formed completion, in order."""
        answer = (f"<{self.answer_tag}>", f"</{self.answer_tag}>") if self.answer_tag else ()
        if not self.stages:
            return answer
        inside = [tag for stage in self.stages for tag in (stage.open, stage.close)]
        return (f"<{self.think_tag}>", *inside, f"</{self.think_tag}>", *answer)

    def coefs(self) -> list[float]:
        """Entropy coefficients beta_1..beta_K (formulas above)."""
        return [
            beta if stage.coef is None else float(stage.coef)
            for stage, beta in zip(self.stages, self._scheduled(), strict=True)
        ]

    def _scheduled(self) -> list[float]:
        count = self.num_stages
        tau = (count + 2) / 2 if self.tau is None else self.tau
        half = max(tau - 1, count - tau) or 1.0
        shape = {
            "tanh": math.tanh,
            "linear": lambda x: x / half,
            "cosine": lambda x: math.sin(math.pi * x / (2 * half)),
            "step": lambda x: float(x > 0) - float(x < 0),
            "explicit": lambda _: 0.0,  # never used: every stage has its coef
        }[self.schedule]
        return [self.magnitude * shape(k - tau) + 0.0 for k in range(1, count + 1)]  # no -0.0

    def stage_ids(self, token_ids: Iterable[int], tokenizer: Any) -> list[int]:
        """The stage of every sampled token: 0-based, -1 for none.

        Args:
            token_ids: N ids of one completion as sampled (without the prompt and its prefill).
            tokenizer: the model's tokenizer (see `token_text.read_tokens`).

        Raises:
            ValueError: an id is negative.
        """
        read = read_tokens(token_ids, tokenizer)
        stage_ids = [-1] * len(read.ends)
        for index, stage in enumerate(self.stages):
            stop = read.find(stage.close)
            if stop < 0:
                continue
            start = read.find(stage.open)
            if start >= 0:
                start += len(stage.open)
            elif index == 0:
                start = 0  # opened by the prefill
            if 0 <= start < stop:
                first, last = read.tokens_within(start, stop)
                stage_ids[first:last] = [index] * (last - first)
        return stage_ids

    def is_well_formed(self, completion: str) -> bool:
        """Every tag exactly once and in order, no stage and no answer empty.

        Args:
            completion: its text; text between the tags is tolerated, and the prefill is prepended
                where it is absent.
        """
        text = completion
        if self.stages and not text.lstrip().startswith(f"<{self.think_tag}>"):
            text = self.prefill + text
        if not self.tags:
            return bool(text.strip())
        position = -1
        for tag in self.tags:
            found = text.find(tag)
            if found <= position or text.find(tag, found + 1) >= 0:
                return False
            position = found
        pairs = [(stage.open, stage.close) for stage in self.stages]
        if self.answer_tag:
            pairs.append((self.tags[-2], self.tags[-1]))
        return all(text[text.find(a) + len(a) : text.find(b)].strip() for a, b in pairs)

    def extract_answer(self, completion: str) -> str | None:
        """What the first answer tag holds, stripped; None where there is no such pair of tags.

        Args:
            completion: its text.
        """
        if not self.answer_tag:
            return completion.strip()
        _, _, rest = completion.partition(f"<{self.answer_tag}>")
        content, close, _ = rest.partition(f"</{self.answer_tag}>")
        return content.strip() if close else None

    def render(self, contents: dict[str, str], answer: str) -> str:
        """The well-formed completion that follows the prefill.

        Args:
            contents: stage name -> what the stage holds, for every stage.
            answer: what the answer tag holds.

        Raises:
            ValueError: a stage is missing, unknown or empty, or a tag occurs inside a content.
        """
        for name in contents:
            if name not in self.names:
                raise ValueError(_unknown("contents", name, self.names))
        missing = [name for name in self.names if not contents.get(name, "").strip()]
        if missing or not answer.strip():
            raise ValueError(
                "contents: expected text for every stage and the answer, got none for "
                f"{missing or ['answer']}. Write a sentence for each, or leave the row out of the "
                "cold start."
            )
        filled = {"": answer, **contents}
        for name, content in filled.items():
            if clash := next((tag for tag in self.tags if tag in content), None):
                raise ValueError(
                    f"contents: expected no tags inside {name or 'the answer'!r}, got {clash!r}. "
                    "Remove the tag."
                )
        return self._join({name: content.strip() for name, content in filled.items()})

    def _join(self, filled: dict[str, str]) -> str:
        stages = "".join(f"{stage.open}{filled[stage.name]}{stage.close}" for stage in self.stages)
        text = stages.removeprefix(self.stages[0].open) + f"</{self.think_tag}>" if stages else ""
        return text + (filled[""].join(self.tags[-2:]) if self.answer_tag else filled[""])

    def system_prompt(self) -> str:
        """What tells a model about the stages; empty where there is nothing to say."""
        if not self.answer_tag:
            return ""
        answer = f"<{self.answer_tag}>...</{self.answer_tag}>"
        if not self.stages:
            return f"Give the final answer between tags, with nothing else inside them: {answer}"
        steps = [f"{i}. {s.open}...{s.close} {s.instruction}" for i, s in enumerate(self.stages, 1)]
        head = (
            "You assess what a person's words reveal about their state of mind, one appraisal step "
            f"at a time.\nReason between <{self.think_tag}> and </{self.think_tag}>. Write each of "
            "these steps once, in this order, each between its own tags:"
        )
        tail = (
            "Then give the final answer, one of the options you were offered and nothing else: "
            f"{answer}"
        )
        return "\n".join([head, *map(str.rstrip, steps), tail])

    def _check_schedule(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(_unknown("schedule", self.schedule, SCHEDULES))
        numbers = [("magnitude", self.magnitude), ("tau", self.tau)]
        numbers += [(f"coef of stage {stage.name!r}", stage.coef) for stage in self.stages]
        for name, value in numbers:
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number, got {value}. Write e.g. 0.06.")
        missing = [stage.name for stage in self.stages if stage.coef is None]
        if self.schedule == "explicit" and missing:
            raise ValueError(
                "schedule: expected a coef for every stage with schedule = 'explicit', got none "
                f"for {missing}. Write e.g. coef = -0.05 in their [[stages]] tables, or choose "
                "schedule = 'tanh'."
            )

    def _check_tags(self) -> None:
        if self.stages and not self.answer_tag:
            raise ValueError(
                "answer_tag: expected a tag, got ''. Write answer_tag = 'answer'; "
                "only a grammar without stages may take the whole completion as the answer."
            )
        tags = [stage.tag for stage in self.stages] + [self.think_tag]
        tags += [self.answer_tag] if self.answer_tag else []
        for tag in tags:
            if not isinstance(tag, str) or not _TAG.fullmatch(tag):
                raise ValueError(
                    f"tag: expected a letter followed by letters, digits, '_' or '-', got {tag!r}. "
                    "Write the tag without its brackets, e.g. tag = 'mental_state'."
                )
        for index, name in enumerate(self.names):
            if name in self.names[:index]:
                raise ValueError(
                    f"stages: expected different names, got {name!r} twice. Rename one of them."
                )
        for index, tag in enumerate(tags):
            for other in tags[:index]:
                _check_pair(other, tag)


def _check_pair(one: str, other: str) -> None:
    if one == other:
        raise ValueError(
            "tag: expected different tags for the stages, thinking and the answer, got "
            f"{one!r} twice. Rename one of them."
        )
    short, long = sorted((one, other), key=len)
    if long.startswith(short):
        raise ValueError(
            "tag: expected no stage tag to be a prefix of another tag, got "
            f"{short!r} and {long!r}. Rename one so that neither begins with the other."
        )


def _unknown(argument: str, value: object, valid: Iterable[str]) -> str:
    choices = list(valid)
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{argument}: expected one of {', '.join(choices) or 'no names'}, got {value!r}.{hint}"


def check_same_stages(names: list[str], saved: list[str]) -> None:
    """Refuse a saved state of other stages.

    Raises:
        ValueError: names both.
    """
    if saved != names:
        raise ValueError(
            f"state: expected the stages {names}, got {saved}. Resume with the stages of the "
            "checkpoint, or start a new run folder."
        )


def check_one_per_stage(names: Sequence[str], entropies: Sequence[float | None]) -> None:
    """Refuse a list of entropies of other stages.

    Raises:
        ValueError: not one entropy per stage.
    """
    if len(entropies) != len(names):
        raise ValueError(
            f"entropies: expected one per stage, {len(names)}, got {len(entropies)}. "
            "Pass None for a stage that does not occur."
        )

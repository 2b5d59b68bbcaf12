"""Which calls of reward functions are due, and what follows from their answers.

One call of a function gets the samples of one prompt, so that functions may compare them. When a
call fails (exception, timeout, wrong length, crash),

    1. its samples are called one by one: those that fail alone are the guilty and get NaN;
    2. the others are called together again; if that fails too, all of them get NaN.

So every value comes from a call of the whole group, or of the group without the guilty. A value
that is NaN, infinite or no number costs its own sample only.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from crpo_fast.reward_calls import RewardFailure, RewardTable, add_up


@dataclass(eq=False)
class _Group:
    """The samples of one prompt under one function, and what is known of them."""

    function: int
    samples: list[int]
    waiting: int = 0  # calls of single samples that have not answered
    innocent: dict[int, dict[str, Any]] = field(default_factory=dict)  # sample -> answer alone


@dataclass(eq=False)
class Call:
    """One call of a function.

    Attributes:
        group: what it belongs to.
        samples: indices of the completions it gets.
        step: "group", "alone" or "again" (see the top).
        shares: it may share a worker's event loop with other calls (coroutines only).
    """

    group: _Group
    samples: list[int]
    step: str = "group"
    shares: bool = True

    @property
    def function(self) -> int:
        """Index of the function."""
        return self.group.function


class GroupCalls:
    """All calls of one batch of completions.

    Args:
        names: of the functions.
        per_sample: keyword -> [N] values, "completions" among them.
        group_size: completions per prompt, side by side.

    Attributes:
        due: calls to be made, in this order.
        failed: samples without a usable value of every function so far.
    """

    def __init__(
        self, names: Sequence[str], per_sample: Mapping[str, Sequence[Any]], group_size: int
    ) -> None:
        count = len(per_sample["completions"])
        self.due: deque[Call] = deque()
        self.failed: set[int] = set()
        self._names, self._per_sample, self._count = names, per_sample, count
        self._values: list[list[float | None]] = [[math.nan] * count for _ in names]
        self._errors: list[RewardFailure] = []
        self._recovered: set[int] = set()
        self._open = {(k, i) for k in range(len(names)) for i in range(count)}
        for k in range(len(names)):
            for start in range(0, count, group_size):
                group = _Group(k, list(range(start, min(start + group_size, count))))
                self.due.append(Call(group, group.samples))

    def keywords(self, call: Call) -> dict[str, list[Any]]:
        """The arguments of a call."""
        return {name: [v[i] for i in call.samples] for name, v in self._per_sample.items()}

    def take(self, call: Call, answer: dict[str, Any]) -> None:
        """A worker's answer to a call (see `reward_worker`)."""
        if "error" in answer:
            self.fail(call, answer["error"], answer["text"])
        elif call.step == "alone":
            call.group.innocent[call.samples[0]] = answer
            self._one_less(call.group)
        else:
            self._accept(call, answer)
            if call.step == "again" and len(call.samples) == len(call.group.samples):
                self._recovered.update(call.samples)

    def fail(self, call: Call, kind: str, text: str) -> None:
        """A call gave no values."""
        if call.step == "group" and len(call.samples) > 1:
            call.group.waiting = len(call.samples)
            # first: so it is soon known who is guilty, and whether the run has to stop
            alone = [Call(call.group, [i], "alone", shares=False) for i in call.samples]
            self.due.extendleft(reversed(alone))
            return
        for sample in call.samples:
            self._close(call.function, sample, math.nan)
            self._error(call.function, kind, sample, text)
        if call.step == "alone":
            self._one_less(call.group)

    def table(self, weights: Sequence[float]) -> RewardTable:
        """What is known now; samples with an open call are not run."""
        parts = dict(zip(self._names, self._values, strict=True))
        not_run = {sample for _, sample in self._open} - self.failed
        return add_up(
            parts,
            weights,
            self._count,
            self._errors,
            recovered=len(self._recovered),
            not_run=len(not_run),
        )

    def _one_less(self, group: _Group) -> None:
        """When all single samples have answered: the innocent ones together."""
        group.waiting -= 1
        if group.waiting or not group.innocent:
            return
        again = Call(group, sorted(group.innocent), "again", shares=False)
        if len(again.samples) == 1:
            self._accept(again, group.innocent[again.samples[0]])
        else:
            self.due.appendleft(again)

    def _accept(self, call: Call, answer: dict[str, Any]) -> None:
        for sample, value in zip(call.samples, answer["values"], strict=True):
            self._close(call.function, sample, value)
        for place, text in answer["bad"]:
            self._error(call.function, "nan", call.samples[place], text)

    def _close(self, function: int, sample: int, value: float | None) -> None:
        self._values[function][sample] = value
        self._open.discard((function, sample))

    def _error(self, function: int, kind: str, sample: int, text: str) -> None:
        self._errors.append(RewardFailure(kind, self._names[function], sample, text))
        self.failed.add(sample)

"""Reward functions in worker processes that may hang, crash or lie without harming the run.

A call may take ``timeout`` seconds per sample. A worker that hangs or crashes is killed with all
that it started, and replaced; `reward_groups` says what becomes of the samples it had.

Coroutine functions: the groups of a step are shared out evenly and awaited together in each worker.
Other functions get one group at a time.
"""

from __future__ import annotations

import math
import os
import selectors
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from crpo_fast.reward_calls import (
    Completion,
    RewardError,
    RewardFunction,
    RewardTable,
    named,
    per_sample_keywords,
    score,
)
from crpo_fast.reward_groups import Call, GroupCalls
from crpo_fast.reward_process import WorkerDied, WorkerProcess, frame, search_path

STARTS = 3  # workers in a row that may end before they are ready
GRACE = 1.0  # seconds: for idle workers to leave, for an event loop to report its own timeout
_LOOK = 0.2  # seconds between looks at workers whose socket a child of theirs holds open


@dataclass(eq=False)
class _Worker:
    """A process, what it does now, and until when (time.monotonic)."""

    process: WorkerProcess
    deadline: float
    ready: bool = False
    calls: list[Call] = field(default_factory=list)

    @property
    def is_awaited(self) -> bool:
        """Whether it owes an answer."""
        return bool(self.calls) or not self.ready


class Scorer(Protocol):
    """Who calls the reward functions; a context manager that closes at its end."""

    def bind(self, **shared: Any) -> None:
        """Further keywords of all calls."""
        ...

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        columns: Mapping[str, Sequence[Any]],
        group_size: int,
        max_failed: float = math.inf,
    ) -> RewardTable:
        """Rewards of N completions (see `RewardPool.score`)."""
        ...

    def __enter__(self) -> Scorer: ...

    def __exit__(self, *_: object) -> None: ...


class InProcessRewards:
    """Calls the functions here: an exception of theirs raises, and one that hangs hangs all."""

    def __init__(self, functions: Sequence[RewardFunction], weights: Sequence[float] = ()) -> None:
        self._functions = named(functions)
        self._weights = list(weights) or [1.0] * len(functions)
        self._shared: dict[str, Any] = {}

    def __enter__(self) -> InProcessRewards:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def bind(self, **shared: Any) -> None:
        """Further keywords of all calls."""
        self._shared = shared

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        columns: Mapping[str, Sequence[Any]],
        group_size: int,
        max_failed: float = math.inf,
    ) -> RewardTable:
        """As `RewardPool.score`; ``max_failed`` has no use here.

        Raises:
            RewardError: a function raised or returned the wrong thing.
        """
        del max_failed
        total, errors = [], []
        parts: dict[str, list[float | None]] = {name: [] for name in self._functions}
        for start in range(0, len(completions), group_size):
            here = slice(start, start + group_size)
            group = {name: values[here] for name, values in columns.items()}
            table = score(
                self._functions,
                self._weights,
                prompts[here],
                completions[here],
                group,
                **self._shared,
            )
            total += table.total
            errors += [replace(e, sample=e.sample + start) for e in table.errors]
            for name, values in table.parts.items():
                parts[name] += values
        return RewardTable(total, parts, tuple(errors))


class RewardPool:
    """Processes that call reward functions.

    Args:
        paths: ``module:function`` each.
        weights: one per function; empty: all 1.
        workers: processes, at least 1.
        timeout: seconds per sample of a call.
        start_timeout: seconds until a worker has imported the functions.

    Attributes:
        names: of the functions, when a worker is ready.
    """

    def __init__(
        self,
        paths: Sequence[str],
        weights: Sequence[float] = (),
        *,
        workers: int = 1,
        timeout: float = 10.0,
        start_timeout: float = 300.0,
    ) -> None:
        self.names: list[str] = []
        self._paths, self._weights = list(paths), list(weights) or [1.0] * len(paths)
        self._count, self._timeout, self._start_timeout = workers, timeout, start_timeout
        self._asynchronous: list[bool] = []
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self._shared: dict[str, Any] = {}
        self._failed_starts = 0
        self._fill()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """The processes that run now."""
        return [worker.process.pid for worker in self._workers]

    def bind(self, **shared: Any) -> None:
        """Further keywords of all calls, sent to every worker once."""
        self._shared = shared
        for worker in self._workers:
            worker.process.send(frame("shared", shared))

    def wait_ready(self) -> None:
        """Return when a worker has imported the functions.

        Raises:
            RewardError: a function is refused, or the workers do not start.
        """
        while not self.names:
            self._exchange(None)

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        columns: Mapping[str, Sequence[Any]],
        group_size: int,
        max_failed: float = math.inf,
    ) -> RewardTable:
        """Rewards of N completions.

        Args:
            prompts: N prompts.
            completions: N completions, ``group_size`` of each prompt side by side.
            columns: name -> N values, handed over by name.
            group_size: completions per prompt.
            max_failed: when more samples than this have failed, the rest is not run (but counted).

        Raises:
            RewardError: the workers do not start.
            ValueError: the lengths of the arguments do not fit.
        """
        self.wait_ready()
        self._fill()
        per_sample = per_sample_keywords(prompts, completions, columns, self._shared)
        groups = GroupCalls(self.names, per_sample, group_size)
        while groups.due or any(worker.calls for worker in self._workers):
            if len(groups.failed) > max_failed:
                self._abandon()
                break
            self._hand_out(groups)
            self._exchange(groups)
        return groups.table(self._weights)

    def close(self) -> None:
        """End all workers; none is left when this returns."""
        for worker in self._workers:
            worker.process.ask_to_end()
        deadline = time.monotonic() + GRACE
        for worker in self._workers:
            self._selector.unregister(worker.process)
            worker.process.end(0.0 if worker.is_awaited else deadline)
        self._workers = []
        self._selector.close()

    def _fill(self) -> None:
        """Start the workers that are missing."""
        while len(self._workers) < self._count:
            path = search_path()
            process = WorkerProcess(path)
            payload = {
                "functions": self._paths,
                "path": path,
                "pythonpath": os.environ.get("PYTHONPATH"),
                "timeout": self._timeout,
            }
            worker = _Worker(process, time.monotonic() + self._start_timeout)
            self._workers.append(worker)
            self._selector.register(process, selectors.EVENT_READ, worker)
            process.send(frame("load", payload) + frame("shared", self._shared))

    def _hand_out(self, groups: GroupCalls) -> None:
        """Due calls to idle workers."""
        for worker in self._workers:
            if not groups.due:
                return
            if worker.ready and not worker.calls:
                self._give(worker, groups)

    def _give(self, worker: _Worker, groups: GroupCalls) -> None:
        """The next call; of a coroutine function, this worker's share of the groups."""
        calls = [groups.due.popleft()]
        function = calls[0].function
        if calls[0].shares and self._asynchronous[function]:
            num_due = 1 + sum(c.shares and c.function == function for c in groups.due)
            share = math.ceil(num_due / self._count)
            while len(calls) < share and groups.due:
                if not (groups.due[0].shares and groups.due[0].function == function):
                    break
                calls.append(groups.due.popleft())
        samples = sum(len(call.samples) for call in calls)
        grace = GRACE if self._asynchronous[function] else 0.0
        worker.calls = calls
        worker.deadline = time.monotonic() + samples * self._timeout + grace
        payload = {"function": function, "calls": [groups.keywords(call) for call in calls]}
        worker.process.send(frame("job", payload))

    def _exchange(self, groups: GroupCalls | None) -> None:
        """Wait for answers, take them in, replace workers that died or are late."""
        for worker in self._workers:
            write = selectors.EVENT_WRITE if worker.process.wants_to_send else 0
            if self._selector.get_key(worker.process).events != selectors.EVENT_READ | write:
                self._selector.modify(worker.process, selectors.EVENT_READ | write, worker)
        awaited = [w.deadline for w in self._workers if w.is_awaited]
        first = min(awaited, default=math.inf) - time.monotonic()
        events = self._selector.select(min(_LOOK, max(0.0, first)))
        touched = [key.data for key, _ in events] or list(self._workers)
        for worker in touched:
            worker.process.flush()
            try:
                for answer in worker.process.receive():
                    self._take(worker, answer, groups)
            except WorkerDied as death:
                self._lose(worker, groups, "crash", f"the worker ended: {death}")
        now = time.monotonic()
        for worker in [w for w in self._workers if w.is_awaited and now >= w.deadline]:
            worker.process.kill()
            samples = sum(len(call.samples) for call in worker.calls)
            self._lose(worker, groups, "timeout", f"no answer within {samples * self._timeout:g} s")
        self._fill()

    def _take(self, worker: _Worker, answer: dict[str, Any], groups: GroupCalls | None) -> None:
        if "refused" in answer:
            raise RewardError(answer["refused"])
        if "ready" in answer:
            self.names, self._asynchronous = answer["ready"], answer["asynchronous"]
            self._failed_starts, worker.ready = 0, True
            return
        calls, worker.calls = worker.calls, []
        for call, result in zip(calls, answer["results"], strict=True):
            assert groups is not None, "an answer outside of score"
            groups.take(call, result)

    def _lose(self, worker: _Worker, groups: GroupCalls | None, kind: str, text: str) -> None:
        """Forget a worker that is dead; its calls are made again or have failed."""
        self._selector.unregister(worker.process)
        self._workers.remove(worker)
        if not worker.ready:
            self._failed_starts += 1
            late = kind == "timeout"
            if late or self._failed_starts >= STARTS:
                what = f"not within {self._start_timeout:g} s" if late else text
                raise RewardError(
                    f"rewards.functions: expected a worker that imports {', '.join(self._paths)}, "
                    f"got none: {what}. Import them in Python alone to see why, or raise "
                    "--rewards.start_timeout."
                )
        for call in reversed(worker.calls):
            if len(worker.calls) > 1 and groups is not None:  # one of them did it; not together
                call.shares = False
                groups.due.appendleft(call)
            elif groups is not None:
                groups.fail(call, kind, text)

    def _abandon(self) -> None:
        """Stop what is running; the next ``score`` starts new workers."""
        for worker in [w for w in self._workers if w.calls]:
            self._selector.unregister(worker.process)
            self._workers.remove(worker)
            worker.process.kill()

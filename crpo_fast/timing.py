"""Where the time of a step goes, and what this process is doing now.

with timer("generation"): ...     adds to the part "rollout" and names what the process is in
activity()                        that name, e.g. "generation", from any thread
lap()                             seconds of every part since the last lap

A timer inside another one stops the outer one, so that no second counts twice. Costs a microsecond.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

# activity (what messages say) -> part of a step (metric ``seconds/<part>``)
PARTS = {
    "generation": "rollout",
    "reward": "reward",
    "forward": "train",
    "backward": "train",
    "optimizer": "train",
    "sync": "sync",
    "save": "checkpoint",
    "evaluation": "eval",
    "probes": "probes",
    "load": "other",
    "exchange": "other",  # counts and metrics of all ranks
    "tokenizer": "other",
    "model": "other",
    "report": "other",
}
NAMES = tuple(dict.fromkeys(PARTS.values()))  # every part once, "other" last
IDLE = "between two parts"

# activity -> part of a whole run; what is not here is "other"
RUN_PARTS = {
    "load": "data",
    "tokenizer": "tokenizer",
    "model": "model",
    "generation": "rollout",
    "reward": "reward",
    "forward": "train",
    "backward": "train",
    "optimizer": "train",
    "evaluation": "evaluation",
    "probes": "evaluation",
    "save": "checkpoints",
    "report": "report",
}
START, COLD_START = "start-up", "cold start"  # scopes: they take what has no part, or trains
RUN_NAMES = (START, "tokenizer", "model", "data", COLD_START, "rollout", "reward", "train",
             "evaluation", "checkpoints", "report", "other")  # fmt: skip


class Stopwatch:
    """Seconds by part, each second in exactly one part; what no timer covers is ``other``.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._running: list[str] = []  # activities, the innermost last
        self._left_by_error = ""
        self.detail = ""  # how far the activity is, for people
        self.step = 0  # of the run; for messages
        self._seconds = dict.fromkeys(NAMES, 0.0)
        self._of_run = dict.fromkeys(RUN_NAMES, 0.0)
        self._scope = START
        self._mark = self._entered = clock()

    @property
    def activity(self) -> str:
        """The innermost activity that runs, or ``IDLE``."""
        return (self._running or [IDLE])[-1]

    @property
    def failed_activity(self) -> str:
        """The innermost activity that an exception left last, else the one that runs."""
        return self._left_by_error or self.activity

    @property
    def seconds_in_activity(self) -> float:
        """How long it has been in it."""
        return self._clock() - self._entered

    @contextmanager
    def timer(self, activity: str) -> Iterator[None]:
        """The block is ``activity``, one of ``PARTS``."""
        assert activity in PARTS, f"activity: expected one of {sorted(PARTS)}, got {activity!r}"
        outer_entered = self._entered
        self._charge()
        self._running.append(activity)
        self._entered = self._mark
        self._left_by_error = self.detail = ""
        try:
            yield
        except BaseException:
            self._left_by_error = self._left_by_error or activity
            raise
        finally:
            self._charge()
            self._running.pop()
            self.detail = ""
            self._entered = outer_entered

    def lap(self) -> dict[str, float]:
        """Seconds of each of ``NAMES`` since the last lap; they add up to the time between."""
        self._charge()
        seconds = self._seconds
        self._seconds = dict.fromkeys(NAMES, 0.0)
        return seconds

    def enter(self, scope: str) -> None:
        """From here on ``scope`` has the run's seconds of no part, and those that train; "": none.

        Before the first call it is ``START``.
        """
        self._charge()
        self._scope = scope

    def run_seconds(self) -> dict[str, float]:
        """Seconds of each of ``RUN_NAMES`` since the watch was made; they add up to all of them."""
        self._charge()
        return dict(self._of_run)

    def _charge(self) -> None:
        now, activity = self._clock(), self.activity
        self._seconds[PARTS.get(activity, "other")] += now - self._mark
        part = RUN_PARTS.get(activity, "other")
        if self._scope and part in ("other", "train"):
            part = self._scope
        self._of_run[part] += now - self._mark
        self._mark = now


_PROCESS = Stopwatch()


def timer(activity: str) -> AbstractContextManager[None]:
    """Times a block of this process; see ``Stopwatch.timer``."""
    return _PROCESS.timer(activity)


def activity() -> str:
    """What this process is doing now: a key of ``PARTS``, or ``IDLE``."""
    return _PROCESS.activity


def failed_activity() -> str:
    """What it was doing when the last exception came; without one, what it is doing now."""
    return _PROCESS.failed_activity


def begin_step(step: int) -> None:
    """Step ``step`` of the run begins (counted from 1)."""
    _PROCESS.step = step


def where(activity: str) -> str:
    """``activity`` with the step that this process is in, for messages."""
    return f"{activity} (step {_PROCESS.step})" if _PROCESS.step else activity


@contextmanager
def exchange() -> Iterator[None]:
    """A collective outside of every activity; inside one it belongs to that."""
    if _PROCESS.activity != IDLE:
        yield
        return
    with _PROCESS.timer("exchange"):
        yield


def enter(scope: str) -> None:
    """See ``Stopwatch.enter``."""
    _PROCESS.enter(scope)


def run_seconds() -> dict[str, float]:
    """Seconds of this process since this module was imported, by part of a run."""
    return _PROCESS.run_seconds()


def seconds_in_activity() -> float:
    """How long it has been doing that."""
    return _PROCESS.seconds_in_activity


def set_detail(text: str) -> None:
    """How far the activity is, e.g. "64 of 320 rows"; forgotten when it ends."""
    _PROCESS.detail = text


def detail() -> str:
    """What ``set_detail`` said last about the activity that runs."""
    return _PROCESS.detail


def lap() -> dict[str, float]:
    """Seconds of every part of this process since the last lap."""
    return _PROCESS.lap()


def rates(
    seconds: dict[str, float], tokens: float, trained: float, sampled: float
) -> dict[str, float]:
    """The metrics of one step that depend on the clock.

    Args:
        seconds: a lap, over ranks the largest of each part; with ``step``, the whole.
        tokens: of the step's sequences, prompts included, of all ranks.
        trained: tokens that went through forward and backward, of all updates and ranks.
        sampled: tokens that were generated for it, of all ranks.

    Returns:
        seconds/<part>, seconds/step, and tokens per second: of the whole step, of the training
        part (trained) and of the rollout (sampled); 0 where a part took no time.
    """
    found = {f"seconds/{name}": value for name, value in seconds.items()}
    found["tokens_per_second"] = _ratio(tokens, seconds["step"])
    found["tokens_per_second/train"] = _ratio(trained, seconds["train"])
    found["tokens_per_second/rollout"] = _ratio(sampled, seconds["rollout"])
    return found


def _ratio(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0

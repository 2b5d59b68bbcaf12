"""The parts of a gate: named checks with their values, what was not run."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.deadline import LATE, OutOfTime
from benchmarks.output import say


class CannotRun(Exception):
    """A check that this device or this machine does not allow; the text is the reason."""


@dataclass
class Part:
    """What one part of the gate found.

    Attributes:
        name: of the part.
        seconds: its limit of time; nothing new begins after it.
        is_vital: what it drops for lack of time fails the gate.
        checks: name, value, limit, is_met of each check.
        not_run: name and reason of what was left out.
        results: tables and the like.
        error: why it ended early, or "".
    """

    name: str
    seconds: float
    is_vital: bool = True
    checks: list[dict[str, Any]] = field(default_factory=list)
    not_run: list[dict[str, str]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    begin: float = field(default_factory=time.monotonic)

    def is_late(self) -> bool:
        """Whether the part has used its time."""
        return time.monotonic() - self.begin > self.seconds

    def at_most(self, name: str, value: float, limit: float, **more: Any) -> None:
        """A value that may not exceed a limit; NaN does."""
        self._add(name, float(value), float(limit), bool(value <= limit), more)

    def holds(self, name: str, is_met: bool, **more: Any) -> None:
        """A yes or no, with the values behind it."""
        self._add(name, None, None, is_met, more)

    def _add(
        self, name: str, value: float | None, limit: float | None, is_met: bool, more: dict
    ) -> None:
        self.checks.append({"name": name, "value": value, "limit": limit, "is_met": is_met, **more})
        if not is_met:
            say(f"FAILED {self.name}: {name}: {value} (limit {limit}) {more or ''}")

    def skip(self, name: str, why: str) -> None:
        """Something that is not run."""
        self.not_run.append({"name": name, "why": why})
        say(f"not run: {self.name}: {name}: {why}")

    def run(self, name: str, action: Callable[[], None]) -> None:
        """Run some checks: an error in them fails them and no others."""
        if self.is_late():
            self.skip(name, LATE)
            return
        try:
            action()
        except CannotRun as reason:
            self.skip(name, str(reason))
        except OutOfTime:
            self.skip(name, LATE)
            raise
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:2000]
            self.holds(name, False, error=text, where=traceback.format_exc()[-2000:])

    @property
    def dropped(self) -> list[str]:
        """Names of what there was no time for."""
        return [item["name"] for item in self.not_run if item["why"] == LATE]

    @property
    def has_failed(self) -> bool:
        """A check failed, the part broke off, or vital checks were dropped."""
        is_incomplete = self.is_vital and bool(self.dropped)
        return bool(self.error) or is_incomplete or not all(c["is_met"] for c in self.checks)

    def record(self) -> dict[str, Any]:
        """For the JSON: numbers that are not finite as text, which JSON has no numbers for."""
        return plain(
            {
                "seconds": round(time.monotonic() - self.begin, 2),
                "has_failed": self.has_failed,
                "error": self.error,
                "checks": self.checks,
                "not_run": self.not_run,
                **self.results,
            }
        )

    def line(self) -> str:
        """One line for the terminal."""
        met = sum(check["is_met"] for check in self.checks)
        state = "FAILED" if self.has_failed else "passed"
        text = f"{state}  {self.name}: {met} of {len(self.checks)} checks met"
        if self.not_run:
            text += f", {len(self.not_run)} not run ({len(self.dropped)} for lack of time)"
        return text + (f"; {self.error.strip().splitlines()[-1]}" if self.error else "")


def plain(value: Any) -> Any:
    """``value`` with NaN and infinities as text."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value

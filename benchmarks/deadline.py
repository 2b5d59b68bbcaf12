"""Limits of time: a part of a run may be broken off without losing what it found."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

LATE = "dropped for lack of time"


class OutOfTime(BaseException):
    """Something went on after its limit of time; nobody who handles its errors stops this one."""


@contextlib.contextmanager
def at_most_seconds(seconds: float) -> Iterator[None]:
    """Raise OutOfTime inside the block after so long; in the main thread alone.

    Python code is interrupted, a compilation too; a kernel on a device is not.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise OutOfTime(f"stopped after {seconds:.3g} s")

    begin, (outer, _) = time.monotonic(), signal.getitimer(signal.ITIMER_REAL)
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(min(seconds, outer or seconds), 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer:  # what is left of a limit around this one
            left = outer - (time.monotonic() - begin)
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.001))

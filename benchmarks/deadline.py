"""Limits of time: a part of a run may be broken off without losing what it found."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator

LATE = "dropped for lack of time"
AGAIN = 0.02  # seconds after which an interruption that nobody saw is repeated


class OutOfTime(BaseException):
    """Something went on after its limit of time; nobody who handles its errors stops this one."""


@contextlib.contextmanager
def at_most_seconds(seconds: float) -> Iterator[None]:
    """Raise OutOfTime inside the block after so long; in the main thread alone.

    Python code is interrupted, a compilation too; a kernel on a device is not. Where the moment
    falls into a destructor or another callback whose exceptions Python prints and drops, it comes
    again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise OutOfTime(f"stopped after {seconds:.3g} s")

    def again(dropped: sys.UnraisableHookArgs) -> None:
        if not issubclass(dropped.exc_type, OutOfTime):
            hook(dropped)
        elif signal.getsignal(signal.SIGALRM) is stop:
            signal.setitimer(signal.ITIMER_REAL, AGAIN)

    begin, (outer, _) = time.monotonic(), signal.getitimer(signal.ITIMER_REAL)
    hook, sys.unraisablehook = sys.unraisablehook, again
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(min(seconds, outer or seconds), 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        sys.unraisablehook = hook
        if outer:  # what is left of a limit around this one
            left = outer - (time.monotonic() - begin)
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.001))

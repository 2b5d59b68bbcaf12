"""Runs a function on items in worker processes that may hang or die.

A compiler is not to be trusted with the process it runs in: it can loop, abort or be killed for its
memory. Each worker is a fork of this process (so items and functions need no pickling; results do)
and the leader of a process group, which a timeout kills together with what the worker started.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

PR_SET_PDEATHSIG = 1  # the kernel ends a worker whose parent was killed
CONTEXT = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Failure:
    """Why there is no result for an item."""

    reason: str


@dataclass
class Worker:
    """A process, the pipe to it, and what it is doing since when."""

    process: Any  # of CONTEXT
    pipe: connection.Connection
    item: int = -1
    deadline: float = float("inf")  # time.monotonic(), seconds

    def give(self, item: int, timeout: float) -> None:
        """Begin an item."""
        self.pipe.send(item)
        self.item, self.deadline = item, time.monotonic() + timeout

    def kill(self) -> None:
        """End the worker and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.pipe.close()


def serve(pipe: connection.Connection, function: Callable, items: Sequence) -> None:
    """The life of a worker: indices in, results or failures out."""
    os.setpgid(0, 0)
    with contextlib.suppress(AttributeError):  # not on Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # compilers print what they also raise
    with contextlib.suppress(EOFError):
        while True:
            item = pipe.recv()
            try:
                pipe.send(function(items[item]))
            except Exception as error:  # the reason is the result
                pipe.send(Failure(" ".join(f"{type(error).__name__}: {error}".split())))


def start(function: Callable, items: Sequence) -> Worker:
    """A worker that waits for its first item."""
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=serve, args=(theirs, function, items), daemon=True)
    process.start()
    theirs.close()
    return Worker(process, ours)


def ending(worker: Worker) -> str:
    """How a worker that no longer answers ended."""
    worker.process.join()
    code = worker.process.exitcode
    name = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    return f"its process died with {name}"


def answer(worker: Worker, is_ready: bool, timeout: float) -> Any:
    """What the worker has to say: a result, a `Failure`, or None when it is still at work."""
    if is_ready:
        try:
            return worker.pipe.recv()
        except (EOFError, ConnectionError):
            return Failure(ending(worker))
    is_late = time.monotonic() >= worker.deadline
    return Failure(f"no result within {timeout:g} s") if is_late else None


def run(
    function: Callable[[Any], Any], items: Sequence, num_workers: int, timeout: float
) -> Iterator[tuple[int, Any]]:
    """Yields (index, result or `Failure`) for every item, in the order in which they end.

    Args:
        function: called as ``function(item)`` in a worker; its result is pickled, and not None.
        items: anything.
        num_workers: how many processes at most.
        timeout: seconds for one item, after which its worker is killed and replaced.
    """
    waiting = list(range(len(items)))[::-1]
    busy: list[Worker] = []
    try:
        for _ in range(min(num_workers, len(items))):
            busy.append(start(function, items))
            busy[-1].give(waiting.pop(), timeout)
        while busy:
            left = min(worker.deadline for worker in busy) - time.monotonic()
            ready = connection.wait([worker.pipe for worker in busy], max(left, 0.0))
            for worker in list(busy):
                result = answer(worker, worker.pipe in ready, timeout)
                if result is None:
                    continue
                yield worker.item, result
                if isinstance(result, Failure) or not waiting:  # after a failure it may be unwell
                    busy.remove(worker)
                    worker.kill()
                    worker = start(function, items) if waiting else None
                    busy += [worker] if worker else []
                if worker:
                    worker.give(waiting.pop(), timeout)
    finally:
        for worker in busy:
            worker.kill()

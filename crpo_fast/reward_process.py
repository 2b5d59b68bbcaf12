"""The trainer's side of one reward worker: a process, a socket that never blocks, a clean end.

Start workers in the main thread: Linux ends them when the thread that started them ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from crpo_fast.reward_worker import LENGTH_BYTES


class WorkerDied(Exception):
    """The worker is gone; the text says how it ended."""


def search_path() -> list[str]:
    """``sys.path`` of this process, without the empty name of the working directory."""
    return [str(p) or os.getcwd() for p in sys.path]


def frame(kind: str, payload: Any) -> bytes:
    """A message for ``WorkerProcess.send``."""
    data = pickle.dumps((kind, payload))
    return len(data).to_bytes(LENGTH_BYTES, "little") + data


class WorkerProcess:
    """A running ``python -m crpo_fast.reward_worker``.

    Its standard output goes to the trainer's standard error.

    Args:
        path: ``sys.path`` while it starts.
    """

    def __init__(self, path: Sequence[str]) -> None:
        ours, theirs = socket.socketpair()
        fd = theirs.fileno()
        self.started = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "crpo_fast.reward_worker", str(fd), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=2,
            pass_fds=[fd],
            start_new_session=True,
            env={"PYTHONHASHSEED": "0", **os.environ, "PYTHONPATH": os.pathsep.join(path)},
        )
        theirs.close()
        ours.setblocking(False)
        self._socket, self._inbox, self._outbox = ours, bytearray(), bytearray()

    @property
    def pid(self) -> int:
        """Of the process, which leads a process group of the same number."""
        return self._process.pid

    @property
    def wants_to_send(self) -> bool:
        """Whether the socket has to be watched for room."""
        return bool(self._outbox)

    def fileno(self) -> int:
        """Of the socket, for ``select``."""
        return self._socket.fileno()

    def send(self, message: bytes) -> None:
        """Send what the socket takes now; ``flush`` sends the rest when there is room."""
        self._outbox += message
        self.flush()

    def flush(self) -> None:
        """Send more. A worker that is gone shows in ``receive``."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            while self._outbox:
                del self._outbox[: self._socket.send(self._outbox)]

    def receive(self) -> list[dict[str, Any]]:
        """The answers that have come.

        Raises:
            WorkerDied: it ended, or closed its socket.
        """
        try:
            data = self._socket.recv(1 << 20)
        except BlockingIOError:
            if self._process.poll() is None:
                return []
            data = b""  # it is gone, and a child of its holds the socket open
        except ConnectionResetError:
            data = b""
        if not data:
            raise WorkerDied(self.kill())
        self._inbox += data
        *lines, rest = self._inbox.split(b"\n")
        self._inbox = rest
        return [json.loads(line) for line in lines]

    def kill(self) -> str:
        """End the worker and all that it started; says how it ended."""
        # before the wait: until then the number of the group cannot be given to others
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        code = self._process.wait()
        self._socket.close()
        if code >= 0:
            return f"exit status {code}"
        name = signal.Signals(-code).name
        return f"killed by {name}{' (out of memory?)' if code == -signal.SIGKILL else ''}"

    def ask_to_end(self) -> None:
        """Close the socket: an idle worker leaves, a busy one kills itself a second later."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def end(self, deadline: float) -> None:
        """Wait until ``deadline`` (time.monotonic), then kill."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, deadline - time.monotonic()))
        self.kill()

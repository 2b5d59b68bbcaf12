"""The other ranks of a run: one rank's error or death ends all of them, with one message.

A rank that dies closes its connections, so the others fail in whatever collective comes next; that
error names neither rank nor phase and may come late (NCCL, a long generation). So every rank leaves
its process id and what it is doing in torchrun's store, and a thread looks after the processes of
this machine once a second. Whoever notices first speaks, the others leave silently.
"""

from __future__ import annotations

import math
import os
import re
import socket
import sys
import threading
import time
from typing import Any

import psutil
import torch

from crpo_fast import distributed, timing
from crpo_fast.config import Config
from crpo_fast.distributed import BackendError
from crpo_fast.endings import same_command

_LOST = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed out waiting|timeout|nccl|gloo", re.I
)


class Peers:
    """The ranks of one run; without arguments, before the ranks know each other.

    Args:
        rank: of this process; torchrun's, when not given.
        size: number of ranks.
        store: what all ranks can read and write (torchrun's); None for a single rank.
        config: of the run; for the messages.
    """

    def __init__(
        self,
        rank: int | None = None,
        size: int = 1,
        store: Any = None,
        config: Config | None = None,
    ) -> None:
        # before they know each other, the first rank of every machine speaks
        self._speaks = size > 1 or os.environ.get("LOCAL_RANK", "0") == "0"
        self.rank, self.size, self._config = rank or 0, size, config
        self._store = store
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._processes: dict[int, psutil.Process] = {}

    def watch(self) -> None:
        """Introduce this rank, then look after the others of this machine. A collective."""
        if self.size == 1:
            return
        me = psutil.Process()
        self._store.set(f"crpo/peer/{self.rank}", _identity(me))
        self._tell()
        distributed.barrier()
        for rank in range(self.size):
            host, pid, created = self._store.get(f"crpo/peer/{rank}").decode().split(" ")
            if rank != self.rank and host == socket.gethostname() and psutil.pid_exists(int(pid)):
                process = psutil.Process(int(pid))
                if _identity(process).endswith(f" {created}"):  # else: another process namespace
                    self._processes[rank] = process
        self._thread = threading.Thread(target=self._run, name="crpo-peers", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """From now on the others may leave."""
        self._end.set()
        if self._thread is not None:
            self._thread.join(timeout=10.0)  # it may be talking to the store

    def refuse(self, error: Exception, status: int) -> int:
        """Print an error that ends the run; returns ``status``."""
        self._say(f"rank {self.rank}: {error}" if self.size > 1 else str(error))
        return status

    def explain(self, error: Exception) -> int:
        """Print what stands behind an error of torch: 1, or 0 where only its traceback tells."""
        if self.lost(error):
            self._say(self.describe(error))
            return 1
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            self._say(
                f"rank {self.rank}: out of memory in {timing.failed_activity()} "
                f"({str(error).splitlines()[0]}). Type a smaller --train.token_budget or "
                f"--model.activation_checkpointing; the {same_command(self._config)} continues "
                "from the last checkpoint."
            )
            return 1
        self._claim()
        return 0

    def _say(self, message: str) -> None:
        """Print on stderr unless some rank has already said why the run ends."""
        if self._claim():
            print(f"error: {message}", file=sys.stderr, flush=True)

    def _claim(self) -> bool:
        """True for the first rank that asks: it is the one to speak."""
        if self.size == 1:
            return self._speaks
        try:
            return self._store.add("crpo/said", 1) == 1
        except BackendError:  # the store died with its host: better twice than never
            return True

    def lost(self, error: BaseException) -> bool:
        """Is ``error`` how the death or the silence of another rank shows here?"""
        if self.size == 1 or not isinstance(error, RuntimeError):
            return False
        return isinstance(error, BackendError) or bool(_LOST.search(str(error)))

    def describe(self, error: BaseException | None = None) -> str:
        """The message for a lost rank: who is gone, who was doing what, what to do."""
        cause = _cause(error) if error else ""
        waited = bool(re.search("timed out|timeout", cause, re.I))
        gone = self._gone(0.0 if waited else 2.0)
        if waited:
            timeout = self._config.train.timeout if self._config else math.inf
            what = f"waited more than train.timeout = {timeout:g} s for the other ranks"
            advice = (
                "Raise --train.timeout if a rank may take that long, or look at the one that hangs "
                "(py-spy dump --pid <pid>)."
            )
        else:
            who = f"rank {', '.join(map(str, gone))}" if gone else "another rank"
            what = f"lost {who}"
            advice = "The system's log says whether it was killed for its memory (dmesg)."
        doing = "; ".join(f"rank {r} in {text}" for r, text in self._activities().items())
        here = timing.where(timing.failed_activity())
        return (
            f"rank {self.rank} of {self.size} {what} while in {here}"
            f"{f' ({cause})' if cause else ''}. Last seen: {doing or 'unknown'}. {advice} "
            f"The {same_command(self._config)} continues from the last checkpoint."
        )

    def _gone(self, patience: float) -> list[int]:
        """Ranks that are dead; connections close some time before a process has ended."""
        deadline = time.monotonic() + patience
        while True:
            gone = sorted(r for r, process in self._processes.items() if not _alive(process))
            if gone or not self._processes or time.monotonic() > deadline:
                return gone
            time.sleep(0.05)

    def _activities(self) -> dict[int, str]:
        found = {self.rank: timing.where(timing.failed_activity())}
        for rank in range(self.size):
            try:
                if rank != self.rank and self._store.check([f"crpo/doing/{rank}"]):
                    found[rank] = self._store.get(f"crpo/doing/{rank}").decode()
            except BackendError:  # the store died with its host
                found[rank] = "an unknown place"
        return dict(sorted(found.items()))

    def _tell(self) -> str:
        text = timing.where(timing.activity())
        self._store.set(f"crpo/doing/{self.rank}", text)
        return text

    def _run(self) -> None:
        told = ""
        while not self._end.wait(1.0):
            if all(map(_alive, self._processes.values())):
                try:
                    told = self._tell() if timing.where(timing.activity()) != told else told
                    continue
                except BackendError:  # the store is gone, and its host with it
                    pass
            # the dying rank, or a collective of this one, may speak better: let them
            if self._end.wait(2.0):
                return
            self._say(self.describe())
            sys.stdout.flush()
            os._exit(1)


def _cause(error: BaseException) -> str:
    """The sentence of a backend's error that says what happened, without source paths."""
    line = re.sub(r"^\[[^\]]*\]\s*", "", str(error).splitlines()[0])
    return line.split(". ")[0][:200]


def _identity(process: psutil.Process) -> str:
    return f"{socket.gethostname()} {process.pid} {process.create_time():.2f}"


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

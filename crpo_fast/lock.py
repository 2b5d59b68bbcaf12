"""One run a folder: a lock that the kernel gives back when its holder dies, however it dies."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from crpo_fast.config_file import ConfigError
from crpo_fast.console import notice

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class RunLock:
    """``flock`` on ``<run>/lock``, which says who holds it. Rank 0 holds it for all ranks.

    Child processes do not inherit it: the descriptor closes on exec and after a fork.

    Args:
        folder: of the run; has to exist.

    Raises:
        ConfigError: another process holds it; names process, host and start.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lock"
        self._descriptor = _open(self.path)
        os.register_at_fork(after_in_child=self._close)
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)

    def release(self) -> None:
        """Let others have the folder; may be called twice."""
        if self._descriptor >= 0:
            self.path.unlink(missing_ok=True)
            self._close()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _open(path: Path) -> int:
    """A descriptor that holds the lock of the file that ``path`` names now."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise ConfigError(
                f"run.dir: expected a folder that no other run uses, got {path.parent}, in use by "
                f"{holder}. Type --run.dir <new folder>, or wait for that run or stop it."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            notice(f"warning: {path}: this file system has no locks; start only one run here")
            return descriptor
        if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
            return descriptor
        os.close(descriptor)  # its holder released it meanwhile


def _holder(descriptor: int) -> str:
    try:
        record = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {record['pid']} on {record['host']} since {record['started']}"
    except (ValueError, KeyError, TypeError):
        return "a process that is just starting"

"""crpo_fast/train.py that dies by SIGKILL: python killed_train.py <moment> <count> <arguments...>.

generation  while the <count>th token of this process is sampled
backward    inside the <count>th backward pass
save        at the <count>th flush of a checkpoint's files: between any two of its writes
torn        with half of the <count>th tensor file written
full        does not die: the <count>th tensor file does not fit on the disk

Under torchrun rank 0 takes the launcher and all its ranks with it.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from crpo_fast import checkpoint_files, train
from crpo_fast.rollout import static


def die() -> None:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = psutil.Process(os.getppid())
        others = [p for p in launcher.children(recursive=True) if p.pid != os.getpid()]
        for process in (launcher, *others):
            process.kill()
    os.kill(os.getpid(), signal.SIGKILL)


def at(count: int, function: Callable[..., Any], action: Callable[..., None]) -> Any:
    """``function``, with ``action`` on its arguments before the ``count``th call."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            action(*args)
        return function(*args, **kwargs)

    return wrapped


def in_the_middle(loss: torch.Tensor, *_: Any) -> None:
    """Die when the engine has passed some nodes of the graph below ``loss``."""
    node = loss.grad_fn
    for _level in range(6):
        below = [n for n, _ in node.next_functions if n is not None] if node else []
        node = below[0] if below else node
    assert node is not None
    node.register_hook(lambda *_: die())


def torn(tensors: dict[str, torch.Tensor], path: Path) -> None:
    checkpoint_files.save_file(tensors, path)
    os.truncate(path, path.stat().st_size // 2)
    die()


def full(_tensors: dict[str, torch.Tensor], path: Path) -> None:
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def prepare(moment: str, count: int) -> None:
    if moment == "generation":
        static.sample = at(count, static.sample, lambda *_: die())
    elif moment == "backward":
        torch.Tensor.backward = at(count, torch.Tensor.backward, in_the_middle)
    elif moment == "save":
        checkpoint_files.flush = at(count, checkpoint_files.flush, lambda *_: die())
    else:
        action = {"torn": torn, "full": full}[moment]
        checkpoint_files.save_file = at(count, checkpoint_files.save_file, action)


if __name__ == "__main__":
    if os.environ.get("RANK", "0") == "0":
        prepare(sys.argv[1], int(sys.argv[2]))
    sys.exit(train.main(sys.argv[3:]))

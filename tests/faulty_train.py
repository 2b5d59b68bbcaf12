"""crpo_fast/train.py with one fault injected: python faulty_train.py <fault> <rank> <arguments...>.

The fault hits the given rank in the rollout of step 8 of tiny.toml, ``<fault>@forward`` in the
training pass of step 4.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from crpo_fast import step, train
from crpo_fast.rollout import RolloutError
from crpo_fast.rollout.static import StaticEngine


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(600)


def stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def refuse() -> None:
    raise RolloutError("the injected engine gave up")


def bug() -> None:
    raise KeyError("an injected bug")


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def _after(
    calls: int,
    function: Callable[..., Any],
    fault: Callable[[], None],
    counts: Callable[..., bool] = lambda *_: True,
) -> Any:
    seen = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += counts(*args)
        if seen > calls:
            fault()
        return function(*args, **kwargs)

    return wrapped


def in_groups(_engine: Any, _prompts: Any, group_size: int, *_: Any) -> bool:
    """A rollout, neither an evaluation nor a probe."""
    return group_size > 1


def inject(name: str) -> None:
    """Replace a function of the trainer by one that fails after some calls."""
    fault, _, where = name.partition("@")
    action = {
        "die": die,
        "hang": hang,
        "stop": stopped,
        "refuse": refuse,
        "bug": bug,
        "oom": out_of_memory,
    }[fault]
    if where == "forward":
        step.micro_batch_loss = _after(6, step.micro_batch_loss, action)
    else:
        StaticEngine._complete = _after(3, StaticEngine._complete, action, in_groups)


if __name__ == "__main__":
    if int(os.environ.get("RANK", "0")) == int(sys.argv[2]):
        inject(sys.argv[1])
    sys.exit(train.main(sys.argv[3:]))

"""A trainer in a process of its own, which does one step whenever it is asked.

So rounds of different trainers interleave although each has its own loop, and no trainer's memory,
allocator settings or patches meet another's. Requests, one word each:

    gradients   an ordinary step; the answer has a sample of the clipped gradients
    memory      a step under the counter of bytes (on a GPU, what its allocator reports)
    time        an ordinary step
    quit        the end
"""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
from collections.abc import Iterable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from crpo_fast import distributed
from crpo_fast.live_bytes import LiveBytes, storage_bytes

from .case import StepCase
from .parts import Timeline

SAMPLE = 20_000  # gradients of each tensor that are compared


class Finished(Exception):
    """No step is asked for any more."""


class StepBytes(LiveBytes):
    """Also counts storages from before that are resized, as a sharded model's gathered weights."""

    def _resized(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._entries and storage.nbytes():
            self._add(storage, "weights, gathered")
        else:
            super()._resized(storage)


class Steps:
    """The requests of one worker, and the answers."""

    def __init__(self, connection: Connection, device: torch.device, timeline: Timeline) -> None:
        self._connection, self._device, self._timeline = connection, device, timeline
        self._request = ""
        self._counter: StepBytes | None = None
        self._gradients: dict[str, Tensor] = {}

    def knows(
        self, parameters: dict[str, Tensor], optimizer: Any, frozen: Iterable[Tensor]
    ) -> None:
        """What lives longer than a step."""
        self._parameters, self._optimizer = parameters, optimizer
        self._frozen = list(frozen)

    def begin(self) -> bool:
        """Wait for a request; False when there is none any more."""
        self._request = self._connection.recv()
        if self._request == "quit":
            return False
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        elif self._request == "memory":
            self._counter = counter = StepBytes()
            counter.add(self._parameters.values(), "weights, sharded")
            counter.add(self._state(), "optimizer")
            counter.add(self._frozen, "KL reference")
            counter.__enter__()
        self._begun = time.perf_counter()
        self._timeline.start()
        return True

    def gradients(self, named: dict[str, Tensor | None]) -> None:
        """The gradients that the optimizer will use, by name of the parameter."""
        if self._request == "gradients":
            self._gradients = {n: sample(g) for n, g in named.items() if g is not None}

    def end(self, **values: Any) -> None:
        """The step is done: answer."""
        parts = self._timeline.stop()
        seconds = time.perf_counter() - self._begun
        answer: dict[str, Any] = {"seconds": seconds, "parts": parts}
        answer |= {name: float(value) for name, value in values.items()}
        if self._request == "memory":
            answer["memory"] = self._memory()
        if self._request == "gradients":
            answer["gradients"], self._gradients = self._gradients, {}
        self._connection.send(answer)

    def _state(self) -> list[Tensor]:
        states = self._optimizer.state.values()
        return [x for state in states for x in state.values() if isinstance(x, Tensor)]

    def _memory(self) -> dict[str, int]:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            peak, self._counter = self._counter.peak, None
        else:
            peak = torch.cuda.max_memory_allocated()
        parameters = storage_bytes(self._parameters.values())
        held = {
            "parameters": parameters,
            "gradients": parameters,
            "optimizer": storage_bytes(self._state()),
            "reference": storage_bytes(self._frozen),
        }
        return {**held, "peak": peak, "over": peak - sum(held.values())}


def sample(gradient: Tensor) -> Tensor:
    """Some elements of a gradient, evenly spread; fp32 on the CPU."""
    flat = gradient.detach().flatten()
    return flat[:: max(1, flat.numel() // SAMPLE)].float().cpu().clone()


def serve(connection: Connection, key: str, case: StepCase) -> None:
    """The main function of a worker: build, say so, then do what is asked.

    Sends ("ready", seconds) or ("failed", reason) first, and ("failed", reason) instead of an
    answer when a step fails.
    """
    with contextlib.redirect_stdout(sys.stderr):  # the report alone is printed
        try:
            begun = time.perf_counter()
            candidate, steps = build(connection, key, case)
            connection.send({"ready": time.perf_counter() - begun})
            candidate.run(steps)
        except Exception as error:  # what goes wrong with a candidate is its row
            traceback.print_exc()
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            connection.send({"failed": f"{type(error).__name__}: {reason}"})
    distributed.shutdown(together=False)


def build(connection: Connection, key: str, case: StepCase) -> tuple[Any, Steps]:
    """The trainer ``key`` and its requests."""
    torch.set_num_threads(case.threads)
    device = torch.device(case.device)
    timeline = Timeline.on(device)
    steps = Steps(connection, device, timeline)
    if key == "ours":
        from .ours import Ours

        return Ours(case, timeline), steps
    from .trl import Trl

    return Trl(case, timeline, liger=key == "trl_liger"), steps

"""Where the time of a training step goes: a line of time, cut where something else begins.

    timeline.start()                     the step begins, in the part "loop"
    with timeline.part("packing"): ...   what is inside belongs to that part alone
    timeline.switch("blocks_backward")   the innermost part goes on under another name
    timeline.stop() -> seconds by part   they add up to the time between start and stop

On a CPU the cuts are readings of the clock. On a GPU they are events on the stream: the time of a
part is the device's, its waits for the host included; nothing is synchronised in between.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

PARTS = {
    "blocks_forward": "embedding and blocks, forward",
    "head_forward": "head and loss, forward",
    "head_backward": "head and loss, backward",
    "blocks_backward": "embedding and blocks, backward",
    "optimizer": "optimizer (clip, AdamW)",
    "reference": "reference pass",
    "packing": "packing or padding",
    "metrics": "metrics",
    "sharding": "gathering and sharding of weights (FSDP)",
    "loop": "everything else",
}
OVERHEAD = ("packing", "metrics", "sharding", "loop")  # outside model, kernel and engine


class Timeline:
    """Seconds by part, each second in exactly one.

    Args:
        stamp: a mark of now: a reading of a clock, or a recorded event.
        between: seconds between two marks, asked after the step.
    """

    def __init__(
        self,
        stamp: Callable[[], Any] = time.perf_counter,
        between: Callable[[Any, Any], float] = lambda a, b: b - a,
    ) -> None:
        self._stamp, self._between = stamp, between
        self._running: list[str] = []
        self._marks: list[tuple[Any, str]] = []  # (where, the part that begins there)

    @classmethod
    def on(cls, device: torch.device) -> Timeline:
        """Events on a CUDA device's stream, the clock elsewhere."""
        if device.type != "cuda":
            return cls()

        def stamp() -> Any:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event

        return cls(stamp, lambda a, b: a.elapsed_time(b) / 1e3)

    def start(self) -> None:
        """A step begins."""
        self._running, self._marks = ["loop"], [(self._stamp(), "loop")]

    def stop(self) -> dict[str, float]:
        """Seconds of every one of ``PARTS`` since ``start``."""
        assert self._running == ["loop"], f"parts that did not end: {self._running}"
        end = self._stamp()
        if isinstance(end, torch.cuda.Event):
            end.synchronize()
        seconds = dict.fromkeys(PARTS, 0.0)
        ends = [mark for mark, _ in self._marks[1:]] + [end]
        for (begin, name), after in zip(self._marks, ends, strict=True):
            seconds[name] += self._between(begin, after)
        self._running, self._marks = [], []
        return seconds

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The block belongs to ``name``; all inside a reference pass stays the reference's."""
        assert name in PARTS, f"name: expected one of {sorted(PARTS)}, got {name!r}"
        if not self._running or "reference" in self._running:
            yield
            return
        self._begin(name)
        try:
            yield
        finally:
            self._running.pop()
            self._marks.append((self._stamp(), self._running[-1]))

    def switch(self, name: str) -> None:
        """The innermost part ends and ``name`` begins in its place."""
        if self._running and "reference" not in self._running:
            self._running.pop()
            self._begin(name)

    def _begin(self, name: str) -> None:
        self._running.append(name)
        self._marks.append((self._stamp(), name))

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Every call of ``owner.name`` belongs to ``part``."""
        plain = getattr(owner, name)

        @functools.wraps(plain)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return plain(*args, **kwargs)

        setattr(owner, name, timed)

    def watch_backward(self) -> None:
        """``Tensor.backward`` begins with the head; `watch_blocks` says where the blocks begin."""
        self.wrap(Tensor, "backward", "head_backward")

    def watch_blocks(self, base_model: nn.Module) -> None:
        """Where ``base_model`` returns, the head begins; backward the other way round.

        The caller has begun "blocks_forward".
        """

        def blocks(gradient: Tensor) -> None:
            del gradient
            self.switch("blocks_backward")

        def after(module: nn.Module, args: Any, output: Any) -> None:
            del module, args
            hidden = output.last_hidden_state
            self.switch("head_forward")
            if self._running and hidden.requires_grad:
                hidden.register_hook(blocks)

        base_model.register_forward_hook(after)


def overhead(parts: dict[str, float]) -> float:
    """Share of a step outside model, kernel and optimizer."""
    return sum(parts[name] for name in OVERHEAD) / sum(parts.values())

"""What a person sees while a run goes on: one live line on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text


def duration(seconds: float) -> str:
    """``h:mm:ss``, or ``m:ss`` under an hour."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def notice(text: str) -> None:
    """A line about a file, from where no ``Reporter`` is at hand."""
    print(text, flush=True)


class Reporter:
    """Prints on rank 0 only; ``line`` stays, ``step`` is replaced (in a pipe: thinned out)."""

    def __init__(self, *, enabled: bool = True, every_seconds: float = 5.0) -> None:
        self._console = Console(soft_wrap=True, highlight=False, file=sys.stdout)
        self._enabled, self._every = enabled, every_seconds
        self._live: Live | None = None
        self._last = 0.0

    def line(self, text: str = "") -> None:
        """A line that stays."""
        if self._enabled:
            self._console.print(Text(text))
            if not self._console.is_terminal:
                sys.stdout.flush()

    def warning(self, text: str) -> None:
        """A line that stays, marked as a warning."""
        self.line(f"warning: {text}")

    def step(self, text: str, *, last: bool = False) -> None:
        """The progress of a phase; ``last`` leaves it on the screen."""
        if not self._enabled:
            return
        if not self._console.is_terminal:
            if last or time.monotonic() - self._last >= self._every:
                self._last = time.monotonic()
                self.line(text)
            return
        if self._live is None:
            self._live = Live(console=self._console, refresh_per_second=4)
            self._live.start()
        self._live.update(Text(text))
        if last:
            self.close()

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table: boxes on a terminal, aligned columns in a pipe."""
        if not self._enabled:
            return
        if self._console.is_terminal:
            table = Table(title=title, title_justify="left")
            for i, name in enumerate(header):
                table.add_column(name, justify="left" if i == 0 else "right")
            for row in rows:
                table.add_row(*row)
            self._console.print(table)
            return
        widths = [max(len(r[i]) for r in (header, *rows)) for i in range(len(header))]
        self.line(title)
        for row in (header, *rows):
            cells = [
                c.ljust(w) if i == 0 else c.rjust(w)
                for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ]
            self.line("  ".join(cells).rstrip())

    def close(self) -> None:
        """End the live line."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def step_line(phase: str, done: int, total: int, metrics: dict[str, Any], eta: float) -> str:
    """One line with the numbers that matter for the algorithm."""
    parts = [f"[{phase}] step {done}/{total}", f"loss {metrics['loss']:.4f}"]
    if "reward" in metrics:
        parts.append(f"reward {metrics['reward']:.3f}")
        stages = [v for k, v in sorted(metrics.items()) if k.startswith("stage_entropy/")]
        if stages:
            parts.append("stage entropy " + " ".join(f"{v:.2f}" for v in stages))
        parts.append(f"kl {metrics['kl']:.4f}  clip {metrics['clip_fraction']:.3f}")
    parts.append(f"grad {metrics['grad_norm']:.2f}")
    parts.append(f"{metrics['tokens_per_second']:,.0f} tok/s")
    parts.append(f"eta {duration(eta)}")
    return "  ".join(parts)

"""What a person sees while a run goes on.

On a terminal one live line at the bottom says how the phase goes and what the process is doing now,
and everything else scrolls by above it. In a pipe there are plain lines without control
characters, thinned out by time, and a sign of life during long silences. With ``--quiet`` only
warnings, errors and the closing lines.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from crpo_fast import timing

# (priority, text): where room is short, the fields of the largest number go first
Field = tuple[int, str]
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_LABEL_WIDTH = 14  # indentation of values on the first screen
_PLAIN_WIDTH = 110


def duration(seconds: float) -> str:
    """``h:mm:ss``, or ``m:ss`` under an hour."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def notice(text: str) -> None:
    """A line about a file, from where no ``Reporter`` is at hand."""
    print(_CONTROL.sub("", text), flush=True)


def fit(fields: Sequence[Field], width: int | None = None) -> str:
    """The fields in one line of at most ``width`` characters; None: as long as it is."""
    kept = list(fields)
    while width is not None and len(kept) > 1 and len(_join(kept)) > width:
        kept.remove(max(reversed(kept), key=lambda field: field[0]))
    line = _join(kept)
    if width is None or len(line) <= width:
        return line
    return f"{line[: max(0, width - 3)]}..."[:width]


def _join(fields: Sequence[Field]) -> str:
    return "  ".join(text for _, text in fields)


def _doing(between: str) -> str:
    """What the process does, for how long and how far it is; empty between two activities."""
    activity, detail = timing.activity(), timing.detail()
    if activity == timing.IDLE:
        return ""
    spent = duration(timing.seconds_in_activity())
    return f"{activity} {between}{spent}{f' ({detail})' if detail else ''}"


class Reporter:
    """Prints on rank 0 only.

    ``line`` stays, ``step`` is replaced (in a pipe: thinned out), ``warning`` and ``closing`` are
    printed under ``quiet`` as well. Warnings of the start wait for ``screen``, to stand together.

    Args:
        enabled: whether this rank prints.
        quiet: only warnings and closing lines.
        stream: where to; standard output by default.
        every_seconds: least time between two lines of steps in a pipe, at first; it grows to a
            fiftieth of the time that the run takes, at most a minute.
        alive_seconds: after so much silence in a pipe a line says what goes on.
    """

    def __init__(
        self,
        *,
        enabled: bool = True,
        quiet: bool = False,
        stream: TextIO | None = None,
        every_seconds: float = 5.0,
        alive_seconds: float = 60.0,
    ) -> None:
        self._stream, self._enabled, self._quiet = stream, enabled, quiet
        self._every, self._alive = every_seconds, alive_seconds
        self._console: Console | None = None
        if enabled and self._out.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
            self._console = Console(file=stream, highlight=False, force_terminal=True)
        self._live: Live | None = None
        self._fields: list[Field] = []
        self._waiting: list[str] | None = []  # warnings before the screen
        self._started = self._last = time.monotonic()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def _out(self) -> TextIO:
        return self._stream or sys.stdout

    def start(self) -> None:
        """Begin to show what goes on."""
        if not self._enabled or self._quiet or self._live or self._thread:
            return
        if self._console is not None:
            self._live = Live(
                console=self._console,
                get_renderable=self._live_line,
                refresh_per_second=4,
                transient=True,
            )
            self._live.start()
            self._console.show_cursor(True)  # a killed process could not give it back
        else:
            self._thread = threading.Thread(target=self._show_life, daemon=True)
            self._thread.start()

    def line(self, text: str = "") -> None:
        """A line that stays."""
        if not self._quiet:
            self._print(text)

    def warning(self, text: str) -> None:
        """A line that stays, marked as a warning."""
        if self._waiting is not None:
            self._waiting.append(text)
        else:
            self._print(f"warning: {text}")

    def closing(self, text: str) -> None:
        """A line of the end of a run."""
        self._print(text)

    def screen(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """The first screen: labels and values aligned, then the warnings so far."""
        width = _PLAIN_WIDTH if self._console is None else self._console.width
        indent = " " * _LABEL_WIDTH
        self.line(title)
        for label, value in rows:
            first = f"  {label:{_LABEL_WIDTH - 3}} "
            text = textwrap.fill(
                value, width, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False
            )
            self.line(text)
        self._release()

    def _release(self) -> None:
        waiting, self._waiting = self._waiting or (), None
        for text in waiting:
            self.warning(text)

    def begin(self, fields: Sequence[Field]) -> None:
        """What the live line shows before the first step of a phase."""
        self._fields = list(fields)

    def step(self, fields: Sequence[Field], *, first: bool = False, last: bool = False) -> None:
        """How the phase goes; the ``last`` step stays on the screen, a pipe shows the first too."""
        self._fields = list(fields)
        if not self._enabled or self._quiet:
            return
        if self._console is not None:
            if last:
                self._print(fit(fields, self._console.width))
                self._fields = []
                if self._live is not None:
                    self._live.refresh()
            return
        now = time.monotonic()
        pause = max(self._every, min(60.0, (now - self._started) / 50))
        if first or last or now - self._last >= pause:
            self._print(fit(fields))

    def _live_line(self) -> Text:
        """The line as it is now; called four times a second from the thread of ``Live``."""
        assert self._console is not None, "there is a live line on a terminal only"
        width = self._console.width - 1  # the last column makes some terminals wrap
        doing = [(1, now)] if (now := _doing("")) else []
        text = Text(fit([*self._fields, *doing], width), no_wrap=True, overflow="crop")
        if self._fields:
            text.stylize("bold", 0, len(self._fields[0][1]))
        return text

    def _show_life(self) -> None:
        while not self._end.wait(min(1.0, self._alive)):
            if time.monotonic() - self._last >= self._alive:
                head = f"{self._fields[0][1]}  " if self._fields else ""
                self._print(head + (_doing("for ") or "at work"))

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table of the closing lines: boxes on a terminal, aligned columns in a pipe."""
        if not self._enabled:
            return
        if self._console is not None:
            table = Table(title=title, title_justify="left")
            for i, name in enumerate(header):
                table.add_column(name, justify="left" if i == 0 else "right")
            for row in rows:
                table.add_row(*row)
            self._console.print(table)
            return
        widths = [max(len(r[i]) for r in (header, *rows)) for i in range(len(header))]
        self._print(title)
        for row in (header, *rows):
            cells = [
                c.ljust(w) if i == 0 else c.rjust(w)
                for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ]
            self._print("  ".join(cells).rstrip())

    def close(self) -> None:
        """End the live line; warnings that wait are printed."""
        self._end.set()
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._release()

    def _print(self, text: str) -> None:
        if not self._enabled:
            return
        self._last = time.monotonic()
        text = _CONTROL.sub("", text)
        if self._console is not None:
            self._console.print(Text(text), soft_wrap=True)
        else:
            print(text, file=self._out, flush=True)

"""The wall time of a run by part, from typing the command to the report's last byte.

One line at the end, and ``wall`` in summary.json: {"seconds": all, "parts": {part: seconds}}. The
parts are those of this start on rank 0: a resumed run says nothing of earlier starts.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from crpo_fast import timing
from crpo_fast.console import Reporter
from crpo_fast.run_folder import RunFolder

_NOT_YET = 0.05  # seconds: a part below says nothing on a line


def seconds_before() -> float:
    """Seconds that this process, or the torchrun that started it, has run; 0 where nobody knows.

    Linux alone says when a process began, in ticks since the machine's start.
    """
    pid = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    stat = Path(f"/proc/{pid}/stat")
    if not stat.exists():
        return 0.0
    fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()  # a name may have spaces
    began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)


def measured(before: float | None = None) -> dict[str, Any]:
    """{"seconds", "parts"} up to now; the parts sum to the seconds.

    Args:
        before: seconds since the command was typed; None: as `seconds_before` finds it.
    """
    parts = timing.run_seconds()
    if before is None:
        before = seconds_before()
    parts[timing.START] += max(0.0, before - sum(parts.values()))  # what came before the imports
    rounded = {name: round(value, 2) for name, value in parts.items()}
    return {"seconds": round(sum(rounded.values()), 2), "parts": rounded}


def line(wall: dict[str, Any]) -> str:
    """For people, the largest part first."""
    ordered = sorted(wall["parts"].items(), key=lambda pair: -pair[1])
    named = [f"{name} {value:.1f}" for name, value in ordered if value >= _NOT_YET]
    return f"wall time {wall['seconds']:.1f} s: {', '.join(named)}"


def finish(folder: RunFolder, reporter: Reporter) -> None:
    """Say it, and write it into summary.json where this start has ended the run."""
    wall = measured()
    reporter.closing(line(wall))
    path = folder.path / "summary.json"
    if not path.exists():  # stopped, or ended by an error
        return
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        folder.write_json(path.name, {**summary, "wall": wall})
    except OSError as error:
        reporter.closing(f"summary.json keeps no wall time ({error.strerror})")

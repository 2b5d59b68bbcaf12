"""metrics.jsonl -> curves: one array per metric, by phase, thinned where a run is long.

Up to ``MAX_POINTS`` steps every value is shown. Beyond, a point stands for w consecutive steps of a
phase (w as small as it can be): their mean, with the smallest and the largest of them as a band.
"""

from __future__ import annotations

import math
from typing import Any

MAX_POINTS = 600
_LABELS = ("step", "phase", "phase_step")


def curves(records: list[dict[str, Any]], max_points: int = MAX_POINTS) -> dict[str, Any]:
    """The phases in order, each with its steps and a curve per metric.

    Returns:
        width: steps per point; phases: [{algorithm, steps: [P], series: {name: {mean: [P]}}}], with
        ``min`` and ``max`` beside ``mean`` where width > 1. Values are numbers or None.
    """
    phases: list[tuple[str, list[dict[str, Any]]]] = []
    for record in records:
        name = str(record.get("phase", ""))
        restarted = phases and record.get("phase_step") == 1 and phases[-1][1]
        if not phases or phases[-1][0] != name or restarted:
            phases.append((name, []))
        phases[-1][1].append(record)
    width = max(1, math.ceil(len(records) / max_points))
    return {
        "width": width,
        "phases": [_phase(name, members, width) for name, members in phases],
    }


def _phase(name: str, records: list[dict[str, Any]], width: int) -> dict[str, Any]:
    chunks = [records[i : i + width] for i in range(0, len(records), width)]
    names = dict.fromkeys(k for r in records for k in r if k not in _LABELS)
    series = {}
    for key in names:
        columns = [[v for r in chunk if (v := _number(r.get(key))) is not None] for chunk in chunks]
        if not any(columns):
            continue
        found = {"mean": [_short(sum(c) / len(c)) if c else None for c in columns]}
        if width > 1:
            found["min"] = [_short(min(c)) if c else None for c in columns]
            found["max"] = [_short(max(c)) if c else None for c in columns]
        series[key] = found
    steps = [chunk[-1].get("step", 0) for chunk in chunks]
    return {"algorithm": name, "steps": steps, "series": series}


def _number(value: Any) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _short(value: float) -> float | int:
    """Five significant digits."""
    short = float(f"{value:.5g}")
    return int(short) if short.is_integer() and abs(short) < 1e9 else short


def totals(records: list[dict[str, Any]]) -> dict[str, float]:
    """Sums over the run of what went wrong, for the line below the title (only what occurred)."""
    counted = {
        "skipped": "updates skipped, not finite",
        "skipped_empty": "updates without a token",
        "groups/dropped": "groups dropped, no reward variance",
        "groups/missing": "groups missing after resampling",
    }
    found = dict.fromkeys(counted.values(), 0.0)
    for record in records:
        for key, text in counted.items():
            found[text] += _number(record.get(key)) or 0.0
    return {text: value for text, value in found.items() if value}

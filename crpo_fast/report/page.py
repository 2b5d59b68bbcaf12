"""The data of a report and the HTML around them: one file, nothing from any network.

All data stand in one JSON block, in which no "<" is left, and the scripts write them with
textContent, so that no text of a run can become markup; a content security policy forbids
everything that is not in the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from crpo_fast.report.curves import MAX_POINTS, curves, totals
from crpo_fast.report.folder import RunFiles, config_differences, grammar_of, read_run
from crpo_fast.report.scores import confusions, history, labels_of, table
from crpo_fast.report.viewer import BUDGET, View, probes, samples

_SCRIPTS = ("core.js", "charts.js", "tables.js", "traces.js", "main.js")


def page_data(paths: Sequence[str | Path], *, show_text: bool = False) -> dict[str, Any]:
    """Everything the page shows, as plain JSON.

    Args:
        paths: run folders.
        show_text: show posts, and completions without anything hidden.
    """
    runs = [read_run(Path(path)) for path in paths]
    names = _names([run.path for run in runs])
    return {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "show_text": show_text,
        "runs": [_run(run, n, show_text, len(runs)) for run, n in zip(runs, names, strict=True)],
    }


def _run(run: RunFiles, name: str, show_text: bool, count: int) -> dict[str, Any]:
    try:
        stages, tags = grammar_of(run.config)
    except (KeyError, TypeError, ValueError) as error:
        run.notes.append(f"config.toml: the stages could not be read ({error}).")
        stages, tags = [], ()
    view = View(labels_of(run.evaluations), tags, show_text)
    points = min(MAX_POINTS, max(60, 1600 // count))
    traced = samples(run.samples, view, BUDGET * 2 // 3 // count)
    probed = probes(run.samples, view, BUDGET // 3 // count)
    if run.samples and not traced["recorded"] and not probed["recorded"]:
        run.notes.append("samples.jsonl holds no per-token records (report.trace_every = 0?).")
    return {
        "name": name,
        "folder": str(run.path),
        "finished": bool(run.summary),
        "steps": run.metrics[-1].get("step", 0) if run.metrics else 0,
        "planned": _planned(run.config),
        "seconds": run.summary.get("seconds") or _seconds(run.metrics),
        "seed": run.config.get("seed", 0),
        "stages": stages,
        "reference_length": run.config.get("entropy", {}).get("reference_length"),
        "config": config_differences(run.config) if run.config else [],
        "starts": run.starts,
        "table": table(run.evaluations),
        "history": history(run.evaluations),
        "confusions": confusions(run.evaluations),
        "curves": curves(run.metrics, points),
        "totals": totals(run.metrics),
        "traces": traced,
        "probes": probed,
        "notes": run.notes,
    }


def _planned(config: dict[str, Any]) -> int | None:
    """Steps of all phases under train.max_steps."""
    phases = config.get("phases") or []
    cap = config.get("train", {}).get("max_steps", 0)
    steps = [p.get("steps", 100) for p in phases]
    return sum(min(s, cap) if cap else s for s in steps) or None


def _seconds(metrics: list[dict[str, Any]]) -> float | None:
    value = metrics[-1].get("seconds") if metrics else None
    return round(value, 1) if isinstance(value, int | float) else None


def _names(paths: list[Path]) -> list[str]:
    """The folders' names, with as many parents as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    depth = 1
    while depth < 8 and len({p[-depth:] for p in parts}) < len(parts):
        depth += 1
    return ["/".join(p[-depth:]).lstrip("/") for p in parts]


def render(data: dict[str, Any]) -> str:
    """The page."""
    title = ", ".join(run["name"] for run in data["runs"])
    return (
        _asset("page.html")
        .replace("{{style}}", _asset("report.css"), 1)
        .replace("{{script}}", "\n".join(_asset(name) for name in _SCRIPTS), 1)
        .replace("{{title}}", _escape(f"{title} - crpo-fast report"), 1)
        .replace("{{data}}", embed(data), 1)  # last: nothing is replaced inside the data
    )


def embed(data: Any) -> str:
    """JSON that may stand inside a script element."""
    text = json.dumps(_strict(data), separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _strict(value: Any) -> Any:
    """NaN and infinities as null, which JSON has."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _strict(v) for k, v in value.items()}
    return [_strict(v) for v in value] if isinstance(value, list | tuple) else value


def _escape(text: str) -> str:
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
        text = text.replace(character, entity)
    return text


def _asset(name: str) -> str:
    return resources.files("crpo_fast.report").joinpath(name).read_text(encoding="utf-8")

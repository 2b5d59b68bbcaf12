"""The end of a run: the before/after table, the curves, the line that says where the model is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from crpo_fast.console import Reporter, duration
from crpo_fast.plots import write_svg

_KEPT = ("weighted_f1", "accuracy", "macro_f1", "format_rate", "parse_rate")


def scores(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The part of an evaluation that summary.json keeps; percent."""
    kept: dict[str, Any] = {k: evaluation[k] for k in _KEPT}
    kept["per_dataset"] = {
        name: {k: result[k] for k in _KEPT if k in result}
        for name, result in evaluation["per_dataset"].items()
    }
    return kept


def show(summary: dict[str, Any], run_dir: Path, reporter: Reporter) -> None:
    """Print the table per data set and how to load the model."""
    columns = [k for k in ("untrained", "before", "after") if k in summary]
    header = [
        "data set",
        *(f"F1 {c}" for c in columns),
        "change",
        *(f"format {c}" for c in columns),
    ]
    first, last = summary["before"], summary["after"]
    rows = [
        _row(name, [summary[c]["per_dataset"][name] for c in columns])
        for name in last["per_dataset"]
    ]
    if len(rows) > 1:
        rows.append(_row("average", [summary[c] for c in columns]))
    reporter.table("weighted F1 and format rate on held-out rows, percent", header, rows)
    gain = last["weighted_f1"] - first["weighted_f1"]
    reporter.closing(
        f"{duration(summary['seconds'])} in all, weighted F1 {first['weighted_f1']:.1f} -> "
        f"{last['weighted_f1']:.1f} ({gain:+.1f}), curves in {run_dir / 'plots'}"
    )
    reporter.closing(
        f"model: {run_dir / 'final'}   load it with "
        f"transformers.AutoModelForCausalLM.from_pretrained({str(run_dir / 'final')!r})"
    )


def _row(name: str, results: list[dict[str, Any]]) -> list[str]:
    f1 = [r["weighted_f1"] for r in results]
    change = f1[-1] - (f1[-2] if len(f1) > 1 else f1[-1])
    return [
        name,
        *(f"{x:.1f}" for x in f1),
        f"{change:+.1f}",
        *(f"{r['format_rate']:.1f}" for r in results),
    ]


def write_plots(records: list[dict[str, Any]], stages: list[str], folder: Path) -> None:
    """Write reward, entropy, loss, kl and length.svg, each where its metric was logged.

    A metric that never had a value (no stage occurred) is an empty plot that says so.
    """
    folder.mkdir(exist_ok=True)
    trained = [r for r in records if "reward" in r]
    curves = {
        "reward": (trained, {"reward": "reward"}, "mean reward"),
        "entropy": (
            trained,
            {f"stage_entropy/{k}": name for k, name in enumerate(stages)},
            "entropy, nats",
        ),
        "loss": (records, {"loss": "loss"}, "loss"),
        "kl": (trained, {"kl": "kl"}, "KL to the reference, nats"),
        "length": (trained, {"completions/length": "completion"}, "tokens"),
    }
    for name, (rows, series, label) in curves.items():
        drawn = {
            title: [(r["step"], math.nan if r.get(key) is None else r[key]) for r in rows]
            for key, title in series.items()
            if any(key in r for r in rows)
        }
        if drawn:
            write_svg(
                folder / f"{name}.svg", drawn, title=label, xlabel="optimizer step", ylabel=label
            )

"""The dual controller on the quickstart: every stage's entropy against its band, and beta_k.

The unscaled M = .06 explodes when fixed. Shown is, over seeds, for how many steps a stage is
outside its band (half to twice its target), and that the final weighted F1 is not lower than that
of M = 0 by more than two points.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crpo_fast.config import DEFAULT_CONFIG, load_config
from crpo_fast.plots import HEIGHT, WIDTH, line_plot
from crpo_fast.stages import StageGrammar

VARIANT = "CRPO, M = .06 unscaled, dual controller"
BASELINE = "GRPO (M = 0)"
BAND = 2.0  # the target divided and multiplied by this
MOST_STEPS, LEAST_F1 = 10, -2.0  # steps outside; points of weighted F1 beside M = 0
FIELDS = ("seed", "step", "stage", "entropy", "target", "coef")

Row = Mapping[str, Any]


def trace(seed: int, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Entropy, target (nats) and coefficient of every stage and step of a crpo phase."""
    rows = []
    for record in records:
        stages = [k for k in range(len(record)) if f"stage_target/{k}" in record]
        rows += [
            {
                "seed": seed,
                "step": record["phase_step"],
                "stage": k,
                **{
                    name: float(f"{record[f'stage_{name}/{k}']:.5g}")
                    for name in ("entropy", "target", "coef")
                },
            }
            for k in stages
        ]
    return rows


def write_traces(path: Path, rows: Sequence[Row]) -> None:
    """The traces of all seeds as CSV."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_traces(path: Path) -> list[dict[str, Any]]:
    """What `write_traces` wrote."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {k: int(v) if k in ("seed", "step", "stage") else float(v) for k, v in row.items()}
            for row in csv.DictReader(file)
        ]


def is_outside(row: Row) -> bool:
    """Is the stage's entropy below half or above twice its target?"""
    return not row["target"] / BAND <= row["entropy"] <= row["target"] * BAND


def steps_outside(rows: Sequence[Row], seed: int) -> dict[int, int]:
    """Stage -> steps of one seed outside its band, from the first on, in a row or not."""
    counts: dict[int, int] = {}
    for row in rows:
        if row["seed"] == seed:
            counts[row["stage"]] = counts.get(row["stage"], 0) + is_outside(row)
    return counts


def checks(rows: Sequence[Row], results: Sequence[Row]) -> list[dict[str, Any]]:
    """What the runs must show, with what they show."""
    seeds = sorted({row["seed"] for row in rows})
    worst = max(n for seed in seeds for n in steps_outside(rows, seed).values())
    dual, baseline = (statistics.mean(_f1(results, name).values()) for name in (VARIANT, BASELINE))
    return [
        {
            "text": "steps outside its band, worst stage of any seed",
            "limit": f"at most {MOST_STEPS}",
            "value": str(worst),
            "met": worst <= MOST_STEPS,
        },
        {
            "text": "weighted F1, mean over seeds",
            "limit": f"at least {baseline + LEAST_F1:.1f} (M = 0 less {-LEAST_F1:g})",
            "value": f"{dual:.1f}",
            "met": dual >= baseline + LEAST_F1,
        },
    ]


def _f1(results: Sequence[Row], variant: str) -> dict[int, float]:
    return {r["seed"]: r["after"]["weighted_f1"] for r in results if r["variant"] == variant}


def table(rows: Sequence[Row], results: Sequence[Row]) -> str:
    """Markdown: a row per seed, then the checks."""
    names = StageGrammar.preset("mental_r1").names
    dual, baseline = _f1(results, VARIANT), _f1(results, BASELINE)
    header = (
        f"| seed | steps outside the band: {', '.join(names)} | entropy / target, least and most "
        "| largest entropy, nats | weighted F1 | of M = 0 |"
    )
    lines = [header, "| --- | --- | --- | --- | --- | --- |"]
    for seed in sorted(dual):
        mine = [row for row in rows if row["seed"] == seed]
        ratios = [row["entropy"] / row["target"] for row in mine]
        lines.append(
            f"| {seed} | {', '.join(str(n) for n in steps_outside(rows, seed).values())} "
            f"| {min(ratios):.2f}, {max(ratios):.2f} | {max(r['entropy'] for r in mine):.2f} "
            f"| {dual[seed]:.1f} | {baseline[seed]:.1f} |"
        )
    lines += ["", "| shown | limit | measured | met |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {c['text']} | {c['limit']} | {c['value']} | {'yes' if c['met'] else '**no**'} |"
        for c in checks(rows, results)
    ]
    return "\n".join(lines)


def plot(rows: Sequence[Row]) -> str:
    """SVG: a row of two panels per seed, entropy / target with its band, and beta_k."""
    seeds = sorted({row["seed"] for row in rows})
    width, height = 2 * WIDTH, HEIGHT * len(seeds)
    panels = []
    for i, seed in enumerate(seeds):
        mine = [row for row in rows if row["seed"] == seed]
        for j, panel in enumerate((_entropy_panel(seed, mine), _coef_panel(seed, mine))):
            place = f'<svg x="{j * WIDTH}" y="{i * HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            panels.append(panel.replace("<svg ", place, 1))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
    title = "<title>Dual controller: stage entropy against its band, and beta, by seed</title>"
    return "\n".join([head, title, *panels, "</svg>"]) + "\n"


def _series(rows: Sequence[Row], value: Any) -> dict[str, list[tuple[float, float]]]:
    names = StageGrammar.preset("mental_r1").names
    return {
        name: [(row["step"], value(row)) for row in rows if row["stage"] == k]
        for k, name in enumerate(names)
    }


def _entropy_panel(seed: int, rows: Sequence[Row]) -> str:
    steps = sorted({row["step"] for row in rows})
    band = "target, half to twice it"
    series = _series(rows, lambda row: row["entropy"] / row["target"])
    return line_plot(
        {**series, band: [(step, 1.0) for step in steps]},
        f"seed {seed}: stage entropy / its target",
        "crpo step",
        "entropy / target",
        {band: [(step, 1 / BAND, BAND) for step in steps]},
    )


def _coef_panel(seed: int, rows: Sequence[Row]) -> str:
    return line_plot(
        _series(rows, lambda row: row["coef"]),
        f"seed {seed}: coefficient of each stage",
        "crpo step",
        f"beta, |beta| <= {load_config(DEFAULT_CONFIG).entropy.magnitude:g}",
    )

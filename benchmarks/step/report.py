"""From the answers of the workers to the rows, the comparison and the targets of a report."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.clock import summary

from .parts import PARTS, overhead

OVERHEAD_LIMIT, SPEED_LIMIT = 0.03, 1.3
# relative L2 distance of the two gradients: fp32 sums in another order; bf16 products rounded
# at other places (autocast keeps some operations in fp32 that a bf16 model does not)
GRADIENT_LIMIT = {"float32": 1e-4, "bfloat16": 0.05}
LOSS_LIMIT = {"float32": 1e-5, "bfloat16": 1e-3}  # of an advantage of 1: the loss may cancel
NORM_LIMIT = {"float32": 1e-4, "bfloat16": 1e-2}


def row_of(
    answers: list[dict[str, Any]],
    memory: dict[str, int],
    found: dict[str, Any],
    flops: float,
    peak: float,
) -> dict[str, Any]:
    """What is said of one trainer.

    Args:
        answers: of its timed steps.
        memory: bytes by what holds them.
        found: tokens of the step, of `case.distribution`.
        flops: of one step.
        peak: FLOP/s.
    """
    seconds = summary([answer["seconds"] for answer in answers])
    return {
        "seconds": seconds,
        "all_seconds": [answer["seconds"] for answer in answers],
        "parts": {name: summary([answer["parts"][name] for answer in answers]) for name in PARTS},
        "all_parts": [answer["parts"] for answer in answers],
        "tokens_per_second": found["tokens"] / seconds["median"],
        "completion_tokens_per_second": found["completion_tokens"] / seconds["median"],
        "mfu": flops / seconds["median"] / peak,
        "overhead": summary([overhead(answer["parts"]) for answer in answers]),
        "memory": memory,
    }


def agreement(first: dict[str, dict[str, Any]], dtype: str) -> list[dict[str, Any]]:
    """How far each other trainer's first step is from ours.

    Args:
        first: by key the answer to "gradients": loss, norm, and the gradients' samples.
        dtype: of the products, which decides the limits.
    """
    if "ours" not in first:
        return []
    ours, rows = first["ours"], []
    for key, theirs in first.items():
        if key == "ours":
            continue
        distance = norm = 0.0
        worst, worst_name = 0.0, ""
        names = set(ours["gradients"]) ^ set(theirs["gradients"])
        for name in sorted(set(ours["gradients"]) & set(theirs["gradients"])):
            a, b = ours["gradients"][name].double(), theirs["gradients"][name].double()
            square = float((a - b).square().sum())
            distance, norm = distance + square, norm + float(b.square().sum())
            share = math.sqrt(square / max(float(b.square().sum()), 1e-300))
            if share > worst:
                worst, worst_name = share, name
        row: dict[str, Any] = {
            "key": key,
            "loss": [ours["loss"], theirs["loss"]],
            "grad_norm": [ours["grad_norm"], theirs["grad_norm"]],
            "loss_error": abs(ours["loss"] - theirs["loss"]),
            "norm_error": _relative(ours["grad_norm"], theirs["grad_norm"]),
            "gradient_error": math.sqrt(distance / norm) if norm else math.inf,
            "worst": [worst_name, worst],
            "only_one_has": sorted(names),
        }
        limits = {"loss": LOSS_LIMIT, "norm": NORM_LIMIT, "gradient": GRADIENT_LIMIT}
        row["limits"] = {name: limit[dtype] for name, limit in limits.items()}
        row["agrees"] = not names and all(
            row[f"{name}_error"] <= limit[dtype] for name, limit in limits.items()
        )
        rows.append(row)
    return rows


def _relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(b), 1e-12)


def targets(
    rows: list[dict[str, Any]], compared: list[dict[str, Any]], *, is_gpu: bool
) -> list[dict[str, Any]]:
    """What the run must show, with what it shows; the rival is compared by time on a GPU alone."""
    ran = {row["key"]: row for row in rows if "missing" not in row}
    checks: list[dict[str, Any]] = []

    def check(text: str, limit: float, value: float, met: bool | None) -> None:
        checks.append({"text": text, "limit": limit, "value": value, "met": met})

    if "ours" in ran:
        value = ran["ours"]["overhead"]["median"]
        check(
            "loop outside model, kernel and engine / step",
            OVERHEAD_LIMIT,
            value,
            value <= OVERHEAD_LIMIT,
        )
    for row in compared:
        check(
            f"gradient of {row['key']} and ours: relative distance",
            row["limits"]["gradient"],
            row["gradient_error"],
            row["agrees"],
        )
    if "ours" in ran and "trl" in ran:
        ours, trl = ran["ours"], ran["trl"]
        speed = trl["seconds"]["median"] / ours["seconds"]["median"]
        check("speed / TRL, at least", SPEED_LIMIT, speed, speed >= SPEED_LIMIT if is_gpu else None)
        memory = ours["memory"]["peak"] / trl["memory"]["peak"]
        check("peak memory / TRL, below", 1.0, memory, memory < 1.0 if is_gpu else None)
    return checks

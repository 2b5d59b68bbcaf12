"""Exponents of growth: least squares on logarithms, and the slope of what should not grow."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

Point = tuple[float, float]
FEWEST_POINTS = 2  # of a fit; with exactly as many there is no band
# 97.5 % quantiles of Student's t by degrees of freedom: a band of 95 %
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
NORMAL = 1.96


@dataclass(frozen=True)
class Fit:
    """y = factor x^exponent, fitted to the points with ``first`` <= x <= ``last``.

    Attributes:
        exponent: slope of log y over log x.
        low, high: its band of 95 %, None where two points leave no freedom.
        factor: y at x = 1.
        residual: root mean square of log y - fit, in natural logarithms: .05 is 5 %.
        first, last: the range of x that was fitted.
        count: points in it.
    """

    exponent: float
    low: float | None
    high: float | None
    factor: float
    residual: float
    first: float
    last: float
    count: int

    def as_json(self) -> dict[str, float | int | None]:
        """For a report."""
        return asdict(self)


def fit_exponent(points: Sequence[Point], first: float = 0.0, last: float = math.inf) -> Fit | None:
    """The exponent of growth of ``points`` (x, y) within a range; None for fewer than two points.

    Raises:
        ValueError: a coordinate in the range is not above 0, which has no logarithm.
    """
    chosen = sorted(p for p in points if first <= p[0] <= last)
    if len({x for x, _ in chosen}) < FEWEST_POINTS:
        return None
    wrong = next((p for p in chosen if min(p) <= 0), None)
    if wrong is not None:
        raise ValueError(
            f"points: expected coordinates above 0, got {wrong}. Fit another range, or add what "
            "was left out."
        )
    xs, ys = [math.log(x) for x, _ in chosen], [math.log(y) for _, y in chosen]
    line = statistics.linear_regression(xs, ys)
    errors = [y - line.intercept - line.slope * x for x, y in zip(xs, ys, strict=True)]
    total, freedom = sum(e * e for e in errors), len(chosen) - 2
    low = high = None
    if freedom > 0:
        middle = statistics.fmean(xs)
        spread = sum((x - middle) ** 2 for x in xs)
        quantile = STUDENT[freedom - 1] if freedom <= len(STUDENT) else NORMAL
        half = quantile * math.sqrt(total / freedom / spread)
        low, high = line.slope - half, line.slope + half
    return Fit(
        line.slope, low, high, math.exp(line.intercept), math.sqrt(total / len(chosen)),
        chosen[0][0], chosen[-1][0], len(chosen),
    )  # fmt: skip


def rise(points: Sequence[Point], first: float) -> float | None:
    """How much y rises per x from ``first`` on: the line through the ends; None without two points.

    The ends, not a least-squares line: one step up at the largest x must show in full.
    """
    chosen = sorted(p for p in points if p[0] >= first)
    if len(chosen) < FEWEST_POINTS or chosen[-1][0] == chosen[0][0]:
        return None
    return (chosen[-1][1] - chosen[0][1]) / (chosen[-1][0] - chosen[0][0])


def flatness(
    title: str, points: Sequence[Point], *, first: float, allowed: float, per: str = "row"
) -> dict:
    """A check of a report: bytes that do not grow with x beyond ``allowed`` bytes per x.

    Args:
        title: of what.
        points: (x, bytes).
        first: x from which on they may be flat: below it the bound itself grows.
        allowed: bytes that one more x may take.
        per: what x counts.
    """
    slope = rise(points, first)
    return {
        "text": f"{title}: bytes that one more {per} takes, from {first:g} on",
        "limit": allowed,
        "value": slope,
        "met": None if slope is None else slope <= allowed,
    }

"""Panels of log-log plots as one SVG: points with their bands, fitted lines, ticks at powers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from crpo_fast.plots import COLOURS, STYLE

WIDTH, PLOT, LEFT, RIGHT, BOTTOM = 540, 250, 70, 20, 52  # pixels; PLOT: height of the drawing area
TITLE, ROW = 44, 17  # heights of the heading and of a row of the legend
COLUMNS, GAP, MOST_TICKS, MOST_LETTERS = 2, 16, 8, 86
MARGIN = 0.04  # of the logarithmic span, on both sides
LEAST_SPAN = 3.0  # of an axis, largest / smallest
EXTRA_STYLE = ".fit{fill:none;stroke-width:1.5;stroke-dasharray:5 4}.small{font-size:11px}"


@dataclass(frozen=True, slots=True)
class LogAxis:
    """A logarithmic map of values ``low..high`` to pixels ``start..end``."""

    low: float
    high: float
    start: float
    end: float
    base: int  # ticks are powers of it, of a multiple of them where there would be too many

    def __call__(self, value: float) -> float:
        """Pixel of a value."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Powers of the base inside the range; 2 and 5 times powers of ten where these are few."""
        first = math.ceil(math.log(self.low, self.base) - 1e-9)
        last = math.floor(math.log(self.high, self.base) + 1e-9)
        step = max(1, math.ceil((last - first + 1) / MOST_TICKS))
        powers = [float(self.base) ** n for n in range(first, last + 1) if n % step == 0]
        if len(powers) > 2 or self.base != 10:
            return powers
        decades = [10.0**n for n in range(first - 1, last + 1)]
        finer = [m * d for d in decades for m in (1, 2, 5)]
        return [x for x in finer if self.low <= x <= self.high]


def log_axis(values: Sequence[float], start: float, end: float, base: int) -> LogAxis:
    """An axis around values above 0; those that hardly differ lie in its middle."""
    low, high = min(values), max(values)
    least = max(1.0, (LEAST_SPAN / (high / low)) ** 0.5)
    pad = max(least, (high / low) ** MARGIN)
    return LogAxis(low / pad, high * pad, start, end, base)


def count_text(value: float) -> str:
    """256, 4k, 1M: thousands of 1024, as sizes of models are."""
    for size, letter in ((2**20, "M"), (2**10, "k")):
        if value >= size and value % size == 0:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def bytes_text(value: float) -> str:
    """4 KiB, 1 GiB."""
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} B"


def seconds_text(value: float) -> str:
    """3 us, 20 ms, 1 s."""
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


UNITS: dict[str, tuple[int, Callable[[float], str]]] = {
    "bytes": (2, bytes_text),
    "s": (10, seconds_text),
}


def exponent_text(fit: dict[str, Any] | None) -> str:
    """The exponent with its band; why there is none."""
    if fit is None:
        return "no fit"
    band = "" if fit["low"] is None else f" [{fit['low']:.2f}, {fit['high']:.2f}]"
    return f"{fit['exponent']:.2f}{band}"


def document(sweeps: Sequence[dict[str, Any]], title: str, below: str) -> str:
    """All sweeps of a report as panels of one SVG, two in a row.

    Args:
        sweeps: as `growth.sweeps.sweep_json` makes them; those without a point are left out.
        title: heading.
        below: where it was measured.
    """
    drawn = [sweep for sweep in sweeps if any(line["points"] for line in sweep["series"])]
    rows = [drawn[i : i + COLUMNS] for i in range(0, len(drawn), COLUMNS)]
    body, top = [], 64.0
    for row in rows:
        for column, sweep in enumerate(row):
            body.append(f'<g transform="translate({column * (WIDTH + GAP)},{top:g})">')
            body += [*panel(sweep), "</g>"]
        top += max(panel_height(sweep) for sweep in row) + GAP
    width = COLUMNS * WIDTH + (COLUMNS - 1) * GAP
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top:g}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<desc>{escape(describe(drawn))}</desc>",
            f"<style>{STYLE}{EXTRA_STYLE}</style>",
            f'<rect class="page" width="{width}" height="{top:g}" rx="6"/>',
            f'<text class="title" x="20" y="28">{escape(title)}</text>',
            f'<text x="20" y="48">{escape(below)}</text>',
            *body,
            "</svg>",
            "",
        ]
    )


def describe(sweeps: Sequence[dict[str, Any]]) -> str:
    """Alternative text: the exponent of every line."""
    parts = []
    for sweep in sweeps:
        lines = [f"{s['title']} {exponent_text(s['fit'])}" for s in sweep["series"] if s["points"]]
        parts.append(f"{sweep['title']}: {'; '.join(lines)}.")
    return " ".join(parts)


def shortened(text: str) -> str:
    """What fits the width of a panel."""
    return text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS - 4]} ..."


def panel_height(sweep: dict[str, Any]) -> float:
    """Pixels."""
    return TITLE + ROW * len(shown(sweep)) + PLOT + BOTTOM


def shown(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines that have points."""
    return [line for line in sweep["series"] if line["points"]]


def panel(sweep: dict[str, Any]) -> Iterator[str]:
    """Heading, legend with exponents, axes, bands, points and fitted lines."""
    lines, (base, text) = shown(sweep), UNITS[sweep["unit"]]
    points = [point for line in lines for point in line["points"]]
    top = TITLE + ROW * len(lines)
    x_axis = log_axis([p["x"] for p in points], LEFT, WIDTH - RIGHT, 2)
    edges = [p[name] for p in points for name in ("low", "high")]
    edges += [y for line in lines for _, y in ends_of(line["fit"])]
    y_axis = log_axis(edges, top + PLOT, top + 8, base)
    yield f'<text class="title" x="20" y="16">{escape(sweep["title"])}</text>'
    yield f'<text class="small" x="20" y="33">{escape(shortened(sweep["fixed"]))}</text>'
    for index, line in enumerate(lines):
        y, colour = TITLE + ROW * index + 6, COLOURS[index % len(COLOURS)]
        name = f"{line['title']}: exponent {exponent_text(line['fit'])}"
        if line["fit"] is None:
            name = line["title"]
        elif line["expected"] is not None:
            name += f", expected {line['expected']:g}"
        yield f'<rect x="20" y="{y - 6}" width="14" height="4" rx="2" fill="{colour}"/>'
        yield f'<text x="40" y="{y}">{escape(name)}</text>'
    yield from axes(x_axis, y_axis, sweep["x"], text, top)
    for index, line in enumerate(lines):
        yield from draw_line(line, COLOURS[index % len(COLOURS)], x_axis, y_axis)


def ends_of(fit: dict[str, Any] | None) -> list[tuple[float, float]]:
    """Where the line of a fit begins and ends."""
    if fit is None:
        return []
    return [(x, fit["factor"] * x ** fit["exponent"]) for x in (fit["first"], fit["last"])]


def axes(
    x_axis: LogAxis, y_axis: LogAxis, name: str, text: Callable[[float], str], top: float
) -> Iterator[str]:
    """Grid, tick labels and the name of the x axis."""
    bottom, right = top + PLOT, WIDTH - RIGHT
    for value in y_axis.ticks():
        y = f"{y_axis(value):.1f}"
        yield f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>'
        yield f'<text x="{LEFT - 6}" y="{y}" text-anchor="end" dy=".35em">{text(value)}</text>'
    for value in x_axis.ticks():
        x = f"{x_axis(value):.1f}"
        yield f'<line class="grid" x1="{x}" x2="{x}" y1="{top + 8:g}" y2="{bottom:g}"/>'
        yield f'<text x="{x}" y="{bottom + 16:g}" text-anchor="middle">{count_text(value)}</text>'
    yield f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom:g}" y2="{bottom:g}"/>'
    middle = (LEFT + right) / 2
    yield f'<text x="{middle:g}" y="{bottom + 34:g}" text-anchor="middle">{escape(name)}</text>'


def draw_line(line: dict[str, Any], colour: str, x_axis: LogAxis, y_axis: LogAxis) -> Iterator[str]:
    """Points with the range of their repetitions, and the fit over its range."""
    for point in line["points"]:
        x, y = x_axis(point["x"]), y_axis(point["y"])
        low, high = y_axis(point["low"]), y_axis(point["high"])
        if low - high > 1:
            yield (
                f'<line stroke="{colour}" stroke-width="2" stroke-opacity=".5" x1="{x:.1f}" '
                f'x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
            )
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'
    fit = line["fit"]
    if fit is None:
        where = " ".join(f"{x_axis(p['x']):.1f},{y_axis(p['y']):.1f}" for p in line["points"])
        yield f'<polyline class="fit" stroke="{colour}" stroke-opacity=".5" points="{where}"/>'
        return
    where = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in ends_of(fit))
    yield f'<polyline class="fit" stroke="{colour}" points="{where}"/>'

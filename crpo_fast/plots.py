"""Line plots as SVG, written by hand: no dependency, readable on a light and on a dark page.

`line_plot` turns named series of points into one SVG document, `write_svg` puts it into a file. The
drawing area has the y axis upwards; points that are not finite are left out, which breaks the line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path

Point = tuple[float, float]
Band = Sequence[tuple[float, float, float]]  # x, low, high

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, BOTTOM = 64, 16, 48
LEGEND_TOP, LEGEND_ROW = 46, 20  # the drawing area begins below the legend
LARGEST = 1e300  # what is larger is as good as infinite, and spans of it would overflow
# After Okabe and Ito: colour-blind readers tell them apart, on white and on black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7f7f7f", "#a65628")
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1f2328}.title{font-size:15px;font-weight:600}"
    ".grid{stroke:#8c959f;stroke-opacity:.3}.axis{stroke:#57606a}"
    ".line{fill:none;stroke-width:2;stroke-linejoin:round}.band{stroke:none;fill-opacity:.2}"
    ".page{fill:#fff}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.axis{stroke:#9198a1}.page{fill:#0d1117}}"
)


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear map of values ``low..high`` to pixels ``start..end``, with ticks at round values."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Pixel of a value."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Multiples of a round step inside the range."""
        step = nice_step(self.high - self.low)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def nice_step(span: float, target: int = 8) -> float:
    """The step 1, 2 or 5 times a power of ten that gives at most ``target`` steps over ``span``."""
    power = 10.0 ** math.floor(math.log10(span / target))
    return next(power * m for m in (1, 2, 5, 10, 20) if span / (power * m) <= target)


def axis_of(values: Sequence[float], start: float, end: float, margin: float) -> Axis:
    """An axis around the values with ``margin`` (a share of their span) on both sides."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1 / LARGEST):
        # a constant: the line lies in the middle
        pad = 0.5 * abs(low) if abs(low) > 1 / LARGEST else 1.0
        return Axis(low - pad, high + pad, start, end)
    pad = margin * (high - low)
    return Axis(low - pad, high + pad, start, end)


def is_finite(numbers: Sequence[float]) -> bool:
    """Whether all of them can be drawn."""
    return all(abs(number) < LARGEST for number in numbers)  # False for NaN


def finite_runs(points: Sequence[Point]) -> Iterator[list[Point]]:
    """Splits a line where a coordinate is not finite."""
    for known, run in groupby(points, key=is_finite):
        if known:
            yield list(run)


def coordinates(points: Sequence[Point], x_axis: Axis, y_axis: Axis) -> str:
    """Points of a polyline or polygon in pixels."""
    return " ".join(f"{x_axis(x):.2f},{y_axis(y):.2f}" for x, y in points)


def draw_axes(x_axis: Axis, y_axis: Axis, xlabel: str, ylabel: str) -> Iterator[str]:
    """Grid, frame, tick labels and names of the axes."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for value in y_axis.ticks():
        y = f"{y_axis(value):.2f}"
        yield f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>'
        yield f'<text x="{LEFT - 8}" y="{y}" text-anchor="end" dy=".35em">{value:.10g}</text>'
    for value in x_axis.ticks():
        x = f"{x_axis(value):.2f}"
        yield f'<line class="axis" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 4}"/>'
        yield f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{value:.10g}</text>'
    yield f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
    middle = (LEFT + right) / 2
    yield f'<text x="{middle:g}" y="{HEIGHT - 10}" text-anchor="middle">{escape(xlabel)}</text>'
    yield f'<text x="{LEFT}" y="{y_axis.end - 8:g}">{escape(ylabel)}</text>'


def draw_series(points: Sequence[Point], colour: str, x_axis: Axis, y_axis: Axis) -> Iterator[str]:
    """A line for every unbroken run of points; a run of one point is a dot."""
    for run in finite_runs(points):
        if len(run) == 1:
            x, y = x_axis(run[0][0]), y_axis(run[0][1])
            yield f'<circle cx="{x:.2f}" cy="{y:.2f}" r="3" fill="{colour}"/>'
        else:
            where = coordinates(run, x_axis, y_axis)
            yield f'<polyline class="line" stroke="{colour}" points="{where}"/>'


def draw_band(band: Band, colour: str, x_axis: Axis, y_axis: Axis) -> str:
    """The area between low and high."""
    known = [row for row in band if is_finite(row)]
    outline = [(x, low) for x, low, _ in known] + [(x, high) for x, _, high in reversed(known)]
    where = coordinates(outline, x_axis, y_axis)
    return f'<polygon class="band" fill="{colour}" points="{where}"/>'


def legend_rows(names: Sequence[str]) -> list[list[tuple[float, int]]]:
    """Rows of (left edge, index of the name), wrapped by an estimate of the width of the text."""
    rows: list[list[tuple[float, int]]] = [[]]
    x = float(LEFT)
    for index, name in enumerate(names):
        width = 34 + 6.6 * len(name)
        if rows[-1] and x + width > WIDTH:
            rows.append([])
            x = float(LEFT)
        rows[-1].append((x, index))
        x += width
    return rows


def draw_legend(names: Sequence[str], rows: list[list[tuple[float, int]]]) -> Iterator[str]:
    """One swatch and name per series."""
    for number, row in enumerate(rows):
        y = LEGEND_TOP + LEGEND_ROW * number
        for x, index in row:
            colour = COLOURS[index % len(COLOURS)]
            yield f'<rect x="{x:.1f}" y="{y - 6}" width="14" height="4" rx="2" fill="{colour}"/>'
            yield f'<text x="{x + 19:.1f}" y="{y}">{escape(names[index])}</text>'


def describe(series: Mapping[str, Sequence[Point]], xlabel: str, ylabel: str) -> str:
    """Alternative text: first and last value of every series."""
    parts = [f"{ylabel} over {xlabel}."]
    for name, points in series.items():
        known = [point for run in finite_runs(points) for point in run]
        if known:
            parts.append(f"{name}: from {known[0][1]:.4g} to {known[-1][1]:.4g}.")
        else:
            parts.append(f"{name}: no values.")
    return " ".join(parts)


def line_plot(
    series: Mapping[str, Sequence[Point]],
    title: str,
    xlabel: str,
    ylabel: str,
    bands: Mapping[str, Band] | None = None,
) -> str:
    """Draws lines over common axes.

    Args:
        series: name -> points (x, y), in drawing order; NaN and infinite points break the line.
        title: heading of the plot.
        xlabel: name of the x axis with its unit.
        ylabel: name of the y axis with its unit.
        bands: name of a series -> rows (x, low, high), drawn in that series' colour.

    Returns:
        A complete SVG document with ``<title>`` and ``<desc>``.

    Raises:
        ValueError: a band whose name is no series.
    """
    bands = bands or {}
    strangers = [name for name in bands if name not in series]
    if strangers:
        known = ", ".join(series) or "none"
        raise ValueError(
            f"bands: expected names of series ({known}), got {strangers[0]!r}. "
            "Name each band like its series."
        )
    points = [point for line in series.values() for run in finite_runs(line) for point in run]
    rows = [row for band in bands.values() for row in band if is_finite(row)]
    points += [(x, edge) for x, low, high in rows for edge in (low, high)]
    x_axis = axis_of([x for x, _ in points], LEFT, WIDTH - RIGHT, margin=0.0)
    names = list(series) if len(series) > 1 else []  # one line needs no legend: the title names it
    legend = legend_rows(names) if names else []
    top = LEGEND_TOP + LEGEND_ROW * len(legend) + 12
    y_axis = axis_of([y for _, y in points], HEIGHT - BOTTOM, top, margin=0.05)
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(series)}
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<desc>{escape(describe(series, xlabel, ylabel))}</desc>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="6"/>',
        f'<text class="title" x="{LEFT}" y="24">{escape(title)}</text>',
        *draw_axes(x_axis, y_axis, xlabel, ylabel),
        *(draw_band(band, colours[name], x_axis, y_axis) for name, band in bands.items()),
        *(draw for n in series for draw in draw_series(series[n], colours[n], x_axis, y_axis)),
        *draw_legend(names, legend),
        "</svg>",
    ]
    return "\n".join(body) + "\n"


def write_svg(
    path: str | Path,
    series: Mapping[str, Sequence[Point]],
    title: str,
    xlabel: str,
    ylabel: str,
    bands: Mapping[str, Band] | None = None,
) -> Path:
    """Writes `line_plot` of the same arguments to ``path``; makes its folder, returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line_plot(series, title, xlabel, ylabel, bands), encoding="utf-8")
    return path

"""Bars of a `loss` or `score` report in SVG, written by hand: a panel per shape.

A bar is a candidate's warm median with its 20-80 % band, a ring its cold median, the dashed line
the floor of that candidate. Readable on a light and on a dark page.
"""

from __future__ import annotations

from collections import Counter
from html import escape
from typing import Any

from benchmarks.machine import device_name

Row = dict[str, Any]
BAR, GAP, LABEL, TAIL, WIDTH = 16, 7, 300, 240, 960
HEAD, PANEL = 66, 34  # above the first panel; above the bars of each
MOST_LETTERS = 92  # of a reason
COLOURS = {"ours": "#0072b2", "plain": "#e69f00", "peer": "#d55e00", "floor": "#7f7f7f"}
NAMES = {"ours": "crpo_kernels", "plain": "plain torch", "peer": "peers", "floor": "bare products"}
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1f2328}.title{font-size:15px;font-weight:600}"
    ".shape{font-weight:600}.page{fill:#fff}.quiet{fill:#57606a}.wrong{fill:#cf222e}"
    ".band{stroke:#1f2328;stroke-width:1.5}.cold{fill:none;stroke:#1f2328;stroke-width:1.5}"
    ".floor{stroke:#1f2328;stroke-width:1.5;stroke-dasharray:4 3}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.page{fill:#0d1117}.quiet{fill:#9198a1}"
    ".wrong{fill:#ff7b72}.band,.cold,.floor{stroke:#e6edf3}}"
)
HATCH = (
    '<defs><pattern id="wrong" width="6" height="6" patternTransform="rotate(45)" '
    'patternUnits="userSpaceOnUse"><rect width="3" height="6" fill="#cf222e"/></pattern></defs>'
)


def svg(report: Row) -> str:
    """The first shape."""
    return document(report, report["cases"][:1])


def svg_of_shapes(report: Row) -> str | None:
    """The other shapes, None without any; what did not run is one line for each reason."""
    others = report["cases"][1:]
    return document(report, others, is_brief=True) if others else None


def document(report: Row, cases: list[Row], *, is_brief: bool = False) -> str:
    """A picture with a panel for each of ``cases``."""
    y, panels = HEAD, legend()
    for case in cases:
        rows = list(case.get("rows", ()))
        panels += panel(case, y, is_brief=is_brief)
        y += PANEL + max(1, num_lines(rows) if is_brief else len(rows)) * (BAR + GAP)
    title = f"{report['kind']}: ms, % of floor, peak MiB beyond inputs and outputs"
    return framed(report["machine"], title, panels, y + 8, patterns=HATCH)


def framed(
    machine: Row, title: str, body: list[str], height: float, *, more: str = "", patterns: str = ""
) -> str:
    """A picture of WIDTH x ``height`` pixels: a heading, where and when, and what is in ``body``.

    Args:
        machine: of the report.
        title: the heading.
        body: elements below it.
        height: pixels.
        more: words after the date.
        patterns: definitions that the body uses.
    """
    device = device_name(machine)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img">',
            f"<title>{escape(title)}; {escape(device)}</title>",
            f"<style>{STYLE}</style>{patterns}",
            f'<rect class="page" width="{WIDTH}" height="{height:g}"/>',
            text(16, 24, title, 'class="title"'),
            text(16, 43, f"{device}, {machine['date']}{more}", 'class="quiet"'),
            *body,
            "</svg>",
            "",
        ]
    )


def text(x: float, y: float, words: str, more: str = "") -> str:
    """A line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(words)}</text>'


def legend() -> list[str]:
    """What colours, dashes and rings mean."""
    parts, x = [], 16.0
    for kind, name in NAMES.items():
        parts.append(f'<rect x="{x:.1f}" y="53" width="14" height="8" fill="{COLOURS[kind]}"/>')
        parts.append(text(x + 19, 61, name))
        x += 38 + 6.6 * len(name)
    parts.append(f'<line class="floor" x1="{x + 7:.1f}" x2="{x + 7:.1f}" y1="49" y2="65"/>')
    parts.append(text(x + 14, 61, "floor of the row"))
    parts += whisker(x + 125, x + 145, 57)
    parts.append(text(x + 151, 61, "20 .. 80 %, warm"))
    parts.append(f'<circle class="cold" cx="{x + 264:.1f}" cy="57" r="3.5"/>')
    parts.append(text(x + 272, 61, "cold median"))
    return parts


def whisker(low: float, high: float, y: float) -> list[str]:
    """A band."""
    ends = [(low, low, 4), (high, high, 4), (low, high, 0)]
    return [
        f'<line class="band" x1="{a:.1f}" x2="{b:.1f}" y1="{y - d:.1f}" y2="{y + d:.1f}"/>'
        for a, b, d in ends
    ]


def reasons(rows: list[dict[str, Any]]) -> dict[str, int]:
    """How many rows each reason keeps from being there."""
    return Counter(row["missing"] for row in rows if "missing" in row)


def num_lines(rows: list[dict[str, Any]]) -> int:
    """Lines of a panel."""
    return sum("missing" not in row for row in rows) + len(reasons(rows))


def left_out(reason: str, count: int) -> str:
    """A line for rows that one reason keeps from being there."""
    return shortened(f"{count} not measured: {reason}")


def panel(case: Row, top: float, *, is_brief: bool = False) -> list[str]:
    """The bars of one shape."""
    parts = [text(16, top + 22, f"{case['name']}: {case['case']}", 'class="shape"')]
    rows = case.get("rows", ())
    measured = [row for row in rows if "missing" not in row]
    if not measured:
        why = case.get("missing") or "nothing was measured"
        return [*parts, text(LABEL, top + PANEL + 12, shortened(f"- {why}"), 'class="quiet"')]
    floors = {row["key"]: row["seconds"]["warm"]["median"] for row in measured}
    longest = max(
        times[name]
        for row in measured
        for times, name in ((row["seconds"]["warm"], "high"), (cold(row), "median"))
    )
    scale = (WIDTH - LABEL - TAIL) / longest
    for index, row in enumerate(measured if is_brief else rows):
        y = top + PANEL + index * (BAR + GAP)
        parts += bar(row, y, scale, floors.get(row.get("floor", "")))
    found = reasons(rows) if is_brief else {}
    for index, (reason, count) in enumerate(found.items(), len(measured)):
        y = top + PANEL + index * (BAR + GAP) + 12
        parts.append(text(LABEL, y, left_out(reason, count), 'class="quiet"'))
    return parts


def cold(row: Row) -> Row:
    """The cold times of a row, where it has none the warm ones."""
    return row["seconds"].get("cold") or row["seconds"]["warm"]


def bar(row: Row, y: float, scale: float, floor: float | None) -> list[str]:
    """One candidate: its name, its bar, its numbers, or the reason why there are none."""
    name = " ".join(filter(None, (row["title"], row.get("version"))))
    label = text(LABEL - 8, y + 12, shortened(name, 44), 'text-anchor="end"')
    if "missing" in row:
        return [label, text(LABEL, y + 12, shortened(f"- {row['missing']}"), 'class="quiet"')]
    warm, colour = row["seconds"]["warm"], COLOURS[row["kind"]]
    middle, end = y + BAR / 2, LABEL + scale * max(warm["high"], cold(row)["median"])
    box = f'x="{LABEL}" y="{y:.1f}" width="{scale * warm["median"]:.1f}" height="{BAR}"'
    parts = [label, f'<rect {box} fill="{colour}"/>']
    if row.get("wrong"):
        parts.append(f'<rect {box} fill="url(#wrong)"/>')
    if warm.get("count", 2) > 1:
        parts += whisker(LABEL + scale * warm["low"], LABEL + scale * warm["high"], middle)
    if "cold" in row["seconds"]:
        x = LABEL + scale * cold(row)["median"]
        parts.append(f'<circle class="cold" cx="{x:.1f}" cy="{middle:.1f}" r="3.5"/>')
    if floor is not None:
        x, last = LABEL + scale * floor, y + BAR + GAP / 2
        line = f'x1="{x:.1f}" x2="{x:.1f}" y1="{y - GAP / 2:.1f}" y2="{last:.1f}"'
        parts.append(f'<line class="floor" {line}/>')
    if row.get("wrong"):
        return [*parts, text(end + 8, y + 12, f"wrong, {numbers(row)}", 'class="wrong"')]
    return [*parts, text(end + 8, y + 12, numbers(row))]


def numbers(row: Row) -> str:
    """What stands behind a bar."""
    milliseconds = 1e3 * row["seconds"]["warm"]["median"]
    parts = [f"{milliseconds:.{0 if milliseconds >= 100 else 2}f} ms"]
    if row["kind"] != "floor":
        if row.get("floor_share") is not None:
            parts.append(f"{100 * row['floor_share']:.0f} %")
        if row.get("peak_bytes") is not None and "peak_bytes" not in row.get("lacks", {}):
            mib = row["peak_bytes"] / 2**20
            parts.append(f"{mib:.{0 if mib >= 32 else 2}f} MiB")
    return ", ".join(parts)


def shortened(words: str, most: int = MOST_LETTERS) -> str:
    """At most so many letters."""
    words = " ".join(words.split())
    return words if len(words) <= most else words[: most - 3] + "..."

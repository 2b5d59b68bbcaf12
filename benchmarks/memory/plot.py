"""What is shown of a report of kind "memory": Markdown, SVG and CSV."""

from __future__ import annotations

from typing import Any

from benchmarks.drawing.bars import COLOURS, WIDTH, framed, left_out, num_lines, reasons, text
from benchmarks.drawing.log_plot import bytes_text
from benchmarks.losses.plot import MET, markdown
from benchmarks.machine import headline, opening

LABEL, TAIL, BAR, GAP, HEAD, PANEL = 290, 230, 14, 6, 66, 34
METHOD = (
    "Peak: the most live bytes beyond inputs and outputs (both gradients, logprobs, entropies) in "
    "one forward and backward, of tensors on a CPU, of the allocator on a GPU; all: outputs "
    "included. Bound: what the design allows beyond the inputs with the default workspace_bytes: "
    "1024 fp32 rows of logits, gradient factors of at most 2D rows and a group, the fp32 sum of "
    "d_weight, outputs, scratch. Planned: the package's own code on fake tensors, with the "
    "backend triton as on a GPU whose memory is free: bytes asked for, nothing was measured."
)


def page(report: dict[str, Any]) -> str:
    """The whole Markdown page of a run."""
    parts = [
        *opening("Peak memory", report),
        *(text for case in report["cases"] for text in section(case)),
        METHOD,
    ]
    return "\n\n".join(parts) + "\n"


def section(case: dict[str, Any]) -> list[str]:
    """A shape: what was measured, then what was planned."""
    return [
        f"## {case['name']}",
        f"Measured: {case['case']}",
        table(case["rows"]),
        f"PLANNED, not measured: {case['planned_case']} on a GPU",
        table(case["planned"]),
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """MiB by candidate."""
    header = ["", "peak MiB", "all MiB", "bound MiB", "within", "note"]
    lines = []
    for row in rows:
        title = f"{row['title']} {row.get('version', '')}".strip()
        if "missing" in row:
            lines.append([title, "-", "-", "-", "-", row["missing"]])
            continue
        bound = f"{row['bound'] / 2**20:.1f}" if "bound" in row else "-"
        sizes = [f"{row[name] / 2**20:.1f}" for name in ("peak_bytes", "extra_bytes")]
        met = MET[row["met"]] if "met" in row else "-"
        lines.append([title, *sizes, bound, met, row.get("note", "")])
    return markdown(header, lines)


def svg(report: dict[str, Any]) -> str:
    """Bars of the peak: a panel for each shape as measured, and one as planned."""
    y, body = float(HEAD), []
    for case in report["cases"]:
        panels = (
            (f"{case['name']}: {case['case']}", case["rows"]),
            (f"{case['name']}: PLANNED, not measured: {case['planned_case']}", case["planned"]),
        )
        for title, rows in panels:
            body += panel(title, rows, y)
            y += PANEL + num_lines(rows) * (BAR + GAP)
    title = "Peak bytes beyond inputs and outputs"
    return framed(report["machine"], title, body, y)


def panel(title: str, rows: list[dict[str, Any]], top: float) -> list[str]:
    """The bars of some rows, each as long as its share of the largest; a line for each reason."""
    measured = [row for row in rows if "missing" not in row]
    most = max((row["peak_bytes"] for row in measured), default=1)
    parts = [text(16, top + 14, title, 'class="shape"')]
    for index, row in enumerate(measured):
        y = top + 24 + index * (BAR + GAP)
        parts.append(text(LABEL - 8, y + 11, row["title"], 'text-anchor="end"'))
        length = max(1.0, (WIDTH - LABEL - TAIL) * row["peak_bytes"] / max(most, 1))
        box = f'x="{LABEL}" y="{y:g}" width="{length:.1f}" height="{BAR}"'
        parts.append(f'<rect {box} fill="{COLOURS[row["kind"]]}"/>')
        parts.append(text(LABEL + length + 6, y + 11, bytes_text(row["peak_bytes"])))
    for index, (reason, count) in enumerate(reasons(rows).items(), len(measured)):
        words = left_out(reason, count)
        parts.append(text(LABEL, top + 35 + index * (BAR + GAP), words, 'class="quiet"'))
    return parts


def csv_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each candidate of each shape."""
    rows = []
    for case in report["cases"]:
        for how, name, found in (
            ("measured", case["case"], case["rows"]),
            ("planned", case["planned_case"], case["planned"]),
        ):
            rows += [{"shape": case["name"], "case": name, "how": how, **row} for row in found]
    return rows


def readme_block(report: dict[str, Any], stem: str) -> str:
    """For docs/benchmarks.md: where it was measured, the shapes in short, the picture."""
    header = ["shape", "ours, one pass", "ours, two passes", "ours, scoring", "plain torch"]
    lines = []
    for case in report["cases"]:
        for how, name in (("rows", case["case"]), ("planned", f"planned: {case['planned_case']}")):
            found = {row["key"]: row for row in case[how] if "missing" not in row}
            keys = ("one_pass", "two_pass", "scored", "naive")
            sizes = [bytes_text(found[k]["peak_bytes"]) if k in found else "-" for k in keys]
            lines.append([f"{case['name']}, {name}", *sizes])
    every = [row for case in report["cases"] for row in (*case["rows"], *case["planned"])]
    judged = [row for row in every if "met" in row]
    kept = sum(row["met"] for row in judged)
    about = (
        "Peak beyond inputs and outputs; planned: not measured, bytes that the code asks for on a "
        f"GPU. {kept} of {len(judged)} are within the bound. All candidates and what the numbers "
        f"mean: [{stem}.md](benchmarks/results/{stem}.md)."
    )
    parts = [
        headline(report),
        about,
        markdown(header, lines),
        f"![Peak bytes by shape and candidate](benchmarks/results/{stem}.svg)",
    ]
    return "\n\n".join(parts)

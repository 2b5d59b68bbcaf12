"""The result of a run as a Markdown table and as horizontal bars in SVG, without a dependency."""

from __future__ import annotations

from html import escape

BAR, GAP, LABEL, WIDTH = 22, 10, 280, 860
OURS, OTHERS, FLOOR = "#0072b2", "#d55e00", "#7f7f7f"
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1f2328}.title{font-size:15px;font-weight:600}"
    ".page{fill:#fff}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.page{fill:#0d1117}}"
)


def table(report: dict) -> str:
    """The rows of a report as Markdown."""
    head = (
        "| | s | / products | / plain torch | extra GB | d_weight error | d_hidden error "
        "| logprob error (nats) | note |"
    )
    lines = [head, "|" + " --- |" * 9]
    for row in report["rows"]:
        if "missing" in row:
            lines.append(f"| {row['title']} | - | - | - | - | - | - | - | {row['missing']} |")
            continue
        found = row["errors"]
        cells = [
            row["title"] + (f" {row['version']}" if row.get("version") else ""),
            f"{row['seconds']['median']:.2f}",
            f"{row['over_products']:.2f}",
            f"{row['over_naive']:.2f}",
            "-" if row["key"] == "products" else f"{row['extra_bytes'] / 1e9:.2f}",
            _error(found.get("d_weight_rel_rms")),
            _error(found.get("d_hidden_rel_rms")),
            _error(found.get("logprobs_rms")),
            row["note"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def page(report: dict) -> str:
    """The whole Markdown page of a run."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    targets = [
        f"| {target['text']} | {target['limit']} | {target['value']:.2f} | "
        f"{'yes' if target['met'] else '**no**'} |"
        for target in report["targets"]
    ]
    low, high = report["entropy_quantiles"]
    where = (
        f"{machine['cpu']}, {machine['threads']} threads, {machine['memory_gib']} GiB; "
        f"Python {machine['python']}, {versions}."
    )
    inputs = (
        f"One product: {report['product_tflops']:.2f} TFLOP/s. "
        f"Inputs: entropy {low:.1f} .. {high:.1f} nats (10 % .. 90 % of rows)."
    )
    method = (
        "Seconds: median of interleaved rounds, forward and backward. Extra GB: peak of live "
        "tensor bytes beyond the inputs, both gradients included, in a run of its own. Errors: rms "
        f"against fp64 on {report['error_rows']} rows, gradients relative; on a CPU every bf16 "
        "product is rounded to bf16, which is most of each error. Products may be 5 "
        "times faster on another CPU: compare ratios of one run."
    )
    lines = [
        f"# Fused loss on a CPU: {report['case']}",
        f"`{report['command']}`, {machine['date']}, commit {machine['commit']}. {where}",
        inputs,
        table(report),
        "\n".join(["| target | limit | measured | met |", "| --- | --- | --- | --- |", *targets]),
        method,
    ]
    return "\n\n".join(lines) + "\n"


def bars(report: dict) -> str:
    """Seconds of every candidate, with three products as the floor."""
    rows = [row for row in report["rows"] if "missing" not in row]
    longest = max(row["seconds"]["median"] for row in rows)
    height = 58 + len(rows) * (BAR + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(report['case'])}: seconds, forward and backward</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}"/>',
        f'<text class="title" x="16" y="24">{escape(report["case"])}: seconds (extra GB)</text>',
        f'<text x="16" y="42">{escape(report["machine"]["cpu"])}</text>',
    ]
    for index, row in enumerate(rows):
        y = 54 + index * (BAR + GAP)
        seconds = row["seconds"]["median"]
        length = seconds / longest * (WIDTH - LABEL - 150)
        ours = OURS if row["key"].startswith(("one_pass", "two_pass")) else OTHERS
        colour = FLOOR if row["key"] == "products" else ours
        text = f"{seconds:.2f} s"
        if row["key"] != "products":
            text += f" ({row['extra_bytes'] / 1e9:.2f} GB)"
        parts += [
            f'<text x="{LABEL - 8}" y="{y + 15}" text-anchor="end">{escape(row["title"])}</text>',
            f'<rect x="{LABEL}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{colour}"/>',
            f'<text x="{LABEL + length + 6:.1f}" y="{y + 15}">{text}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])

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
    """The rows of a report as Markdown; seconds and GB of a CPU, milliseconds and MiB of a GPU."""
    is_gpu = "gpu" in report["machine"]
    columns = [
        *("", "ms" if is_gpu else "s", "/ products", "% of floor"),
        *(["/ products, fp32 out"] if is_gpu else []),
        *("/ plain torch", "peak MiB" if is_gpu else "extra GB"),
        *(["workspace MiB"] if is_gpu else []),
        *(["targets"] if is_gpu else []),
        *("d_weight error", "d_hidden error", "logprob error (nats)", "note"),
    ]
    lines = [f"| {' | '.join(columns).strip()} |", "|" + " --- |" * len(columns)]
    for row in report["rows"]:
        if "missing" in row:
            empty = " - |" * (len(columns) - 2)
            lines.append(f"| {row['title']} |{empty} {row['missing']} |")
        else:
            lines.append("| " + " | ".join(cells(row, is_gpu=is_gpu)) + " |")
    return "\n".join(lines)


def cells(row: dict, *, is_gpu: bool) -> list[str]:
    """One row. The floor is the bare products that the candidate cannot do without."""
    found, seconds, ratio = row["errors"], row["seconds"]["median"], row.get("over_products")
    scale, digits = (2**20, 0) if is_gpu else (1e9, 2)
    is_floor = row["key"].startswith("products")
    sizes = [row["extra_bytes"], *([row["workspace_bytes"]] if is_gpu else [])]
    times = [
        f"{1e3 * seconds:.2f}" if is_gpu else f"{seconds:.2f}",
        _ratio(ratio),
        "-" if ratio is None else f"{100 / ratio:.0f}",
        *([_ratio(row.get("over_products_fp32"))] if is_gpu else []),
        _ratio(row.get("over_naive")),
    ]
    return [
        row["title"] + (f" {row['version']}" if row.get("version") else ""),
        *("-" if row.get("has_no_claim") else time for time in times),
        *("-" if is_floor else f"{size / scale:.{digits}f}" for size in sizes),
        *([row.get("target", "-")] if is_gpu else []),
        _error(found.get("d_weight_rel_rms")),
        _error(found.get("d_hidden_rel_rms")),
        _error(found.get("logprobs_rms")),
        row["note"],
    ]


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def place(machine: dict) -> str:
    """Device and versions."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    software = f"Python {machine['python']}, {versions}."
    if "gpu" not in machine:
        return (
            f"{machine['cpu']}, {machine['threads']} threads, {machine['memory_gib']} GiB; "
            f"{software}"
        )
    gpu = machine["gpu"]
    toolkit = f"ROCm {gpu['hip']}" if gpu.get("hip") else f"CUDA {gpu['cuda']}"
    return (
        f"{gpu['name']}, {gpu['memory_gib']} GiB, driver {gpu['driver']}, {toolkit}, "
        f"clocks and power {gpu['clocks_and_power']}; {software}"
    )


def method(report: dict) -> str:
    """How the numbers came about."""
    rows = report["error_rows"]
    if "gpu" in report["machine"]:
        return (
            "ms: median of interleaved rounds by CUDA events, after warm-up, inputs larger than "
            "the cache or in turn. Floor: the bare products (bf16 out) that a candidate cannot do "
            "without, measured in the same rounds. Peak: allocated bytes beyond the inputs; "
            "workspace: without the gradients that are returned. Errors: rms against fp64 on "
            f"{rows} rows, gradients relative."
        )
    return (
        "Seconds: median of interleaved rounds, forward and backward. % of floor: the three bare "
        "products of the same run over a row's seconds. Extra GB: peak of live "
        "tensor bytes beyond the inputs, both gradients included, in a run of its own. Errors: rms "
        f"against fp64 on {rows} rows, gradients relative; on a CPU every bf16 "
        "product is rounded to bf16, which is most of each error. Products may be 5 "
        "times faster on another CPU: compare ratios of one run."
    )


def page(report: dict) -> str:
    """The whole Markdown page of a run."""
    machine = report["machine"]
    where = "a GPU" if "gpu" in machine else "a CPU"
    low, high = report["entropy_quantiles"]
    inputs = (
        f"One product: {report['product_tflops']:.2f} TFLOP/s. "
        f"Inputs: entropy {low:.1f} .. {high:.1f} nats (10 % .. 90 % of rows)."
    )
    lines = [
        f"# Fused loss on {where}: {report['case']}",
        f"`{report['command']}`, {machine['date']}, commit {machine['commit']}. {place(machine)}",
        inputs,
        table(report),
        target_table(report["targets"]),
        method(report),
    ]
    return "\n\n".join(lines) + "\n"


MET = {True: "yes", False: "**no**", None: "no claim"}


def target_table(targets: list[dict]) -> str:
    """Limits and what was measured."""
    lines = [
        f"| {target['text']} | {target['limit']} | "
        f"{'-' if target['met'] is None else round(target['value'], 2)} | {MET[target['met']]} |"
        for target in targets
    ]
    return "\n".join(["| target | limit | measured | met |", "| --- | --- | --- | --- |", *lines])


def bars(report: dict) -> str:
    """Seconds of every candidate, with three products as the floor."""
    rows = [row for row in report["rows"] if "missing" not in row]
    is_gpu = "gpu" in report["machine"]
    device = report["machine"]["gpu"]["name"] if is_gpu else report["machine"]["cpu"]
    longest = max(row["seconds"]["median"] for row in rows)
    height = 58 + len(rows) * (BAR + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(report['case'])}: seconds, forward and backward</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}"/>',
        f'<text class="title" x="16" y="24">{escape(report["case"])}: seconds (extra GB)</text>',
        f'<text x="16" y="42">{escape(device)}</text>',
    ]
    for index, row in enumerate(rows):
        y = 54 + index * (BAR + GAP)
        seconds = row["seconds"]["median"]
        length = seconds / longest * (WIDTH - LABEL - 150)
        ours = OURS if row["title"].startswith("crpo_kernels") else OTHERS
        colour = FLOOR if row["key"].startswith("products") else ours
        text = f"{1e3 * seconds:.2f} ms" if is_gpu else f"{seconds:.2f} s"
        if colour != FLOOR:
            text += f" ({row['extra_bytes'] / 1e9:.2f} GB)"
        parts += [
            f'<text x="{LABEL - 8}" y="{y + 15}" text-anchor="end">{escape(row["title"])}</text>',
            f'<rect x="{LABEL}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{colour}"/>',
            f'<text x="{LABEL + length + 6:.1f}" y="{y + 15}">{text}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])

"""A report of kind "step" as Markdown, as stacked bars in SVG and as rows of CSV."""

from __future__ import annotations

from html import escape
from typing import Any

from benchmarks.drawing.bars import STYLE
from benchmarks.losses.plot import MET, markdown
from benchmarks.machine import device_name, headline

from .parts import PARTS

COLOURS = {
    "blocks_forward": "#56b4e9",
    "blocks_backward": "#0072b2",
    "head_forward": "#e69f00",
    "head_backward": "#d55e00",
    "reference": "#cc79a7",
    "optimizer": "#009e73",
    "packing": "#f0e442",
    "metrics": "#999999",
    "sharding": "#8c564b",
    "loop": "#555555",
}
BAR, WIDTH, LEFT = 34, 860, 40


def present(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of trainers that ran."""
    return [row for row in report["rows"] if "missing" not in row]


def page(report: dict[str, Any]) -> str:
    """The whole Markdown page."""
    case = report["case"]
    lines = [
        f"# One optimizer step, training phase: {case['model']}, {case['dtype']}, {case['device']}",
        headline(report),
        rollouts(report),
        table(report),
        parts_table(report),
        agreement_table(report),
        target_table(report),
        method(report),
    ]
    return "\n\n".join(line for line in lines if line) + "\n"


def rollouts(report: dict[str, Any]) -> str:
    """What is trained on."""
    case, found = report["case"], report["rollouts"]
    padding = 1 - found["tokens"] / found["padded"]
    return (
        f"{found['sequences']} sequences ({case['prompts']} prompts x {case['group_size']}), "
        f"{found['tokens']} tokens of which {found['completion_tokens']} are trained completion "
        f"tokens. Lengths (least, quartiles, most): prompts {_list(found['prompt_quantiles'])}, "
        f"completions {_list(found['completion_quantiles'])} (log-normal, sigma 0.6, cut at "
        f"{case['max_completion']}). Padded as TRL pads they are {found['padded']} slots, "
        f"{100 * padding:.0f} % of them padding, in {found['micro_batches']} micro-batches of "
        f"{case['micro_batch']}; ours: {case['layout']}, as many slots. Objective "
        f"{case['objective']}, KL coefficient {case['kl_coef']}, attention {case['attention']}, "
        f"activation checkpointing {'on' if case['checkpointing'] else 'off'}."
    )


def _list(values: list[int]) -> str:
    return ", ".join(map(str, values))


def table(report: dict[str, Any]) -> str:
    """One line per trainer."""
    names = ("", "s / step", "20-80 %", "tokens/s", "MFU %", "peak MiB", "over states MiB")
    lines = []
    for row in report["rows"]:
        title = f"{row['title']} {row['version']}".strip()
        if "missing" in row:
            lines.append([title, *["-"] * 7, row["missing"]])
            continue
        seconds, memory = row["seconds"], row["memory"]
        cells = [
            title,
            f"{seconds['median']:.3f}",
            f"{seconds['low']:.3f}-{seconds['high']:.3f}",
            f"{row['tokens_per_second']:.0f}",
            f"{100 * row['mfu']:.1f}",
            f"{memory['peak'] / 2**20:.0f}",
            f"{memory['over'] / 2**20:.0f}",
            f"{100 * row['overhead']['median']:.2f}",
            row["note"],
        ]
        lines.append(cells)
    return markdown([*names, "loop overhead %", "note"], lines)


def parts_table(report: dict[str, Any]) -> str:
    """Seconds and share of every part, by trainer."""
    rows, lines = present(report), []
    for name, text in PARTS.items():
        cells = []
        for row in rows:
            value = row["parts"][name]["median"]
            cells.append(f"{value:.4f} ({100 * value / row['seconds']['median']:.1f} %)")
        lines.append([text, *cells])
    header = ["part", *(f"{row['title']}, s (share)" for row in rows)]
    return markdown(header, lines) if rows else ""


def agreement_table(report: dict[str, Any]) -> str:
    """Loss and gradients of the first step beside each other."""
    if not report["agreement"]:
        return ""
    names = ("first step", "loss, ours / theirs", "gradient norm, ours / theirs")
    lines = []
    for row in report["agreement"]:
        cells = [
            row["key"],
            " / ".join(f"{x:.6g}" for x in row["loss"]),
            " / ".join(f"{x:.6g}" for x in row["grad_norm"]),
            f"{row['gradient_error']:.1e} (limit {row['limits']['gradient']:.0e})",
            MET[row["agrees"]],
        ]
        lines.append(cells)
    return markdown([*names, "relative gradient distance", "agrees"], lines)


def target_table(report: dict[str, Any]) -> str:
    """Limits and what was measured."""
    lines = [
        [t["text"], f"{t['limit']:g}", f"{t['value']:.3g}", MET[t["met"]]]
        for t in report["targets"]
    ]
    return markdown(["target", "limit", "measured", "met"], lines)


def method(report: dict[str, Any]) -> str:
    """How the numbers came about."""
    flops = sum(report["flops"].values())
    memory = (
        "what the device's allocator held at most"
        if "gpu" in report["machine"]
        else "live tensor bytes in a step of its own (not resident memory)"
    )
    return (
        "Seconds: median of interleaved rounds; parts are medians of their own. Tokens: prompts "
        "and completions of the step, padding not counted. Peak: "
        f"{memory}; over states: without parameters, gradients, optimizer state and the weights of "
        "the KL reference. Overhead: packing, metrics and everything else outside model, kernel "
        "and optimizer; for TRL the arithmetic of the loss after its kernel is among the metrics. "
        f"MFU: {flops / 1e12:.3g} TFLOP a step (6 N T of the blocks, causal attention, head; the "
        f"reference pass a third of that again) against {report['peak_tflops']:.3g} TFLOP/s, "
        f"{report['peak_source']}. Random weights. fp32 weights, gradients and optimizer state in "
        "both; compare trainers of one run, not runs."
    )


def cases(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The trainers as rows that `--against` compares: they have no floor."""
    case = report["case"]
    names = ("model", "dtype", "attention", "objective", "prompts", "group_size", "micro_batch")
    rows = []
    for row in report["rows"]:
        told = {"key": row["key"], "title": row["title"]}
        if "missing" in row:
            rows.append({**told, "missing": row["missing"]})
        else:
            seconds, peak = {"warm": row["seconds"]}, row["memory"]["peak"]
            rows.append({**told, "seconds": seconds, "peak_bytes": peak})
    sizes = ", ".join(f"{name} {case[name]}" for name in names)
    return [{"name": "step", "case": sizes, "rows": rows, "command": report["command"]}]


def svg(report: dict[str, Any]) -> str:
    """One stacked bar per trainer, on one scale of seconds."""
    rows = present(report)
    longest = max((row["seconds"]["median"] for row in rows), default=1.0)
    legend = 26 * -(-len(PARTS) // 3)
    height = 82 + len(rows) * (BAR + 34) + legend
    case, machine = report["case"], report["machine"]
    where = f"{device_name(machine)}, {machine['date']}"
    title = f"One optimizer step, {case['model']} {case['dtype']}: seconds by part"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}"/>',
        f'<text class="title" x="{LEFT}" y="28">{escape(title)}</text>',
        f'<text class="quiet" x="{LEFT}" y="47">{escape(where)}</text>',
    ]
    scale = (WIDTH - 2 * LEFT) / longest
    for index, row in enumerate(rows):
        lines += _bar(row, 74 + index * (BAR + 34), scale)
    for index, (name, text) in enumerate(PARTS.items()):
        x, y = LEFT + 265 * (index % 3), height - legend + 26 * (index // 3)
        lines.append(f'<rect x="{x}" y="{y}" width="14" height="14" fill="{COLOURS[name]}"/>')
        lines.append(f'<text x="{x + 20}" y="{y + 12}">{escape(text)}</text>')
    return "\n".join([*lines, "</svg>", ""])


def _bar(row: dict[str, Any], y: float, scale: float) -> list[str]:
    seconds, memory = row["seconds"]["median"], row["memory"]["peak"] / 2**20
    whole = sum(part["median"] for part in row["parts"].values())
    text = f"{row['title']}: {seconds:.3f} s, {row['tokens_per_second']:.0f} tokens/s, "
    text += f"peak {memory:.0f} MiB"
    lines, x = [f'<text x="{LEFT}" y="{y - 4}">{escape(text)}</text>'], float(LEFT)
    for name, part in row["parts"].items():  # medians of parts need not add up to the whole's
        width = part["median"] / whole * seconds * scale if whole else 0.0
        tip = f"{PARTS[name]}: {part['median']:.4f} s"
        lines.append(
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" '
            f'fill="{COLOURS[name]}"><title>{escape(tip)}</title></rect>'
        )
        x += width
    return lines


def csv_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per trainer and part, and one for its whole step."""
    found = []
    for row in report["rows"]:
        head = {"trainer": row["key"], "version": row["version"]}
        if "missing" in row:
            found.append({**head, "part": "step", "missing": row["missing"]})
            continue
        whole = row["seconds"]["median"]
        step = {
            "tokens_per_second": row["tokens_per_second"],
            "mfu": row["mfu"],
            "peak_bytes": row["memory"]["peak"],
            "over_bytes": row["memory"]["over"],
            "overhead": row["overhead"]["median"],
        }
        for name, part in {"step": row["seconds"], **row["parts"]}.items():
            times = {f"{key}_s": part[key] for key in ("median", "low", "high")}
            record = {**head, "part": name, **times, "share": part["median"] / whole}
            found.append(record | (step if name == "step" else {}))
    return found

"""What is shown of a report of kind "rollout": Markdown, SVG and CSV."""

from __future__ import annotations

from typing import Any

from benchmarks.drawing.bars import COLOURS, WIDTH, framed, text, whisker
from benchmarks.drawing.log_plot import bytes_text
from benchmarks.losses.plot import markdown
from benchmarks.machine import opening

LABEL, TAIL, BAR, GAP, HEAD, PANEL = 210, 330, 16, 7, 60, 34
METHOD = (
    "Prefill: prompt tokens over the seconds of a generation of one token, each prompt counted "
    "once (plain generate computes it for every sample). Decode: sampled tokens after the first "
    "over the seconds beyond the prefill. Medians of interleaved rounds, 20 .. 80 % in brackets. "
    "Peak: live bytes beyond the weights. Mismatch: |trainer - rollout logprob| of every token of "
    "one run, largest and mean, in nats. Weights are random: the text means nothing, the "
    "probabilities are nearly equal, and mismatches are smaller than in a trained model."
)


def page(report: dict[str, Any]) -> str:
    """The whole Markdown page of a run."""
    model = (
        f"Model {report['model']}, {report['parameters'] / 1e6:,.1f} M random parameters in "
        f"{report['dtype']}; attention {report['attention']} (plain generate: sdpa instead of "
        "sdpa_packed)."
    )
    parts = [
        *opening("Rollouts", report),
        model,
    ]
    for case in report["cases"]:
        parts += [f"## {case['name']}", f"{case['case']}", table(case), *notes(case)]
    return "\n\n".join([*parts, METHOD]) + "\n"


def table(case: dict[str, Any]) -> str:
    """One line for each candidate."""
    header = ["", "tokens/s", "prefill tokens/s", "decode tokens/s", "x generate", "peak",
              "mismatch max", "mean", "state"]  # fmt: skip
    lines = []
    for row in case["rows"]:
        if "missing" in row:
            lines.append([row["title"], *"-------", row["missing"]])
            continue
        names = ("tokens_per_second", "prefill_tokens_per_second", "decode_tokens_per_second")
        ratio = f"{row['over_generate']:.2f}" if "over_generate" in row else "-"
        peak = bytes_text(row["peak_bytes"]) if "peak_bytes" in row else "-"
        mismatch = [f"{row['mismatch'][name]:.2g}" for name in ("max", "mean")]
        state = f"**wrong**: {row['wrong']}" if row["wrong"] else "right"
        rates = [rate(row.get(name)) for name in names]
        lines.append([row["title"], *rates, ratio, peak, *mismatch, state])
    return markdown(header, lines)


def rate(summary: dict[str, float] | None) -> str:
    """1,234 (1,200 .. 1,300)."""
    if summary is None:
        return "-"
    return f"{summary['median']:,.0f} ({summary['low']:,.0f} .. {summary['high']:,.0f})"


def notes(case: dict[str, Any]) -> list[str]:
    """What each candidate does, and why a cell is empty."""
    lines = []
    for row in case["rows"]:
        lacks = [f"no {name}: {why}" for name, why in row.get("lacks", {}).items()]
        said = [part for part in [row["note"], *lacks] if part]
        lines += [f"- {row['title']}: {'; '.join(said)}"] if said else []
    return ["\n".join(lines)]


def svg(report: dict[str, Any]) -> str:
    """Tokens per second: a panel for each case, a bar for each candidate."""
    y, body = float(HEAD), []
    for case in report["cases"]:
        body += panel(case, y)
        y += PANEL + len(case["rows"]) * (BAR + GAP)
    title = f"Sampled tokens per second, {report['model']} in {report['dtype']}"
    return framed(report["machine"], title, body, y, more="; whiskers 20 .. 80 % of the rounds")


def panel(case: dict[str, Any], top: float) -> list[str]:
    """The bars of one case, each as long as its share of the fastest."""
    parts = [text(16, top + 14, f"{case['name']}: {case['case']}", 'class="shape"')]
    ran = [row["tokens_per_second"] for row in case["rows"] if "tokens_per_second" in row]
    scale = (WIDTH - LABEL - TAIL) / max((speed["high"] for speed in ran), default=1.0)
    for index, row in enumerate(case["rows"]):
        y = top + 24 + index * (BAR + GAP)
        parts.append(text(LABEL - 8, y + 12, row["title"], 'text-anchor="end"'))
        speed = row.get("tokens_per_second")
        if speed is None:
            parts.append(text(LABEL, y + 12, f"- {row['missing'][:80]}", 'class="quiet"'))
            continue
        length, colour = scale * speed["median"], COLOURS[row["kind"]]
        box = f'x="{LABEL}" y="{y:g}" width="{length:.1f}" height="{BAR}"'
        parts.append(f'<rect {box} fill="{colour}"/>')
        if speed["count"] > 1:
            ends = LABEL + scale * speed["low"], LABEL + scale * speed["high"]
            parts += whisker(*ends, y + BAR / 2)
        words = f"{speed['median']:,.0f} tokens/s"
        if "decode_tokens_per_second" in row:
            words += f", decode {row['decode_tokens_per_second']['median']:,.0f}"
        parts.append(text(LABEL + scale * speed["high"] + 8, y + 12, words))
    return parts


def csv_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each candidate of each case."""
    rows = []
    names = ("tokens_per_second", "prefill_tokens_per_second", "decode_tokens_per_second")
    for case in report["cases"]:
        for row in case["rows"]:
            line = {"name": case["name"], "case": case["case"]}
            line |= {k: row[k] for k in ("key", "title", "kind", "missing", "wrong") if k in row}
            for name in names:
                line |= {f"{name}_{k}": v for k, v in row.get(name, {}).items()}
            line |= {f"mismatch_{k}": v for k, v in row.get("mismatch", {}).items()}
            line |= {k: row[k] for k in ("peak_bytes", "sampled_tokens") if k in row}
            rows.append(line)
    return rows

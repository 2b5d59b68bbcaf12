"""The numbers of the README, made from the committed result files: `python -m benchmarks readme`.

Each block stands between `<!-- name -->` and `<!-- /name -->`; a test compares them with this code's output.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import quickstart

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def load(name: str) -> dict[str, Any] | None:
    """A result file, or None where it was not measured yet."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def quickstart_block() -> str:
    """CRPO beside GRPO and the unscaled magnitude, over seeds."""
    report = load("quickstart")
    if report is None:
        return "Not measured yet."
    seeds = sorted({r["seed"] for r in report["runs"]})
    return (
        f"`{report['command']}`, seeds {', '.join(map(str, seeds))}, {report['machine']['cpu']}, commit "
        f"{report['machine']['commit']} ([file](benchmarks/results/quickstart.json)); held-out synthetic test split, "
        "percent, mean +- standard deviation over seeds; before = after the cold start:\n\n"
        f"{quickstart.table(report['runs'])}\n\n{report['remark']}"
    )


def smollm2_block() -> str:
    """The runs of the small pretrained model."""
    parts = []
    for name, title in (
        ("smollm2_135m_sad", "SAD of IMHI"),
        ("smollm2_135m_cpu", "made-up posts"),
    ):
        report = load(name)
        if report is None:
            parts.append(f"configs/{name}.toml: not measured yet.")
            continue
        summary = report["summary"]
        rows = [
            f"| {k} | {summary[k]['weighted_f1']:.1f} | {summary[k]['accuracy']:.1f} | {summary[k]['format_rate']:.1f} |"
            for k in ("untrained", "before", "after")
            if k in summary
        ]
        first, last = report["reward_quarters"][0], report["reward_quarters"][-1]
        parts.append(
            f"{title}: `{report['command']}`, {report['rows']} test posts, {summary['seconds'] / 60:.0f} minutes "
            f"({report['machine']['cpu']}, {report['conditions']}), mean reward of the first quarter of CRPO steps "
            f"{first:.3f}, of the last {last:.3f} ([file](benchmarks/results/{name}.json)):\n\n"
            "| | weighted F1 | accuracy | format |\n| --- | --- | --- | --- |\n" + "\n".join(rows)
            + f"\n\n{report['remark']}"
        )
    return "\n\n".join(parts)


def loss_block() -> str:
    """The page of `python -m benchmarks loss --device cpu`."""
    page = RESULTS / "loss_cpu.md"
    if not page.exists():
        return "Not measured yet."
    body = re.sub(r"\A#.*\n+", "", page.read_text(encoding="utf-8")).replace("](loss_", "](benchmarks/results/loss_")
    return body.strip()


BLOCKS: dict[str, Callable[[], str]] = {
    "quickstart": quickstart_block,
    "smollm2": smollm2_block,
    "loss": loss_block,
}


def fill(text: str) -> str:
    """``text`` with every block made anew."""
    for name, make in BLOCKS.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        block = make()
        text = re.sub(pattern, lambda m, b=block: f"{m[1]}{b}\n{m[2]}", text, flags=re.DOTALL)
    return text


def write() -> None:
    """Rewrite README.md."""
    page = ROOT / "README.md"
    page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")

"""The numbers of the pages, made from the committed result files: `python -m benchmarks readme`.

Each block stands between `<!-- name -->` and `<!-- /name -->`; a test compares them with what this
code makes. README.md has them at a glance, docs/ whole.
`python -m benchmarks record <run> <config>` turns a finished run into a result file.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from . import plot
from .drawing.log_plot import bytes_text
from .gpu_gate import command as gpu_gate
from .losses import plot as loss_plot
from .machine import headline
from .output import RESULTS
from .quickstart import command as quickstart
from .quickstart import dual

ROOT = Path(__file__).resolve().parent.parent
PAGES = {  # page with blocks -> the repository's root from there
    ROOT / "README.md": "",
    ROOT / "docs" / "training.md": "../",
    ROOT / "docs" / "benchmarks.md": "../",
}
NOT_MEASURED = "Not measured yet."
GPU_NOT_MEASURED = "GPU numbers are not measured yet."
RUNS = {
    "quickstart": "The main job",
    "smollm2_135m_sad": "SAD of IMHI",
    "smollm2_135m_cpu": "Made-up posts",
}


def load(name: str) -> dict[str, Any] | None:
    """A result file, or None where it was not measured yet."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def record(run_dir: Path, name: str, command: str, machine: dict[str, Any]) -> dict[str, Any]:
    """What a finished run of ``configs/<name>.toml`` showed; see ``smollm2_block``."""
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = map(json.loads, lines)
    rewards = [r["reward"] for r in records if r.get("reward") is not None]
    size = max(1, len(rewards) // 4)
    evaluations = json.loads((run_dir / "evaluations.json").read_text(encoding="utf-8"))
    return {
        "config": f"configs/{name}.toml",
        "command": command,
        "machine": machine,
        "rows": evaluations["after"]["num_rows"],
        "summary": summary,
        "reward_first_quarter": sum(rewards[:size]) / size,
        "reward_last_quarter": sum(rewards[-size:]) / size,
    }


def all_block() -> str:
    """How long all commands together took."""
    report = load("all_cpu")
    if report is None:
        return NOT_MEASURED
    file = "[all_cpu.json](benchmarks/results/all_cpu.json)"
    return f"All commands together took {report['seconds']:.0f} s ({file}): {headline(report)}"


def glance_block() -> str:
    """The loss beside others at one shape, then a line for each other measurement."""
    loss = load("loss_cpu")
    if loss is None:
        return NOT_MEASURED
    case = loss["cases"][0]
    rows = [row for row in case["rows"] if "missing" not in row]
    rows.sort(key=lambda row: row["seconds"]["warm"]["median"])
    columns = {
        "warm": "ms (20 .. 80 %)",
        "floor_share": "% of the floor",
        "peak_bytes": "peak MiB",
        "d_weight": "error of dW, rms / max",
        "entropy_gradient": "entropy gradient",
    }
    lines = [
        [loss_plot.title_of({**row, "note": "", "lacks": {}}, loss_plot.Notes())]
        + [loss_plot.COLUMNS[name][1](row) or "-" for name in columns]
        for row in rows
    ]
    parts = [
        f"Loss and all gradients, {case['name']} head, {case['case']}:\n{headline(loss)}",
        loss_plot.markdown(["", *columns.values()], lines),
        "What surrounds the loss:",
        loss_plot.markdown(["", "ours", "beside it", "command"], list(_other_lines())),
    ]
    is_measured = gpu_block() != GPU_NOT_MEASURED
    gpu = "[GPU numbers](docs/benchmarks.md#gpu-numbers)." if is_measured else GPU_NOT_MEASURED
    return "\n\n".join([*parts, gpu])


def _other_lines() -> Iterator[list[str]]:
    """One line each for scoring, planned memory, the training step and sampling: ours first."""

    def line(
        title: str, report: dict[str, Any], cells: list[tuple[dict[str, Any], str]]
    ) -> list[str]:
        (_, ours), *others = cells
        beside = [
            f"{row['title']} {row.get('version', '')}".strip() + ": " + x for row, x in others
        ]
        return [title, f"**{ours}**", "; ".join(beside), f"`{report['command']}`"]

    if score := load("score_cpu"):
        case = score["cases"][0]
        rows = [row for kind in ("ours", "plain", "peer") for row in loss_plot.ran(case, kind)[:1]]
        yield line("scoring without gradients, same head", score, [(r, _scored(r)) for r in rows])
    if memory := load("memory_cpu"):
        case = memory["cases"][0]
        rows = [row for row in case["planned"] if row["key"] in ("one_pass", "naive")]
        title = f"memory of the loss at {case['planned_case']} on a GPU, planned and not measured"
        yield line(title, memory, [(row, bytes_text(row["peak_bytes"])) for row in rows])
    if step := load("step_cpu"):
        rows = [row for row in step["rows"] if "missing" not in row]
        yield line(f"training step, {step['case']['model']} model", step, [
            (row, f"{row['seconds']['median']:.2f} s, {row['memory']['peak'] / 2**20:.0f} MiB")
            for row in rows
        ])  # fmt: skip
    if rollout := load("rollout_cpu"):
        case = rollout["cases"][0]
        rows = [row for row in case["rows"] if "missing" not in row]
        rates = [f"{row['tokens_per_second']['median']:,.0f} tokens/s" for row in rows]
        cells = list(zip(rows, rates, strict=True))
        yield line(f"sampling, {case['case']}", rollout, cells)


def _scored(row: dict[str, Any]) -> str:
    text = f"{loss_plot.milliseconds(row['seconds']['warm']['median'])} ms"
    return f"{text} (no entropy)" if "entropy" in row.get("lacks", {}) else text


def quickstart_block() -> str:
    """CRPO beside GRPO and the unscaled magnitude, over seeds."""
    report = load("quickstart")
    if report is None:
        return NOT_MEASURED
    seeds = ", ".join(map(str, sorted({r["seed"] for r in report["runs"]})))
    machine = report["machine"]
    return (
        f"`{report['command']}`, seeds {seeds}, {machine['cpu']}, commit {machine['commit']}\n"
        "([file](benchmarks/results/quickstart.json)). Held-out synthetic test split, percent,\n"
        "mean +- standard deviation over seeds; before = after the cold start.\n\n"
        f"{quickstart.table(report['runs'])}\n\n{_run('quickstart')}"
    )


def dual_block() -> str:
    """The dual controller against its bands; the runs are those of ``quickstart.json``."""
    report, file = load("quickstart"), RESULTS / "quickstart_dual.csv"
    if report is None or not file.exists():
        return NOT_MEASURED
    return (
        f"`{report['command']}`, commit {report['machine']['commit']} "
        "([file](benchmarks/results/quickstart_dual.csv)).\n\n"
        f"{dual.table(dual.read_traces(file), report['runs'])}\n\n"
        "![Stage entropy against its band, and the coefficients, by seed]"
        "(benchmarks/results/quickstart_dual.svg)"
    )


def smollm2_block() -> str:
    """The runs of the small pretrained model."""
    return "\n\n".join(_run(name) for name in RUNS if name.startswith("smollm2"))


def _run(name: str) -> str:
    report, title = load(f"{name}_run"), RUNS[name]
    if report is None:
        return f"{title} (`configs/{name}.toml`): not measured yet."
    summary, machine = report["summary"], report["machine"]
    rows = [
        f"| {stage} | {s['weighted_f1']:.1f} | {s['accuracy']:.1f} | {s['format_rate']:.1f} |"
        for stage, s in ((k, summary.get(k)) for k in ("untrained", "before", "after"))
        if s is not None
    ]
    return (
        f"{title}: `{report['command']}`, {report['rows']} test posts, seed {summary['seed']},\n"
        f"{summary['seconds'] / 60:.1f} minutes with {machine['threads']} thread(s) on "
        f"{machine['cpu']}, commit {machine['commit']}\n"
        f"([file](benchmarks/results/{name}_run.json)). Mean reward of the first quarter of CRPO\n"
        f"steps {report['reward_first_quarter']:.3f}, last {report['reward_last_quarter']:.3f}. "
        "Before = after the cold start; percent.\n\n"
        "| | weighted F1 | accuracy | format |\n| --- | --- | --- | --- |\n" + "\n".join(rows)
    )


LOSS_FILES = {  # blocks of further runs of `loss` -> name of a run -> what makes it
    "targets": {
        "targets": "--sizes 512,151936,1024 512,49152,576 2048,49152,576 8192,49152,576 "
        "2048,151936,1024 --only one_pass --rounds 2 --seconds 420",
        "targets_t8192": "--sizes 8192,151936,1024 --only one_pass --rounds 1 --seconds 330",
    },
    "peers": {
        "peers": "--shape llama3-8b qwen3-1.7b qwen3-8b qwen3.5 gemma-256k --only one_pass "
        "liger_scaled trl verl_torch cce_compiled compiled --rounds 2 --seconds 840",
    },
}
MEASURED = {  # blocks that a command of the same name fills, with the picture's words
    "loss": "Milliseconds of each candidate, with the floor",
    "score": "Milliseconds of scoring without gradients, with the floor",
    "memory": "Bytes of each moment against its bound",
    "growth": "Seconds and bytes against tokens, vocabulary and width",
    "rollout": "Tokens per second of the engines",
    "step": "Seconds of one optimizer step by part",
}


def measured_block(name: str, device: str = "cpu") -> str:
    """What a command measured on a device, as its drawer shows it; else what to type."""
    report, stem = load(f"{name}_{device}"), f"{name}_{device}"
    if report is None or "kind" not in report:
        return f"{NOT_MEASURED} `python -m benchmarks {name} --device {device}` makes this part."
    module = plot.drawer(report)
    if hasattr(module, "readme_block"):
        return module.readme_block(report, stem).strip()
    text = without_title(module.page(report))
    picture = f"benchmarks/results/{stem}.svg"
    return text if picture in text else f"{text}\n\n![{MEASURED[name]}]({picture})"


def loss_block(block: str) -> str:
    """Further runs of `loss` on a CPU: a line for each shape, and the limits."""
    parts, targets = [], []
    for name, options in LOSS_FILES[block].items():
        report = load(f"loss_cpu_{name}")
        if report is None:
            command = f"python -m benchmarks loss --device cpu {options} --name {name}"
            parts.append(f"{NOT_MEASURED} `{command}` makes this part.")
            continue
        every = f"Every candidate: [loss_cpu_{name}.md](benchmarks/results/loss_cpu_{name}.md)."
        parts += [f"{headline(report)} {every}", loss_plot.overview(report["cases"])]
        targets += report["targets"]
    return "\n\n".join([*parts, loss_plot.target_table(targets)] if targets else parts)


def without_title(page: str) -> str:
    """A page as part of a section: no title, smaller headings."""
    return re.sub(r"\A#.*\n+", "", page).replace("\n## ", "\n#### ").strip()


def gpu_block() -> str:
    """The page of the committed run of `python -m benchmarks gpu-gate` and the GPU's reports.

    A rehearsal is none.
    """
    gate = load("gpu_gate")
    parts = [] if gate is None or gate["note"] else [without_title(gpu_gate.page(gate))]
    if parts and gate and gpu_gate.tables(gate):
        parts.append("![Milliseconds by shape, with the floor](benchmarks/results/gpu_gate.svg)")
    found = [name for name in MEASURED if load(f"{name}_cuda") is not None]
    parts += [f"#### {name}\n\n{measured_block(name, 'cuda')}" for name in found]
    return "\n\n".join(parts) or GPU_NOT_MEASURED


BLOCKS: dict[str, Callable[[], str]] = {
    "glance": glance_block,
    "all": all_block,
    "quickstart": quickstart_block,
    "dual": dual_block,
    "smollm2": smollm2_block,
    **{name: partial(measured_block, name) for name in MEASURED},
    **{name: partial(loss_block, name) for name in LOSS_FILES},
    "gpu": gpu_block,
}


def fill(text: str, root: str = "") -> str:
    """``text`` with every block made anew; ``root`` is the repository's root for its links."""
    for name, make in BLOCKS.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        block = make().replace("](benchmarks/", f"]({root}benchmarks/")
        text = re.sub(pattern, lambda m, b=block: f"{m[1]}{b}\n{m[2]}", text, flags=re.DOTALL)
    return text


def write() -> None:
    """Draw every result file again, and rewrite the pages."""
    for file in plot.committed():
        plot.draw(plot.read(file), file.with_suffix(""))
    for page, root in PAGES.items():
        page.write_text(fill(page.read_text(encoding="utf-8"), root), encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no options."""


def run(options: argparse.Namespace, command: str) -> int:  # noqa: ARG001
    """Rewrite what is drawn of results, and the numbers of the pages."""
    write()
    return 0

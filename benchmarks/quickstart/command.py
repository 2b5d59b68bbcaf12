"""The quickstart over seeds beside its rivals: `python -m benchmarks quickstart`.

The rivals are GRPO (M = 0) and the paper's unscaled magnitude, fixed and under the dual controller
(dual.py). Same data, same cold start, same
budget; one run folder per variant and seed, whose summaries become the table of the README. Runs
share the cores: `--jobs 2` gives each of two runs one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, machine
from benchmarks.output import RESULTS, out_folder, write_json
from crpo_fast.config import DEFAULT_CONFIG, load_config

from . import dual

VARIANTS = {
    "CRPO (M = .06, reference_length = 80)": [],
    dual.BASELINE: ["--entropy.magnitude", "0"],
    "CRPO, the paper's M = .06 unscaled": [
        "--entropy.reference_length",
        "None",
        "--entropy.no-alarm",
    ],
    dual.VARIANT: ["--entropy.reference_length", "None", "--entropy.controller", "dual"],
}


def run_one(variant: str, seed: int, folder: Path, threads: int) -> dict[str, Any]:
    """One run of the quickstart; a finished one is only read.

    The variants differ in CRPO alone, so those after the first start from its cold start's end.
    """
    index = list(VARIANTS).index(variant)
    run_dir = folder / f"{index}_{seed}"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        str(ROOT / "crpo_fast" / "train.py"),
        *("--seed", str(seed), "--run.dir", str(run_dir), "--train.threads", str(threads)),
        *VARIANTS[variant],
    ]
    if index:
        steps = load_config(DEFAULT_CONFIG).phases[0].steps
        start = folder / f"0_{seed}" / "checkpoints" / f"step_{steps}"
        command += ["--run.resume", str(start)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} exited with {done.returncode}:\n{done.stderr[-4000:]}"
        )
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    records = [
        json.loads(x) for x in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    entropies = [
        [v for k, v in sorted(r.items()) if k.startswith("stage_entropy/")] for r in records
    ]
    pairs = zip(entropies, records, strict=True)
    trained = [v for e, r in pairs if r["phase"] != "sft" for v in e if v is not None]
    crpo = [r for r in records if r["phase"] == "crpo"]
    return {
        "variant": variant,
        "seed": seed,
        "seconds": summary["seconds"],
        "before": summary["before"],
        "after": summary["after"],
        "largest_stage_entropy": max(trained),
        "last_stage_entropies": entropies[-1],
        "trace": dual.trace(seed, crpo) if variant == dual.VARIANT else [],
    }


def run_all(seeds: list[int], folder: Path, jobs: int, threads: int) -> list[dict[str, Any]]:
    """All variants and seeds, ``jobs`` seeds at a time."""

    def run_seed(seed: int) -> list[dict[str, Any]]:
        return [run_one(variant, seed, folder, threads) for variant in VARIANTS]

    with ThreadPoolExecutor(jobs) as pool:
        return [row for rows in pool.map(run_seed, seeds) for row in rows]


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row per variant; weighted F1 and format rate, mean +- deviation, percent."""
    header = (
        "| | weighted F1 before | weighted F1 after | gain, by seed | format after "
        "| largest stage entropy, nats |"
    )
    lines = [header, "| --- | --- | --- | --- | --- | --- |"]
    for variant in VARIANTS:
        rows = [r for r in results if r["variant"] == variant]
        if not rows:  # of a file that was written before there was this variant
            continue
        before = [r["before"]["weighted_f1"] for r in rows]
        after = [r["after"]["weighted_f1"] for r in rows]
        gains = ", ".join(f"{b - a:+.1f}" for a, b in zip(before, after, strict=True))
        lines.append(
            f"| {variant} | {_spread(before)} | {_spread(after)} | {gains} | "
            f"{_spread([r['after']['format_rate'] for r in rows])} | "
            f"{max(r['largest_stage_entropy'] for r in rows):.2f} |"
        )
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} +- {deviation:.1f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="seeds that run at the same time")
    parser.add_argument("--threads", type=int, default=0, help="threads of a run (0: all cores)")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark_quickstart"))
    parser.add_argument("--out", type=out_folder, default=RESULTS)


def run(options: argparse.Namespace, command: str) -> int:
    """Run what is not finished below ``--runs``; write quickstart.json and what dual.py shows."""
    runs = run_all(options.seeds, options.runs, options.jobs, options.threads)
    traces = [row for run in runs for row in run.pop("trace")]
    report = {"command": command, "machine": machine(), "runs": runs}
    write_json(options.out / "quickstart.json", report)
    dual.write_traces(options.out / "quickstart_dual.csv", traces)
    (options.out / "quickstart_dual.svg").write_text(dual.plot(traces), encoding="utf-8")
    print(table(runs), dual.table(traces, runs), sep="\n\n")
    return 0

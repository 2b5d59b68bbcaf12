"""`python -m benchmarks loss --device cpu`: the fused loss beside its floor and its peers.

Writes `<out>/loss_<device>.json`, `.md` and `.svg`; about four minutes on two cores. `quickstart`
runs the main job over seeds, `record` keeps the result of a finished run, `readme` writes the
numbers of all result files into README.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from . import dual, plot, quickstart, readme
from .baselines import CANDIDATES, Candidate
from .cases import CASES, Case, make_inputs
from .timing import errors, exact_result, extra_bytes, machine, measure_seconds, summary

ERROR_ROWS, ERROR_COLUMNS = 32, 4096


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    loss = commands.add_parser("loss", help="the fused loss beside its floor and its peers")
    loss.add_argument("--device", choices=sorted(CASES), default="cpu")
    loss.add_argument("--rows", type=int, help="rows T instead of the case's")
    loss.add_argument("--vocab", type=int, help="vocabulary V instead of the case's")
    loss.add_argument("--dim", type=int, help="hidden size D instead of the case's")
    loss.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    loss.add_argument("--only", nargs="+", help="keys of candidates, besides products and naive")
    loss.add_argument("--gate", action="store_true", help="exit 1 when a target is missed")
    loss.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    seeds = commands.add_parser("quickstart", help="the main job over seeds beside its rivals")
    seeds.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds.add_argument("--jobs", type=int, default=1, help="seeds that run at the same time")
    seeds.add_argument("--threads", type=int, default=0, help="threads of a run (0: all cores)")
    seeds.add_argument("--runs", type=Path, default=Path("runs/benchmark_quickstart"))
    seeds.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    record = commands.add_parser("record", help="keep the result of a finished run")
    record.add_argument("run", type=Path, help="its folder")
    record.add_argument("name", choices=sorted(readme.RUNS), help="its config")
    record.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    commands.add_parser("readme", help="write the numbers of the result files into README.md")
    return parser.parse_args(arguments)


def chosen_case(options: argparse.Namespace) -> Case:
    """The case of the device with the sizes of the command line."""
    case = CASES[options.device]
    sizes = {"num_rows": options.rows, "vocab_size": options.vocab, "dim": options.dim}
    case = replace(case, **{name: size for name, size in sizes.items() if size})
    name = f"T{case.num_rows} V{case.vocab_size} D{case.dim} {str(case.dtype).split('.')[1]}"
    return replace(case, name=name)


def run_loss(options: argparse.Namespace, command: str) -> dict:
    """Measure everything; the report of one run."""
    torch.set_num_threads(options.threads)
    case = chosen_case(options)
    say(f"{case.name}: inputs")
    inputs = make_inputs(case)
    wanted = None if options.only is None else {"products", "naive", *options.only}
    candidates = [c for c in CANDIDATES if wanted is None or c.key in wanted]
    present = [candidate for candidate in candidates if candidate.missing() is None]
    few = inputs.first(min(ERROR_ROWS, case.num_rows))
    columns = torch.randperm(case.vocab_size)[:ERROR_COLUMNS]
    truths = {flag: exact_result(few, columns, flag) for flag in (True, False)}
    found, memory = {}, {}
    for candidate in present:
        say(f"errors and memory: {candidate.title}")
        truth = truths[candidate.has_entropy_gradient]
        found[candidate.key] = errors(candidate, few, truth, columns)
        has_floor = candidate.key == "products"  # writes into buffers that exist already
        memory[candidate.key] = 0 if has_floor else extra_bytes(candidate, inputs)
    for candidate in (c for c in present if c.key == "one_pass"):
        say("warm-up: generated code must exist before the clock runs")
        candidate.step(inputs)
    seconds = measure_seconds(present, inputs, say)
    rows = [report_row(c, seconds, memory, found) for c in candidates]
    products = min(seconds["products"]) / 3
    entropy = truths[True].entropy
    assert entropy is not None, "the truth has everything"
    return {
        "command": command,
        "case": case.name,
        "machine": machine(),
        "product_tflops": case.product_flops / products / 1e12,
        "entropy_quantiles": [float(q) for q in entropy.quantile(entropy.new_tensor([0.1, 0.9]))],
        "error_rows": few.labels.numel(),
        "rows": rows,
        "targets": targets({row["key"]: row for row in rows}),
    }


def report_row(candidate: Candidate, seconds: dict, memory: dict, found: dict) -> dict:
    """One row of the table, or the reason why there is none."""
    row = {"key": candidate.key, "title": candidate.title, "note": candidate.note}
    reason = candidate.missing()
    if reason is not None:
        return {**row, "missing": reason}
    median = summary(seconds[candidate.key])
    return {
        **row,
        "version": candidate.version(),
        "has_entropy_gradient": candidate.has_entropy_gradient,
        "seconds": median,
        "all_seconds": seconds[candidate.key],
        "over_products": median["median"] / summary(seconds["products"])["median"],
        "over_naive": median["median"] / summary(seconds["naive"])["median"],
        "extra_bytes": memory[candidate.key],
        "errors": found[candidate.key],
    }


def targets(rows: dict[str, dict]) -> list[dict]:
    """What the run must show, with what it shows; only for candidates that ran."""
    ran = {key: row for key, row in rows.items() if "missing" not in row}
    checks = []

    def check(text: str, limit: float, keys: tuple[str, ...], value: float | None) -> None:
        if value is not None and all(key in ran for key in keys):
            checks.append({"text": text, "limit": limit, "value": value, "met": value <= limit})

    def seconds(key: str) -> float:
        return ran[key]["seconds"]["median"]

    if "one_pass" in ran:
        ours = ran["one_pass"]
        memory = ours["extra_bytes"] / ran["naive"]["extra_bytes"]
        check("one pass / three products", 1.6, (), ours["over_products"])
        check("one pass / plain torch, time", 0.4, (), ours["over_naive"])
        check("one pass / plain torch, extra memory", round(1 / 3, 3), (), memory)
        for peer in ("liger", "trl"):
            value = seconds("one_pass") / seconds(peer) if peer in ran else None
            check(f"one pass / {rows.get(peer, {}).get('title', peer)}, time", 1.0, (peer,), value)
    if "one_pass_eager" in ran:
        value = ran["one_pass_eager"]["over_products"]
        check("without a C++ compiler / three products", 2.8, (), value)
    return checks


def say(line: str) -> None:
    """Progress on the terminal."""
    print(line, file=sys.stderr, flush=True)


def write_json(path: Path, report: dict) -> None:
    """A result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def run_quickstart(options: argparse.Namespace, command: str) -> None:
    """Run what is not finished below ``--runs``; write quickstart.json and what dual.py shows."""
    runs = quickstart.run_all(options.seeds, options.runs, options.jobs, options.threads)
    traces = [row for run in runs for row in run.pop("trace")]
    report = {"command": command, "machine": machine(), "runs": runs}
    write_json(options.out / "quickstart.json", report)
    dual.write_traces(options.out / "quickstart_dual.csv", traces)
    (options.out / "quickstart_dual.svg").write_text(dual.plot(traces), encoding="utf-8")
    print(quickstart.table(runs), dual.table(traces, runs), sep="\n\n")


def main(arguments: list[str] | None = None) -> int:
    """Run, print the table, write the files; with ``--gate`` 1 when a target is missed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    command = shlex.join(["python", "-m", "benchmarks", *arguments])
    if options.command == "quickstart":
        run_quickstart(options, command)
        return 0
    if options.command == "record":
        command = f"torchrun crpo_fast/train.py configs/{options.name}.toml"
        report = readme.record(options.run, options.name, command, machine())
        write_json(options.out / f"{options.name}_run.json", report)
        return 0
    if options.command == "readme":
        readme.write()
        return 0
    warnings.filterwarnings("ignore", category=FutureWarning)
    report = run_loss(options, command)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"loss_{options.device}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    stem.with_suffix(".md").write_text(plot.page(report), "utf-8")
    stem.with_suffix(".svg").write_text(plot.bars(report), "utf-8")
    print(plot.page(report))
    print(f"written: {stem}.json, .md, .svg")
    missed = [target["text"] for target in report["targets"] if not target["met"]]
    return 1 if options.gate and missed else 0


if __name__ == "__main__":
    sys.exit(main())

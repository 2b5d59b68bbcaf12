"""The fused loss beside its floor and its peers: `python -m benchmarks loss --device cpu`.

Writes `<out>/loss_<device>.json`, `.md` and `.svg`; about four minutes on two cores.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from . import plot
from .baselines import CANDIDATES, Candidate
from .cases import CASES, Case, make_inputs
from .output import RESULTS, say, write_json
from .timing import errors, exact_result, extra_bytes, machine, measure_seconds, summary

ERROR_ROWS, ERROR_COLUMNS = 32, 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--device", choices=sorted(CASES), default="cpu")
    parser.add_argument("--rows", type=int, help="rows T instead of the case's")
    parser.add_argument("--vocab", type=int, help="vocabulary V instead of the case's")
    parser.add_argument("--dim", type=int, help="hidden size D instead of the case's")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--only", nargs="+", help="keys of candidates, besides products and naive")
    parser.add_argument("--gate", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--out", type=Path, default=RESULTS)


def run(options: argparse.Namespace, command: str) -> int:
    """Measure, print the table, write the files; with ``--gate`` 1 when a target is missed."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    report = run_loss(options, command)
    stem = options.out / f"loss_{options.device}"
    write_json(stem.with_suffix(".json"), report)
    stem.with_suffix(".md").write_text(plot.page(report), "utf-8")
    stem.with_suffix(".svg").write_text(plot.bars(report), "utf-8")
    print(plot.page(report))
    print(f"written: {stem}.json, .md, .svg")
    missed = [target["text"] for target in report["targets"] if not target["met"]]
    return 1 if options.gate and missed else 0


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

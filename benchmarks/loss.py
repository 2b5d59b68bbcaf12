"""The fused loss beside its floor and its peers: `python -m benchmarks loss --device cpu`.

Writes `<out>/loss_<device>.json`, `.md` and `.svg`; about four minutes on two cores. The floor is
the bare products that a candidate cannot do without, measured in the same run.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from . import plot
from .baselines import Candidate
from .candidates import all_gradients, cpu_candidates, frozen_head, scoring
from .cases import CASES, Case
from .clock import Clock
from .gpu_targets import gpu_targets, target_state
from .machine import gpu_name, machine
from .measure import measure
from .output import RESULTS, write_json

GPU_ROUNDS = 15


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
    if options.device == "cuda" and not torch.cuda.is_available():
        message = "--device: expected cpu, got cuda, but torch sees no CUDA device here."
        print(f"{message} Type --device cpu, or run it on a machine with a GPU.")
        return 2
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
    return replace(case, **{name: size for name, size in sizes.items() if size})


def run_loss(options: argparse.Namespace, command: str) -> dict:
    """Measure everything; the report of one run."""
    torch.set_num_threads(options.threads)
    case, device = chosen_case(options), torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type == "cuda":
        lists = (all_gradients, frozen_head, scoring)
        candidates = [c for make in lists for c in make("auto", has_fp32_out=True)]
    else:
        candidates = cpu_candidates()
    if options.only is not None:
        wanted = {"naive", *options.only}
        candidates = [c for c in candidates if c.is_floor or c.key in wanted]
    measured = measure(case, candidates, Clock(device), rounds_on(device))
    rows = {row["key"]: row for row in measured["rows"]}
    where = machine(device)
    checks = targets(rows) if device.type == "cpu" else gpu_targets(case, rows, gpu_name(where))
    for row in measured["rows"] if device.type == "cuda" else ():
        row["target"] = target_state(checks, row["key"])
    return {"command": command, **measured, "machine": where, "targets": checks}


def rounds_on(device: torch.device) -> Callable[[Candidate], int]:
    """How often a candidate is timed: on a GPU, where a step takes milliseconds, all the same."""
    return lambda candidate: GPU_ROUNDS if device.type == "cuda" else candidate.rounds


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

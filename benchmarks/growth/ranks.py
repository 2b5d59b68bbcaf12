"""The training step against ranks and against GRPO's group size, in processes of their own.

torchrun starts as many ranks (gloo, one thread each) as the largest world; see `rank_worker`.
Strong scaling keeps the batch of all ranks, weak scaling that of each. On fewer cores
than ranks these take turns: `ideal` is the time of one rank's work times ranks / cores where that
is above 1, which is what more ranks could reach here.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.machine import ROOT

from .sweeps import Series, sweep_json

WORKER = Path(__file__).with_name("rank_worker.py")
TASK = {"prompt": 16, "completion": 48, "prompts": 4, "samples": 8, "per_rank": 8, "budget": 512}
ROUNDS, LONGEST = 3, 240.0  # seconds until all ranks are killed
GRADIENT_BOUND = 2e-6  # largest error / largest element of a tensor, fp32: sums in another order
LOSS_BOUND = 1e-6
TINY = "a decoder of 2 layers, D 128, V 4096, fp32, packed to 512 tokens a micro-batch"


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure_ranks(
    ranks: Sequence[int], group: Sequence[int], seconds: float
) -> tuple[dict[str, Any], list[dict], list[dict]]:
    """(results by number of ranks, sweeps, checks); what did not end in time has its reason."""
    with tempfile.TemporaryDirectory() as folder:
        task = {**TASK, "out": folder, "ranks": sorted(ranks), "group": sorted(group)}
        reason = run_ranks({**task, "rounds": ROUNDS}, min(seconds, LONGEST))
        out = Path(folder)
        found = {n: read(out / f"ranks_{n}.json") for n in sorted(ranks)}
        groups = read(out / "groups.json")
        errors = {n: worst_error(out, n, min(ranks)) for n, one in found.items() if one}
    missing = {str(n): reason or "no result" for n, one in found.items() if one is None}
    present = {n: one for n, one in found.items() if one is not None}
    report = {
        "cores": num_cores(),
        "task": dict(TASK),
        "model": TINY,
        "rows": [scaling_row(n, one, present, errors) for n, one in present.items()],
        "missing": missing
        | ({} if groups or not group else {"group sizes": reason or "no result"}),
    }
    sweeps = [*rank_sweeps(report["rows"]), *(group_sweeps(groups) if groups else [])]
    return report, sweeps, equality_checks(report["rows"])


def run_ranks(task: dict[str, Any], seconds: float) -> str:
    """Start torchrun; "" or why there are not all results. Nothing outlives the limit of time."""
    size = max(task["ranks"])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={size}", str(WORKER), json.dumps(task)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # gloo ranks are on the CPU
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        _, errors = process.communicate(timeout=max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        return f"killed after {seconds:.0f} s: out of time, or a rank that waited for another one"
    finally:
        end(process)
    if process.returncode == 0:
        return ""
    lines = [line for line in errors.splitlines() if "Error" in line]
    return f"exit status {process.returncode}: {(lines or ['no message'])[0].strip()[:300]}"


def end(process: subprocess.Popen) -> None:
    """Kill torchrun and its ranks, which have process groups of their own."""
    children = descendants(process.pid) if process.poll() is None else []
    for pid in (process.pid, *children):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL) if pid == process.pid else os.kill(pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and theirs (Linux; elsewhere none is known)."""
    found = []
    for file in Path("/proc").glob(f"{pid}/task/*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, file.read_text(encoding="ascii").split()):
                found += [child, *descendants(child)]
    return found


def read(path: Path) -> Any:
    """A result of the worker, None where it wrote none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def worst_error(out: Path, ranks: int, fewest: int) -> float | None:
    """Largest |error| / largest |element| over the gradient's tensors, against the fewest ranks."""
    files = [out / f"gradients_{n}.safetensors" for n in (ranks, fewest)]
    if not all(file.exists() for file in files):
        return None
    got, want = map(load_file, files)
    return max(float((got[k] - v).abs().max() / v.abs().max()) for k, v in want.items())


def scaling_row(
    ranks: int, one: dict[str, Any], found: dict[int, Any], errors: dict[int, float | None]
) -> dict[str, Any]:
    """One number of ranks: medians, bands, what could be reached on these cores, equality."""
    row: dict[str, Any] = {"ranks": ranks, "loss": one["loss"], "gradient_error": errors[ranks]}
    fewest = min(found)
    for name in ("strong", "weak"):
        seconds = sorted(one[name]["seconds"])
        base = statistics.median(found[fewest][name]["seconds"])
        crowd = max(1.0, ranks / num_cores()) / max(1.0, fewest / num_cores())
        ideal = base * crowd * (fewest / ranks if name == "strong" else 1.0)
        median = statistics.median(seconds)
        row[name] = {
            "seconds": {"median": median, "low": seconds[0], "high": seconds[-1]},
            "ideal": ideal,
            "efficiency": ideal / median,
            "tokens": one[name]["tokens"],
            "peak_bytes": one[name]["peak_bytes"],
        }
    row["loss_error"] = abs(one["loss"] - found[fewest]["loss"]) / abs(found[fewest]["loss"])
    return row


def rank_sweeps(rows: list[dict]) -> list[dict]:
    """Seconds and bytes of a rank against ranks."""
    if not rows:
        return []
    fixed = f"training step of {TINY}, one thread a rank, {num_cores()} cores"
    seconds, size = [], []
    for name, text in (("strong", "strong: same batch in all"), ("weak", "weak: same per rank")):
        line = Series(name, text, -1.0 if name == "strong" else 0.0, last=float(num_cores()))
        ideal = Series(f"{name}_ideal", f"{name}, reachable", None, first=math.inf)
        held = Series(name, text, None, first=math.inf)
        for row in rows:
            one, x = row[name], row["ranks"]
            times = one["seconds"]
            line.points.append(
                {"x": x, "y": times["median"], "low": times["low"], "high": times["high"]}
            )
            ideal.points.append(
                {"x": x, "y": one["ideal"]} | dict.fromkeys(("low", "high"), one["ideal"])
            )
            held.points.append(point(x, one["peak_bytes"]))
        seconds += [line, ideal]
        size.append(held)
    note = (
        "The ideal divides one rank's time by what the cores allow: ranks beyond the number of "
        "cores share them, so that strong scaling ends there and weak scaling costs its multiple."
    )
    return [
        sweep_json("ranks_seconds", "ranks", "s", fixed, seconds, note),
        sweep_json("ranks_bytes", "ranks", "bytes", fixed, size, "Most live bytes of any rank."),
    ]


def point(x: float, y: float) -> dict[str, float]:
    """A point without a band."""
    return {"x": x, "y": y, "low": y, "high": y}


def group_sweeps(groups: list[dict]) -> list[dict]:
    """Seconds and bytes against G; tokens grow with it."""
    first = groups[-1]["group"] / 8  # below, what a step costs whatever its tokens
    step = Series("step", "training step", 1.0, first)
    stage = Series("stage_weights", "stage weights of 1024 G completions", 1.0, first)
    held = Series("step", "training step", 0.0, 8.0)
    for one in groups:
        for line, key in ((step, "seconds"), (stage, "stage_weights")):
            times = sorted(one[key])
            line.points.append(
                {
                    "x": one["group"],
                    "y": statistics.median(times),
                    "low": times[0],
                    "high": times[-1],
                }
            )
        held.points.append(point(one["group"], one["peak_bytes"]))
    fixed = f"2 prompts with G samples of {TASK['completion']} tokens each, one rank: {TINY}"
    note = "Micro-batches have 512 tokens whatever G is: more samples are more micro-batches."
    return [
        sweep_json("group_seconds", "samples a prompt G", "s", fixed, [step, stage]),
        sweep_json("group_bytes", "samples a prompt G", "bytes", fixed, [held], note),
    ]


def equality_checks(rows: list[dict]) -> list[dict]:
    """Loss and gradient of the same batch do not depend on the number of ranks."""
    checks = []
    for row in rows[1:]:
        text = f"training step, {row['ranks']} ranks against {rows[0]['ranks']}"
        pairs = (("loss_error", "relative error of the loss", LOSS_BOUND),)
        pairs += (("gradient_error", "largest error of the gradient", GRADIENT_BOUND),)
        for name, what, limit in pairs:
            value = row[name]
            met = None if value is None else value <= limit
            checks.append({"text": f"{text}: {what}", "limit": limit, "value": value, "met": met})
    return checks

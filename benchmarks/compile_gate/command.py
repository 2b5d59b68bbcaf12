"""`python -m benchmarks compile-gate`: every shipped kernel, compiled for GPUs that are not here.

Compiles each configuration that the launchers of `crpo_kernels` can start (`shipped_calls`) for
sm_80, sm_90, sm_100 and gfx942, prints what became of it, and ends with exit status 1 when one

* spills registers, or asks for more shared memory than the GPU has;
* multiplies tiles without the GPU's tensor-core instruction (only kernels with `tl.dot`);
* streams rows by loads of less than 128 bits;
* drops a NaN in the objective (a `min` or `max` where there should be a `where`);
* does not compile, or not in time.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
from collections import Counter

from benchmarks.output import new_file, positive, positive_seconds, write_json
from crpo_kernels.support import MIN_TRITON, release, triton_version

from . import farm
from .report import TARGETS, Job, Report, row_of, table

SHIPPED = "benchmarks.compile_gate.shipped_calls:shipped_jobs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--target",
        action="append",
        choices=list(TARGETS),
        help="compile for this one only; may be repeated (default: all)",
    )
    parser.add_argument("--json", type=new_file, help="also write the rows here")
    parser.add_argument("--jobs", type=positive, default=usable_cores(), help="compilers at once")
    parser.add_argument(
        "--timeout", type=positive_seconds, default=60.0, help="seconds for one compilation"
    )
    parser.add_argument(
        "--launches", default=SHIPPED, help="module:function that lists what to compile"
    )


def usable_cores() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def parents(module: str) -> list[str]:
    """``a.b.c`` and the packages that it is in."""
    names = module.split(".")
    return [".".join(names[: count + 1]) for count in range(len(names))]


def listed_jobs(name: str) -> list[Job]:
    """What ``module:function`` lists.

    Raises:
        ValueError: not of that form, not there, or nothing is listed.
    """
    module, _, function = name.partition(":")
    if not (module and function):
        raise ValueError(f"--launches: expected module:function, got {name!r}. Write {SHIPPED}.")
    try:
        listing = getattr(importlib.import_module(module), function)
    except (ModuleNotFoundError, AttributeError) as error:
        is_inside = isinstance(error, ModuleNotFoundError) and error.name not in parents(module)
        if is_inside:  # it is there, and imports something that is not
            raise
        raise ValueError(
            f"--launches: expected module:function, got {name!r} ({error}). Write {SHIPPED}."
        ) from error
    jobs = listing()
    if not jobs:
        raise ValueError(f"--launches: expected launches, got none from {name}. List some.")
    return jobs


def distinct(jobs: list[Job], targets: list[str]) -> list[tuple[Job, str]]:
    """(job, target) without those that compile to the same code as an earlier one.

    A job that cannot even be specialised stays: compiling it says why.
    """
    from .inspect_triton import specialisation_key

    seen, kept = set(), []
    for target in targets:
        for job in jobs:
            if job.targets and target not in job.targets:
                continue
            try:
                key = specialisation_key(job, TARGETS[target])
            except Exception as error:  # the compiler's answer to it is a row
                key = f"{job.name} {error}"
            rules = (target, job.streams_rows, job.is_objective, job.is_exact)
            if (key, rules) not in seen:
                seen.add((key, rules))
                kept.append((job, target))
    return kept


def compile_pair(pair: tuple[Job, str]) -> tuple[Report, float]:
    """The report of one compilation and the seconds it took."""
    from .inspect_triton import compile_job

    start = time.perf_counter()
    report = compile_job(pair[0], TARGETS[pair[1]])
    return report, time.perf_counter() - start


def gate(pairs: list[tuple[Job, str]], num_workers: int, timeout: float) -> list[dict]:
    """One row per pair, in their order."""
    rows: list[dict] = [{}] * len(pairs)
    for index, result in farm.run(compile_pair, pairs, num_workers, timeout):
        job, target = pairs[index]
        if isinstance(result, farm.Failure):
            name = getattr(job.kernel, "__name__", str(job.kernel))
            result = Report(name, job.name, target, error=result.reason), 0.0
        rows[index] = row_of(result[0], job, result[1])
    return rows


def run(options: argparse.Namespace, command: str) -> int:
    """Compile, print the table; 1 when something failed, 2 where nothing can be compiled."""
    installed = triton_version()
    if installed is None or release(installed) < MIN_TRITON:
        print(
            f"triton: expected 3.6 or newer, got {installed or 'none'}. "
            "Type pip install 'triton>=3.6'."
        )
        return 2
    if os.environ.get("TRITON_INTERPRET"):  # kernels imported under it cannot be compiled
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        print("TRITON_INTERPRET is set: the gate starts again without it", flush=True)
        again = [sys.executable, *sys.orig_argv[1:]]
        return subprocess.run(again, env=environment, check=False).returncode
    start = time.perf_counter()
    try:
        jobs = listed_jobs(options.launches)
    except ValueError as error:
        print(f"compile-gate: {error}")
        return 2
    pairs = distinct(jobs, options.target or list(TARGETS))
    rows = gate(pairs, options.jobs, options.timeout)
    print(table(rows))
    failed = [row for row in rows if row["problems"]]
    counts = Counter(row["kernel"] for row in failed)
    print(
        f"{len(jobs)} launches, {len(rows)} compilations, {time.perf_counter() - start:.0f} s: "
        + (f"{len(failed)} failed ({dict(counts)})" if failed else "all pass")
    )
    if options.json:
        from .inspect_triton import version

        found = {
            "command": command,
            "triton": version(),
            "python": sys.version.split()[0],
            "rows": rows,
        }
        write_json(options.json, found)
    return 1 if failed else 0

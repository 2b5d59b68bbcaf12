"""Keep the result of a finished run: `python -m benchmarks record <run> <config>`."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import readme
from .machine import machine
from .output import RESULTS, out_folder, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("run_dir", metavar="run", type=Path, help="its folder")
    parser.add_argument("name", choices=sorted(readme.RUNS), help="its config")
    parser.add_argument("--out", type=out_folder, default=RESULTS)


def run(options: argparse.Namespace, command: str) -> int:
    """Write `<out>/<name>_run.json`; its command is the run's own."""
    command = f"torchrun crpo_fast/train.py configs/{options.name}.toml"
    report = readme.record(options.run_dir, options.name, command, machine())
    write_json(options.out / f"{options.name}_run.json", report)
    return 0

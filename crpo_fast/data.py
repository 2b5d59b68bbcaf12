"""Everything about data: what other modules import, and the command line.

    python -m crpo_fast.data synth <root> [--seed N] [--rows N]
    python -m crpo_fast.data check <root>
    python -m crpo_fast.data convert imhi --task sad <source> <root>

The official layout is read by ``data_official``, anybody's table by ``data_tables``, a published
layout turned into the official one by ``data_convert``, made-up posts written by ``synthetic``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from crpo_fast.data_check import CheckReport, check, format_report
from crpo_fast.data_official import load_cold_start, load_official
from crpo_fast.data_tables import LABEL_SETS, OFFICIAL_EIGHT, DataError, load_table

__all__ = [
    "LABEL_SETS",
    "OFFICIAL_EIGHT",
    "CheckReport",
    "DataError",
    "check",
    "load_cold_start",
    "load_official",
    "load_table",
    "main",
]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m crpo_fast.data", description="Write, check and convert data."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    synth = commands.add_parser("synth", help="write made-up data of all eight tasks")
    synth.add_argument("root", type=Path)
    synth.add_argument("--seed", type=int, default=0)
    synth.add_argument(
        "--rows", type=int, default=200, help="training rows of each data set (default 200)"
    )
    checked = commands.add_parser(
        "check", help="read everything, report counts, duplicates and refusals"
    )
    checked.add_argument("root", type=Path)
    convert = commands.add_parser("convert", help="turn a published layout into the official one")
    convert.add_argument("layout", choices=["imhi"])
    convert.add_argument("--task", choices=["sad"], required=True)
    convert.add_argument("source", type=Path)
    convert.add_argument("root", type=Path)
    return parser


def _synth(arguments: argparse.Namespace) -> str:
    from crpo_fast.synthetic import write_corpus

    rows = arguments.rows
    sizes = {
        "train": rows,
        "val": max(8, rows // 8),
        "test": max(8, rows // 5),
        "cold_start": 5 * rows,
    }
    return json.dumps(write_corpus(arguments.root, seed=arguments.seed, **sizes))


def _convert(arguments: argparse.Namespace) -> str:
    from crpo_fast.data_convert import convert_imhi_sad

    return convert_imhi_sad(arguments.source, arguments.root).summary()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (1 when data was refused)."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "check":
            report = check(arguments.root)
            print(format_report(report))
            return 1 if report.refusals else 0
        print(_synth(arguments) if arguments.command == "synth" else _convert(arguments))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Command line of the report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from crpo_fast.report import ReportError, write


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 written, 2 the user must correct."""
    parser = argparse.ArgumentParser(
        prog="python -m crpo_fast.report",
        description="One self-contained HTML page about one or several runs.",
    )
    parser.add_argument("runs", nargs="+", metavar="run", help="a run folder")
    parser.add_argument("--show-text", action="store_true", help="show posts and all of the text")
    parser.add_argument("--out", help="the file (one run: <run>/report.html; several: report.html)")
    options = parser.parse_args(arguments)
    alone = len(options.runs) == 1
    out = options.out or (Path(options.runs[0]) / "report.html" if alone else "report.html")
    try:
        path = write(options.runs, out, show_text=options.show_text)
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path} ({path.stat().st_size / 1e6:.2f} MB)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

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
    parser.add_argument(
        "--out",
        help="the file; without it <run>/report.html, of several runs ./report.html, and with "
        "--show-text report_with_text.html, so that the page without text stays as it is",
    )
    options = parser.parse_args(arguments)
    folder = Path(options.runs[0]) if len(options.runs) == 1 else Path()
    name = "report_with_text.html" if options.show_text else "report.html"
    out = options.out or folder / name
    try:
        path = write(options.runs, out, show_text=options.show_text)
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path} ({path.stat().st_size / 1e6:.2f} MB)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""A report beside an older one: `--against old.json` prints what changed and flags regressions.

Times are compared as ratios to the floor of their own run, since machines differ; milliseconds are
shown as well where the machine has the same name. A regression is

- a row that is slower by more than 5 % and whose medians lie outside each other's 20 .. 80 % bands,
- more memory by over 2 %, an error above 1.5 times the old one,
- a row, an error or an entropy gradient that is gone, or a row that is now marked wrong.

Exit status: 1 with a regression, 2 where the files cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .losses.plot import error, markdown, mebibytes, milliseconds
from .plot import DRAWERS, drawer

Row = dict[str, Any]
SLOWER, MORE, WORSE = 1.05, 1.02, 1.5
HEADER = ["row", "time / floor: old, new", "change", "ms: old, new", "MiB: old, new", "regression"]


class CannotCompare(ValueError):
    """Two files that do not fit each other; the text says what to type."""


def old_report(text: str, kind: str | None = None) -> Row:
    """A result file from the command line, read before minutes of work.

    Args:
        text: its path.
        kind: of the report that will stand beside it; None: any.

    Raises:
        argparse.ArgumentTypeError: it cannot be read, is no report with rows, or another kind's.
    """
    where = f"expected a result file of an earlier run, got {text!r}"
    remedy = "Type --against benchmarks/results/loss_cpu.json, or any .json that --out received."
    try:
        report = json.loads(Path(text).read_text(encoding="utf-8"))
    except OSError as reason:
        raise argparse.ArgumentTypeError(f"{where} ({reason.strerror}). {remedy}") from reason
    except ValueError as reason:
        raise argparse.ArgumentTypeError(f"{where} (no JSON: {reason}). {remedy}") from reason
    if not isinstance(report, dict) or not has_rows(report):
        raise argparse.ArgumentTypeError(f"{where} (it has no cases with rows). {remedy}")
    if kind is not None and report.get("kind") != kind:
        raise argparse.ArgumentTypeError(other_kind(kind, report, text))
    return {**report, "file": text}


def other_kind(kind: str, old: Row, file: str) -> str:
    """Why a report of another command is not compared, and what to type."""
    return (
        f"expected a report of {kind!r}, got one of {old.get('kind', '?')!r} ({file}). "
        f"Type python -m benchmarks {old.get('kind', '?')} --against {file}"
    )


def cases_of(report: Row) -> list[Row]:
    """The cases with rows of a report; of a kind without, what its drawer makes such."""
    if "cases" not in report and report.get("kind") in DRAWERS:
        make = getattr(drawer(report), "cases", None)
        return [] if make is None else make(report)
    return report.get("cases", [])


def has_rows(report: Row) -> bool:
    """Whether the report is of a kind that can be compared, and whole."""
    try:
        cases, place = cases_of(report), device_of(report)
        rows = [row for case in cases for row in case.get("rows", ())]
        whole = all(case["name"] for case in cases) and all(r["key"] and r["title"] for r in rows)
    except (LookupError, TypeError, AttributeError):
        return False
    return bool(cases and place) and whole


def add_argument(parser: argparse.ArgumentParser, kind: str) -> None:
    """`--against` for a command whose report of ``kind`` has cases with rows."""
    parser.add_argument(
        "--against",
        type=partial(old_report, kind=kind),
        metavar="OLD.json",
        help="print changes against this file; exit 1 with a regression, 2 if it does not fit",
    )


def check(new: Row, old: Row | None, only: Sequence[str] | None = None) -> int:
    """Print the changes; the exit status, 0 without an old report.

    Args:
        new: this run's report.
        old: the earlier one.
        only: keys that this run was limited to; rows of others are not missed.
    """
    if old is None:
        return 0
    try:
        cases = matched(new, old)
    except CannotCompare as reason:
        print(f"--against: {reason}")
        return 2
    same = device_of(new) == device_of(old)
    lines, flagged = [], []
    for now, before in cases:
        for line, reasons in changes(now, before, same=same, only=only):
            lines.append(line)
            flagged += [f"{line[0]}: {reason}" for reason in reasons]
    print(markdown(HEADER, lines).replace("**", ""))
    print(*not_compared(new, old), sep="\n")
    name = old.get("file", "the old file")
    print(f"{len(flagged)} regression(s) against {name}", *flagged, sep="\n  ")
    return 1 if flagged else 0


def device_of(report: Row) -> str:
    """The name of the GPU, or of the CPU with its threads."""
    machine = report["machine"]
    if "gpu" in machine:
        return machine["gpu"]["name"]
    return f"{machine['cpu']}, {machine.get('threads')} threads"


def matched(new: Row, old: Row) -> list[tuple[Row, Row]]:
    """The cases of the same shape and dtype in both.

    Raises:
        CannotCompare: another command, kind of device, or no shape in common.
    """
    file = old.get("file", "the old file")
    kinds = [report.get("kind", "?") for report in (new, old)]
    if kinds[0] != kinds[1]:
        raise CannotCompare(other_kind(kinds[0], old, file))
    devices = ["cuda" if "gpu" in report["machine"] else "cpu" for report in (new, old)]
    if devices[0] != devices[1]:
        raise CannotCompare(
            f"expected a report of a run on {devices[0]}, got one on {devices[1]} "
            f"({device_of(old)}, {file}). Type --device {devices[1]}"
        )
    olds = {identity(case): case for case in cases_of(old)}
    found = [(case, olds[i]) for case in cases_of(new) if (i := identity(case)) in olds]
    if not found:
        raise CannotCompare(
            f"expected a shape of this run ({names(cases_of(new))}), got {names(cases_of(old))} "
            f"({file}). {how_to_ask(cases_of(old)[0])}"
        )
    return found


def identity(case: Row) -> tuple[str, str]:
    """What two cases must share: sizes, dtype and kind of inputs."""
    return str(case.get("case", case["name"])), str(case.get("inputs", ""))


def names(cases: list[Row]) -> str:
    """The shapes of a report, for people."""
    return ", ".join(", ".join(filter(None, identity(case))) for case in cases)


def how_to_ask(case: Row) -> str:
    """What makes a run of this shape."""
    if str(case.get("inputs", "")).startswith("checkpoint"):
        return f"Type --inputs <folder of that {case['inputs']}> --rows {case.get('rows_t')}"
    words = [f"--{name} {case[key]}" for name, key in SIZES.items() if case.get(key)]
    if not words:
        return f"Type {case.get('command', 'the command that stands in that file')}"
    if case["name"] != "own":
        words = [f"--shape {case['name']}", *(w for w in words if w.startswith(NAMED))]
    return f"Type {' '.join(words)}"


SIZES = {"rows": "rows_t", "vocab": "vocab", "dim": "dim", "dtype": "dtype"}
NAMED = ("--rows", "--dtype")  # what a named shape leaves open


def not_compared(new: Row, old: Row) -> Iterator[str]:
    """Shapes that only one of the files has."""
    for mine, others, where in ((new, old, "the old file"), (old, new, "this run")):
        known = {identity(case) for case in cases_of(others)}
        absent = [case for case in cases_of(mine) if identity(case) not in known]
        if absent:
            yield f"not compared, as {where} has no such shape: {names(absent)}"


def changes(
    now: Row, before: Row, *, same: bool, only: Sequence[str] | None
) -> Iterator[tuple[list[str], list[str]]]:
    """A line of the table, and its regressions, for every row of the old case."""
    rows = {row["key"]: row for row in now.get("rows", ())}
    olds = {row["key"]: row for row in before.get("rows", ())}
    for key, old in olds.items():
        if only is not None and key not in rows and key not in only:
            continue
        absent = now.get("missing", "it is not in the new file")
        new = rows.get(key, {"missing": absent})
        reasons = list(regressions(new, old, rows, olds, same=same))
        name = f"{now['name']}: {old['title']}"
        yield [name, *columns(new, old, rows, olds, same=same), "; ".join(reasons)], reasons


def columns(new: Row, old: Row, rows: Row, olds: Row, *, same: bool) -> list[str]:
    """Ratios, their change, milliseconds on the same machine, MiB."""
    if "missing" in new or "missing" in old:
        states = [row.get("missing", "measured") for row in (old, new)]
        return [f"{states[0]}, {states[1]}".replace("|", "/"), "-", "-", "-"]
    sizes = [row["peak_bytes"] for row in (old, new) if row.get("peak_bytes") is not None]
    memory = ", ".join(map(mebibytes, sizes)) if len(sizes) == 2 else "-"
    if "seconds" not in old or "seconds" not in new:
        return ["-", "-", "-", memory]
    pairs = [relative(old, olds), relative(new, rows)]
    times = [row["seconds"]["warm"]["median"] for row in (old, new)]
    first, second = (None if pair is None else pair["median"] for pair in pairs)
    ratios = "-" if first is None or second is None else f"{first:.3f}, {second:.3f}"
    if first is None or second is None:
        change = f"{100 * (times[1] / times[0] - 1):+.1f} %" if same else "-"
    else:
        change = f"{100 * (second / first - 1):+.1f} %"
    shown = ", ".join(map(milliseconds, times)) if same else "other machine"
    return [ratios, change, shown, memory]


def relative(row: Row, rows: Row) -> Row | None:
    """Median and band of a row over its floor's median, None without a floor or seconds."""
    floor = rows.get(row.get("floor", ""), {"missing": ""})
    if "missing" in floor or "seconds" not in row:
        return None
    unit = floor["seconds"]["warm"]["median"]
    return {name: row["seconds"]["warm"][name] / unit for name in ("median", "low", "high")}


def regressions(new: Row, old: Row, rows: Row, olds: Row, *, same: bool) -> Iterator[str]:
    """What got worse in a row, with its numbers."""
    if "missing" in old:
        return
    if "missing" in new:
        yield f"went missing: {new['missing']}"
        return
    if new.get("wrong") and not old.get("wrong"):
        yield f"is wrong now: {new['wrong']}"
    if old.get("has_entropy_gradient") and not new.get("has_entropy_gradient"):
        yield "lost its entropy gradient"
    first, second = relative(old, olds), relative(new, rows)
    if (first is None or second is None) and same and "seconds" in old and "seconds" in new:
        first, second = (row["seconds"]["warm"] for row in (old, new))
    if first is not None and second is not None and is_slower(second, first):
        yield f"slower: x{second['median'] / first['median']:.2f}, limit x{SLOWER}"
    sizes = [row["peak_bytes"] for row in (old, new) if row.get("peak_bytes") is not None]
    if len(sizes) == 2 and sizes[1] > MORE * sizes[0]:
        yield f"more memory: {mebibytes(sizes[0])} to {mebibytes(sizes[1])} MiB, limit x{MORE}"
    yield from larger_errors(new, old)


def is_slower(new: Row, old: Row) -> bool:
    """More than 5 %, each median outside the other's band."""
    is_outside = new["median"] > old["high"] and old["median"] < new["low"]
    return new["median"] > SLOWER * old["median"] and is_outside


def larger_errors(new: Row, old: Row) -> Iterator[str]:
    """Errors that grew, are no number any more, or are not there any more."""
    for name, values in old.get("errors", {}).items():
        found = new.get("errors", {}).get(name)
        if not values:
            continue
        if not found:
            yield f"no {name} error any more"
            continue
        for kind in ("rms", "max"):
            was, now = number(values.get(kind)), number(found.get(kind))
            if not math.isnan(was) and not now <= WORSE * was:
                yield f"{name} {kind} error {error(was)} to {error(now)}, limit x{WORSE}"


def number(value: float | str | None) -> float:
    """An error of a JSON file, in which None and text stand for what is not finite."""
    return math.nan if value is None else float(value)

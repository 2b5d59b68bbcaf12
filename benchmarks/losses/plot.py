"""Reports of `loss` and `score` as Markdown and as rows of a CSV file; bars.py draws them.

A case is one shape: a table with a row per candidate. "-" stands where a candidate cannot do a
thing; the number behind it leads to the reason below the table. Every number comes from the report.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from benchmarks.drawing.bars import svg as svg
from benchmarks.drawing.bars import svg_of_shapes as svg_of_shapes
from benchmarks.machine import device_name, headline

Row = dict[str, Any]
TITLES = {"loss": "Fused loss", "score": "Scoring without gradients"}
QUANTITIES = {  # of `errors`, with their names here
    "logprobs": "logprob error",
    "entropy": "entropy error",
    "d_hidden": "dH error",
    "d_weight": "dW error",
    "d_weight_tail": "dW error, rare tokens",
}
FLOOR_HAS_NONE = "bare products alone: no loss and nothing beyond inputs and outputs"
TIMES = ("warm", "cold", "floor_share", "tflops")  # columns that bare products have as well
MET = {True: "yes", False: "**no**", None: "no claim"}


class Notes:
    """Numbered remarks below a table, each text once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        """`[n]`, the number of ``text``."""
        text = " ".join(str(text).replace("|", "/").split())
        if text not in self.texts:
            self.texts.append(text)
        return f"[{self.texts.index(text) + 1}]"

    def lines(self) -> list[str]:
        """What stands below the table."""
        return [f"- [{number}] {text}" for number, text in enumerate(self.texts, 1)]


def milliseconds(seconds: float, like: float | None = None) -> str:
    """Four digits; as many decimals as ``like`` seconds would have."""
    size = 1e3 * abs(seconds if like is None else like)
    digits = next((d for d, least in enumerate((1000, 100, 1)) if size >= least), 3)
    return f"{1e3 * seconds:.{digits}f}"


def mebibytes(size: float) -> str:
    """MiB with as many decimals as matter."""
    mib = size / 2**20
    return f"{mib:.{0 if mib >= 100 else 1 if mib >= 1 else 3}f}"


def error(value: float | str | None) -> str:
    """Two digits; None and text stand for what JSON has no numbers for."""
    if value is None or not math.isfinite(float(value)):
        return "not finite" if value is None else str(value)
    value = float(value)
    mantissa, exponent = f"{value:.1e}".split("e")
    return "0" if value == 0 else f"{mantissa}e{int(exponent)}"


def band(times: Row) -> str:
    """A median with its 20-80 % band."""
    median = milliseconds(times["median"])
    if times.get("count", 2) == 1:
        return f"{median} (1 run)"
    low, high = (milliseconds(times[name], times["median"]) for name in ("low", "high"))
    return f"{median} ({low} .. {high})"


def _cold(row: Row) -> str | None:
    cold = row["seconds"].get("cold")
    return None if cold is None else milliseconds(cold["median"])


def _share(row: Row) -> str | None:
    share = row.get("floor_share")
    return None if share is None else f"{100 * share:.0f}"


def _tflops(row: Row) -> str | None:
    value = row.get("tflops")
    return None if value is None else f"{value:.{2 if value < 10 else 0}f}"


def _peak(row: Row) -> str | None:
    size = row.get("peak_bytes")
    return None if size is None or row["kind"] == "floor" else mebibytes(size)


def _errors(name: str) -> Callable[[Row], str | None]:
    def cell(row: Row) -> str | None:
        found = row.get("errors", {}).get(name)
        return None if not found else f"{error(found['rms'])} / {error(found['max'])}"

    return cell


def _entropy_gradient(row: Row) -> str | None:
    if row["kind"] == "floor":
        return None
    return "yes" if row.get("has_entropy_gradient") else "no"


# column as in a row's `lacks` -> its title and its cell, None where the row has none
COLUMNS: dict[str, tuple[str, Callable[[Row], str | None]]] = {
    "warm": ("ms, warm (20 .. 80 %)", lambda row: band(row["seconds"]["warm"])),
    "cold": ("ms, cold", _cold),
    "floor_share": ("% of floor", _share),
    "tflops": ("TFLOP/s", _tflops),
    "peak_bytes": ("peak MiB", _peak),
    **{name: (f"{title}, rms / max", _errors(name)) for name, title in QUANTITIES.items()},
    "entropy_gradient": ("entropy gradient", _entropy_gradient),
    "target": ("targets", lambda row: row.get("target", "-")),
}


def title_of(row: Row, notes: Notes) -> str:
    """Name and version, marked where the results are wrong, with the numbers of its remarks."""
    name = " ".join(filter(None, (row["title"], row.get("version"))))
    if row.get("kind") == "ours":
        name = f"**{name}**"
    texts = [row.get("note"), *(v for k, v in row.get("lacks", {}).items() if k not in COLUMNS)]
    marks = [notes.mark(text) for text in texts if text]
    if row.get("wrong"):
        marks = [f"**wrong** {notes.mark('wrong: ' + row['wrong'])}", *marks]
    return " ".join([name, *marks]).replace("|", "/")


def why_not(row: Row, column: str) -> str:
    """Why a column of a row is empty."""
    if row.get("lacks", {}).get(column):
        return row["lacks"][column]
    if row["kind"] == "floor" and column not in TIMES:
        return FLOOR_HAS_NONE
    if column == "cold":
        return "no time was left for a cold run"
    if column in ("floor_share", "tflops"):
        return "its floor was not measured"
    if column == "peak_bytes" or not row.get("errors"):
        return "not measured of this candidate"
    if column.startswith("d_") and row.get("num_products", 3) < 3:
        return "frozen head: no dW" if row["num_products"] == 2 else "scoring: no gradients"
    return "not among what this candidate returns"


def cells(row: Row, notes: Notes, columns: list[str]) -> list[str]:
    """The columns of one row; a "-" carries the number of its reason."""
    title = title_of(row, notes)
    if "missing" in row:
        return [title, f"- {notes.mark(row['missing'])}", *["-"] * (len(columns) - 1)]
    return [title, *(cell(row, notes, name) for name in columns)]


def cell(row: Row, notes: Notes, column: str) -> str:
    """One column of one row that ran."""
    found, reason = COLUMNS[column][1](row), row.get("lacks", {}).get(column)
    if column == "entropy_gradient" and found is not None:
        return f"{found} {notes.mark(reason)}" if reason else found
    return f"- {notes.mark(why_not(row, column))}" if found is None or reason else found


def columns_of(case: Row) -> list[str]:
    """The columns that some row has: scoring has no gradients, few runs have targets."""
    rows = [row for row in case["rows"] if "missing" not in row]
    dropped = {"d_hidden", "d_weight", "entropy_gradient"}
    if any(row.get("num_products", 3) > 1 for row in rows):
        dropped = set()
    for name, of in {"d_weight_tail": "errors", "target": ""}.items():
        if not any(name in (row.get(of, {}) if of else row) for row in rows):
            dropped.add(name)
    return [name for name in COLUMNS if name not in dropped]


def table(case: Row) -> str:
    """One shape: a row per candidate, then the remarks."""
    notes, columns = Notes(), columns_of(case)
    lines = [cells(row, notes, columns) for row in case["rows"]]
    return "\n".join(
        [markdown(["", *(COLUMNS[name][0] for name in columns)], lines), "", *notes.lines()]
    )


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A table; an empty first title is written as GitHub wants it."""
    head = "| " + " | ".join(header) + " |" if header[0] else "| | " + " | ".join(header[1:]) + " |"
    return "\n".join([head, "|" + " --- |" * len(header), *(f"| {' | '.join(x)} |" for x in lines)])


def ran(case: Row, kind: str, floor: str | None = None) -> list[Row]:
    """The right rows of a kind that ran, fastest first."""
    rows = [
        row
        for row in case.get("rows", ())
        if row.get("kind") == kind and "missing" not in row and not row.get("wrong")
        if floor is None or row.get("floor") == floor
    ]
    return sorted(rows, key=lambda row: row["seconds"]["warm"]["median"])


def overview(cases: list[Row]) -> str:
    """A line per shape: the fastest of ours beside its floor, plain torch and the fastest peer."""
    header = [
        *("shape", "floor, ms", "ours", "ms (20 .. 80 %)", "% of floor", "peak MiB"),
        *("plain torch, ms", "peak MiB", "fastest peer", "ms (20 .. 80 %)", "peak MiB"),
    ]
    notes = Notes()
    lines = [overview_line(case, notes) for case in cases]
    return "\n".join([markdown(header, lines), "", *notes.lines()]).strip()


def title_of_case(case: Row) -> str:
    """Name and sizes, where the name does not say them already."""
    named = case["case"].startswith(case["name"])
    return case["case"] if named else f"{case['name']}: {case['case']}"


def overview_line(case: Row, notes: Notes) -> list[str]:
    """One shape of the overview; of frozen heads and the like only what needs most products."""
    name, ours = title_of_case(case), ran(case, "ours")
    if not ours:
        why = case.get("missing") or reason_of(case, "ours") or "no row of ours was asked for"
        return [name, "-", f"- {notes.mark(why)}", *["-"] * 8]
    floor = max(ours, key=lambda row: row["num_products"])["floor"]
    best = ran(case, "ours", floor)[0]
    bare, plain, peers = (ran(case, kind, floor) for kind in ("floor", "plain", "peer"))
    bare = [row for row in bare if row["key"] == floor]
    line = [name, milliseconds(bare[0]["seconds"]["warm"]["median"]) if bare else "-"]
    line += [title_of({**best, "note": ""}, notes), band(best["seconds"]["warm"])]
    line += [_share(best) or "-", _peak(best) or "-"]
    if plain:
        line += [milliseconds(plain[0]["seconds"]["warm"]["median"]), _peak(plain[0]) or "-"]
    else:
        why = reason_of(case, "plain") or "plain torch was not asked for"
        line += [f"- {notes.mark(why)}", "-"]
    if not peers:
        return [*line, f"- {notes.mark('no peer with right results ran at this shape')}", "-", "-"]
    peer = peers[0]
    name = " ".join(filter(None, (peer["title"], peer.get("version"))))
    if best.get("has_entropy_gradient") and not peer.get("has_entropy_gradient"):
        name += " " + notes.mark("without an entropy gradient, which ours has")
    return [*line, name, band(peer["seconds"]["warm"]), _peak(peer) or "-"]


def reason_of(case: Row, kind: str) -> str:
    """Why the first row of a kind did not run, "" where it did or is not there."""
    rows = [row for row in case.get("rows", ()) if row.get("kind") == kind]
    return rows[0].get("missing", "") if rows else ""


def target_table(targets: list[Row]) -> str:
    """Limits and what was measured; nothing where there are none."""
    if not targets:
        return ""
    lines = [
        [
            f"{target['case']}: {target['text']}" if target.get("case") else target["text"],
            f"{target['limit']}",
            "-" if target["met"] is None else f"{round(target['value'], 2)}",
            MET[target["met"]],
        ]
        for target in targets
    ]
    return markdown(["target", "limit", "measured", "met"], lines)


def inputs_of(case: Row) -> str:
    """Which inputs a shape had, and the rate of a bare product."""
    parts = [f"Inputs: {case['inputs']}"]
    if case.get("entropy_quantiles"):
        low, high = case["entropy_quantiles"]
        parts[0] += f", entropy {low:.1f} .. {high:.1f} nats (10 % .. 90 % of rows)"
    if case.get("product_tflops"):
        parts.append(f"one bare product: {case['product_tflops']:.2f} TFLOP/s")
    parts.append(f"errors on {case['error_rows']} rows")
    return "; ".join(parts) + "."


def method(report: Row) -> str:
    """How the numbers came about."""
    is_gpu = "gpu" in report["machine"]
    clock = "CUDA events" if is_gpu else "the host's clock"
    text = (
        f"ms: medians of interleaved rounds by {clock}, forward and backward where there is one; "
        "warm: inputs as the run before left them, with the 20 .. 80 % band; cold: caches "
        "overwritten before each run. % of floor: the bare products that a candidate cannot do "
        "without, measured in the same rounds, over its own time. TFLOP/s: the operations of these "
        "products (6NVD with all gradients) over the warm time. Peak MiB: beyond inputs and "
        "outputs (gradients are outputs). Errors against fp64: logprob and entropy in nats, "
        "gradients relative to the rms of the truth. **wrong**: an error far beyond that of plain "
        "torch in the same dtype; the note says which."
    )
    if is_gpu:
        return text
    return text + (
        " On a CPU every bf16 product is rounded to bf16, which is most of each error. CPUs differ "
        "by a factor of 5 in products: compare ratios of one run."
    )


def section(case: Row) -> str:
    """One shape with its heading."""
    heading = f"## {title_of_case(case)}"
    if case.get("missing"):
        return f"{heading}\n\nNot measured: {case['missing']}."
    return "\n\n".join([heading, inputs_of(case), table(case)])


def page(report: Row) -> str:
    """The whole Markdown page of a run."""
    machine = report["machine"]
    where = device_name(machine)
    parts = [f"# {TITLES[report['kind']]} on {where}", headline(report)]
    if len(report["cases"]) > 1:
        parts.append(overview(report["cases"]))
    parts += [*map(section, report["cases"]), target_table(report["targets"]), method(report)]
    return "\n\n".join(filter(None, parts)) + "\n"


def readme_block(report: Row, stem: str) -> str:
    """For docs/benchmarks.md: the first shape in full, a line for each of the others."""
    first, *others = report["cases"]
    folder = "benchmarks/results"
    parts: list[str] = [headline(report)]
    parts.append(f"{first['name']}, {first['case']}. {inputs_of(first)}")
    parts += [table(first), f"![Bars of {first['name']}, with floor]({folder}/{stem}.svg)"]
    if others:
        text = (
            f"The other shapes ([tables]({folder}/{stem}.md), [bars]({folder}/{stem}_shapes.svg)):"
        )
        parts += [text, overview(others)]
    parts += [target_table(report["targets"]), method(report)]
    return "\n\n".join(part for part in parts if part)


def csv_rows(report: Row) -> list[Row]:
    """A flat row per candidate and shape, values as they stand in the JSON; seconds, bytes."""
    return [
        {**_of_case(report, case), **flat(row)}
        for case in report["cases"]
        for row in case.get("rows", ())
    ]


def _of_case(report: Row, case: Row) -> Row:
    names = ("name", "rows_t", "vocab", "dim", "dtype", "inputs", "product_tflops", "error_rows")
    return {"report": report["kind"], **{name: case.get(name) for name in names}}


def flat(row: Row) -> Row:
    """Nested values get names with a dot: `seconds.warm.median`, `errors.d_weight.rms`."""
    found: Row = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                add(f"{prefix}.{key}" if prefix else key, item)
        elif not isinstance(value, list):
            found[prefix] = value

    add("", {key: value for key, value in row.items() if key != "all_seconds"})
    return found

"""What is shown of a report of kind "growth": Markdown, SVG and CSV."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.drawing.log_plot import UNITS, document, exponent_text, seconds_text
from benchmarks.losses.plot import markdown
from benchmarks.machine import device_name, headline, opening

MET = {True: "yes", False: "**no**", None: "not measured"}
METHOD = (
    "Exponents: least squares on logarithms over the range that is named, with the band of 95 % "
    "(Student's t) and the residual as a share. Seconds: median of the repetitions of a point with "
    "their range; row passes as generated code at every size. Bytes held: the peak of live tensor "
    "bytes (of the allocator on a GPU) beyond the inputs, both gradients and (one pass) the copy "
    "of d_hidden that backward scales: logits, gradient factors, the fp32 sum of d_weight, "
    "vectors; on a CPU counted in runs of their own without generated code."
)


def page(report: dict[str, Any]) -> str:
    """The whole Markdown page of a run."""
    parts = [
        *opening("Growth of time and memory", report),
        exponents(report),
        "## Checks",
        checks(report["checks"]),
        *(ranks(report["ranks"]) if report["ranks"] else []),
        "## Values",
        *(values(sweep) for sweep in report["sweeps"]),
        *dropped(report),
        METHOD,
    ]
    return "\n\n".join(parts) + "\n"


def exponents(report: dict[str, Any]) -> str:
    """A row for every line that was fitted."""
    header = ["", "", "exponent [95 %]", "expected", "residual", "fitted over", "points"]
    lines = []
    for sweep in report["sweeps"]:
        for line in sweep["series"]:
            fit = line["fit"]
            if fit is None:
                continue
            expected = "-" if line["expected"] is None else f"{line['expected']:g}"
            lines.append(
                [
                    f"{sweep['title']} ({sweep['fixed']})",
                    line["title"],
                    exponent_text(fit),
                    expected,
                    f"{100 * fit['residual']:.1f} %",
                    f"{fit['first']:g} .. {fit['last']:g}",
                    str(fit["count"]),
                ]
            )
    return markdown(header, lines)


def checks(found: list[dict[str, Any]]) -> str:
    """Limits and what was found."""
    lines = [
        [
            check["text"],
            f"{check['limit']:.3g}",
            "-" if check["value"] is None else f"{check['value']:.3g}",
            MET[check["met"]],
        ]
        for check in found
    ]
    return markdown(["check", "limit", "found", "met"], lines) if lines else "None was asked for."


def ranks(found: dict[str, Any]) -> list[str]:
    """Scaling of the training step."""
    header = ["ranks"]
    for name in ("strong", "weak"):
        header += [f"{name}, seconds", "reachable", "share of it", "MiB of a rank"]
    header += ["loss", "gradient off by"]
    lines = []
    for row in found["rows"]:
        cells = [str(row["ranks"])]
        for name in ("strong", "weak"):
            one = row[name]
            low, high = (seconds_text(one["seconds"][edge]) for edge in ("low", "high"))
            cells += [
                f"{seconds_text(one['seconds']['median'])} ({low} .. {high})",
                seconds_text(one["ideal"]),
                f"{100 * one['efficiency']:.0f} %",
                f"{one['peak_bytes'] / 2**20:.1f}",
            ]
        error = row["gradient_error"]
        cells += [f"{row['loss']:.9f}", "-" if error is None else f"{error:.1e}"]
        lines.append(cells)
    text = (
        f"One training step of {found['model']}, gloo ranks on {found['cores']} cores with one "
        "thread each; strong: the batch of all ranks stays, weak: that of each rank. Reachable: "
        "one rank's work by ranks that run at once. With more ranks than cores they take turns: "
        "strong scaling cannot go on there, and weak scaling takes ranks / cores times as long. So "
        "this shows what sharding and collectives cost, not what more machines would gain."
    )
    missing = [f"{name} ranks: {reason}" for name, reason in found["missing"].items()]
    return ["## Ranks", text, markdown(header, lines), *missing]


def values(sweep: dict[str, Any]) -> str:
    """The points of a sweep: a row for each x, a column for each line."""
    text = UNITS[sweep["unit"]][1]
    lines = [line for line in sweep["series"] if line["points"] or line["dropped"]]
    xs = sorted({p["x"] for line in lines for p in line["points"] + line["dropped"]})
    table = []
    for x in xs:
        cells = [f"{x:g}"]
        for line in lines:
            point = next((p for p in line["points"] if p["x"] == x), None)
            cells.append("-" if point is None else text(point["y"]))
        table.append(cells)
    note = f" {sweep['note']}" if sweep["note"] else ""
    head = f"{sweep['title']}; {sweep['fixed']}.{note}"
    return f"{head}\n\n{markdown([sweep['x'], *(line['title'] for line in lines)], table)}"


def dropped(report: dict[str, Any]) -> list[str]:
    """What is not there, with its reason."""
    found = [f"- {name}: {reason}" for name, reason in report["dropped"].items()]
    for sweep in report["sweeps"]:
        for line in sweep["series"]:
            reasons = dict.fromkeys(p["reason"] for p in line["dropped"])
            for reason in reasons:
                xs = ", ".join(f"{p['x']:g}" for p in line["dropped"] if p["reason"] == reason)
                found.append(f"- {sweep['title']} {xs}, {line['title']}: {reason}")
    return ["## Not measured", "\n".join(found)] if found else []


def svg(report: dict[str, Any]) -> str:
    """All sweeps as panels."""
    machine = report["machine"]
    device = device_name(machine)
    threads = "" if "gpu" in machine else f", {machine['threads']} threads"
    below = f"{device}{threads}, {machine['date']}; dashed: fits; PLANNED: not measured"
    return document(report["sweeps"], "Growth of time and memory, log-log", below)


def csv_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for every point, also for those that are missing."""
    rows = []
    for sweep in report["sweeps"]:
        for line in sweep["series"]:
            about = {"sweep": sweep["name"], "fixed": sweep["fixed"], "axis": sweep["x"]}
            about |= {"unit": sweep["unit"], "line": line["key"]}
            rows += [
                {**about, **{k: v for k, v in point.items() if k != "cost"}}
                for point in line["points"]
            ]
            rows += [{**about, "x": p["x"], "missing": p["reason"]} for p in line["dropped"]]
    return rows


def cases(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The sweeps as cases that `--against` compares, their points as rows: they have no floor."""
    return [
        {
            "name": sweep["name"],
            "case": f"{sweep['title']}, {sweep['fixed']}",
            "rows": [row for line in sweep["series"] for row in points_of(line, sweep["unit"])],
            "command": report["command"],
        }
        for sweep in report["sweeps"]
    ]


def points_of(line: dict[str, Any], unit: str) -> Iterator[dict[str, Any]]:
    """The points of a line as rows."""
    for point in (*line["points"], *line["dropped"]):
        row = {"key": f"{line['key']} {point['x']:g}", "title": f"{line['title']}, {point['x']:g}"}
        if "reason" in point:
            yield {**row, "missing": point["reason"]}
        elif unit == "s":
            band = {"median": point["y"], "low": point["low"], "high": point["high"]}
            yield {**row, "seconds": {"warm": band}}
        else:
            yield {**row, "peak_bytes": point["y"]}


def readme_block(report: dict[str, Any], stem: str) -> str:
    """For docs/benchmarks.md: exponents, the checks in a sentence, ranks, the picture."""
    judged = [check for check in report["checks"] if check["met"] is not None]
    failed = [check["text"] for check in judged if not check["met"]]
    end = f"{len(failed)} of {len(judged)} checks failed: {'; '.join(failed)}."
    if not failed:
        end = (
            f"All {len(judged)} checks (bytes within the bound and flat in T, equal ranks) are met."
        )
    parts = [
        headline(report),
        f"{end} Values, checks and what is missing: [{stem}.md](benchmarks/results/{stem}.md).",
        exponents(report),
        *(ranks(report["ranks"])[1:] if report["ranks"] else []),
        f"![Seconds and bytes against sizes, settings and ranks](benchmarks/results/{stem}.svg)",
    ]
    return "\n\n".join(parts)

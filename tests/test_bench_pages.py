"""What is drawn of a report: every number of a table and of the CSV file comes from the JSON."""

from __future__ import annotations

import csv
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import report_cases
from benchmarks import plot
from benchmarks.__main__ import main
from benchmarks.drawing import bars
from benchmarks.losses import plot as loss_plot


def line_of(page: str, title: str) -> list[str]:
    """The cells of the first row whose title begins so."""
    lines = [re.split(r"\s*\|\s*", line)[1:-1] for line in page.splitlines() if "|" in line]
    return next(cells for cells in lines if cells[0].startswith(title))


def test_a_row_has_its_columns_in_order() -> None:
    case = report_cases.case()
    case["rows"][1]["seconds"]["warm"] = {"median": 1.25, "low": 1.2, "high": 1.3, "count": 7}
    page = loss_plot.table(case)
    assert line_of(page, "**crpo_kernels, one pass**")[1:] == [
        *("1250 (1200 .. 1300)", "1375", "96", "0.80", "320"),
        *("2.0e-2 / 7.1e-2", "9.2e-3 / 3.1e-2", "1.1e-2 / 5.2e-2", "9.4e-3 / 4.4e-2", "yes"),
    ]
    assert line_of(page, "three bare products")[1:6] == [
        *("1200 (1188 .. 1224)", "1320", "100", "0.83", "- [1]"),
    ]


def test_a_dash_leads_to_its_reason() -> None:
    page = loss_plot.table(report_cases.case())
    notes = dict(re.findall(r"^- (\[\d+\]) (.*)$", page, re.MULTILINE))
    liger = line_of(page, "Liger chunked GRPO 0.8.5")
    assert notes[liger[7].removeprefix("- ")] == "returns no entropy"
    assert notes[liger[9].removeprefix("- ")] == "keeps d_weight to itself / always"
    assert notes[liger[10].removeprefix("no ")] == "has no entropy term"
    gone = line_of(page, "A GPU kernel")
    assert notes[gone[1].removeprefix("- ")] == "needs a CUDA device"
    assert set(gone[2:]) == {"-"}
    plain = line_of(page, "plain torch")[0].removeprefix("plain torch ")
    assert notes[plain] == "fp32 logits of all tokens"
    assert len(notes) == len(set(notes.values())) == 7


def test_wrong_results_are_marked_and_never_the_best_peer() -> None:
    report = report_cases.report()
    page = loss_plot.table(report["cases"][0])
    title = line_of(page, "A filtered loss")[0]
    assert title.startswith("A filtered loss **wrong** [")
    assert f"- {title.split('**wrong** ')[1]} wrong: d_weight rms .9, limit .03" in page
    line = line_of(loss_plot.overview(report["cases"]), "qwen3-8b: T128")
    assert line[8].startswith("Liger chunked GRPO")  # the wrong one is faster
    assert line[1:6] == ["1200", "**crpo_kernels, one pass**", "1250 (1238 .. 1275)", "96", "320"]
    assert line[6:8] == ["2400", "614"]
    assert 'fill="url(#wrong)"' in bars.svg(report)
    assert ">wrong, 1100 ms, 109 %, 282 MiB<" in bars.svg(report)


def test_a_lack_without_a_column_is_still_said() -> None:
    case = report_cases.case()
    case["rows"][3]["lacks"] = {"bias": "takes no bias"}
    assert "] takes no bias" in loss_plot.table(case)


def test_not_a_number_is_shown_as_such(tmp_path: Path) -> None:
    report = report_cases.report()
    report["cases"][0]["rows"][4]["errors"] = {"logprobs": {"rms": float("nan"), "max": 1.0}}
    plot.write(report, tmp_path / "loss_cpu")
    assert json.loads((tmp_path / "loss_cpu.json").read_text())["kind"] == "loss"
    assert line_of((tmp_path / "loss_cpu.md").read_text(), "A filtered")[6] == "nan / 1.0e0"


def test_scoring_has_no_columns_of_gradients() -> None:
    report = report_cases.report("score")
    for row in report["cases"][0]["rows"]:
        row["num_products"] = 1
    head = loss_plot.table(report["cases"][0]).splitlines()[0]
    assert "logprob error" in head
    assert "dW" not in head
    assert "entropy gradient" not in head
    assert loss_plot.page(report).startswith("# Scoring without gradients on Some CPU")


def test_the_csv_has_the_values_of_the_json(tmp_path: Path) -> None:
    plot.write(report_cases.report(), tmp_path / "loss_cpu")
    report = json.loads((tmp_path / "loss_cpu.json").read_text())
    with (tmp_path / "loss_cpu.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    rows = [row for case in report["cases"] for row in case["rows"]]
    assert [line["key"] for line in lines] == [row["key"] for row in rows]
    for line, row in zip(lines, rows, strict=True):
        assert line["missing"] == row.get("missing", "")
        if "missing" in row:
            continue
        assert float(line["seconds.warm.median"]) == row["seconds"]["warm"]["median"]
        assert float(line["seconds.cold.high"]) == row["seconds"]["cold"]["high"]
        assert int(line["peak_bytes"]) == row["peak_bytes"]
        assert float(line["floor_share"]) == row["floor_share"]
        for name, found in row["errors"].items():
            assert float(line[f"errors.{name}.max"]) == found["max"]


def test_bars_show_bands_floor_and_reasons() -> None:
    report = report_cases.report()
    picture = bars.svg(report)
    root = ET.fromstring(picture)
    space = "{http://www.w3.org/2000/svg}"
    kinds = [part.get("fill") for part in root.iter(f"{space}rect")]
    assert kinds.count(bars.COLOURS["ours"]) == 2  # the legend and the bar
    lines = [part.attrib for part in root.iter(f"{space}line")]
    floors = {line["x1"] for line in lines if line["class"] == "floor" and float(line["y1"]) > 70}
    longest = 3.1 * 1.1  # the slowest cold median
    scale = (bars.WIDTH - bars.LABEL - bars.TAIL) / longest
    assert floors == {f"{bars.LABEL + scale * report_cases.FLOOR:.1f}"}
    assert f"{bars.LABEL + scale * 1.25 * 0.99:.1f}" in {line["x1"] for line in lines}
    assert "- needs a CUDA device" in picture
    assert "qwen3-8b" not in picture
    others = bars.svg_of_shapes(report) or ""
    assert "qwen3-8b" in others
    count = sum("missing" in row for row in report["cases"][1]["rows"])
    assert others.count("needs a CUDA device") == 1  # a line for the reason, without a name
    assert "not measured: needs a CUDA device" in others
    assert count == sum(int(n) for n in re.findall(r">(\d+) not measured:", others))
    assert "prefers-color-scheme:dark" in picture


def test_bytes_that_nobody_saw_are_no_zero_in_the_picture() -> None:
    report = report_cases.report()
    row = next(r for r in report["cases"][0]["rows"] if r["key"] == "naive")
    row |= {"peak_bytes": 0, "lacks": {"peak_bytes": "no counter sees them"}}
    assert bars.numbers(row) == "2400 ms, 50 %"
    row["lacks"] = {}
    assert bars.numbers(row) == "2400 ms, 50 %, 0.00 MiB"


def test_plot_draws_a_file_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = plot.write(report_cases.report(), tmp_path / "loss_cpu")
    before = {file.name: file.read_bytes() for file in files}
    assert sorted(before) == [
        *("loss_cpu.csv", "loss_cpu.json", "loss_cpu.md", "loss_cpu.svg", "loss_cpu_shapes.svg"),
    ]
    for file in files[1:]:
        file.unlink()
    assert main(["plot", str(files[0])]) == 0
    assert {file.name: file.read_bytes() for file in files} == before
    report = json.loads(files[0].read_text())
    plot.write({**report, "cases": report["cases"][:1]}, tmp_path / "loss_cpu")
    assert not (tmp_path / "loss_cpu_shapes.svg").exists()
    (tmp_path / "other.json").write_text('{"runs": []}')
    del report["cases"][0]["rows"][1]["seconds"]
    (tmp_path / "torn.json").write_text(json.dumps(report))
    capsys.readouterr()
    assert main(["plot", str(tmp_path / "other.json")]) == 2
    assert main(["plot", str(tmp_path / "absent.json")]) == 2
    said = capsys.readouterr().out
    assert "expected a report with a kind among loss, score" in said
    assert said.count("Type python -m benchmarks plot") == 2
    assert main(["plot", str(tmp_path / "torn.json")]) == 2
    assert "expected a whole report, got KeyError: 'seconds'" in capsys.readouterr().out
    assert not (tmp_path / "torn.svg").exists()

"""The report's data: values, intervals, thinning, hidden text, escaping, unfinished runs."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from crpo_fast import train
from crpo_fast.report import ReportError, page_data, render, write, write_at_end
from crpo_fast.report.__main__ import main
from crpo_fast.report.curves import curves
from crpo_fast.report.privacy import hide
from report_run import COLD, write_run

TINY = str(Path(__file__).with_name("tiny.toml"))
LIMIT = 3_000_000


@pytest.fixture(scope="module")
def run500(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "example")


@pytest.fixture(scope="module")
def data(run500: Path) -> dict[str, Any]:
    return page_data([run500])["runs"][0]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_curves_hold_every_value_of_500_steps(run500: Path, data: dict[str, Any]) -> None:
    metrics = lines(run500 / "metrics.jsonl")
    assert data["curves"]["width"] == 1
    cold, trained = data["curves"]["phases"]
    assert [p["algorithm"] for p in (cold, trained)] == ["sft", "crpo"]
    assert trained["steps"] == list(range(COLD + 1, 501))
    for name in ("reward", "kl", "stage_entropy/2", "stage_coef/0", "tokens_per_second/train"):
        found = trained["series"][name]["mean"]
        assert found == pytest.approx([r[name] for r in metrics[COLD:]], rel=1e-4)
    assert "reward" not in cold["series"]
    assert data["totals"] == {"updates skipped, not finite": 1.0}


def test_long_runs_are_thinned_by_the_stated_rule() -> None:
    records = [{"step": s, "phase": "crpo", "phase_step": s, "x": float(s)} for s in range(1, 2001)]
    records[3]["x"] = None
    found = curves(records, 600)
    (phase,) = found["phases"]
    assert found["width"] == 4
    assert len(phase["steps"]) == 500
    assert phase["steps"][:2] == [4, 8]
    x = phase["series"]["x"]
    assert (x["mean"][0], x["min"][0], x["max"][0]) == (2.0, 1.0, 3.0)  # the missing one left out
    assert (x["mean"][-1], x["min"][-1], x["max"][-1]) == (1998.5, 1997.0, 2000.0)


def test_table_has_the_scores_and_intervals(run500: Path, data: dict[str, Any]) -> None:
    evaluations = json.loads((run500 / "evaluations.json").read_text())
    rows = {row["name"]: row for row in data["table"]["rows"]}
    assert list(rows) == ["Dreaddit", "LID", "average"]
    for name, row in rows.items():
        for column in ("before", "after"):
            source = evaluations[column]
            source = source if name == "average" else source["per_dataset"][name]
            cell = row["cells"][column]
            assert cell["weighted_f1"] == source["weighted_f1"]
            assert cell["low"] < cell["weighted_f1"] < cell["high"]
        change = row["change"]
        gain = row["cells"]["after"]["weighted_f1"] - row["cells"]["before"]["weighted_f1"]
        assert change["value"] == pytest.approx(gain)
        assert change["low"] < change["value"] < change["high"]
    assert rows["average"]["rows"] == 120
    assert [h["name"] for h in data["history"]] == ["before", "step_300", "after"]
    matrix = evaluations["after"]["per_dataset"]["LID"]["confusion"]
    assert data["confusions"][1]["after"] == matrix["counts"]


def test_old_evaluations_without_rows_still_have_intervals(run500: Path, tmp_path: Path) -> None:
    """Read off the confusion matrix; the paired interval of the change needs the rows."""
    folder = tmp_path / "old"
    shutil.copytree(run500, folder)
    evaluations = json.loads((folder / "evaluations.json").read_text())
    for evaluation in evaluations.values():
        for scores in evaluation["per_dataset"].values():
            del scores["predictions"]
    (folder / "evaluations.json").write_text(json.dumps(evaluations))
    row = page_data([folder])["runs"][0]["table"]["rows"][0]
    assert row["cells"]["after"]["low"] < row["cells"]["after"]["high"]
    assert row["change"]["low"] is None


def test_traces_are_those_of_the_file(run500: Path, data: dict[str, Any]) -> None:
    records = lines(run500 / "samples.jsonl")
    samples = [r for r in records if r["kind"] == "sample"]
    shown = [s for step in data["traces"]["steps"] for s in step["samples"]]
    assert data["traces"]["recorded"] == len(data["traces"]["steps"])
    assert len(shown) == len(samples)
    for a, b in zip(shown[:8], samples[:8], strict=True):
        assert a["entropy"] == pytest.approx(b["entropy"], abs=6e-4)
        assert a["advantage"] == b["advantage"]
        assert [k for k, n in a["stages"] for _ in range(n)] == b["stage_ids"]
    prompts = data["probes"]["prompts"]
    assert len(prompts) == 4
    answers = {a["step"]: a for a in prompts[0]["answers"]}
    assert answers[300]["answer"] == "No"
    turned = answers[310]
    assert turned["answer"] == "Yes"
    assert turned["right"] is True
    new = [t for _, _, k, m in turned["changes"] for t in turned["tokens"][k:m]]
    assert new == [" Yes", "Yes"]
    assert answers[320]["changes"] == []


def test_500_steps_stay_below_3_mb_and_say_what_is_left_out(tmp_path: Path) -> None:
    """Long completions (some 700 tokens) are thinned by steps; nothing else is dropped."""
    folder = write_run(tmp_path / "long", repeat=30)
    assert (folder / "samples.jsonl").stat().st_size > 10_000_000
    page = write([folder], tmp_path / "r.html")
    assert page.stat().st_size < LIMIT
    run = page_data([folder])["runs"][0]
    steps = [s["step"] for s in run["traces"]["steps"]]
    assert 2 < len(steps) < run["traces"]["recorded"]
    assert (steps[0], steps[-1]) == (COLD + 1, 500)  # first and last stay
    assert sum(len(p["steps"]) for p in run["curves"]["phases"]) == 500


CANARIES = ("Zorblax42", "kangaroo", "Birchwood", "purple")
POST = "My name is Zorblax42 and a purple kangaroo left me at Birchwood on the 7th, no one told me."


def test_posts_are_hidden_unless_show_text(tmp_path: Path) -> None:
    """In posts, in completions that quote their own or another post, and over split tokens."""
    folder = write_run(tmp_path / "r", posts={"Zorblax42's purple": POST, "Birchwood": "short"})
    records = lines(folder / "samples.jsonl")
    for record in records[:40]:
        record["tokens"][1:3] = [" Zor", "blax", "42", " no one told me", " KANGAROO"]
        record["stage_ids"][1:3] = [0] * 5
        for name in ("logprobs", "entropy", "token_weights", "entropy_weights"):
            if name in record:
                record[name][1:3] = [0.0] * 5
    (folder / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    hidden = write([folder], tmp_path / "hidden.html").read_text()
    for word in (*CANARIES, "7th", "no one told me"):
        assert word.casefold() not in hidden.casefold(), word
    assert "much is at stake" in "".join(
        page_data([folder])["runs"][0]["traces"]["steps"][-1]["samples"][0]["tokens"]
    )
    shown = write([folder], tmp_path / "shown.html", show_text=True).read_text()
    for word in CANARIES:
        assert word in shown


def test_hide() -> None:
    post = "I cannot sleep and my sister Ada left in May 2020."
    tokens = [
        "<think>",
        "the sis",
        "ter Ada",
        " gives ",
        "no help",
        ". ",
        "my sister",
        " \u00e9\U0001f600 2020",
    ]
    found = hide(tokens, post=post, tags=("<think>",))
    assert [len(t) for t in found] == [len(t) for t in tokens]
    b = "\u2592"
    assert "".join(found) == f"<think>the {b * 6} {b * 3} gives no help. my {b * 6} {b * 2} {b * 4}"
    assert hide(["i cannot sleep"], post=post) == [f"{b} {b * 6} {b * 5}"]  # three in a row
    assert hide(["cannot sleep"], post=post) == ["cannot sleep"]
    assert hide(["so [1-2]"], post="", labels=["[1-2]"]) == ["so [1-2]"]
    assert hide(["<b>7"], post="", tags=()) == [f"<{b}>{b}"]


def test_no_text_becomes_markup(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    folder = write_run(tmp_path / "a&b<i>", steps=130)
    config = (folder / "config.toml").read_text().replace("runs/example", evil)
    (folder / "config.toml").write_text(config)
    for name in ("samples.jsonl", "starts.jsonl", "evaluations.json"):
        text = (folder / name).read_text()
        for word in ("Dreaddit", "a CPU", " stake"):
            text = text.replace(word, evil)
        (folder / name).write_text(text)
    html = render(page_data([folder], show_text=True))
    assert html.count("<script") == 2
    assert html.count("</script") == 2
    assert "<img" not in html
    assert "onerror=alert(2)" in html  # as data
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert block is not None
    assert json.loads(block[1])["runs"][0]["confusions"][0]["name"] == evil
    assert "<title>a&amp;b&lt;i&gt; - crpo-fast report</title>" in html


def test_the_page_names_no_host(run500: Path) -> None:
    html = render(page_data([run500]))
    urls = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", html)) - {"http://www.w3.org"}
    assert urls == set()
    assert not re.search(r"<link[^>]+stylesheet|<script[^>]+src|@import|url\(", html)


def test_unfinished_and_killed_runs(run500: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    folder.mkdir()
    shutil.copy(run500 / "config.toml", folder)
    torn = (run500 / "metrics.jsonl").read_text()[:-40]
    (folder / "metrics.jsonl").write_text(torn)
    run = page_data([folder])["runs"][0]
    assert run["finished"] is False
    assert (run["steps"], run["planned"]) == (499, 500)
    assert run["table"] == {"columns": [], "rows": []}
    notes = "\n".join(run["notes"])
    assert "metrics.jsonl: 1 line(s) could not be read" in notes
    for name in ("evaluations.json", "samples.jsonl", "starts.jsonl"):
        assert f"{name} is not there" in notes
    (folder / "config.toml").write_text("[broken")
    assert "config.toml: could not be read" in "\n".join(page_data([folder])["runs"][0]["notes"])


def test_config_shows_what_differs(data: dict[str, Any]) -> None:
    found = {entry["key"]: (entry["value"], entry["default"]) for entry in data["config"]}
    assert found["optim.lr"] == (2e-6, 5e-6)
    assert found["seed"] == (7, 0)
    assert found["phases.1.algorithm"] == ("crpo", None)
    assert "optim.warmup_steps" not in found


def test_command_line(run500: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twin = write_run(tmp_path / "b" / "example", seed=1)
    out = tmp_path / "both.html"
    assert main([str(run500), str(twin), "--out", str(out)]) == 0
    assert out.stat().st_size < LIMIT
    runs = page_data([run500, twin])["runs"]
    assert [r["name"] for r in runs] == [f"{run500.parent.name}/example", "b/example"]
    assert main([str(run500)]) == 0
    assert (run500 / "report.html").exists()
    before = (run500 / "report.html").read_text()
    assert main([str(run500), "--show-text"]) == 0
    assert (run500 / "report.html").read_text() == before  # the page without text stays
    assert "pay my rent" in (run500 / "report_with_text.html").read_text()
    assert "pay my rent" not in before
    capsys.readouterr()
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "Type python -m crpo_fast.report runs/<name>" in capsys.readouterr().err
    with pytest.raises(ReportError, match="expected the folder of a run"):
        page_data([tmp_path])


def test_a_report_that_fails_is_named_and_ends_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    write_at_end(tmp_path, said.append)
    (line,) = said
    assert "report.html was not written (ReportError" in line
    assert f"python -m crpo_fast.report {tmp_path}" in line


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run that a signal stops in the second step of its second phase."""
    folder = tmp_path_factory.mktemp("stopped") / "r"
    collect = train.experience.collect
    calls = []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return collect(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.experience, "collect", interrupted)
        assert train.main([TINY, "--run.dir", str(folder), "--report.trace-every", "1"]) == 0
    return folder


def test_sigterm_leaves_a_report(stopped: Path) -> None:
    assert not (stopped / "summary.json").exists()
    html = (stopped / "report.html").read_text()
    block = re.search(r'id="data">(.*?)</script>', html, re.S)
    assert block is not None
    (run,) = json.loads(block[1])["runs"]
    assert (run["finished"], run["steps"], run["planned"]) == (False, 6, 8)
    assert [s["step"] for s in run["traces"]["steps"]] == [5, 6]
    assert run["starts"][0]["ranks"] == 1
    assert run["starts"][0]["versions"]["torch"]
    posts = {r["post"] for r in lines(stopped / "samples.jsonl")}
    assert posts
    assert not any(post in html for post in posts)


def test_the_end_leaves_a_report_of_the_whole_run(stopped: Path, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    shutil.copytree(stopped, folder)
    (folder / "report.html").unlink()
    assert train.main([TINY, "--run.dir", str(folder), "--report.trace-every", "1"]) == 0
    run = page_data([folder])["runs"][0]
    assert (folder / "report.html").exists()
    assert (run["finished"], run["steps"]) == (True, 8)
    assert [s["step"] for s in run["starts"]] == [0, 6]
    summary = json.loads((folder / "summary.json").read_text())
    assert run["table"]["rows"][-1]["cells"]["after"]["weighted_f1"] == pytest.approx(
        summary["after"]["weighted_f1"]
    )

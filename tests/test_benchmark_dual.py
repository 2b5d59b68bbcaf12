"""What the table of the dual controller counts, and that its plot is that of the committed data."""

from __future__ import annotations

import shutil
import subprocess
import xml.etree.ElementTree as ET

import pytest

from benchmarks import machine, readme
from benchmarks.quickstart import dual


def row(seed, step, stage, ratio, coef=0.01):
    return {
        "seed": seed,
        "step": step,
        "stage": stage,
        "entropy": 0.1 * ratio,
        "target": 0.1,
        "coef": coef,
    }


def results(dual_f1, baseline_f1):
    rows = []
    for variant, values in ((dual.VARIANT, dual_f1), (dual.BASELINE, baseline_f1)):
        rows += [
            {"variant": variant, "seed": i, "after": {"weighted_f1": f1}}
            for i, f1 in enumerate(values)
        ]
    return rows


def test_trace_keeps_the_stages_that_occur():
    record = {"phase_step": 3, "stage_entropy/1": 0.123456789, "stage_target/1": 0.1}
    record |= {"stage_coef/1": -0.05, "stage_entropy/0": 0.0, "stage_coef/0": 0.01}
    assert dual.trace(7, [record]) == [
        {"seed": 7, "step": 3, "stage": 1, "entropy": 0.12346, "target": 0.1, "coef": -0.05}
    ]


def test_csv_round_trip(tmp_path):
    rows = [row(0, 1, 0, 1.5), row(1, 2, 3, 0.7, -0.06)]
    dual.write_traces(tmp_path / "t.csv", rows)
    assert dual.read_traces(tmp_path / "t.csv") == rows


def test_every_step_outside_counts_in_a_row_or_not():
    ratios = [1.0, 2.01, 1.9, 0.49, 0.51, 3.0]
    rows = [row(0, i, 0, r) for i, r in enumerate(ratios)] + [row(0, i, 1, 1.0) for i in range(6)]
    rows += [row(1, 0, 0, 9.0)]
    assert dual.steps_outside(rows, 0) == {0: 3, 1: 0}
    assert dual.steps_outside(rows, 1) == {0: 1}


@pytest.mark.parametrize(
    ("outside", "f1", "met"),
    [
        (10, [90.0, 86.0], [True, True]),
        (11, [90.0, 86.0], [False, True]),
        (0, [90.0, 85.8], [True, False]),
    ],
)
def test_checks(outside, f1, met):
    rows = [row(1, i, 2, 3.0 if i < outside else 1.0) for i in range(50)]
    rows += [row(0, i, 2, 1.0) for i in range(50)]
    checks = dual.checks(rows, results(f1, [90.0, 90.0]))
    assert [check["met"] for check in checks] == met
    assert checks[0]["value"] == str(outside)
    assert checks[1]["limit"] == "at least 88.0 (M = 0 less 2)"
    page = dual.table(rows, results(f1, [90.0, 90.0]))
    assert page.count("**no**") == met.count(False)
    assert f"| 1 | {outside} | " in page


def test_the_plot_has_two_panels_per_seed():
    rows = [row(s, i, k, 1.0 + i / 10, 0.01 * k) for s in (0, 2) for i in range(3) for k in (0, 4)]
    root = ET.fromstring(dual.plot(rows))
    panels = [e for e in root if e.tag.endswith("svg")]
    titles = [next(t.text for t in p if t.tag.endswith("title")) for p in panels]
    assert titles == [
        "seed 0: stage entropy / its target",
        "seed 0: coefficient of each stage",
        "seed 2: stage entropy / its target",
        "seed 2: coefficient of each stage",
    ]
    assert [(p.get("x"), p.get("y")) for p in panels] == [
        ("0", "0"),
        ("640", "0"),
        ("0", "360"),
        ("640", "360"),
    ]


def test_the_committed_plot_is_that_of_the_committed_data():
    file = readme.RESULTS / "quickstart_dual.csv"
    if not file.exists():
        pytest.skip("the dual controller is not measured yet")
    rows = dual.read_traces(file)
    assert dual.plot(rows) == (readme.RESULTS / "quickstart_dual.svg").read_text("utf-8")
    assert {(r["seed"], r["stage"]) for r in rows} == {(s, k) for s in range(3) for k in range(5)}
    report = readme.load("quickstart")
    assert report is not None
    assert all(check["met"] for check in dual.checks(rows, report["runs"]))
    assert min(r["target"] for r in rows) >= 0.02


# ---- the commit of a snapshot


def test_commit_of_a_folder_without_git_is_what_the_archive_says(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    (tmp_path / ".git_archival.txt").write_text("commit: 0123456789abcdef0123\n")
    assert machine.commit() == "0123456789ab"
    (tmp_path / ".git_archival.txt").write_text("commit: $Format:%H$\n")
    assert machine.commit() == "unknown"


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_archive_writes_its_commit_and_a_changed_tree_is_marked(tmp_path, monkeypatch):
    def git(*arguments: str) -> bytes:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        done = subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, capture_output=True, check=True
        )
        return done.stdout

    for name in (".gitattributes", ".git_archival.txt"):
        shutil.copy(readme.ROOT / name, tmp_path)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "a.py").write_text("x = 1\n")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "a")
    head = git("rev-parse", "HEAD").decode().strip()
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit() == head[:12]
    (tmp_path / "kernels" / "a.py").write_text("x = 2\n")
    assert machine.commit() == f"{head[:12]} + changes"
    snapshot = tmp_path / "snapshot"  # inside the repository: its commit is not the snapshot's
    snapshot.mkdir()
    (tmp_path / "s.tar").write_bytes(git("archive", "HEAD"))
    shutil.unpack_archive(tmp_path / "s.tar", snapshot)
    git("commit", "-qam", "b")
    monkeypatch.setattr(machine, "ROOT", snapshot)
    assert machine.commit() == head[:12]

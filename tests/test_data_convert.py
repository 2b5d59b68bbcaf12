"""SAD of the IMHI benchmark: the published layout into the official one. Made-up posts only."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from crpo_fast.data import LABEL_SETS, DataError, check, load_cold_start, load_official, main
from crpo_fast.data_convert import (
    FIXED,
    GOLD,
    INSTRUCTION,
    MAX_WORDS,
    convert_imhi_sad,
    cut_reasoning,
    unusable,
)

STAGES = ["stimulus", "primary_appraisal", "secondary_appraisal", "reaction", "mental_state"]
WORK = "This post shows the stress cause related to work."
REASONING = (
    "The post explicitly mentions that the poster's shift was doubled, which leaves no free "
    'evening. This suggests that the poster is losing time for "family dinners". They are '
    "struggling to keep up and feel worn out by it. Therefore, the appropriate label is Work."
)


def query(post: str) -> str:
    return f'Consider this post: "{post}" Question: What is the stress cause of this post?'


def write_source(folder: Path, **splits: list[tuple[str, str]]) -> Path:
    folder.mkdir(exist_ok=True)
    for split in ("train", "val", "test"):
        rows = splits.get(split, [(query(f"{split} post"), f"{WORK} Reasoning: {REASONING}")])
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("query", "gpt-3.5-turbo"), *rows])
    return folder


def test_gold_sentences_cover_the_nine_labels():
    assert sorted(GOLD.values()) == sorted(LABEL_SETS["SAD"])
    assert all(f'"{label}"' in INSTRUCTION for label in LABEL_SETS["SAD"])
    assert INSTRUCTION.endswith("Statement:")


def test_reasoning_is_cut_by_the_documented_rules():
    stages, rules = cut_reasoning(REASONING, "they doubled my shift", "Work")
    assert stages == {
        "stimulus": "the poster's shift was doubled",
        "primary_appraisal": "the poster is losing time for family dinners",
        "secondary_appraisal": "struggling to keep up and feel worn out",
        "reaction": "feel worn out by it",
        "mental_state": "stress caused by work",
    }
    assert rules == {
        "stimulus": "first sentence",
        "primary_appraisal": "indicates",
        "secondary_appraisal": "cue word",
        "reaction": "cue word",
        "mental_state": "gold",
    }


def test_fallbacks_fill_every_stage():
    reasoning = "Work is named. Therefore, the appropriate label is Work."
    stages, rules = cut_reasoning(
        reasoning, 'my boss said "more" again and ' + "so on " * 20, "Work"
    )
    assert stages == {
        "stimulus": "my boss said more again and so on so on so on",
        "mental_state": "stress caused by work",
        **FIXED,
    }
    assert list(rules.values()) == ["post", "fixed", "fixed", "fixed", "gold"]


@pytest.mark.parametrize(("reasoning", "expected"), [
    ("The post names a bill. The cause is due to unpaid debts.", "due to unpaid debts"),
    ("The post states a fear of falling, indicating that heights are hard.", "heights are hard"),
    ("The post implies that it rains. This implies that walks are off.", "walks are off"),
])  # fmt: skip
def test_primary_appraisal(reasoning, expected):
    assert cut_reasoning(reasoning, "p", "Other")[0]["primary_appraisal"] == expected


def test_difficulty_of_labelling_is_no_lack_of_coping():
    reasoning = "The post says hm. It is difficult to assign a specific label or category."
    assert cut_reasoning(reasoning, "hm", "Other")[1]["secondary_appraisal"] == "fixed"


@pytest.mark.parametrize(("reasoning", "label", "reason"), [
    (REASONING, "Work", None),
    (REASONING, "School", "conclusion names another cause"),
    ("The post is short. Hence, Other causes fits.", "Other", None),
    ("The post is short.", "School", None),
    ("Apologies, but I cannot provide that.", "Work", "refusal to reason"),
    (" ", "Work", "no reasoning"),
])  # fmt: skip
def test_unusable(reasoning, label, reason):
    assert unusable(reasoning, label) == reason


def test_conversion_writes_the_official_layout_and_counts(tmp_path):
    other = "This post shows other stress causes. Reasoning: The post mentions a talk. Thus, Other."
    school = (
        "This post shows the stress cause related to school. Reasoning: The post mentions an exam."
    )
    train = [
        (query("they doubled my shift"), f"{WORK} Reasoning: {REASONING}"),
        (query('he "said", so\nwhat'), other),
        (query("exam"), school + " Therefore, the label is Health issues."),
        (query("no reasons here"), WORK),
    ]
    source = write_source(tmp_path / "in", train=train)
    conversion = convert_imhi_sad(source, tmp_path / "out")
    assert conversion.rows == {"train": 4, "val": 1, "test": 1}
    assert conversion.cold_start == 2
    assert conversion.left_out == {"conclusion names another cause": 1, "no reasoning": 1}
    assert conversion.rules["stimulus", "first sentence"] == 2
    assert conversion.rules["secondary_appraisal", "fixed"] == 1
    for stage in STAGES:
        assert sum(n for (name, _), n in conversion.rules.items() if name == stage) == 2
    rows = load_official(tmp_path / "out", "train")
    assert [row.text for row in rows] == [
        "they doubled my shift",
        'he "said", so\nwhat',
        "exam",
        "no reasons here",
    ]
    assert [row.label for row in rows] == ["Work", "Other", "School", "Work"]
    assert {row.instruction for row in rows} == {INSTRUCTION}
    cold = load_cold_start(tmp_path / "out")
    assert [(row.text, row.label) for row in cold] == [
        ("they doubled my shift", "Work"),
        ('he "said", so\nwhat', "Other"),
    ]
    assert all(list(row.stages or ()) == STAGES for row in cold)
    summary = conversion.summary()
    for part in (
        "rows: train 4, val 1, test 1",
        "cold_start.jsonl: 2 rows",
        "left out of the cold start",
        "2",
    ):
        assert part in summary


def test_converting_again_changes_nothing_and_other_files_stay(tmp_path):
    source = write_source(tmp_path / "in")
    convert_imhi_sad(source, tmp_path / "out")
    target = tmp_path / "out/SAD/val_clean.csv"
    before = target.read_bytes()
    convert_imhi_sad(source, tmp_path / "out")
    assert target.read_bytes() == before
    target.write_text("mine")
    with pytest.raises(DataError, match="found another"):
        convert_imhi_sad(source, tmp_path / "out")
    assert target.read_text() == "mine"


@pytest.mark.parametrize(("row", "column", "part"), [
    (("What?", WORK), "query", "Consider this post"),
    ((query(" "), WORK), "query", "Consider this post"),
    ((query("a"), "The post is wet. Reasoning: x"), "gpt-3.5-turbo", "got 'The post is wet.'"),
    ((query("a"), ""), "gpt-3.5-turbo", "got ''"),
])  # fmt: skip
def test_malformed_rows_are_refused_and_nothing_is_written(tmp_path, row, column, part):
    source = write_source(tmp_path / "in", val=[(query("two\nlines"), WORK), row])
    with pytest.raises(DataError) as caught:
        convert_imhi_sad(source, tmp_path / "out")
    assert f"{source / 'val.csv'}, row 2 (line 4), column '{column}'" in str(caught.value)
    assert part in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_missing_split_and_missing_column(tmp_path, capsys):
    source = write_source(tmp_path / "in")
    (source / "test.csv").write_text("query,answer\na,b\n")
    arguments = ["convert", "imhi", "--task", "sad", str(source), str(tmp_path / "out")]
    assert main(arguments) == 1
    assert f"{source / 'test.csv'}, column 'gpt-3.5-turbo'" in capsys.readouterr().err
    (source / "test.csv").unlink()
    assert main(arguments) == 1
    assert "missing a split: expected 'test.csv'" in capsys.readouterr().err


@pytest.mark.data
def test_the_published_files_convert_completely(tmp_path):
    source = Path(os.environ["CRPO_DATA"]) / "imhi_sad"
    command = [
        sys.executable,
        "-m",
        "crpo_fast.data",
        "convert",
        "imhi",
        "--task",
        "sad",
        source,
        tmp_path,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert "rows: train 5547, val 616, test 684" in done.stdout
    report = check(tmp_path)
    assert report.refusals == []
    assert report.labels["SAD"]["test"].total() == 684
    assert set(report.labels["SAD"]["train"]) == set(LABEL_SETS["SAD"])
    cold = [json.loads(line) for line in (tmp_path / "SAD/cold_start.jsonl").open(encoding="utf-8")]
    assert len(cold) == report.cold_start["SAD"] == 5481
    for row in cold:
        assert list(row["stages"]) == STAGES
        for stage, limit in MAX_WORDS.items():
            assert 1 <= len(row["stages"][stage].split()) <= limit

"""Anybody's table, the check of a data root and the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from crpo_fast.data import check, load_official, load_table, main
from data_files import HEADER, STAGED, cold, message, write, write_set

# ------------------------------------------------------------------ anybody's table


def test_jsonl_table(tmp_path):
    lines = [
        {"q": "1 + 1?", "a": 2, "level": 3, "note": "x\u2028y"},
        {"q": "2 + 2?", "a": "4 ", "level": None},
    ]
    path = write(tmp_path / "t.jsonl", "\n".join(json.dumps(x, ensure_ascii=False) for x in lines))
    first, second = load_table(path, prompt="q", answer="a", dataset_id="sums")
    assert (first.text, first.label, first.instruction, first.dataset_id) == (
        "1 + 1?",
        "2",
        "",
        "sums",
    )
    assert first.columns == {"level": "3", "note": "x\u2028y"}
    assert (second.label, second.columns) == ("4", {"level": "null"})


def test_csv_table_with_written_completion(tmp_path):
    path = write(tmp_path / "t.csv", 'question,gold,why\n"two\nlines",No,"<answer>No</answer>"\n')
    (row,) = load_table(path, prompt="question", answer="gold", completion="why")
    assert (row.text, row.label, row.completion) == ("two\nlines", "No", "<answer>No</answer>")
    assert (row.columns, row.dataset_id) == ({}, "default")


def test_table_with_stages(tmp_path):
    path = write(tmp_path / "t.jsonl", json.dumps({"p": "x", "a": "y", "s": {"one": "1"}}))
    assert load_table(path, "p", "a", stages="s")[0].stages == {"one": "1"}
    write(path, json.dumps({"p": "x", "a": "y", "s": {"one": ""}}))
    assert "row 1, column 's'" in message(load_table, path, "p", "a", stages="s")


def test_parquet_table_or_how_to_get_it(tmp_path):
    path = tmp_path / "t.parquet"
    write(path, b"no parquet")
    text = message(load_table, path, "q", "a")
    assert str(path) in text
    pyarrow = pytest.importorskip(
        "pyarrow", reason="needs pyarrow; without it the refusal was read"
    )
    from pyarrow.parquet import write_table

    write_table(pyarrow.table({"q": ["x"], "a": ["y"], "n": [1]}), path)
    (row,) = load_table(path, "q", "a")
    assert (row.text, row.label, row.columns) == ("x", "y", {"n": "1"})


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = write(tmp_path / "t.parquet", b"PAR1")
    assert "pip install pyarrow" in message(load_table, path, "q", "a")


@pytest.mark.parametrize(("name", "content", "parts"), [
    ("t.csv", "q,b\nx,y\n", ["column 'a'", "found 'q', 'b'"]),
    ("t.csv", "q,a\nx,y\nz,\n", ["row 2, column 'a'", "non-empty"]),
    ("t.jsonl", '{"q": "x", "a": "y"}\n{"q": "x"}\n', ["row 2, column 'a'", "found 'q'"]),
    ("t.jsonl", '{"q": "x", "a": "y"}\n\n{"q": null, "a": "y"}', ["row 2 (line 3), column 'q'"]),
    ("t.jsonl", '{"q": "x", "a": true}', ["row 1, column 'a'", "got True"]),
    ("t.jsonl", '{"q": "x"', ["row 1", "JSON"]),
    ("t.jsonl", b'{"q": "\xff", "a": "y"}', ["row 1", "UTF-8"]),
    ("t.jsonl", "\n", ["at least one row"]),
    ("t.txt", "x", ["'.jsonl'", "'.csv'", "'.parquet'"]),
])  # fmt: skip
def test_table_refusals(tmp_path, name, content, parts):
    path = write(tmp_path / name, content)
    text = message(load_table, path, prompt="q", answer="a")
    assert str(path) in text
    assert [part for part in parts if part not in text] == []


def test_table_file_missing(tmp_path):
    assert "Check the path" in message(load_table, tmp_path / "t.csv", "q", "a")
    assert "Check the path" in message(load_table, tmp_path / "t.parquet", "q", "a")


# ------------------------------------------------------------------ check and the command line


def test_check_counts_and_notes(tmp_path):
    write_set(
        tmp_path, train='same,Yes,q\n" SAME ",No,q\nshared,No,q\n"",No,q\n', test="leak,No,q\n"
    )
    write_set(tmp_path, "DATD", train="leak,Yes,q\n", test="Shared,Yes,q\n")
    report = check(tmp_path)
    assert report.refusals == []
    assert report.labels["Dreaddit"]["train"] == {"Yes": 1, "No": 3}
    assert report.labels["DATD"]["test"] == {"Yes": 1}
    assert report.empty_texts == {"Dreaddit/train": 1}
    notes = "\n".join(report.notes)
    assert "Dreaddit/train: 1 rows repeat the text of an earlier row (rows 2)" in notes
    assert "1 posts are in Dreaddit/train and in DATD/test" in notes
    assert "1 posts are in DATD/train and in Dreaddit/test" in notes
    assert "Dreaddit/train: 1 rows with an empty text; they are kept" in notes
    assert len(report.notes) == 4


def test_check_finds_a_leak_inside_one_set(tmp_path):
    write_set(tmp_path, train="a,Yes,q\n", test="a,Yes,q\n")
    assert "1 posts are in Dreaddit/train and in Dreaddit/test" in check(tmp_path).notes[0]


def test_check_reports_every_refusal_and_exits_1(tmp_path, capsys):
    write_set(tmp_path, train="a,yes,q\nb,Nope,q\n")
    write_set(tmp_path, "DATD")
    (tmp_path / "DATD/test_clean.csv").unlink()
    cold(tmp_path, {**STAGED, "label": "?"}, name="LID")
    for split in ("train", "val", "test"):
        write(tmp_path / f"LID/{split}_clean.csv", HEADER + "a,[1-2],q\n")
    assert main(["check", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert out.count("refused: ") == 4
    for part in (
        "row 1, column 'label'",
        "row 2, column 'label'",
        "missing a split",
        "cold_start.jsonl",
    ):
        assert part in out
    assert "4 refused" in out


def test_check_never_prints_a_post(tmp_path, capsys):
    write_set(
        tmp_path,
        train="very private words,yes,q\nvery private words,Yes,q\nvery private words,Yes,q\n",
    )
    main(["check", str(tmp_path)])
    assert "private" not in capsys.readouterr().out


def test_command_line_writes_and_checks(tmp_path):
    root = tmp_path / "made"
    options = {
        "cwd": Path(__file__).parent.parent,
        "capture_output": True,
        "text": True,
        "env": os.environ,
    }
    wrote = subprocess.run(
        [sys.executable, "-m", "crpo_fast.data", "synth", root, "--seed", "3", "--rows", "16"],
        **options,
    )
    assert (wrote.returncode, wrote.stderr) == (0, "")
    assert json.loads(wrote.stdout) == {"train": 128, "val": 64, "test": 64, "cold_start": 640}
    checked = subprocess.run([sys.executable, "-m", "crpo_fast.data", "check", root], **options)
    assert checked.returncode == 0
    assert checked.stdout.count("rows") == 32
    assert "everything can be loaded" in checked.stdout
    lost = subprocess.run([sys.executable, "-m", "crpo_fast.data", "check", root / "no"], **options)
    assert lost.returncode == 1
    assert "expected the folder of the data sets" in lost.stdout


def test_synth_refuses_to_overwrite_data_it_did_not_write(tmp_path, capsys):
    write_set(tmp_path)
    assert main(["synth", str(tmp_path), "--rows", "8"]) == 1
    assert "Choose another root" in capsys.readouterr().err
    assert load_official(tmp_path, "train")[0].text == "a"

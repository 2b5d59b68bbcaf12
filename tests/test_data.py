"""The official layout, anybody's table, the check and the command line. Messages are read."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crpo_fast import data
from crpo_fast.data import (
    LABEL_SETS,
    DataError,
    check,
    load_cold_start,
    load_official,
    load_table,
    main,
)
from crpo_fast.synthetic import FIXTURE_ROWS, write_fixtures

HEADER = "text,label,mental_prompt\n"
ASK = "Stressed?\nStatement:"


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_set(root: Path, name: str = "Dreaddit", train: str = "a,Yes,q\n", val: str = "b,No,q\n",
              test: str = "c,No,q\n", val_name: str = "val") -> Path:  # fmt: skip
    for split, rows in (("train", train), (val_name, val), ("test", test)):
        write(root / name / f"{split}_clean.csv", HEADER + rows)
    return root


def message(call, *arguments, **options) -> str:
    with pytest.raises(DataError) as caught:
        call(*arguments, **options)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


# ------------------------------------------------------------------ the official layout


def test_the_eight_label_sets_and_sad_are_the_published_strings():
    assert {name: labels for name, labels in LABEL_SETS.items() if name != "SAD"} == {
        "Dreaddit": ("Yes", "No"),
        "DATD": ("Yes", "No"),
        "SDCNL": ("Yes", "No"),
        "FIG": ("Yes", "No"),
        "DepSeverity": ("Minimum", "Mild", "Moderate", "Severe"),
        "LT-EDI": ("Not depressed", "Moderately depressed", "Severely depressed"),
        "RSD": ("Indicator", "Ideation", "Behavior", "Attempt"),
        "LID": ("[1-2]", "[2-3]", "[3-4]", "[4-5]"),
    }
    assert len(LABEL_SETS["SAD"]) == 9
    assert "SAD" not in data.OFFICIAL_EIGHT


@pytest.mark.parametrize("name", list(LABEL_SETS))
def test_every_label_of_every_set_loads_in_every_split(tmp_path, name):
    rows = "".join(f'post {i},"{label}",{ASK!r}\n' for i, label in enumerate(LABEL_SETS[name]))
    write_set(tmp_path, name, rows, rows, rows, val_name="dev")
    for split in ("train", "val", "dev", "test"):
        loaded = load_official(tmp_path, split)
        assert [row.label for row in loaded] == list(LABEL_SETS[name])
        assert {row.dataset_id for row in loaded} == {name}


def test_nasty_rows_load_exactly_as_written(tmp_path):
    write_fixtures(tmp_path)
    rows = load_official(tmp_path, "train")
    assert [(r.dataset_id, r.text, r.label, r.instruction) for r in rows] == list(FIXTURE_ROWS)
    texts = [row.text for row in rows]
    assert "first line\nsecond, line" in texts
    assert 'she said ""stop""'.replace('""', '"') in texts
    assert "" in texts
    assert any("\U0001f62d" in text for text in texts)


def test_bom_and_crlf_change_nothing_but_line_ends(tmp_path):
    plain = HEADER + 'one,Yes,q\n"two, too",No,q\n'
    write_set(tmp_path / "plain")
    write_set(tmp_path / "windows")
    write(tmp_path / "plain/Dreaddit/train_clean.csv", plain)
    windows = b"\xef\xbb\xbf" + plain.replace("\n", "\r\n").encode()
    write(tmp_path / "windows/Dreaddit/train_clean.csv", windows)
    a, b = (load_official(tmp_path / kind, "train") for kind in ("plain", "windows"))
    assert a == b
    assert [row.text for row in a] == ["one", "two, too"]


@settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\x00")), min_size=1, max_size=5
    )
)
def test_any_text_survives_the_csv_round_trip(tmp_path, texts):
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows(
        [("text", "label", "mental_prompt"), *((t, "Yes", "q") for t in texts)]
    )
    write_set(tmp_path)
    write(tmp_path / "Dreaddit/train_clean.csv", buffer.getvalue())
    assert [row.text for row in load_official(tmp_path, "train")] == texts


def test_a_field_longer_than_the_csv_module_allows_by_default_loads(tmp_path):
    limit = csv.field_size_limit()
    write_set(tmp_path, train=f"{'x' * (limit + 10)},Yes,q\n")
    assert len(load_official(tmp_path, "train")[0].text) == limit + 10
    assert csv.field_size_limit() == limit


def test_labels_are_stripped_and_nothing_else_is(tmp_path):
    write_set(tmp_path, "LID", ' post ,"[1-2] ","q "\n')
    row = load_official(tmp_path, "train", ["LID"])[0]
    assert (row.text, row.label, row.instruction) == (" post ", "[1-2]", "q ")


def test_order_of_data_sets_and_selection(tmp_path):
    for name in ("SDCNL", "Dreaddit", "LID"):
        label = LABEL_SETS[name][0]
        write_set(tmp_path, name, *(f"{name},{label},q\n" for _ in range(3)))
    assert [r.dataset_id for r in load_official(tmp_path, "test")] == ["Dreaddit", "SDCNL", "LID"]
    assert [r.text for r in load_official(tmp_path, "test", ["LID", "SDCNL"])] == ["LID", "SDCNL"]


# ------------------------------------------------------------------ refusals


def test_root_missing(tmp_path):
    text = message(load_official, tmp_path / "nowhere", "train")
    assert str(tmp_path / "nowhere") in text
    assert "python -m crpo_fast.data synth" in text


def test_no_data_set_found(tmp_path):
    (tmp_path / "notes").mkdir()
    text = message(load_official, tmp_path, "train")
    assert "train_clean.csv" in text
    assert "'Dreaddit'" in text


def test_unknown_folder_lists_the_known_names_and_a_selection_passes(tmp_path):
    write_set(tmp_path)
    write_set(tmp_path, "Dreadit")
    text = message(load_official, tmp_path, "train")
    assert "'Dreadit'" in text
    assert "nearest is 'Dreaddit'" in text
    assert all(repr(name) in text for name in LABEL_SETS)
    assert len(load_official(tmp_path, "train", ["Dreaddit"])) == 1


def test_selection_of_an_unknown_or_absent_set(tmp_path):
    write_set(tmp_path)
    assert "nearest is 'DepSeverity'" in message(load_official, tmp_path, "train", ["depseverity"])
    text = message(load_official, tmp_path, "train", ["LID"])
    assert str(tmp_path / "LID") in text
    assert "Present: 'Dreaddit'" in text


@pytest.mark.parametrize(("split", "wanted"), [
    ("train", "train_clean.csv"),
    ("val", "val_clean.csv or dev_clean.csv"),
    ("test", "test_clean.csv"),
])  # fmt: skip
def test_data_root_missing_a_split(tmp_path, split, wanted):
    write_set(tmp_path)
    (tmp_path / f"Dreaddit/{split}_clean.csv").unlink()
    text = message(load_official, tmp_path, split)
    assert "data root is missing a split" in text
    assert f"expected {wanted}, found" in text
    assert str(tmp_path / "Dreaddit") in text
    assert "Add the file" in text


def test_both_names_of_the_validation_split(tmp_path):
    write(write_set(tmp_path) / "Dreaddit/dev_clean.csv", HEADER + "b,No,q\n")
    assert "found both" in message(load_official, tmp_path, "val")


def test_split_name(tmp_path):
    assert "'train', 'val', 'test'" in message(load_official, write_set(tmp_path), "validation")


def test_missing_column_names_file_and_columns_found(tmp_path):
    path = write(
        write_set(tmp_path) / "Dreaddit/train_clean.csv", "text,labels,mental_prompt\na,Yes,q\n"
    )
    text = message(load_official, tmp_path, "train")
    assert f"{path}, column 'label'" in text
    assert "found 'text', 'labels', 'mental_prompt'" in text
    assert "Did you mean 'labels'?" in text


@pytest.mark.parametrize(("label", "near", "case"), [
    ("Moderat", "Moderate", False),
    ("minimum", "Minimum", True),
    ("severe!", "Severe", False),
])  # fmt: skip
def test_a_label_outside_the_set(tmp_path, label, near, case):
    write_set(tmp_path, "DepSeverity", f'"a\nb",Mild,q\nc,"{label}",q\n')
    text = message(load_official, tmp_path, "train")
    path = tmp_path / "DepSeverity/train_clean.csv"
    assert f"{path}, row 2 (line 4), column 'label'" in text
    assert f"nearest valid label is '{near}" in text
    assert "'Minimum', 'Mild', 'Moderate', 'Severe'" in text
    assert ("differs in case only" in text) == case


def test_an_empty_label(tmp_path):
    write_set(tmp_path, train="a,Yes,q\nb, ,q\n")
    text = message(load_official, tmp_path, "train")
    assert "row 2, column 'label': expected one of 'Yes', 'No', got an empty cell" in text


def test_the_line_is_left_out_where_it_says_nothing_new(tmp_path):
    write_set(tmp_path, train="a,Yes,q\nb,Perhaps,q\n")
    assert "row 2, column 'label'" in message(load_official, tmp_path, "train")


def test_an_en_dash_in_a_bracket_label_is_refused(tmp_path):
    write_set(tmp_path, "LID", "a,[1\u20132],q\n")
    assert "nearest valid label is '[1-2]'" in message(load_official, tmp_path, "train")


@pytest.mark.parametrize("content", ["", HEADER, "\n\n"])
def test_empty_split(tmp_path, content):
    path = write(write_set(tmp_path) / "Dreaddit/test_clean.csv", content)
    text = message(load_official, tmp_path, "test")
    assert str(path) in text
    assert "expected" in text
    assert "got none" in text or "empty file" in text


def test_undecodable_bytes_name_row_column_and_byte(tmp_path):
    path = tmp_path / "Dreaddit/train_clean.csv"
    write_set(tmp_path)
    write(path, HEADER.encode() + b'"one\ntwo",Yes,q\ncaf\xe9,No,q\n')
    text = message(load_official, tmp_path, "train")
    assert f"{path}, row 2 (line 4), column 'text'" in text
    assert "0xe9" in text
    assert "Save the file as UTF-8" in text


def test_utf16_is_named(tmp_path):
    write(write_set(tmp_path) / "Dreaddit/train_clean.csv", (HEADER + "a,Yes,q\n").encode("utf-16"))
    assert "found UTF-16" in message(load_official, tmp_path, "train")


@pytest.mark.parametrize("row", ["a, b,Yes,q\n", "a,Yes\n"])
def test_wrong_number_of_cells(tmp_path, row):
    write_set(tmp_path, train="ok,Yes,q\n" + row)
    text = message(load_official, tmp_path, "train")
    assert "train_clean.csv, row 2, column" in text
    assert "expected 3 cells" in text


@pytest.mark.parametrize("row", ['"never closed,Yes,q\nb,No,q\n', '"a"b,Yes,q\n'])
def test_broken_quotes_do_not_swallow_rows(tmp_path, row):
    write_set(tmp_path, train="ok,Yes,q\n" + row)
    text = message(load_official, tmp_path, "train")
    assert "row 2" in text
    assert "RFC-4180" in text


def test_two_columns_of_one_name(tmp_path):
    write(
        write_set(tmp_path) / "Dreaddit/train_clean.csv",
        "text,label,label,mental_prompt\na,Yes,No,q\n",
    )
    assert "column 'label': expected one column" in message(load_official, tmp_path, "train")


def test_further_refused_rows_are_counted(tmp_path):
    write_set(tmp_path, train="a,yes,q\nb,no,q\nc,Yes,q\nd,maybe,q\n")
    assert "2 more rows of this file are refused" in message(load_official, tmp_path, "train")


# ------------------------------------------------------------------ cold start


def cold(root: Path, *objects: object, name: str = "Dreaddit") -> Path:
    lines = [o if isinstance(o, str) else json.dumps(o) for o in objects]
    return write(write_set(root, name) / name / "cold_start.jsonl", "\n".join(lines) + "\n")


STAGED = {"text": "t", "label": "Yes", "mental_prompt": "q", "stages": {"stimulus": "s"}}
WHOLE = {"text": "t", "label": "No", "mental_prompt": "q", "completion": "c"}


def test_cold_start_rows(tmp_path):
    cold(tmp_path, STAGED, "", WHOLE)
    staged, whole = load_cold_start(tmp_path)
    assert (staged.text, staged.label, staged.instruction, staged.dataset_id) == (
        "t",
        "Yes",
        "q",
        "Dreaddit",
    )
    assert (staged.stages, staged.completion) == ({"stimulus": "s"}, None)
    assert (whole.stages, whole.completion) == (None, "c")


@pytest.mark.parametrize(("second", "part"), [
    ({**STAGED, "label": "yes"}, "column 'label'"),
    ({k: v for k, v in STAGED.items() if k != "text"}, "column 'text'"),
    ({**STAGED, "text": 3}, "column 'text'"),
    ({**STAGED, "stages": {"stimulus": " "}}, "stage 'stimulus'"),
    ({**STAGED, "stages": {}}, "column 'stages'"),
    ({**STAGED, "completion": "c"}, "got both"),
    ({k: v for k, v in STAGED.items() if k != "stages"}, "got neither"),
    ({**WHOLE, "completion": ""}, "column 'completion'"),
    ("[1]", "got list"),
    ("{", "expected one JSON object"),
])  # fmt: skip
def test_cold_start_refusals_name_file_and_row(tmp_path, second, part):
    path = cold(tmp_path, STAGED, "", second)
    text = message(load_cold_start, tmp_path)
    assert f"{path}, row 2 (line 3)" in text
    assert part in text


def test_cold_start_missing(tmp_path):
    write_set(tmp_path)
    assert "remove the sft phase" in message(load_cold_start, tmp_path)
    cold(tmp_path, STAGED, name="DATD")
    assert len(load_cold_start(tmp_path)) == 1
    assert str(tmp_path / "Dreaddit/cold_start.jsonl") in message(
        load_cold_start, tmp_path, ["DATD", "Dreaddit"]
    )


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

"""The official layout: what loads, and what every refusal says."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crpo_fast import data
from crpo_fast.data import LABEL_SETS, load_cold_start, load_official
from data_files import (
    ASK,
    FIXTURE_ROWS,
    HEADER,
    STAGED,
    WHOLE,
    cold,
    message,
    write,
    write_fixtures,
    write_set,
)


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

"""The made-up corpus: the planted rule, the biased annotator, what is held out, its size."""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter

import pytest

from crpo_fast import synthetic_phrases as say
from crpo_fast.batch import Row
from crpo_fast.data import LABEL_SETS, OFFICIAL_EIGHT, check, load_cold_start, load_official
from crpo_fast.synthetic import Knobs, annotate, gold_label, make_post, write_corpus

STAGES = ["stimulus", "primary_appraisal", "secondary_appraisal", "reaction", "mental_state"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    write_corpus(root, seed=5)
    return root


@pytest.fixture(scope="module")
def rows(corpus):
    return {split: load_official(corpus, split) for split in ("train", "val", "test")}


def test_all_eight_sets_in_the_official_layout_without_a_note(corpus, rows):
    report = check(corpus)
    assert (report.refusals, report.notes) == ([], [])
    assert list(report.labels) == list(OFFICIAL_EIGHT)
    sizes = {split: Counter(row.dataset_id for row in part) for split, part in rows.items()}
    assert sizes["train"] == dict.fromkeys(OFFICIAL_EIGHT, 200)
    assert sizes["val"] == dict.fromkeys(OFFICIAL_EIGHT, 25)
    assert sizes["test"] == dict.fromkeys(OFFICIAL_EIGHT, 40)
    assert report.cold_start == dict.fromkeys(OFFICIAL_EIGHT, 1000)
    for name in OFFICIAL_EIGHT:
        assert set(report.labels[name]["train"]) == set(LABEL_SETS[name])


def test_the_same_seed_writes_the_same_bytes_in_under_two_seconds(tmp_path, corpus):
    start = time.process_time()
    write_corpus(tmp_path, seed=5)
    assert time.process_time() - start < 2
    files = sorted(path.relative_to(corpus) for path in corpus.rglob("*") if path.is_file())
    assert len(files) == 33
    assert [p for p in files if (tmp_path / p).read_bytes() != (corpus / p).read_bytes()] == []
    write_corpus(tmp_path, seed=6)
    assert [p for p in files if (tmp_path / p).read_bytes() == (corpus / p).read_bytes()] == []


def test_a_split_does_not_depend_on_the_size_of_the_others(tmp_path, corpus):
    write_corpus(tmp_path, seed=5, cold_start=10)
    for name in ("FIG/test_clean.csv", "LID/train_clean.csv"):
        assert (tmp_path / name).read_bytes() == (corpus / name).read_bytes()


@pytest.mark.parametrize(("task", "labels"), [
    ("Dreaddit", ["No", "No", "Yes", "Yes"]),
    ("DepSeverity", ["Minimum", "Mild", "Moderate", "Severe"]),
    ("LT-EDI", ["Not depressed", "Not depressed", "Moderately depressed", "Severely depressed"]),
    ("RSD", ["Indicator", "Ideation", "Behavior", "Attempt"]),
    ("LID", ["[1-2]", "[2-3]", "[3-4]", "[4-5]"]),
])  # fmt: skip
def test_the_rule_counts_three_signs(task, labels):
    assert gold_label(task, threat=False, helped=True, distress=False) == labels[0]
    assert gold_label(task, threat=True, helped=True, distress=False) == labels[1]
    assert gold_label(task, threat=False, helped=False, distress=False) == labels[1]
    assert gold_label(task, threat=False, helped=True, distress=True) == labels[1]
    assert gold_label(task, threat=True, helped=False, distress=False) == labels[2]
    assert gold_label(task, threat=True, helped=False, distress=True) == labels[3]


def stages_of(row: Row) -> dict[str, str]:
    assert row.stages is not None
    return row.stages


def read_signs(text: str) -> tuple[bool, bool, bool]:
    """(threat, help, distress), read from a post by other means than those that wrote it."""
    cues = text.split(" . ", 1)[1]
    cues = re.sub(r"at first [^.]*? but now ", "", cues)
    cues = re.sub(r" even if they say [^.]*", "", cues)
    helped = any(re.search(rf"my \w+ {way}", cues) for way in say.WAYS)
    return any(t in cues for t in say.THREAT), helped, any(d in cues for d in say.DISTRESS)


def test_the_labels_of_all_splits_follow_from_the_text(rows):
    for split, part in rows.items():
        wrong = [r for r in part if gold_label(r.dataset_id, *read_signs(r.text)) != r.label]
        assert wrong == [], split


def test_no_single_cue_decides(rows):
    for name in OFFICIAL_EIGHT:
        part = [r for split in rows.values() for r in split if r.dataset_id == name]
        for cue in range(3):
            groups = {
                value: Counter(r.label for r in part if read_signs(r.text)[cue] == value)
                for value in (True, False)
            }
            right = sum(group.most_common(1)[0][1] for group in groups.values())
            assert right < 0.88 * len(part), (name, cue)


def test_the_annotator_overlooks_help_as_often_as_asked_and_nothing_else(corpus):
    cold = load_cold_start(corpus)
    mentions = [row for row in cold if read_signs(row.text)[1]]
    seen = {phrase.split("{who}")[0] for phrase in say.SAY_HELP}
    overlooked = [r for r in mentions if stages_of(r)["secondary_appraisal"] in say.SAY_NO_HELP]
    assert 0.47 < len(mentions) / len(cold) < 0.53
    assert 0.60 < len(overlooked) / len(mentions) < 0.64
    for row in cold:
        threat, helped, distress = read_signs(row.text)
        said = stages_of(row)["secondary_appraisal"]
        sees = said.startswith(tuple(seen)) and said not in say.SAY_NO_HELP
        assert helped or not sees  # he never invents help
        assert stages_of(row)["primary_appraisal"] in (
            say.SAY_THREAT if threat else say.SAY_NO_THREAT
        )
        assert stages_of(row)["reaction"] in (say.SAY_DISTRESS if distress else say.SAY_CALM)
        assert row.label == gold_label(row.dataset_id, threat, sees, distress)
        assert stages_of(row)["mental_state"].endswith(row.label)


@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_bias_is_a_knob(bias):
    draw = random.Random(0)
    posts = [make_post(draw, "LID", Knobs(), held_out=False) for _ in range(200)]
    helped = [post for post in posts if post.help]
    wrong = sum(
        annotate(draw, "LID", p, bias)[1] != say.TASKS["LID"].labels[p.signs] for p in helped
    )
    assert wrong == bias * len(helped)


def test_a_known_share_of_posts_is_wrong_for_whoever_always_overlooks_help(rows):
    wrong = 0
    for row in rows["test"] + rows["train"]:
        threat, _, distress = read_signs(row.text)
        wrong += gold_label(row.dataset_id, threat, False, distress) != row.label
    assert 0.36 < wrong / 1920 < 0.45


def test_conflicting_cues_are_there_and_a_knob(rows, tmp_path):
    texts = [row.text for part in rows.values() for row in part]
    marks = ("they say", "at first", *say.GONE)
    share = sum(any(mark in text for mark in marks) for text in texts) / len(texts)
    assert 0.45 < share < 0.55
    write_corpus(tmp_path, conflict=0.0, cold_start=20)
    assert not any(mark in r.text for r in load_official(tmp_path, "train") for mark in marks)


def test_phrasings_of_the_test_split_occur_nowhere_else_but_their_words_do(corpus, rows):
    seen = rows["train"] + rows["val"] + load_cold_start(corpus)
    clauses = {c for row in seen for c in row.text.removesuffix(" .").split(" . ")[1:]}
    words = {word for row in seen for word in row.text.split()}
    for row in rows["test"]:
        assert not clauses & set(row.text.removesuffix(" .").split(" . ")[1:])
        assert set(row.text.split()) <= words


def test_cold_start_posts_are_not_trained_on_again(corpus, rows):
    cold = {row.text for row in load_cold_start(corpus)}
    assert len(cold) == 8000
    assert not cold & {row.text for part in rows.values() for row in part}


def test_vocabulary_and_lengths_stay_small(corpus, rows):
    cold = load_cold_start(corpus)
    everything = cold + [row for part in rows.values() for row in part]
    words = {w for r in everything for w in f"{r.instruction} {r.text} {r.label}".split()}
    words |= {w for r in cold for s in stages_of(r).values() for w in s.split()}
    assert len(words) <= 900
    prompts = [len(f"{r.instruction} {r.text}".split()) for r in rows["train"]]
    assert 35 < sum(prompts) / len(prompts) < 48
    assert max(prompts) <= 72
    for row in cold:
        assert list(stages_of(row)) == STAGES
        assert all(2 <= len(stage.split()) <= 8 for stage in stages_of(row).values())


def test_arguments_are_recorded(tmp_path):
    write_corpus(tmp_path, seed=9, train=8, val=4, test=5, cold_start=6, datasets=["LID"])
    record = json.loads((tmp_path / "synthetic.json").read_text())
    assert record["seed"] == 9
    assert record["datasets"] == ["LID"]
    assert (record["train"], record["val"], record["test"], record["cold_start"]) == (8, 4, 5, 6)
    assert (tmp_path / "LID/test_clean.csv").read_text().count("Statement:") == 5


@pytest.mark.parametrize(("options", "part"), [
    ({"bias": 1.5}, "bias: expected a share between 0 and 1, got 1.5"),
    ({"test": 0}, "test: expected at least 1 row, got 0"),
    ({"datasets": ["SAD"]}, "datasets: expected names out of Dreaddit"),
])  # fmt: skip
def test_refusals(tmp_path, options, part):
    with pytest.raises(ValueError, match="expected") as caught:
        write_corpus(tmp_path, **options)
    assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []

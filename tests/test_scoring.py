"""Labels from answers, scikit-learn's weighted F1, confusion in percent, seeded bootstrap."""

from __future__ import annotations

import random

import pytest
from sklearn.metrics import f1_score

from crpo_fast.data import LABEL_SETS
from crpo_fast.scoring import bootstrap_interval, classify, score_predictions

LT_EDI, LID, YES_NO = LABEL_SETS["LT-EDI"], LABEL_SETS["LID"], LABEL_SETS["Dreaddit"]


@pytest.mark.parametrize(("answer", "labels", "prefix", "exact"), [
    ("Yes", YES_NO, "Yes", "Yes"),
    ("  no \n", YES_NO, "No", "No"),
    ("Yes, but no", YES_NO, "Yes", None),
    ("No.", YES_NO, "No", None),
    ("Not sure", YES_NO, None, None),
    ("Nothing", YES_NO, None, None),
    ("not depressed.", LT_EDI, "Not depressed", None),
    ("Not depressed", ("No", "Not", "Not depressed"), "Not depressed", "Not depressed"),
    ("Not today", ("No", "Not", "Not depressed"), "Not", None),
    ("[1-2]", LID, "[1-2]", "[1-2]"),
    ("[2-3] or so", LID, "[2-3]", None),
    ("1-2", LID, None, None),
    ("the answer is Yes", YES_NO, None, None),
    ("", YES_NO, None, None),
    (None, YES_NO, None, None),
])  # fmt: skip
def test_classify(answer, labels, prefix, exact):
    assert classify(answer, labels) == prefix
    assert classify(answer, labels, "exact") == exact


def test_classify_refuses_another_match():
    with pytest.raises(ValueError, match="match: expected 'prefix' or 'exact', got 'fuzzy'"):
        classify("Yes", YES_NO, "fuzzy")


def test_hand_computed_scores():
    # gold Yes Yes Yes No; predicted Yes No None No: Yes p 1 r 1/3 f1 1/2, No p 1/2 r 1 f1 2/3
    scores = score_predictions(
        ["Yes", "Yes", "Yes", "No"], ["Yes", "No", None, "No"], ["a"] * 4, {"a": YES_NO}
    )
    assert scores["weighted_f1"] == pytest.approx(100 * (3 * 0.5 + 2 / 3) / 4)
    assert scores["accuracy"] == pytest.approx(50)
    assert scores["macro_f1"] == pytest.approx(100 * (0.5 + 2 / 3) / 2)
    assert scores["parse_rate"] == pytest.approx(75)
    table = scores["per_dataset"]["a"]["per_class"]
    assert table["Yes"] == pytest.approx(
        {"precision": 100, "recall": 100 / 3, "f1": 50, "support": 3}
    )
    confusion = scores["per_dataset"]["a"]["confusion"]
    assert confusion["columns"] == ["Yes", "No", "unparseable"]
    assert confusion["counts"] == [[1, 1, 1], [0, 1, 0]]
    assert confusion["percent"][0] == pytest.approx([100 / 3] * 3)


def test_weighted_f1_is_scikit_learns_and_unparseable_is_a_wrong_class():
    draw = random.Random(0)
    for _ in range(50):
        gold = [draw.choice(LT_EDI) for _ in range(30)]
        predicted = [draw.choice([*LT_EDI, None]) for _ in range(30)]
        theirs = f1_score(gold, [p or "?" for p in predicted], average="weighted", zero_division=0)
        ours = score_predictions(gold, predicted, ["x"] * 30, {"x": LT_EDI})
        assert ours["weighted_f1"] == pytest.approx(100 * theirs, abs=1e-9)


def test_nothing_parseable_scores_zero():
    scores = score_predictions(["Yes", "No"], [None, None], ["a", "a"], {"a": YES_NO})
    assert [scores[m] for m in ("weighted_f1", "accuracy", "macro_f1", "parse_rate")] == [
        0,
        0,
        0,
        0,
    ]


def test_a_class_that_never_occurs_does_not_lower_macro_f1():
    scores = score_predictions(["Yes", "Yes"], ["Yes", "Yes"], ["a", "a"], {"a": YES_NO})
    assert scores["macro_f1"] == 100
    assert scores["per_dataset"]["a"]["per_class"]["No"]["support"] == 0


def test_the_headline_is_the_mean_over_data_sets_not_over_rows():
    gold = ["Yes"] * 9 + ["[1-2]"]
    predicted = ["Yes"] * 9 + [None]
    scores = score_predictions(gold, predicted, ["a"] * 9 + ["b"], {"a": YES_NO, "b": LID})
    assert scores["weighted_f1"] == 50
    assert scores["accuracy"] == 50
    assert scores["parse_rate"] == 50
    assert scores["rows"] == 10
    assert {name: s["rows"] for name, s in scores["per_dataset"].items()} == {"a": 9, "b": 1}


def test_free_answers_need_no_label_set():
    scores = score_predictions(["41", "42", "43"], ["41", "7", None], ["sums"] * 3, {})
    assert scores["accuracy"] == pytest.approx(100 / 3)
    assert scores["parse_rate"] == pytest.approx(200 / 3)
    many = [str(i) for i in range(80)]
    assert "confusion" not in score_predictions(many, many, ["s"] * 80, {})["per_dataset"]["s"]


@pytest.mark.parametrize(("arguments", "part"), [
    ((["Yes"], ["Yes", "No"], ["a"], {}), "equal lengths"),
    (([], [], [], {}), "equal lengths >= 1"),
    ((["Yes"], ["yes"], ["a"], {"a": YES_NO}), "predicted: expected a label of a (Yes, No)"),
    ((["Ja"], ["Yes"], ["a"], {"a": YES_NO}), "gold: expected a label of a"),
])  # fmt: skip
def test_refusals(arguments, part):
    with pytest.raises(ValueError, match="expected") as caught:
        score_predictions(*arguments)
    assert part in str(caught.value)


def test_bootstrap_is_seeded_and_holds_the_score():
    draw = random.Random(1)
    gold = [draw.choice(YES_NO) for _ in range(200)]
    predicted = [g if draw.random() < 0.7 else draw.choice(["Yes", "No", None]) for g in gold]
    arguments = (gold, predicted, ["a", "b"] * 100, {"a": YES_NO, "b": YES_NO})
    low, high = bootstrap_interval(*arguments, seed=3)
    assert (low, high) == bootstrap_interval(*arguments, seed=3)
    assert (low, high) != bootstrap_interval(*arguments, seed=4)
    assert low < score_predictions(*arguments)["weighted_f1"] < high
    assert 6 < high - low < 20
    narrow = bootstrap_interval(*arguments, level=50, seed=3)
    assert low < narrow[0] < narrow[1] < high


def test_bootstrap_of_a_perfect_score_is_a_point():
    assert bootstrap_interval(["Yes", "No"], ["Yes", "No"], ["a"] * 2, {"a": YES_NO}) == (100, 100)


def test_bootstrap_draws_follow_the_score_of_resampled_rows():
    """The multinomial draw of cells against the plain draw of rows: same mean and spread."""
    draw = random.Random(2)
    gold = ["Yes"] * 30 + ["No"] * 10
    predicted = [g if draw.random() < 0.6 else None for g in gold]
    plain = []
    for _ in range(300):
        rows = [draw.randrange(40) for _ in range(40)]
        part = [gold[i] for i in rows], [predicted[i] for i in rows], ["a"] * 40, {"a": YES_NO}
        plain.append(score_predictions(*part)["weighted_f1"])
    plain.sort()
    low, high = bootstrap_interval(gold, predicted, ["a"] * 40, {"a": YES_NO}, resamples=4000)
    assert low == pytest.approx(plain[7], abs=3)
    assert high == pytest.approx(plain[-8], abs=3)


def test_paired_bootstrap_of_a_change():
    """Where nothing changed a point at 0; else narrower than of two unrelated sets of rows."""
    draw = random.Random(3)
    gold = [draw.choice(YES_NO) for _ in range(200)]
    before = [g if draw.random() < 0.7 else draw.choice(["Yes", "No", None]) for g in gold]
    after = [g if draw.random() < 0.3 else b for g, b in zip(gold, before, strict=True)]
    arguments = (["a"] * 200, {"a": YES_NO})
    assert bootstrap_interval(gold, before, *arguments, before=before) == (0, 0)
    low, high = bootstrap_interval(gold, after, *arguments, before=before)
    scores = [score_predictions(gold, p, *arguments)["weighted_f1"] for p in (before, after)]
    assert low < scores[1] - scores[0] < high
    alone = [bootstrap_interval(gold, p, *arguments) for p in (before, after)]
    assert high - low < 0.8 * sum((b - a) ** 2 for a, b in alone) ** 0.5
    plain = []
    for _ in range(300):
        rows = [draw.randrange(200) for _ in range(200)]
        f1 = [
            score_predictions([gold[i] for i in rows], [p[i] for i in rows], *arguments)
            for p in (before, after)
        ]
        plain.append(f1[1]["weighted_f1"] - f1[0]["weighted_f1"])
    plain.sort()
    assert low == pytest.approx(plain[7], abs=1.5)
    assert high == pytest.approx(plain[-8], abs=1.5)

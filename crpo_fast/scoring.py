"""From answers to numbers: labels, weighted F1 (scikit-learn's), confusion, bootstrap intervals.

All rates are percent. An answer that names no label is wrong and stays in every denominator; the
parse rate says how many there were. The headline of several data sets is the plain mean over them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

UNPARSEABLE = "unparseable"
METRICS = ("weighted_f1", "accuracy", "macro_f1", "parse_rate")
_MAX_TABLE = 64  # labels; free-form answers beyond that get no per-class table


def classify(answer: str | None, labels: Sequence[str], match: str = "prefix") -> str | None:
    """The label that an answer names, or None.

    ``prefix``: the answer starts with the label, ignoring case, and no word character follows; of
    several the longest. ``exact``: nothing else may follow.

    Raises:
        ValueError: ``match`` is neither.
    """
    if match not in ("prefix", "exact"):
        raise ValueError(f"match: expected 'prefix' or 'exact', got {match!r}. Use one of these.")
    if answer is None:
        return None
    answer = answer.strip()
    end = r"(?!\w)" if match == "prefix" else r"\Z"
    for label in sorted(labels, key=len, reverse=True):
        if re.match(re.escape(label) + end, answer, re.IGNORECASE):
            return label
    return None


def _labels_of(
    name: str, gold: Sequence[str], predicted: Sequence[str | None], label_sets: Mapping
) -> list[str]:
    """The declared labels, or (a task of free answers) all that occur."""
    if name not in label_sets:
        return sorted({*gold, *(p for p in predicted if p is not None)})
    labels = list(label_sets[name])
    for column, values in (("gold", gold), ("predicted", predicted)):
        for value in values:
            if value is not None and value not in labels:
                raise ValueError(
                    f"{column}: expected a label of {name} ({', '.join(labels)}) or None, got "
                    f"{value!r}. "
                    "Pass answers through classify first."
                )
    return labels


def _groups(
    gold: Sequence[str], predicted: Sequence[str | None], dataset_ids: Sequence[str]
) -> dict[str, tuple[list[str], list[str | None]]]:
    if not (len(gold) == len(predicted) == len(dataset_ids)) or not gold:
        raise ValueError(
            f"gold, predicted, dataset_ids: expected equal lengths >= 1, got {len(gold)}, "
            f"{len(predicted)}, "
            f"{len(dataset_ids)}. Pass one of each per row."
        )
    groups: dict[str, tuple[list[str], list[str | None]]] = {}
    for label, guess, name in zip(gold, predicted, dataset_ids, strict=True):
        group = groups.setdefault(name, ([], []))
        group[0].append(label)
        group[1].append(guess)
    return groups


def _score_dataset(
    gold: list[str], predicted: list[str | None], labels: list[str]
) -> dict[str, Any]:
    guesses = [UNPARSEABLE if guess is None else guess for guess in predicted]
    used = [label for label in labels if label in gold or label in guesses]
    per_label = precision_recall_fscore_support(gold, guesses, labels=used, zero_division=0)
    weighted = precision_recall_fscore_support(
        gold, guesses, labels=used, average="weighted", zero_division=0
    )
    scores: dict[str, Any] = {
        "weighted_f1": 100 * float(weighted[2]),
        "accuracy": 100 * float(accuracy_score(gold, guesses)),
        "macro_f1": 100 * float(np.mean(per_label[2])),
        "parse_rate": 100 * sum(guess is not None for guess in predicted) / len(gold),
        "rows": len(gold),
    }
    if len(labels) <= _MAX_TABLE:
        scores["per_class"] = _per_class(labels, used, per_label)
        scores["confusion"] = _confusion(gold, guesses, labels)
    return scores


def _per_class(labels: list[str], used: list[str], table: Any) -> dict[str, dict[str, float]]:
    """Precision, recall and F1 in percent; a label that never occurs has zeros and support 0."""
    found = {label: [float(column[i]) for column in table] for i, label in enumerate(used)}
    rows = {}
    for label in labels:
        precision, recall, f1, support = found.get(label, [0.0] * 4)
        rows[label] = {
            "precision": 100 * precision,
            "recall": 100 * recall,
            "f1": 100 * f1,
            "support": int(support),
        }
    return rows


def _confusion(gold: list[str], guesses: list[str], labels: list[str]) -> dict[str, Any]:
    """Rows: gold labels. Columns: predicted ones and ``unparseable``. Percent of the row."""
    columns = [*labels, UNPARSEABLE]
    counts = confusion_matrix(gold, guesses, labels=columns)[:-1]
    percent = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return {
        "labels": labels,
        "columns": columns,
        "counts": counts.tolist(),
        "percent": percent.tolist(),
    }


def score_predictions(
    gold: Sequence[str],
    predicted: Sequence[str | None],
    dataset_ids: Sequence[str],
    label_sets: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """Scores of a set of predictions.

    Args:
        gold: gold labels, one per row.
        predicted: what ``classify`` returned, None where no label was named.
        dataset_ids: data set of each row.
        label_sets: labels of each data set; a data set that is not in it is a task of free answers,
            whose labels are all strings that occur.

    Returns:
        weighted_f1, accuracy, macro_f1 (over labels that occur in gold or predicted), parse_rate:
        percent, means over the data sets; ``rows``; ``per_dataset[name]`` with the same and, up to
        64 labels, ``per_class[label]`` (precision, recall, f1, support) and ``confusion`` (labels,
        columns, counts, percent).

    Raises:
        ValueError: lengths differ, nothing to score, or a label outside its set.
    """
    per_dataset = {}
    for name, (labels_gold, guesses) in _groups(gold, predicted, dataset_ids).items():
        per_dataset[name] = _score_dataset(
            labels_gold, guesses, _labels_of(name, labels_gold, guesses, label_sets)
        )
    scores: dict[str, Any] = {
        m: float(np.mean([s[m] for s in per_dataset.values()])) for m in METRICS
    }
    return {**scores, "rows": len(gold), "per_dataset": per_dataset}


def _draw_f1(
    gold: Sequence[str],
    predictions: Sequence[Sequence[str | None]],  # [P][N]
    labels: Sequence[str],
    rng: np.random.Generator,
    resamples: int,
) -> np.ndarray:  # [P, resamples]
    """Weighted F1 in percent of every set of predictions, on the same resampled rows.

    Rows with equal labels are drawn together: their numbers are multinomial.
    """
    index = {label: i for i, label in enumerate(labels)}
    rows = np.array(
        [[index[g], *(index.get(p, len(labels)) for p in ps)]  # None: counted for no label
         for g, *ps in zip(gold, *predictions, strict=True)]
    )  # [N, 1 + P] # fmt: skip
    cells, counts = np.unique(rows, axis=0, return_counts=True)  # [U, 1 + P], [U]
    draws = rng.multinomial(len(rows), counts / len(rows), size=resamples)  # [R, U]
    one_hot = np.eye(len(labels) + 1)[:, :-1]  # [C + 1, C]
    support = draws @ one_hot[cells[:, 0]]  # [R, C]
    scores = []
    for guesses in cells.T[1:]:
        guessed = draws @ one_hot[guesses]  # [R, C]
        hits = draws @ (one_hot[guesses] * (guesses == cells[:, 0])[:, None])  # [R, C]
        f1 = 2 * hits / np.maximum(support + guessed, 1)
        scores.append(100 * (f1 * support).sum(axis=1) / len(rows))
    return np.stack(scores)


def bootstrap_interval(
    gold: Sequence[str],
    predicted: Sequence[str | None],
    dataset_ids: Sequence[str],
    label_sets: Mapping[str, Sequence[str]],
    *,
    before: Sequence[str | None] | None = None,
    resamples: int = 1000,
    level: float = 95.0,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the average weighted F1, in percent.

    Rows are drawn with replacement inside each data set.

    Args:
        gold: as in ``score_predictions``, like the next three.
        predicted: see there.
        dataset_ids: see there.
        label_sets: see there.
        before: earlier predictions for the same rows: the interval is of the change since then,
            both scored on the same draws (a paired bootstrap).
        resamples: number of draws.
        level: percent of the draws inside the interval.
        seed: of the draws; the same seed gives the same interval.

    Returns:
        Lower and upper end.
    """
    rng = np.random.default_rng(seed)
    draws = []
    earlier = None if before is None else _groups(gold, before, dataset_ids)
    for name, (labels_gold, guesses) in _groups(gold, predicted, dataset_ids).items():
        predictions = [guesses] if earlier is None else [guesses, earlier[name][1]]
        named = [p for column in predictions for p in column]
        labels = _labels_of(name, labels_gold, named, label_sets)
        scores = _draw_f1(labels_gold, predictions, labels, rng, resamples)
        draws.append(scores[0] if earlier is None else scores[0] - scores[1])
    low, high = np.percentile(np.mean(draws, axis=0), [50 - level / 2, 50 + level / 2])
    return float(low), float(high)

"""evaluations.json -> the before/after table with 95 % intervals, and the confusion matrices."""

from __future__ import annotations

from typing import Any

from crpo_fast.scoring import UNPARSEABLE, bootstrap_interval

AVERAGE = "average"
_KEPT = ("weighted_f1", "accuracy", "macro_f1", "format_rate", "parse_rate")


def table(evaluations: dict[str, Any]) -> dict[str, Any]:
    """The table of untrained / before / after.

    Returns:
        columns: names of those that exist, in time; rows: [{name, rows, cells: {column: scores with
        low and high, or None}, change: {value, low, high} or None}]; the average last, where there
        are several data sets. ``change`` is after - before, its interval from a paired bootstrap.
    """
    columns = [name for name in ("untrained", "before", "after") if name in evaluations]
    names = list(dict.fromkeys(d for c in columns for d in evaluations[c]["per_dataset"]))
    rows = [_row(name, [name], columns, evaluations) for name in names]
    if len(names) > 1:
        rows.append(_row(AVERAGE, names, columns, evaluations))
    return {"columns": columns, "rows": rows}


def _row(
    name: str, members: list[str], columns: list[str], evaluations: dict[str, Any]
) -> dict[str, Any]:
    cells = {c: _cell(evaluations[c], name, members) for c in columns}
    sizes = [cell["rows"] for cell in cells.values() if cell]
    return {
        "name": name,
        "rows": max(sizes, default=0),
        "cells": cells,
        "change": _change(evaluations, members, cells),
    }


def _cell(evaluation: dict[str, Any], name: str, members: list[str]) -> dict[str, Any] | None:
    per_dataset = evaluation["per_dataset"]
    if any(member not in per_dataset for member in members):
        return None
    source = evaluation if name == AVERAGE and len(members) > 1 else per_dataset[members[0]]
    found = {key: source[key] for key in _KEPT if key in source}
    sizes = [per_dataset[m].get("rows", 0) for m in members]
    low, high = interval(evaluation, members)
    return {**found, "rows": sum(sizes), "low": low, "high": high}


def _change(
    evaluations: dict[str, Any], members: list[str], cells: dict[str, Any]
) -> dict[str, Any] | None:
    before, after = cells.get("before"), cells.get("after")
    if not before or not after:
        return None
    change: dict[str, Any] = {
        "value": after["weighted_f1"] - before["weighted_f1"],
        "low": None,
        "high": None,
    }
    pairs = [
        (rows(evaluations["before"], member), rows(evaluations["after"], member))
        for member in members
    ]
    usable = [(a, b) for a, b in pairs if a and b and a["gold"] == b["gold"]]
    if len(usable) < len(members) or not all(
        "predictions" in evaluations[c]["per_dataset"][m]
        for c in ("before", "after")
        for m in members
    ):
        return change
    golds = [g for _, b in usable for g in b["gold"]]
    names = [m for m, (_, b) in zip(members, usable, strict=True) for _ in b["gold"]]
    change["low"], change["high"] = bootstrap_interval(
        golds,
        [p for _, b in usable for p in b["predicted"]],
        names,
        {},
        before=[p for a, _ in usable for p in a["predicted"]],
    )
    return change


def interval(
    evaluation: dict[str, Any], members: list[str]
) -> tuple[float, float] | tuple[None, None]:
    """Bootstrap interval of the (average) weighted F1; None where there are no rows to draw."""
    found = [rows(evaluation, member) for member in members]
    if any(f is None for f in found):
        return None, None
    gold = [g for f in found if f for g in f["gold"]]
    predicted = [p for f in found if f for p in f["predicted"]]
    names = [m for m, f in zip(members, found, strict=True) if f for _ in f["gold"]]
    return bootstrap_interval(gold, predicted, names, {})


def rows(evaluation: dict[str, Any], name: str) -> dict[str, list[Any]] | None:
    """Gold and predicted label of every row: as recorded, or read off the confusion matrix."""
    scores = evaluation["per_dataset"][name]
    if "predictions" in scores:
        return scores["predictions"]
    if "confusion" not in scores:
        return None
    confusion = scores["confusion"]
    gold: list[str] = []
    predicted: list[str | None] = []
    for label, counts in zip(confusion["labels"], confusion["counts"], strict=True):
        for guess, count in zip(confusion["columns"], counts, strict=True):
            gold += [label] * count
            predicted += [None if guess == UNPARSEABLE else guess] * count
    return {"gold": gold, "predicted": predicted}


def history(evaluations: dict[str, Any]) -> list[dict[str, Any]]:
    """Weighted F1 of every evaluation, by step."""
    found: list[dict[str, Any]] = []
    for name, evaluation in evaluations.items():
        low, high = interval(evaluation, list(evaluation["per_dataset"]))
        point = {"name": name, "step": evaluation.get("step", 0), "low": low, "high": high}
        found.append({**point, "f1": evaluation["weighted_f1"]})
    return sorted(found, key=lambda point: point["step"])


def confusions(evaluations: dict[str, Any]) -> list[dict[str, Any]]:
    """Counts per data set, before and after; data sets with free answers have none."""
    columns = [name for name in ("before", "after") if name in evaluations]
    names = dict.fromkeys(d for c in columns for d in evaluations[c]["per_dataset"])
    found = []
    for name in names:
        entry: dict[str, Any] = {"name": name}
        for column in columns:
            matrix = evaluations[column]["per_dataset"].get(name, {}).get("confusion")
            if matrix:
                entry |= {"labels": matrix["labels"], "columns": matrix["columns"]}
                entry[column] = matrix["counts"]
        if "labels" in entry:
            found.append(entry)
    return found


def labels_of(evaluations: dict[str, Any]) -> dict[str, list[str]]:
    """Data set -> its labels, where there are few enough to be a closed set."""
    found: dict[str, list[str]] = {}
    for evaluation in evaluations.values():
        for name, scores in evaluation["per_dataset"].items():
            if "confusion" in scores:
                found[name] = list(scores["confusion"]["labels"])
    return found

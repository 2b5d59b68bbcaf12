"""Greedy evaluation: weighted F1, format rate and per-data-set tables on held-out rows."""

from __future__ import annotations

from typing import Any

from crpo_fast import distributed, timing
from crpo_fast.batch import Row, SamplingParams
from crpo_fast.distributed import World
from crpo_fast.rollout import Engine
from crpo_fast.scoring import classify, score_predictions
from crpo_fast.task import Task


def evaluate(
    task: Task, engine: Engine, rows: list[Row], params: SamplingParams, world: World, *, batch: int
) -> dict[str, Any]:
    """Answer every row greedily; the rows are split over ranks, every rank gets the whole result.

    Returns:
        weighted_f1, accuracy, macro_f1, format_rate, parse_rate (percent; means over data sets,
        format and parse rate over rows), per_dataset {name: the same, support, confusion,
        predictions {gold: [labels], predicted: [labels or None]}}, num_rows.
    """
    answers: list[tuple[int, str | None, bool]] = []
    label_sets = task.rows.label_sets()
    mine = range(world.rank, len(rows), world.size)
    share = -(-len(rows) // world.size)
    for start in range(0, share, batch):  # generation is a collective: equally often on all ranks
        timing.set_detail(f"{start * world.size} of {len(rows)} rows")
        indices = mine[start : start + batch]
        prompts = [task.prompt(rows[i])[0] for i in indices]
        groups = engine.generate(prompts, 1, params, seed=0)
        for i, group in zip(indices, groups, strict=True):
            text = task.decode(group.samples[0].token_ids)
            answer = task.grammar.extract_answer(text)
            predicted = classify(answer, label_sets[rows[i].dataset_id], match=task.match)
            answers.append((i, predicted, task.grammar.is_well_formed(text)))
    everyone = sorted(a for part in distributed.all_gather(answers, world) for a in part)
    gold = [row.label for row in rows]
    names = [row.dataset_id for row in rows]
    result = score_predictions(gold, [a[1] for a in everyone], names, label_sets)
    well_formed = [a[2] for a in everyone]
    result["format_rate"] = 100.0 * sum(well_formed) / len(rows)
    for name, scores in result["per_dataset"].items():
        of_set = [(g, a[1]) for g, a, n in zip(gold, everyone, names, strict=True) if n == name]
        golds, guesses = zip(*of_set, strict=True)
        scores["predictions"] = {"gold": list(golds), "predicted": list(guesses)}
        flags = [ok for ok, n in zip(well_formed, names, strict=True) if n == name]
        scores["format_rate"] = 100.0 * sum(flags) / len(flags)
    result["num_rows"] = len(rows)
    return result

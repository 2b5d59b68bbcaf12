"""Writes a run folder of made-up numbers in the trainer's formats, for the tests of the report.

python tests/report_run.py <folder> [steps]   to look at one
"""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

from crpo_fast.scoring import score_predictions
from crpo_fast.traces import is_due

STAGES = ("stimulus", "primary_appraisal", "secondary_appraisal", "reaction", "mental_state")
COLD = 100  # steps of the cold start
LABELS = {"Dreaddit": ("Yes", "No"), "LID": ("[1-2]", "[2-3]", "[3-4]", "[4-5]")}
CONFIG = """seed = 7
[run]
dir = "runs/example"
[entropy]
reference_length = 80
[optim]
lr = 2e-6
[[phases]]
algorithm = "sft"
steps = 100
[[phases]]
algorithm = "crpo"
steps = {steps}
"""
CONTENT = {
    "stimulus": "the post tells of the {word}",
    "primary_appraisal": "much is at stake",
    "secondary_appraisal": "no support is named",
    "reaction": "strong distress and unrest",
    "mental_state": "two of three signs so {answer}",
}


def write_run(
    folder: Path,
    *,
    steps: int = 500,
    seed: int = 0,
    repeat: int = 1,
    posts: dict[str, str] | None = None,
) -> Path:
    """``steps`` steps in all; ``repeat`` makes completions longer; ``posts``: word -> post."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(CONFIG.format(steps=steps - COLD))
    metrics = [_metrics(step, steps, draw) for step in range(1, steps + 1)]
    _lines(folder / "metrics.jsonl", metrics)
    posts = posts or {"rent": "The rent went up again and I cannot pay my rent."}
    words = list(posts)
    records: list[dict[str, Any]] = []
    for step in range(COLD, steps + 1):
        trained = step - COLD
        if trained and is_due(trained, 5):
            for i in range(4):
                word = words[i % len(words)]
                records.append(_sample(step, i, word, posts[word], repeat, draw))
        if trained == 0 or is_due(trained, 10):
            for i in range(4):
                word = words[i % len(words)]
                records.append(_probe(step, i, word, posts[word], repeat, draw, steps))
    _lines(folder / "samples.jsonl", records)
    start: dict[str, Any] = {
        "time": "2026-01-02T03:04:05+00:00",
        "step": 0,
        "command": "crpo_fast/train.py x.toml",
    }
    start |= {"ranks": 1, "machine": "a CPU, 2 cores", "threads": 2, "commit": "0123456789ab"}
    _lines(
        folder / "starts.jsonl", [{**start, "versions": {"python": "3.11.7", "torch": "2.13.0"}}]
    )
    evaluations = {
        "before": {**_evaluation(draw, 0.55), "step": COLD},
        f"step_{(steps + COLD) // 2}": {**_evaluation(draw, 0.75), "step": (steps + COLD) // 2},
        "after": {**_evaluation(draw, 0.9), "step": steps},
    }
    (folder / "evaluations.json").write_text(json.dumps(evaluations))
    (folder / "summary.json").write_text(json.dumps({"seconds": 321.0, "seed": 7}))
    return folder


def _lines(file: Path, records: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(r) + "\n" for r in records))


def _metrics(step: int, steps: int, draw: random.Random) -> dict[str, Any]:
    is_cold = step <= COLD
    record: dict[str, Any] = {
        "step": step,
        "phase": "sft" if is_cold else "crpo",
        "phase_step": step if is_cold else step - COLD,
        "lr": 2e-6,
        "loss": 3 * math.exp(-step / 30) + draw.random() / 50,
        "grad_norm": 0.3 + draw.random() / 10,
        "seconds": step * 0.6,
        "tokens_per_second": 4000 + 500 * draw.random(),
        "tokens": 5000.0,
    }
    if is_cold:
        return record
    share = (step - COLD) / (steps - COLD)
    record |= {
        "reward": -0.2 + 1.3 * share + draw.gauss(0, 0.1),
        "reward/answer_reward": -0.6 + 1.2 * share + draw.gauss(0, 0.1),
        "reward/format_reward": 0.4 + 0.1 * share,
        "kl": 0.05 * share + draw.random() / 100,
        "clip_fraction": draw.random() / 20,
        "mismatch": 2e-4 + draw.random() / 1e4,
        "completions/length": 45 + draw.gauss(0, 2),
        "reward/not_usable": 0.0,
        "skipped": 1.0 if step == COLD + 7 else 0.0,
    }
    record |= {f"tokens_per_second/{n}": 3000 + 900 * draw.random() for n in ("train", "rollout")}
    record |= {
        f"seconds/{name}": base * (1 + draw.random() / 5)
        for name, base in (("rollout", 0.5), ("reward", 0.01), ("train", 0.9), ("other", 0.02))
    }
    record["seconds/step"] = sum(v for k, v in record.items() if k.startswith("seconds/"))
    for k in range(len(STAGES)):
        record[f"stage_entropy/{k}"] = 0.5 / (k + 1) * (1 - 0.4 * share) + draw.random() / 50
        record[f"stage_coef/{k}"] = 0.06 * math.tanh(k + 1 - 3.5)
        record[f"stage_tokens/{k}"] = 5.0 + k
    record["stage_target/4"] = 0.08  # as the dual controller logs it
    return record


def _completion(
    word: str, post: str, answer: str, repeat: int, draw: random.Random, **more: Any
) -> dict[str, Any]:
    tokens, stages = [], []
    for k, name in enumerate(STAGES):
        if k:
            tokens.append(f"<{name}>")
            stages.append(-1)
        text = " ".join([CONTENT[name].format(word=word, answer=answer)] * repeat)
        pieces = [p if i == 0 else " " + p for i, p in enumerate(text.split())]
        tokens += [*pieces, f"</{name}>"]
        stages += [*[k] * len(pieces), -1]
    tokens += ["</think>", "<answer>", answer, "</answer>", "<|end|>"]
    stages += [-1] * 5
    entropy = [round(draw.random() ** 4, 6) for _ in tokens]
    return {
        "dataset_id": "Dreaddit",
        "label": "Yes",
        "predicted": answer,
        "well_formed": True,
        "finish_reason": "stop",
        "post": post,
        "tokens": tokens,
        "stage_ids": stages,
        "logprobs": [round(-e * draw.random(), 6) for e in entropy],
        "entropy": entropy,
        **more,
    }


def _sample(
    step: int, i: int, word: str, post: str, repeat: int, draw: random.Random
) -> dict[str, Any]:
    right = i % 2 == 0
    record = _completion(word, post, "Yes" if right else "No", repeat, draw, kind="sample")
    count, sign = len(record["tokens"]), 1 if right else -1
    return {
        "step": step,
        **record,
        "prompt": i // 2,
        "rewards": {"format_reward": 0.5, "answer_reward": sign * 0.9},
        "reward": 0.5 + sign * 0.9,
        "advantage": sign * 1.25,
        "token_weights": [0.000125] * count,
        "entropy_weights": [0.0 if k < 0 else (k - 2) * 1e-5 for k in record["stage_ids"]],
    }


def _probe(
    step: int, i: int, word: str, post: str, repeat: int, draw: random.Random, steps: int
) -> dict[str, Any]:
    answer = "Yes" if step > (COLD + steps) / 2 else "No"
    record = _completion(word, post, answer, repeat, draw, kind="probe", probe=i)
    return {"step": step, **record}


def _evaluation(draw: random.Random, share: float) -> dict[str, Any]:
    gold: list[str] = []
    predicted: list[str | None] = []
    names: list[str] = []
    rows = random.Random(0)  # the same gold labels in every evaluation
    for name, labels in LABELS.items():
        for _ in range(60):
            label = rows.choice(labels)
            gold.append(label)
            predicted.append(label if draw.random() < share else draw.choice([*labels, None]))
            names.append(name)
    result = score_predictions(gold, predicted, names, LABELS)
    for name, scores in result["per_dataset"].items():
        of_set = [i for i, n in enumerate(names) if n == name]
        scores["predictions"] = {
            "gold": [gold[i] for i in of_set],
            "predicted": [predicted[i] for i in of_set],
        }
        scores["format_rate"] = 100.0
    return {**result, "format_rate": 100.0, "num_rows": len(gold)}


if __name__ == "__main__":
    write_run(Path(sys.argv[1]), steps=int(sys.argv[2]) if len(sys.argv) > 2 else 500)

"""README.md of final/: a model card as Hugging Face expects it, from numbers and settings alone.

It holds no post, no completion, no reward text, and of paths the last component only.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from crpo_fast.batch import Row
from crpo_fast.config import Config, to_dict
from crpo_fast.data import LABEL_SETS
from crpo_fast.report.folder import config_differences
from crpo_fast.report.scores import AVERAGE, table
from crpo_fast.task import Rows, build_grammar

__all__ = ["write_card"]

PAPER = "arXiv 2606.13176"
NO_INSTRUMENT = "research software, no clinical instrument"
_COLUMNS = ("untrained", "before", "after")
_LEFT_OUT = ("run.", "data.system", "track.")  # where it ran, own words, accounts
_KINDS = {
    "synthetic": "Made-up posts, written by crpo-fast's generator from templates. Nobody wrote "
    "them, and nothing here says how the model does on posts that people wrote.",
    "official": "Data sets in the layout of the Mental-R1 authors, from a folder of the user.",
    "table": "Tables (JSON lines, CSV or Parquet) of the user.",
}

_USE = f"""## Intended use
Research on reinforcement learning of language models and on how they answer questions about posts.
This model is {NO_INSTRUMENT}: neither it nor its answers may serve to screen, diagnose, triage,
treat or monitor a person.

Out of scope: any decision about a person, in health care, insurance, employment, education,
policing or moderation; profiling of people from what they post; advice to somebody in need; use
without a person who answers for it. Whoever is in need wants people: a doctor or a crisis line.
"""

_LIMITS = """## Limits
- Language: posts and labels are in English unless the data above are others; nothing was measured
  in another language, dialect, platform or time than that of the test rows.
- Labels of such data come from annotators, keywords or the forum a post stood in, not from
  diagnoses. They are noisy, and annotators disagree; a score compares the model with these labels.
- Test splits are small: read the intervals, not the decimals. They reflect the drawing of test
  rows alone; a run with another seed may differ by more. Settings that were chosen by looking at a
  test split make its numbers too good.
- Not measured: calibration, safety of the text, answers to other prompts, differences between
  groups of people. Biases of the base model, of who posts and of who annotates are still there.
- The text between the tags is trained for its form and its final answer. It is no explanation of
  how the answer came about, and it may state things about a post that are not so.
"""

_CITATION = f"""## Citation
The method: Mental-R1: Cognitive Relative Policy Optimization, {PAPER}. The training code is
independent of its authors.
```
@misc{{mental_r1,
  title = {{Mental-R1}},
  eprint = {{2606.13176}},
  archivePrefix = {{arXiv}}
}}
```
"""


def write_card(
    config: Config,
    rows: Rows,
    evaluations: dict[str, Any],
    *,
    facts: dict[str, Any],
) -> str:
    """The text of README.md.

    Args:
        config: of the run.
        rows: are counted.
        evaluations: of evaluations.json, by name.
        facts: of this run: parameters, ranks, machine, versions, commit, seconds.
    """
    scores = table(evaluations)
    parts = [
        "---\n" + "\n".join(_yaml(_metadata(config, evaluations))) + "\n---\n",
        f"# {_title(config)}\n",
        _summary(config, facts),
        _USE,
        _data(config, rows, evaluations),
        _results(scores),
        _training(config, facts),
        _configuration(config, facts),
        _LIMITS,
        _CITATION,
    ]
    return "\n".join(parts)


def _summary(config: Config, facts: dict[str, Any]) -> str:
    return (
        f"A causal language model of {facts['parameters'] / 1e6:,.1f} million parameters, trained "
        f"with crpo-fast ({_algorithms(config)}; the method of {PAPER}). It is {NO_INSTRUMENT}.\n"
    )


def _title(config: Config) -> str:
    base = config.model.path and _last(config.model.path)
    return f"{base or f'A small {config.model.build.architecture} decoder'}, {_algorithms(config)}"


def _algorithms(config: Config) -> str:
    return " + ".join(dict.fromkeys(phase.algorithm.upper() for phase in config.phases))


def _metadata(config: Config, evaluations: dict[str, Any]) -> dict[str, Any]:
    """The YAML front matter; ``model-index`` is what model pages show as evaluation results."""
    after = evaluations["after"]
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": name, "type": name.lower(), "split": config.eval.split},
            "metrics": [
                {"type": "f1", "name": "weighted F1, percent", "value": found["weighted_f1"]},
                {"type": "accuracy", "name": "accuracy, percent", "value": found["accuracy"]},
            ],
        }
        for name, found in after["per_dataset"].items()
    ]
    tags = ["crpo-fast", "reinforcement-learning", *_algorithms(config).lower().split(" + ")]
    found: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    path = config.model.path
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and not Path(path).exists():
        found["base_model"] = path  # a name on the hub
    if config.data.kind != "table":
        found["language"] = ["en"]
    found["model-index"] = [{"name": _title(config), "results": results}]
    return found


def _data(config: Config, rows: Rows, evaluations: dict[str, Any]) -> str:
    kind = config.data.kind
    lines = ["## Data", _KINDS[kind]]
    if rows.cold_start:
        lines.append(
            "The cold start (SFT) learnt from written answers "
            + (
                "of a made-up annotator who overlooks help that a post mentions."
                if kind == "synthetic"
                else "that came with the data."
            )
        )
    train, cold, test = (_counts(part) for part in (rows.train, rows.cold_start, rows.test))
    after = evaluations["after"]["per_dataset"]
    lines += ["", "| data set | train | cold start | held out | evaluated | labels |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for name in dict.fromkeys([*train, *cold, *test]):
        evaluated = after.get(name, {}).get("rows", 0)
        labels = ", ".join(LABEL_SETS.get(name, ("free answers",)))
        lines.append(
            f"| {name} | {train[name]} | {cold[name]} | {test[name]} | {evaluated} | {labels} |"
        )
    lines.append(
        f"\nEvaluated is a fixed stratified sample of the split `{config.eval.split}` where it is "
        "less than held out. The licences of the data and of the base model, and the consent of "
        "who wrote the posts, are for the user to check; this card grants nothing."
    )
    return "\n".join(lines) + "\n"


def _counts(rows: Iterable[Row]) -> Counter[str]:
    return Counter(row.dataset_id for row in rows)


def _results(scores: dict[str, Any]) -> str:
    """The table of weighted F1 with 95 % intervals, and format rates."""
    columns = scores["columns"]
    heads = [f"F1 {c}" for c in columns] + [f"format {c}" for c in columns]
    lines = [
        "## Results",
        "Weighted F1 with 95 % bootstrap intervals over test rows, and the share of answers in the "
        "asked format; greedy decoding, percent. Before = before the training with rewards, after "
        "the cold start where there is one."
        + (" Untrained = the base model." if "untrained" in columns else ""),
        "",
        f"| data set | rows | {' | '.join(heads)} |",
        f"| --- | --- |{' --- |' * len(heads)}",
    ]
    for row in scores["rows"]:
        cells = [row["cells"][c] for c in columns]
        shown = [_interval(c) for c in cells]
        shown += [f"{c['format_rate']:.1f}" if c else "-" for c in cells]
        name = "**average**" if row["name"] == AVERAGE else row["name"]
        lines.append(f"| {name} | {row['rows']} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def _interval(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    value = f"{cell['weighted_f1']:.1f}"
    if cell.get("low") is None:
        return value
    return f"{value} ({cell['low']:.1f} .. {cell['high']:.1f})"


def _training(config: Config, facts: dict[str, Any]) -> str:
    lines = [
        "## Training",
        "| phase | algorithm | steps | learning rate |",
        "| --- | --- | --- | --- |",
    ]
    cap = config.train.max_steps
    for i, phase in enumerate(config.phases, start=1):
        rate = config.optim.lr if phase.lr is None else phase.lr
        steps = min(phase.steps, cap) if cap else phase.steps
        lines.append(f"| {i} | {phase.algorithm} | {steps} | {rate:g} |")
    rollout, entropy = config.rollout, config.entropy
    if any(phase.algorithm != "sft" for phase in config.phases):
        lines.append(
            f"\nA step with rewards samples {rollout.group_size} completions of each of "
            f"{rollout.prompts_per_step} prompts (temperature {rollout.temperature:g}, top_p "
            f"{rollout.top_p:g}, at most {rollout.max_tokens} tokens) and compares them within "
            "their group. Reward functions: "
            + ", ".join(f"`{_last(name)}`" for name in config.rewards.functions)
            + "."
        )
    if any(phase.algorithm == "crpo" for phase in config.phases):
        grammar = build_grammar(config)
        coefs = ", ".join(
            f"{name} {coef:+.4f}" for name, coef in zip(grammar.names, grammar.coefs(), strict=True)
        )
        lines.append(
            f"\nCRPO adds the mean entropy of each stage with a coefficient, controller "
            f"`{entropy.controller}`, schedule `{entropy.schedule}`, M = {entropy.magnitude:g}; "
            f"positive is a penalty: {coefs or 'no stages'}."
        )
    lora = config.lora
    if lora.rank:
        where = ", ".join(f"`{name}`" for name in lora.targets) or "all Linears of the blocks"
        lines.append(
            f"\nOnly LoRA adapters were trained (rank {lora.rank}, alpha {lora.alpha:g}, on {where}"
            f"{' and lm_head' if lora.head else ''}); here they are merged into the weights."
        )
    master = "fp64" if config.model.compute_dtype == "float64" else "fp32"
    lines.append(
        f"\nMaster weights in {master}, compute in {config.model.compute_dtype}, AdamW; "
        f"{facts['ranks']} rank(s) on {facts['machine']}, {facts['seconds'] / 60:.1f} minutes."
    )
    return "\n".join(lines) + "\n"


def _configuration(config: Config, facts: dict[str, Any]) -> str:
    """Settings that are not the defaults; of paths and file names the last component."""
    tree: dict[str, Any] = {}
    for entry in config_differences(to_dict(config)):
        key, value = entry["key"], entry["value"]
        if not key.startswith(_LEFT_OUT) and not key.endswith(".instruction"):
            tree[key] = [_last(v) for v in value] if isinstance(value, list) else _last(value)
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    settings = "\n".join(f"{key} = {value}" for key, value in sorted(tree.items())) or "none"
    return (
        f"## Configuration\nSeed {config.seed}. Versions: {versions}. Commit of the code: "
        f"{facts['commit'] or 'not known (no checkout)'}. Settings that differ from the defaults:\n"
        f"```\n{settings}\n```\n"
    )


def _yaml(value: Any, indent: str = "") -> list[str]:
    """Lines of block YAML; strings as JSON writes them, which YAML reads."""
    lines = []
    for key, item in value.items() if isinstance(value, dict) else (("", v) for v in value):
        head = f"{indent}{key}:" if key else f"{indent}-"
        if not isinstance(item, dict | list):
            lines.append(f"{head} {json.dumps(item)}")
            continue
        inner = _yaml(item, indent + "  ")
        if key:
            lines += [head, *inner]
        else:  # the first key of a table stands behind its dash
            lines += [f"{head} {inner[0].strip()}", *inner[1:]]
    return lines


def _last(path: Any) -> Any:
    """The last component of a path; anything else as it is."""
    if not isinstance(path, str):
        return path
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]

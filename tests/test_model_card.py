"""The model card in final/: numbers of summary.json, nothing of the data, readable for the hub."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from crpo_fast import train
from crpo_fast.batch import Row
from crpo_fast.config import parse_arguments
from crpo_fast.model_card import write_card
from crpo_fast.task import Rows

TINY = str(Path(__file__).with_name("tiny.toml"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "home" / "jdoe7" / "run"
    folder.parent.mkdir(parents=True)
    status = train.main(
        [TINY, "--run.dir", str(folder), "--train.max_steps", "1", "--train.threads", "1"]
    )
    assert status == 0
    return folder


@pytest.fixture(scope="module")
def card(finished: Path) -> str:
    return (finished / "final" / "README.md").read_text(encoding="utf-8")


def front_matter(card: str) -> dict:
    import yaml  # comes with huggingface_hub

    _, text, body = card.split("---\n", 2)
    assert body.lstrip().startswith("# ")
    return yaml.safe_load(text)


def test_numbers_are_those_of_the_summary(finished: Path, card: str) -> None:
    summary = json.loads((finished / "summary.json").read_text(encoding="utf-8"))
    table = {
        cells[0].strip(): [c.strip() for c in cells[1:-1]]
        for line in card.splitlines()
        if line.startswith("|") and (cells := line.strip("|").split("|"))
    }
    results = card[card.index("## Results") :]
    for name, after in summary["after"]["per_dataset"].items():
        before = summary["before"]["per_dataset"][name]
        row = next(x for x in results.splitlines() if x.startswith(f"| {name} |"))
        cells = [c.strip() for c in row.strip("|").split("|")]
        shown = [float(c.split()[0]) for c in cells[2:]]
        expected = [before["weighted_f1"], after["weighted_f1"]]
        expected += [before["format_rate"], after["format_rate"]]
        assert shown == [float(f"{x:.1f}") for x in expected]
        assert ".." in cells[2], "an interval"
    average = next(x for x in results.splitlines() if x.startswith("| **average** |"))
    assert f"{summary['after']['weighted_f1']:.1f} (" in average
    assert "data set" in table
    index = front_matter(card)["model-index"][0]["results"]
    values = {r["dataset"]["name"]: r["metrics"][0]["value"] for r in index}
    expected = {n: r["weighted_f1"] for n, r in summary["after"]["per_dataset"].items()}
    assert values == expected


def test_nothing_of_the_data_and_no_path_of_the_machine(finished: Path, card: str) -> None:
    posts = 0
    for file in finished.glob("data/*/*.csv"):
        with file.open(encoding="utf-8", newline="") as lines:
            for record in csv.DictReader(lines):
                posts += 1
                assert record["text"] not in card
                words = record["text"].split()
                assert " ".join(words[:4]) not in card
    assert posts > 50
    for line in (finished / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        text = json.loads(line).get("completion") or ""
        assert len(text) < 12 or text not in card
    assert "jdoe7" not in card
    assert not re.search(r"(?<![\w.:/])/(?:home|root|tmp|Users)/", card)
    assert str(Path.home()) not in card


def test_it_says_what_it_is_and_is_not(card: str) -> None:
    assert "research software, no clinical instrument" in card
    for head in ("Intended use", "Data", "Results", "Training", "Configuration", "Limits"):
        assert f"\n## {head}\n" in card
    flat = " ".join(card.split())
    for words in ("Out of scope", "Made-up posts", "2606.13176", "noisy", "licences", "Biases"):
        assert words in flat
    assert "| 2 | crpo | 1 |" in card  # phase, algorithm, steps under the cap
    assert "Seed 5." in card
    assert "model.build.hidden_size = 16" in card
    assert re.search(r"torch \d", card)


def test_the_hub_can_read_it(finished: Path, card: str) -> None:
    hub = pytest.importorskip("huggingface_hub")
    loaded = hub.ModelCard.load(finished / "final" / "README.md")
    data = loaded.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert {"crpo-fast", "sft", "crpo"} <= set(data["tags"])
    results = loaded.data.eval_results
    assert results is not None
    assert {r.metric_type for r in results} == {"f1", "accuracy"}
    assert loaded.text.strip().startswith("# A small llama decoder, SFT + CRPO")


def test_a_canary_in_every_field_of_the_data_stays_out(tmp_path: Path) -> None:
    canary = "canary-7f3a"
    row = Row(
        f"post {canary}",
        f"label {canary}",
        f"instruction {canary}",
        completion=f"completion {canary}",
        stages={"a": f"stage {canary}"},
        columns={"note": canary},
    )
    rows = Rows([row], [row], [row])
    result = {"weighted_f1": 50.0, "accuracy": 40.0, "macro_f1": 30.0, "format_rate": 100.0}
    predictions = {"gold": [row.label], "predicted": [row.label]}
    one = {**result, "rows": 1, "predictions": predictions, "confusion": [[1]], "labels": [canary]}
    evaluation = {**result, "per_dataset": {"default": one}, "num_rows": 1, "step": 1}
    settings = ["--data.path", str(tmp_path / "posts.jsonl"), "--data.completion", "c"]
    settings += ["--data.system", f"You are {canary}.", "--model.path", str(tmp_path / "base")]
    config = parse_arguments([TINY, *settings])
    facts = {
        "parameters": 10**6, "ranks": 1, "machine": "CPU", "versions": {}, "commit": "",
        "seconds": 1.0,
    }  # fmt: skip
    text = write_card(config, rows, {"after": evaluation}, facts=facts)
    assert canary not in text
    assert str(tmp_path) not in text
    assert "data.path = posts.jsonl" in text
    assert "# base, SFT + CRPO" in text
    assert "base_model" not in front_matter(text)  # a folder is no name on the hub

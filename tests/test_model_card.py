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
    samples = (finished / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [text for line in samples for text in _texts(json.loads(line)) if len(text) > 20]
    assert len(texts) > 2
    assert not [text for text in texts if text in card]
    assert "jdoe7" not in card
    assert not re.search(r"(?<![\w.:/])/(?:home|root|tmp|Users)/", card)
    assert str(Path.home()) not in card


def _texts(record: object, key: str = "") -> list[str]:
    """All posts and completions of a record, however deep."""
    if isinstance(record, dict):
        return [text for name, value in record.items() for text in _texts(value, name)]
    if key == "tokens" and isinstance(record, list):
        return ["".join(record)]
    if isinstance(record, list):
        return [text for value in record for text in _texts(value)]
    return [record] if key in ("post", "completion") and isinstance(record, str) else []


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
    assert "Master weights in fp32, compute in float32" in card


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
    settings += ["--model.compute_dtype", "float64"]
    settings += ["--track.name", "jdoe7", "--track.project", "of-jdoe7"]
    config = parse_arguments([TINY, *settings])
    facts = {
        "parameters": 10**6, "ranks": 1, "machine": "CPU", "versions": {}, "commit": "",
        "seconds": 1.0,
    }  # fmt: skip
    text = write_card(config, rows, {"after": evaluation}, facts=facts)
    assert canary not in text
    assert str(tmp_path) not in text
    assert "jdoe7" not in text
    assert "Master weights in fp64, compute in float64" in text
    assert "data.path = posts.jsonl" in text
    assert "# base, SFT + CRPO" in text
    assert "base_model" not in front_matter(text)  # a folder is no name on the hub


POST = "canary-7f3a I have not slept since my sister moved out and nobody calls me any more"


def test_errors_about_rows_name_the_row_and_quote_no_post(tmp_path: Path) -> None:
    """A written completion that is missing; a post where a label, a stage or a list should be."""
    from crpo_fast.data import DataError, load_cold_start, load_official
    from crpo_fast.reward_calls import RewardError, score
    from crpo_fast.task import ConfigError, Task

    task = Task.__new__(Task)
    rows = [Row(POST, "Yes", dataset_id="A", completion="x"), Row(POST, "Yes", dataset_id="A")]
    object.__setattr__(task, "rows", Rows([], [], rows))
    object.__setattr__(task, "made", {})
    messages = []
    with pytest.raises(ConfigError, match="cold-start row 2 of data set A") as error:
        task.written(rows[1])
    messages.append(error)
    folder = tmp_path / "Dreaddit"
    folder.mkdir()
    (folder / "train_clean.csv").write_text(f"text,label,mental_prompt\nYes,{POST},p\n")
    with pytest.raises(DataError, match=r"got a text of \d+ characters") as error:
        load_official(tmp_path, "train", ["Dreaddit"])
    messages.append(error)
    for stages in ([POST], {"a": [POST]}):
        record = {"text": POST, "label": "Yes", "mental_prompt": "p", "stages": stages}
        (folder / "cold_start.jsonl").write_text(json.dumps(record) + "\n")
        with pytest.raises(DataError, match="got list") as error:
            load_cold_start(tmp_path, ["Dreaddit"])
        messages.append(error)
    with pytest.raises(RewardError, match="got str; sample 0, a completion of 83 char") as error:
        score([lambda completions: completions], [1.0], ["p"], [POST], {})
    messages.append(error)
    for found in messages:
        assert "canary" not in str(found.value)
        assert "sister" not in str(found.value)

"""Somebody's own task: the README's ten lines of TOML, on made-up data, with and without stages."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from crpo_fast import train
from crpo_fast.models import build_model

README = Path(__file__).parent.parent / "README.md"


def readme_toml() -> str:
    blocks = re.findall(r"```toml\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [b for b in blocks if "my_rewards" in b]
    return block


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, JSONL data and a reward module, as the README's example names them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    characters = ["<pad>", "<eos>", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    model = build_model(
        "llama",
        vocab_size=len(characters),
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    model.save_pretrained(tmp_path / "my_model")
    fast.save_pretrained(tmp_path / "my_model")
    rows = [
        {"question": f"{a}+{b}=", "gold": str(a + b), "level": a}
        for a in range(4)
        for b in range(4)
    ]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "my_rewards.py").write_text(
        "def digits(completions, answer, level, **columns):\n"
        "    assert len(answer) == len(level) == len(completions)\n"
        "    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]\n"
    )
    return tmp_path


SMALL = ["--train.max_steps", "2", "--rollout.max_tokens", "8", "--eval.limit", "4"]


def test_the_readmes_example_runs(task: Path) -> None:
    text = readme_toml()
    assert len(text.strip().splitlines()) <= 10
    (task / "mine.toml").write_text(text)
    assert train.main(["mine.toml", "--run.dir", "run", *SMALL]) == 0
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2
    assert all("reward/digits" in r for r in records)
    assert json.loads(Path("run/summary.json").read_text())["after"]["per_dataset"].keys() == {
        "default"
    }


def test_csv_with_stages_and_written_completions(task: Path) -> None:
    with (task / "train.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["q", "a", "written"])
        for i in range(8):
            writer.writerow(
                [f"{i}+1=", i + 1, f"{i} plus one</plan></think><answer>{i + 1}</answer>"]
            )
    (task / "staged.toml").write_text(
        '[model]\npath = "my_model"\n[data]\npath = "train.csv"\nprompt = "q"\nanswer = "a"\n'
        'completion = "written"\nsystem = "none"\n[[stages]]\nname = "plan"\n'
        "[rollout]\nprompts_per_step = 2\ngroup_size = 2\n"
        '[[phases]]\nalgorithm = "sft"\nsteps = 2\nsequences_per_step = 4\n[[phases]]\nsteps = 1\n'
    )
    assert train.main(["staged.toml", "--run.dir", "run", *SMALL]) == 0
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [r["phase"] for r in records] == ["sft", "sft", "crpo"]
    assert records[0]["stage_entropy/0"] > 1.0  # the written plans have a stage


def test_a_missing_column_names_file_and_columns(
    task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (task / "mine.toml").write_text(readme_toml().replace('"question"', '"qestion"'))
    assert train.main(["mine.toml", "--run.dir", "run", *SMALL]) == 2
    error = capsys.readouterr().err
    assert "train.jsonl" in error
    assert "question" in error

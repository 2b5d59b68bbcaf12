"""A head with more rows than the tokenizer has ids: what it samples beyond them ends no run."""

from __future__ import annotations

import json
from pathlib import Path

from crpo_fast import train
from crpo_fast.models import build_model, export_model, train_tokenizer
from crpo_fast.stages import StageGrammar

TINY = str(Path(__file__).with_name("tiny.toml"))


def test_a_run_counts_ids_that_the_tokenizer_does_not_know(tmp_path: Path) -> None:
    """Half of the rows are padding, and nothing was learned: about every second token is one."""
    tags = list(StageGrammar.preset("mental_r1").tags)
    tokenizer = train_tokenizer(["a post about a long day", "No. Yes."], 300 + len(tags), tags)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = build_model(
        "llama", vocab_size=2 * len(tokenizer), hidden_size=16, num_layers=1, num_heads=2,
        num_kv_heads=1, intermediate_size=24, max_positions=600, **ids,
    )  # fmt: skip
    folder = export_model(model, tokenizer, tmp_path / "model")
    arguments = ["--model.path", str(folder), "--data.max_prompt_tokens", "500"]
    arguments += ["--phases.0.steps", "1", "--phases.1.steps", "1", "--checkpoint.every", "0"]
    arguments += ["--train.token_budget", "1024", "--report.trace_every", "1"]
    run = tmp_path / "run"
    assert train.main([TINY, "--run.dir", str(run), *arguments]) == 0
    sft, crpo = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    assert "completions/unknown_ids" not in sft
    num_tokens = 4 * crpo["completions/length"]
    assert 0.2 * num_tokens < crpo["completions/unknown_ids"] < 0.8 * num_tokens
    samples = (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    traced = [record for record in map(json.loads, samples) if record["kind"] == "sample"]
    assert sum(record["tokens"].count("\ufffd") for record in traced) > 0

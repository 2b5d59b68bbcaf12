"""Whole runs of train.py on a GPU, and kernels on a device that is not the current one.

Skipped where there is no device. `finite_run` is what they share: a run in a process of its own, as
a person starts it, and what it must leave behind.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import children
from crpo_fast.models import build_model, export_model, train_tokenizer
from crpo_fast.stages import StageGrammar
from numerics import assert_near, make_problem, run_loss, spec_of

QUICK = {
    "phases.0.steps": 2,
    "phases.1.steps": 2,
    "phases.0.sequences_per_step": 16,
    "rollout.prompts_per_step": 4,
    "eval.limit": 8,
    "data.synthetic.cold_start": 40,
    "rewards.functions": "faulty_rewards:length",  # of tests; differs within every group
}
WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "hf, bf16, packed": {
        "rollout.engine": "hf",
        "model.compute_dtype": "bfloat16",
        "train.layout": "packed",
    },
    "checkpointed, several updates": {
        "model.compute_dtype": "bfloat16",
        "model.activation_checkpointing": True,
        "train.updates_per_rollout": 2,
        "train.token_budget": 512,
    },
}
SMOLLM2 = {
    "num_layers": 30,
    "hidden_size": 576,
    "num_heads": 9,
    "num_kv_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49_152,
}


def finite_run(root: Path, folder: Path, options: dict[str, Any]) -> tuple[str, list[dict]]:
    """Start the quickstart with ``options``; returns what it said and its metrics.

    Every metric is finite (or null: nothing of the kind occurred) and no update was skipped.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    arguments = [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in {**QUICK, **options}.items()
    ]
    command = [*launcher, "crpo_fast/train.py", "configs/quickstart.toml", *arguments]
    done = subprocess.run(
        [*command, f"--run.dir={folder}"],
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
        cwd=root,
        env=children.environment(),
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["phase"] for r in records] == ["sft", "sft", "crpo", "crpo"]
    for record in records:
        wanted = ["loss", "grad_norm", "entropy", "seconds/train", "tokens_per_second/train"]
        assert all(math.isfinite(record[name]) for name in wanted), record
        assert record["skipped_total"] == 0
        assert record["grad_norm"] > 1e-6
        assert record["seconds/train"] > 0
    assert all(r["seconds/rollout"] > 0 for r in records[2:])
    assert all(0 <= r["mismatch"] < 0.2 for r in records[2:]), [r["mismatch"] for r in records[2:]]
    for record in records:  # pytest -s shows where the time goes
        parts = {k: round(v, 3) for k, v in record.items() if k.startswith("seconds/")}
        print(record["phase"], parts, round(record["tokens_per_second/train"]), "tokens/s trained")
    return " ".join(said.split()), records


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
def test_the_quickstart(way, root, tmp_path):
    said, _ = finite_run(root, tmp_path / "run", WAYS[way])
    assert "backend triton" in said
    assert f"on {torch.cuda.get_device_name(0)}, compute capability" in said


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["hf", "static"])
def test_a_model_of_the_size_of_smollm2_135m(engine, root, tmp_path):
    """Random weights, 30 layers, 49 152 tokens."""
    options = {
        "rollout.engine": engine,
        "model.compute_dtype": "bfloat16",
        "train.layout": "packed",
        "data.max_prompt_tokens": 1200,  # its tokenizer has hardly more than bytes
    }
    model = random_model(tmp_path / "model", **SMOLLM2)
    said, _ = finite_run(root, tmp_path / "run", {"model.path": model, **options})
    assert "backend triton" in said


def random_model(folder: Path, **sizes: int) -> Path:
    """A transformers folder; its tokenizer has bytes, the tags, and words that do not occur."""
    tags = list(StageGrammar.preset("mental_r1").tags)
    tokenizer = train_tokenizer(["a post about a long day", "No. Yes."], 300 + len(tags), tags)
    tokenizer.add_tokens([f"<{i}>" for i in range(len(tokenizer), sizes["vocab_size"])])
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return export_model(build_model("llama", **sizes, **ids), tokenizer, folder)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="gpu: needs two devices")
@pytest.mark.parametrize("mode", ["one_pass", "two_pass"])
def test_kernels_run_on_the_device_of_their_tensors(mode):
    options = {"spec": spec_of("crpo"), "mode": mode, "backend": "triton"}
    found = {}
    with torch.cuda.device(0):
        for device in ("cuda:0", "cuda:1"):
            problem = make_problem().rounded(torch.float32, device)
            loss, grads, stats = run_loss(problem, torch.float32, **options)
            assert {g.device for g in grads.values()} == {torch.device(device)}
            found[device] = [loss, *grads.values(), *stats]
            assert torch.cuda.current_device() == 0
    for value, expected in zip(found["cuda:1"], found["cuda:0"], strict=True):
        assert_near(value.cpu(), expected.cpu(), 1e-6)

"""Shapes, inputs from a spectrum and from a model, and the options that name them."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import replace

import pytest
import torch

from benchmarks import options
from benchmarks.__main__ import main
from benchmarks.clock import Clock
from benchmarks.losses import baselines, loss, score
from benchmarks.losses.candidates import loss_candidates
from benchmarks.losses.cases import SHAPES, Case, make_inputs, named_case
from benchmarks.losses.checkpoint import checkpoint_case, checkpoint_inputs
from benchmarks.losses.measure import measure
from benchmarks.options import CPU_ROUNDS, backends_of, cases_of, rounds_of, seconds_of
from crpo_fast.models import build_model, export_model, train_tokenizer


def parsed(*words):
    parser = argparse.ArgumentParser()
    loss.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("vocab", "dim"), [(20_000, 256), (30_001, 501)])
def test_the_spectrum_has_the_entropy_of_text(kind, vocab, dim):
    inputs = make_inputs(Case(256, vocab, dim, kind))
    with torch.no_grad():
        logprobs, entropy = baselines.naive_logprobs(inputs)
    low, high = entropy.quantile(torch.tensor([0.1, 0.9])).tolist()
    assert 0.2 < low < 0.6
    assert 1.8 < high < 3.5
    assert -4 < float(logprobs.mean()) < -1  # labels are likely tokens
    lengths = inputs.weight.detach().float().norm(dim=1)
    assert 0.95 < float(lengths.mean()) < 1.05
    first, last = inputs.weight.detach().float().square().mean(0)[[0, -1]]
    assert float(first / last) == pytest.approx(1 + (dim - 1) / 32, rel=0.1)  # it falls off


def test_inputs_do_not_depend_on_the_number_of_threads():
    threads, case = torch.get_num_threads(), Case(8, 9000, 300, torch.bfloat16)
    try:
        torch.set_num_threads(1)
        one = make_inputs(case)
        torch.set_num_threads(2)
        two = make_inputs(case)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(one.tensors(), two.tensors(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.weight, make_inputs(case, seed=1).weight)


def test_a_sample_has_rows_of_every_sequence_and_the_same_sums():
    inputs = make_inputs(Case(61, 300, 16, torch.float32))
    assert inputs.sequence_rows == 8
    few = inputs.sample(16)
    assert few.labels.numel() == 16
    assert few.sequence_rows == 2
    assert torch.equal(few.hidden[2:4], inputs.hidden[8:10])
    assert few.advantages.unique().numel() == 8
    assert float(few.token_weights.sum()) == pytest.approx(float(inputs.token_weights.sum()))
    assert make_inputs(Case(3, 300, 16, torch.float32)).sample(16).labels.numel() == 3
    assert inputs.sample(1).labels.numel() == 8  # one of each at least


def test_named_shapes_are_those_of_the_models_with_rows_for_the_device():
    assert {"llama3-8b", "qwen3-0.6b", "qwen3-1.7b", "qwen3-8b", "qwen3.5", "gemma-256k"} < set(
        SHAPES
    )
    rows = {name: named_case(name, "cpu").num_rows for name in SHAPES}
    assert rows == {
        "qwen3-0.6b": 128,
        "llama3-8b": 32,
        "qwen3-1.7b": 64,
        "qwen3-8b": 32,
        "qwen3.5": 64,
        "gemma-256k": 64,
        "ragged": 127,
    }
    gpu = named_case("ragged", "cuda")
    assert [size % 2 for size in (gpu.num_rows, gpu.vocab_size, gpu.dim)] == [1, 1, 1]
    assert named_case("llama3-8b", "cuda").name == "T8192 V128256 D4096 bfloat16"


def test_options_choose_shapes_dtypes_and_rounds():
    assert [case.shape for case in cases_of(parsed())] == list(SHAPES)
    two = cases_of(parsed("--shape", "ragged", "qwen3.5", "--dtype", "float32", "bfloat16"))
    assert [(c.shape, c.dtype) for c in two] == [
        ("ragged", torch.float32),
        ("ragged", torch.bfloat16),
        ("qwen3.5", torch.float32),
        ("qwen3.5", torch.bfloat16),
    ]
    (own,) = cases_of(parsed("--rows", "7", "--dim", "33"))
    assert (own.shape, own.name) == ("own", "T7 V151936 D33 bfloat16")
    (named,) = cases_of(parsed("--shape", "ragged", "--rows", "5"))
    assert (named.shape, named.name) == ("ragged", "T5 V50257 D1001 bfloat16")
    assert rounds_of(parsed()) == CPU_ROUNDS
    assert rounds_of(parsed("--rounds", "2")) == 2
    assert (seconds_of(parsed(), 9.0), seconds_of(parsed("--seconds", "3"), 9.0)) == (9.0, 3.0)
    assert backends_of(parsed()) == ["torch"]
    assert backends_of(parsed("--backend", "torch", "triton")) == ["torch", "triton"]


REASONS = {"triton": "no GPU"}
MISTAKES = {
    "a shape beside a model": (
        ["--inputs", "{tmp}", "--shape", "ragged"],
        "--inputs: expected no --shape, --vocab or --dim beside it",
    ),
    "a backend that cannot run": (
        ["--backend", "torch", "triton"],
        "--backend: expected one that runs here, got triton: no GPU. Type auto.",
    ),
    "no model": (["--inputs", "{tmp}"], "--inputs: expected a transformers folder with a config"),
}


@pytest.mark.parametrize(("words", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_refused_with_what_to_type(words, said, tmp_path, capsys, monkeypatch):
    # in this process the kernels are interpreted, and would run
    monkeypatch.setattr(options, "unsupported_reason", lambda name, *_: REASONS.get(name))
    assert main(["loss", *(word.format(tmp=tmp_path) for word in words)]) == 2
    assert capsys.readouterr().out.startswith(said)


def test_a_key_that_nobody_has_and_rows_below_one_are_refused(capsys):
    tiny = ["score", "--rows", "8", "--vocab", "50", "--dim", "16", "--threads", "1"]
    assert main([*tiny, "--only", "nobody"]) == 2
    said = capsys.readouterr().out
    assert re.search(r"--only: expected keys among .*scored.*, got nobody", said)
    with pytest.raises(SystemExit):
        main(["loss", "--rows", "0"])
    assert "--rows: expected a whole number above 0, got '0'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = train_tokenizer(["i had a long day . my sister helps me ."] * 3, 300, [])
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    model = build_model("llama", vocab_size=len(tokenizer), **sizes, **ids)
    return export_model(model, tokenizer, tmp_path_factory.mktemp("m") / "tiny")


def test_inputs_of_a_model_are_its_hidden_states_head_and_next_tokens(folder):
    case, model, tokenizer = checkpoint_case(folder, 700, "cpu", torch.float32)
    assert (case.shape, case.inputs, case.temperature) == ("tiny", "checkpoint tiny", 1.0)
    assert (case.num_rows, case.dim) == (700, 32)
    made = checkpoint_inputs(case, torch.device("cpu"), model, tokenizer, is_sampled=False)
    assert made.hidden.shape == (700, 32)
    assert torch.equal(made.weight, model.lm_head.weight)
    text = tokenizer.decode(made.labels[:200])
    assert "<|end|>" in text
    assert " . " in text  # posts, one after the other
    ids = torch.cat([made.labels[:1], made.labels[:255]]).unsqueeze(0)  # the first id is unknown
    with torch.no_grad():
        again = model.model(ids).last_hidden_state[0]
    inner = torch.nn.functional.cosine_similarity(again[1:256], made.hidden[1:256])
    assert float(inner.mean()) > 0.98  # the same but for what one token adds
    sampled = checkpoint_inputs(case, torch.device("cpu"), model, tokenizer, is_sampled=True)
    assert torch.equal(sampled.hidden, made.hidden)
    assert not torch.equal(sampled.labels, made.labels)


def test_the_command_takes_a_model(folder, tmp_path, capsys):
    words = ["--inputs", str(folder), "--rows", "24", "--threads", "1", "--rounds", "1"]
    assert main(["score", *words, "--only", "scored", "--out", str(tmp_path)]) == 0
    assert "Inputs: checkpoint tiny, entropy" in capsys.readouterr().out
    assert (tmp_path / "score_cpu.csv").read_text().count("checkpoint tiny") == 3


def test_a_head_with_a_bias_is_refused(folder, monkeypatch, capsys):
    from benchmarks.losses import checkpoint

    _, model, tokenizer = checkpoint_case(folder, 8, "cpu", torch.float32)
    model.lm_head = torch.nn.Linear(32, len(tokenizer))
    monkeypatch.setattr(checkpoint, "load_model", lambda *_, **__: (model, tokenizer))
    assert main(["score", "--inputs", str(folder)]) == 2
    assert "--inputs: expected a model whose head has no bias" in capsys.readouterr().out


@pytest.mark.parametrize("sizes", [(1, 7, 3), (2, 1, 1)])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=str)
def test_few_rows_divide_nothing_by_zero(sizes, kind):
    cpu, case = torch.device("cpu"), Case(*sizes, kind)
    made = [c for c in loss_candidates(case, cpu, ["torch"]) if c.kind != "peer"]
    rows = measure(case, made, Clock(cpu), 1)["rows"]
    ours = [row for row in rows if row["kind"] == "ours" and "missing" not in row]
    assert len(ours) == 3
    for row in ours:
        assert row["wrong"] == ""
        values = [value for errors in row["errors"].values() for value in errors.values()]
        assert all(math.isfinite(value) for value in values)


def test_two_commands_share_their_options():
    for module in (loss, score):
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        assert {"shape", "inputs", "against", "gate"} <= set(vars(parser.parse_args([])))


def test_the_own_temperature_divides_hidden_states():
    inputs = make_inputs(Case(4, 30, 16, torch.float32))
    scaled = inputs.at_temperature_one()
    assert torch.allclose(scaled.hidden * 0.85, inputs.hidden)
    assert scaled.case == replace(inputs.case, temperature=1.0)

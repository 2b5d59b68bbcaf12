"""LoRA in the trainer: what a plain peft model gives, at one rank and two; resume, export."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from architecture_cases import make
from crpo_fast import distributed, lora, models, train
from crpo_fast import policy as policies
from crpo_fast.batch import SamplingParams
from crpo_fast.config import ConfigError, LoraConfig, parse_arguments
from crpo_fast.packing import pack
from crpo_fast.rollout.hf import HFEngine
from crpo_fast.rollout.static import StaticEngine

TINY = str(Path(__file__).with_name("tiny.toml"))
HERE = Path(__file__).parent
needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="needs peft: pip install peft"
)
if importlib.util.find_spec("peft") is not None:
    from layout_cases import make_model
    from lora_cases import SETTINGS, adapted, measure, sequences
LORA = ("--lora.rank", "3", "--lora.alpha", "6", "--lora.head", "--optim.lr", "0.02")


def check(found: dict[str, Any]) -> None:
    assert found["smallest"] > 1e-6, "every adapter has a gradient"
    assert found["gradients"] < 1e-10
    assert found["merged"] < 1e-12
    assert all(found[name] is True for name in ("names", "loaded", "state", "trained")), found


@needs_peft
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_checkpoint_and_merge_are_those_of_a_plain_peft_model(
    tied: bool, tmp_path: Path
) -> None:
    world = distributed.init(threads=1)
    try:
        check(measure(world, tied, tmp_path))
    finally:
        distributed.shutdown()
    saved = load_file(tmp_path / "step_1" / "model.safetensors")
    assert saved
    assert all(".lora_" in name for name in saved)


@needs_peft
@pytest.mark.multirank
def test_two_ranks_with_shards_of_frozen_and_trained_weights(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, str(HERE / "lora_cases.py"), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in json.loads(file.read_text()):
        for found in rank:
            check(found)


@needs_peft
@pytest.mark.parametrize("engine_class", [HFEngine, StaticEngine])
def test_rollouts_are_of_the_adapted_weights_and_the_reference_of_the_base(
    engine_class: Any,
) -> None:
    world = distributed.init(threads=1)
    try:
        model = adapted(False, torch.float32)
        policy = policies.create(model, world, compute_dtype=torch.float32)
        engine = engine_class(policy.model, gathered=policy.gathered)
        engine.sync(policy.model, 0)
        params = SamplingParams(max_tokens=6, eos_ids=(1,), temperature=0.8)
        (group,) = engine.generate([[3, 4, 5]], 4, params, seed=0)
        base = make_model(False, torch.float32)
        for sample in group.samples:
            ids = torch.tensor([*group.prompt_ids, *sample.token_ids])
            rows = torch.tensor(sample.token_ids)[:, None]
            with torch.no_grad():
                own, other = (
                    (m(ids[None]).logits[0, 2:-1] / 0.8).log_softmax(-1).gather(1, rows)[:, 0]
                    for m in (policy.model, base)
                )
            torch.testing.assert_close(torch.tensor(sample.logprobs), own, atol=1e-5, rtol=0)
            assert (own - other).abs().max() > 0.05
        (batch,) = pack(sequences()[:2], 99, layout="packed")
        reference = policies.BasePolicy(**vars(policy))
        plain = policies.create(base, world, compute_dtype=torch.float32)
        expected = plain.logprobs(batch, 0.8)
        torch.testing.assert_close(reference.logprobs(batch, 0.8), expected)
        assert (policy.logprobs(batch, 0.8) - expected).abs().max() > 0.05
        assert policy.model.training
    finally:
        distributed.shutdown()


@needs_peft
def test_dropout_is_of_training_forwards_alone() -> None:
    """Not of scores, by which ratios and KL are made; the training mode comes back."""
    world = distributed.init(threads=1)
    try:
        settings = LoraConfig(rank=3, alpha=6.0, dropout=0.5)
        policy = policies.create(
            adapted(False, torch.float32, settings), world, compute_dtype=torch.float32
        )
        (batch,) = pack(sequences()[:2], 99, layout="packed")
        once, again = (policy.logprobs(batch, 1.0) for _ in range(2))
        assert torch.equal(once, again)
        first, second = (policy(batch, lambda hidden, weight: hidden.detach()) for _ in range(2))
        assert (first - second).abs().max() > 1e-3
    finally:
        distributed.shutdown()


class Tokenizer:
    """Writes nothing."""

    def save_pretrained(self, folder: Path) -> None:
        """As a tokenizer does."""


@needs_peft
@pytest.mark.parametrize("tied", [True, False])
def test_the_export_is_a_plain_model_and_peft_loads_the_adapter(tied: bool, tmp_path: Path) -> None:
    import peft

    make_model(tied, torch.float32).save_pretrained(tmp_path / "base")
    model, _ = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", output_loading_info=True, dtype=torch.float32
    )
    embedding = model.get_input_embeddings().weight.clone()
    lora.attach(model, SETTINGS, path=str(tmp_path / "base"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3)
    ids = torch.arange(2, 11)[None]
    with torch.no_grad():
        truth = model(ids).logits
    weights = dict(model.state_dict())
    lora.write_adapter(model, weights, tmp_path / "adapter")
    lora.write_adapter(model, weights, tmp_path / "adapter")  # an older one is replaced
    models.export_model(
        lora.plain_model(model), Tokenizer(), tmp_path / "final",  # type: ignore[arg-type]
        state_dict=lora.merged(weights, SETTINGS),
    )  # fmt: skip
    final, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "final", output_loading_info=True
    )
    assert not any(report.values()), report
    assert not final.config.tie_word_embeddings
    assert torch.equal(final.get_input_embeddings().weight, embedding)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    other = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(final(ids).logits, truth, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(other(ids).logits, truth, atol=1e-6, rtol=1e-6)
        assert (make_model(tied, torch.float32)(ids).logits - truth).abs().max() > 0.1


def records(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    timed = ("seconds", "tokens_per_second")
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(timed)} for line in lines
    ]


@needs_peft
def test_a_run_that_goes_on_from_a_checkpoint_is_the_same_to_the_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In bf16, where FSDP casts; adapters alone are in checkpoints and have a state."""
    short = (*LORA, "--model.compute_dtype", "bfloat16", "--phases.0.steps", "2")
    short += ("--phases.1.steps", "2", "--objective.kl_coef", "0.1", "--rollout.max_mismatch", "1")
    short += ("--report.probe_every", "0")
    whole, later = tmp_path / "whole", tmp_path / "later"
    assert train.main([TINY, "--run.dir", str(whole), *short]) == 0
    out = capsys.readouterr().out
    assert " K trained (LoRA of rank 3 on the blocks, lm_head)" in out
    assert "lora_head of rank 3 beside a frozen weight: 4NVD + 6NVr operations" in out
    start = str(whole / "checkpoints" / "step_3")
    assert train.main([TINY, "--run.dir", str(later), *short, "--run.resume", start]) == 0
    assert records(later) == records(whole)[3:]
    assert records(whole)[2]["kl"] > 0, "the cold start moved the policy from the base"
    for name in ("checkpoints/step_4/model", "checkpoints/step_4/optimizer", "final/model"):
        file = f"{name}.safetensors"
        assert (later / file).read_bytes() == (whole / file).read_bytes(), file
    names = set(load_file(whole / "checkpoints/step_4/model.safetensors"))
    assert all(".lora_" in name for name in names)
    state = load_file(whole / "checkpoints/step_4/optimizer.safetensors")
    assert {key.split("|")[0] for key in state} == names
    assert (whole / "adapter" / "adapter_config.json").is_file()
    card = " ".join((whole / "final" / "README.md").read_text().split())
    assert "Only LoRA adapters were trained (rank 3, alpha 6, on all Linears of the blocks" in card
    final = AutoModelForCausalLM.from_pretrained(whole / "final")
    assert not final.config.tie_word_embeddings
    assert isinstance(final.get_output_embeddings(), torch.nn.Linear)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora.head"], r"lora.head: expected a lora.rank above 0 .* Type --lora.rank 16"),
        (["--lora.targets", "q_proj"], r"lora.targets: expected a lora.rank above 0"),
        (["--lora.alpha", "16"], r"lora.alpha: expected a lora.rank above 0"),
        (["--lora.dropout", "0.1"], r"lora.dropout: expected a lora.rank above 0"),
        (["--lora.rank", "-1"], r"lora.rank: expected 0 or more, got -1"),
        (["--lora.rank", "2", "--lora.alpha", "0"], r"lora.alpha: expected a positive number"),
        (["--lora.rank", "2", "--lora.dropout", "1"], r"lora.dropout: expected numbers in \[0, 1"),
        (
            ["--lora.rank", "2", "--lora.head", "--lora.dropout", ".1"],
            r"lora.dropout: expected 0 with lora.head, got 0.1\. .* 0, or --lora.no_head",
        ),
        (["--lora.rank", "2", "--model.freeze_head"], r"model.freeze_head: .* --model.no_freeze_h"),
    ],
)
def test_bad_settings_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_arguments([TINY, *options])


def test_what_the_refusals_say_can_be_typed() -> None:
    options = ("--lora.rank", "2", "--lora.head", "--lora.no_head", "--lora.dropout", "0.1")
    config = parse_arguments([TINY, *options, "--model.freeze_head", "--model.no_freeze_head"])
    assert config.lora == LoraConfig(rank=2, dropout=0.1)


@needs_peft
def test_targets_that_are_not_there_are_refused_before_weights_are_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(True, torch.float32)
    for target, advice in (
        ("qproj", "Type --lora.targets q_proj"),
        ("layers.0.mlp.up_proj", "Type --lora.targets up_proj"),
        ("lm_head", "Type --lora.head for lm_head"),
    ):
        with pytest.raises(
            ConfigError, match=f"lora.targets: .* q_proj, .* got '{target}'.*{advice}"
        ):
            lora.check_targets(LoraConfig(rank=2, targets=("q_proj", target)), model)
    with pytest.raises(
        ConfigError, match=r"lora\.rank: expected 0 for GPT2LM.* no nn\.Linear, got 2"
    ):
        lora.check_targets(LoraConfig(rank=2, head=True), make("gpt2"))  # its blocks have Conv1D
    folder = tmp_path / "base"
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    skeleton = lora.skeleton(model.config)
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    lora.check_targets(LoraConfig(rank=2, targets=("q_proj",)), skeleton)
    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: None)
    arguments = ["--run.dir", str(tmp_path / "r"), "--lora.rank", "2"]
    assert train.main([TINY, *arguments]) == 2
    assert "lora.rank: expected 0 where peft is not installed, got 2. Type pip install peft" in (
        capsys.readouterr().err
    )


@needs_peft
def test_a_plan_counts_adapters_alone(tmp_path: Path) -> None:
    """Gradients and AdamW's moments of adapters; no copy for the reference."""
    from crpo_fast.plan import plan

    options = ("--lora.rank", "4", "--lora.head", "--objective.kl_coef", "0.1")
    full = plan(parse_arguments([TINY, *options[-2:]]))
    found = plan(parse_arguments([TINY, *options]))
    trainable = found.parameters["trainable"]
    assert 0 < trainable < full.parameters["trainable"] / 3
    assert found.parameters["all"] == full.parameters["all"] + trainable
    parts = found.parts()
    assert parts["gradients, sharded"] == 4 * trainable
    assert "KL reference" in full.parts()
    assert not parts["KL reference"]
    assert parts["optimizer"] < full.parts()["optimizer"] / 3

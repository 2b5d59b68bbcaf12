"""Heads and decoders that the fused loss does not know are refused, each with its reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gemma3 import Gemma3Config, Gemma3ForConditionalGeneration

from architecture_cases import SIZES, make
from crpo_fast import policy as policies
from crpo_fast import train
from crpo_fast.attention import SDPA_PACKED
from crpo_fast.distributed import World
from crpo_fast.model_check import UnsupportedModelError, check_rotations, head_options
from crpo_fast.models import export_model, train_tokenizer

ALONE = World(0, 1, torch.device("cpu"))


def logits_through(change: Callable[[Tensor], Tensor]) -> Any:
    """A llama whose forward does something to its logits."""
    model = make("llama")
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    model.forward = forward
    return model


def with_head(change: Callable[[Any], nn.Module]) -> Any:
    model = make("llama")
    model.lm_head = change(model.lm_head)
    return model


class NormalisedHead(nn.Linear):
    """Rows of the weight have length 1, as in Baichuan 2."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, nn.functional.normalize(self.weight))


def normalised(head: nn.Linear) -> nn.Module:
    other = NormalisedHead(head.in_features, head.out_features, bias=False, dtype=head.weight.dtype)
    other.weight = head.weight
    return other


def renamed() -> Any:
    """A cap under a name that the config of no known model has."""
    model = logits_through(lambda logits: 30.0 * (logits / 30.0).tanh())
    model.config.lm_head_soft_limit = 30.0
    return model


def wrong_config(name: str, **changes: float) -> Any:
    """The forward took its numbers when it was built, and the config says others."""
    model = make(name)
    for key, value in changes.items():
        setattr(model.config, key, value)
    return model


def between() -> Any:
    """One more norm between decoder and head, which the decoder's class does not have."""
    model = make("llama")
    model.lm_head.register_forward_pre_hook(lambda _, inputs: (2.0 * inputs[0].tanh(),))
    return model


def with_embeddings() -> Any:
    """Logits that the ids reach besides the decoder; those of the padding token are zero."""
    model = make("llama")
    plain = model.forward

    def forward(input_ids: Tensor, **kwargs: Any) -> Any:
        output = plain(input_ids=input_ids, **kwargs)
        output.logits = output.logits + model.lm_head(model.model.embed_tokens(input_ids))
        return output

    model.forward = forward
    return model


def with_dropout() -> Any:
    """Before the head, in a model that was loaded, and so is in eval mode."""
    model = make("llama")
    model.lm_head.register_forward_pre_hook(
        lambda _, inputs: nn.functional.dropout(inputs[0], 0.2, model.training)
    )
    return model


def with_parameters(name: str, module: nn.Module | nn.Parameter) -> Any:
    """They change no logits: a head for one token more, or a factor that is 1 so far."""
    model = make("llama")
    setattr(model, name, module)
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "scaled": (
        lambda: logits_through(lambda x: 0.5 * x),
        r"scale 1, no cap, no bias.*differ by up to .*\(they are 0\.5 times as large\)",
    ),
    "renamed cap": (renamed, r"other ones: of logits up to 200 .*differ by up to 170"),
    "biased by id": (lambda: logits_through(lambda x: x + torch.arange(300.0)), "differ by up to"),
    "shorter": (
        lambda: logits_through(lambda x: x[..., :280]),
        r"logits of shape \[280\] instead of \[300\] from LlamaForCausalLM\.forward",
    ),
    "not finite": (lambda: logits_through(lambda x: x * torch.nan), "differ by up to nan"),
    "other scale": (lambda: wrong_config("cohere", logit_scale=1.5), r"scale 1\.5.*2 times as"),
    "other name": (lambda: wrong_config("llama", logits_scaling=2.0), r"scale 0\.5.*2 times as"),
    "other cap": (lambda: wrong_config("phi", final_logit_softcapping=9.0), r"cap 9, a bias"),
    "normalised": (lambda: with_head(normalised), "times as large"),
    "between": (between, "differ by up to"),
    "embeddings": (with_embeddings, r"differ by up to .* \(model\.eval\(\)\)"),
    "dropout": (with_dropout, r"differ by up to .* \(model\.train\(\)\)"),
    "score head": (
        lambda: with_parameters("score", nn.Linear(32, 1)),
        r"no other parameters, got score\.weight, score\.bias in LlamaForCausalLM, which the fused",
    ),
    "factor": (lambda: with_parameters("log_scale", nn.Parameter(torch.zeros(()))), "log_scale"),
    "two layers": (
        lambda: with_head(lambda head: nn.Sequential(nn.Identity(), head)),
        "expected an nn.Linear output head, got Sequential in LlamaForCausalLM",
    ),
}


@pytest.mark.parametrize(("build", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_head_that_does_something_unknown_is_refused(
    build: Callable[[], Any], reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        policies.create(build(), ALONE, compute_dtype=torch.float64)


def test_the_check_leaves_the_model_as_it_was() -> None:
    model = make("gemma2")
    ids = torch.arange(9)[None]
    before, state = model(ids).logits, copy.deepcopy(model.state_dict())
    assert head_options(model) == {"logit_softcap": 1.5}
    assert torch.equal(model(ids).logits, before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert "forward" not in vars(model.model)
    assert all(p.grad is None for p in model.parameters())
    model.model.layers.train()
    modes = [module.training for module in model.modules()]
    head_options(model)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("name", ["phi", "gemma2", "granite"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounded_weights_pass_and_are_still_compared(name: str, dtype: torch.dtype) -> None:
    head_options(make(name, dtype))
    model = make(name, dtype)
    model.lm_head.register_forward_hook(lambda *inputs: 1.1 * inputs[2])
    with pytest.raises(UnsupportedModelError, match="times as large"):
        head_options(model)


def test_weights_without_numbers_are_not_compared() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("cohere", **SIZES))
    assert head_options(model) == {"logit_scale": model.config.logit_scale}


def test_a_model_of_images_and_text_is_refused_and_its_decoder_taken() -> None:
    """With the lines of docs/integrations.md."""
    text = {**SIZES, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 28}
    config = Gemma3Config(text_config=text, vision_config={**vision, "num_attention_heads": 2})
    whole = Gemma3ForConditionalGeneration(config).eval()
    with pytest.raises(UnsupportedModelError, match=r"text alone, got Gemma3ForCond.*docs/integr"):
        head_options(whole)
    alone: Any = AutoModelForCausalLM.from_config(whole.config.get_text_config()).eval()
    alone.base_model.load_state_dict(whole.get_decoder().state_dict())
    alone.lm_head.load_state_dict(whole.get_output_embeddings().state_dict())
    ids = torch.arange(9)[None]
    assert torch.equal(alone(ids).logits, whole(ids).logits)
    assert head_options(alone) == {}


def test_a_decoder_without_position_ids_in_its_attention_is_refused_for_packed_rows() -> None:
    """Persimmon's attention never learns where a packed sequence begins."""
    config = AutoConfig.for_model("persimmon", **SIZES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=SDPA_PACKED)
    policy = policies.create(model, ALONE, compute_dtype=torch.float32)
    reason = r"train\.layout: .* got PersimmonForCausalLM: .* by \d+\.\d+% .*--train\.layout padded"
    with pytest.raises(UnsupportedModelError, match=reason):
        policy.check_packing()
    assert policy.model.training


LONGROPE = {  # as Phi-3.5's config.json has it
    "original_max_position_embeddings": 8,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4},
}
DYNAMIC = {
    "max_position_embeddings": 8,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
}


@pytest.mark.parametrize(("name", "changes"), [("phi3", LONGROPE), ("llama", DYNAMIC)])
def test_lengths_whose_rotations_are_those_of_a_longer_neighbour_are_refused(
    name: str, changes: dict[str, Any]
) -> None:
    model = make(name, **changes)
    for longest in (8, 9):
        ids = torch.arange(2, 7 + longest)[None]
        positions = torch.cat([torch.arange(5), torch.arange(longest)])[None]
        packed = model(ids, position_ids=positions, use_cache=False).logits[:, :5]
        moved = (packed - model(ids[:, :5], use_cache=False).logits).abs().max()
        if longest == 8:
            assert moved < 1e-10
            check_rotations(model.config, 3, 5)
            continue
        assert moved > 1e-3
        words = r"at most 8 tokens.*got 3 \+ 6\. Type --rollout\.max_tokens 5\."
        with pytest.raises(UnsupportedModelError, match=words):
            check_rotations(model.config, 3, 6)
    with pytest.raises(UnsupportedModelError, match=r"Type a lower --data\.max_prompt_tokens"):
        check_rotations(model.config, 8, 1)
    for other in ("llama", "gemma3", "gpt2", "smollm3"):
        check_rotations(make(other).config, 10**9, 1)


def test_a_run_checks_its_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = train_tokenizer(["I lost my job."], 290, ["<think>", "</think>"])
    model = make("phi3", torch.float32, **LONGROPE)
    folder = export_model(model, tokenizer, tmp_path / "model", state_dict=model.state_dict())
    arguments = ["--model.path", str(folder), "--run.dir", str(tmp_path / "run")]
    assert train.main([str(Path(__file__).with_name("tiny.toml")), *arguments]) == 2
    assert "rollout.max_tokens: expected prompts and completions of at most 8" in " ".join(
        capsys.readouterr().err.split()
    )

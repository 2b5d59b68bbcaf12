"""The training step that is measured: model, rollouts and settings, the same for every trainer.

The rollouts are made up but ragged as real ones: prompts of some lengths, each with ``group_size``
completions whose lengths are log-normal (sigma .6), cut at ``max_completion``. Weights are random,
so the speed is that of the model's shape and the answers mean nothing. The KL reference is another
model: the same weights with noise, so that the KL is not 0.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from crpo_fast.advantages import group_advantages
from crpo_fast.packing import Sequence

SIGMA = 0.6  # of the logarithm of a completion's length
REFERENCE_NOISE = 0.5  # of a tensor's standard deviation
NUM_STAGES = 5  # of the measured loop: metrics by stage, all coefficients 0
QWEN3 = {
    "num_key_value_heads": 8,
    "num_attention_heads": 16,
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": True,
}
# the same proportions at 1/55 of the size: the head has a quarter of the products
TINY = {
    **QWEN3,
    "num_key_value_heads": 2,
    "num_attention_heads": 4,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "vocab_size": 12288,
    "max_position_embeddings": 4096,
}
MODELS = {"qwen3-0.6b": QWEN3, "tiny": TINY}


@dataclass(frozen=True)
class StepCase:
    """One optimizer step.

    Attributes:
        model: name for people.
        folder: transformers folder of the policy; ``reference`` that of the KL reference.
        device: cpu or cuda.
        dtype: of the products; weights, gradients and optimizer state are fp32 in both trainers.
        attention: sdpa | eager | flash_attention_2 | flash_attention_3.
        layout: of our micro-batches, packed | padded; TRL pads.
        objective: dapo | grpo | bnpo, in both the same definition.
        kl_coef: 0 leaves the reference pass out.
        prompts, group_size: sequences of the step.
        micro_batch: sequences of TRL's micro-batch; ours takes as many token slots.
        median_prompt, median_completion, max_completion: tokens.
        seed: of weights and rollouts.
        checkpointing: recompute activations in backward.
        threads: CPU threads.
    """

    model: str
    folder: str
    reference: str
    device: str = "cpu"
    dtype: str = "bfloat16"
    attention: str = "sdpa"
    layout: str = "packed"
    objective: str = "dapo"
    kl_coef: float = 0.01
    prompts: int = 4
    group_size: int = 8
    micro_batch: int = 8
    median_prompt: int = 48
    median_completion: int = 64
    max_completion: int = 192
    seed: int = 0
    checkpointing: bool = False
    threads: int = 2

    @property
    def num_sequences(self) -> int:
        """Of the step."""
        return self.prompts * self.group_size

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the products."""
        return getattr(torch, self.dtype)

    @property
    def learning_rate(self) -> float:
        """Constant; small, so that every round trains nearly the same model."""
        return 1e-6


def make_sequences(case: StepCase, vocab_size: int) -> list[Sequence]:
    """The step's rollouts with their advantages, in rollout order; a function of the seed."""
    rng = random.Random(case.seed)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, vocab_size) for _ in range(count)]

    def length(median: int, limit: int) -> int:
        return max(2, min(limit, round(rng.lognormvariate(0.0, SIGMA) * median)))

    sequences, rewards = [], []
    for _ in range(case.prompts):
        prompt = tokens(length(case.median_prompt, 4 * case.median_prompt))
        for _ in range(case.group_size):
            ids = tokens(length(case.median_completion, case.max_completion))
            stages = [NUM_STAGES * i // len(ids) for i in range(len(ids))]
            logprobs = [-rng.random() for _ in ids]
            sequences.append(Sequence(prompt, ids, stages, logprobs))
            rewards.append(rng.random())
    advantages = group_advantages(rewards, case.group_size, scale="group_std")
    return [
        Sequence(s.prompt_ids, s.completion_ids, s.stage_ids, s.rollout_logprobs, a)
        for s, a in zip(sequences, advantages, strict=True)
    ]


def distribution(sequences: list[Sequence], micro_batch: int) -> dict[str, Any]:
    """How ragged the rollouts are.

    Returns:
        Counts of tokens; ``quantiles`` (0, 25, 50, 75, 100 %) of prompt and completion lengths; and
        ``padded``: token slots of micro-batches in rollout order, prompts padded to the longest
        prompt of the step and completions to the longest completion, as TRL pads.
    """

    def quantiles(lengths: list[int]) -> list[int]:
        ordered = sorted(lengths)
        return [ordered[round(q * (len(ordered) - 1))] for q in (0, 0.25, 0.5, 0.75, 1)]

    prompts = [len(s.prompt_ids) for s in sequences]
    completions = [len(s.completion_ids) for s in sequences]
    slots = len(sequences) * (max(prompts) + max(completions))
    return {
        "sequences": len(sequences),
        "tokens": sum(prompts) + sum(completions),
        "completion_tokens": sum(completions),
        "squares": sum(len(s) ** 2 for s in sequences),
        "prompt_quantiles": quantiles(prompts),
        "completion_quantiles": quantiles(completions),
        "padded": slots,
        "micro_batches": -(-len(sequences) // micro_batch),
    }


def write_models(config: Any, case_seed: int, folder: Path) -> tuple[Path, Path]:
    """Random weights of ``config`` as a transformers folder, and those of the KL reference.

    bf16 on disk (the values of both trainers' fp32 weights), so that a model of 600 M parameters
    takes 1.2 GB each.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case_seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        paths = folder / "policy", folder / "reference"
        model.save_pretrained(paths[0])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    noise = torch.randn_like(parameter)
                    parameter.add_(noise, alpha=REFERENCE_NOISE * float(parameter.std()))
        model.save_pretrained(paths[1])
    return paths


def model_config(name: str) -> Any:
    """The config of a named model, or of a transformers folder (its weights are not read).

    Raises:
        ValueError: neither.
    """
    if name in MODELS:
        return AutoConfig.for_model("qwen3", **MODELS[name])
    if not (Path(name) / "config.json").is_file():
        names = ", ".join(MODELS)
        raise ValueError(
            f"--model: expected one of {names}, or a folder with a config.json, got {name!r}. "
            "Type --model tiny."
        )
    return AutoConfig.from_pretrained(name)


def load(folder: str, attention: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a folder."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)

"""A run of TRL's trainer, or of ours, on written rollouts: every loss, gradient and log of it.

The rollouts are TRL's `rollout_func`, so that no run depends on what a model samples; lengths
differ, some completions are cut before their end, some tokens come from a tool.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, TrainerCallback

from crpo_fast.models_build import train_tokenizer

WORDS = [
    "a",
    "long",
    "day",
    "at",
    "work",
    "my",
    "sister",
    "helps",
    "me",
    "I",
    "cannot",
    "sleep",
    "it",
    "is",
    "fine",
]
TAGS = ("<stimulus>", "</stimulus>", "<reaction>", "</reaction>")
CONFIGS = {"qwen3": Qwen3Config, "llama": LlamaConfig}

LATE = {"steps_per_generation": 4}  # two updates from one rollout: ratios are not 1
SEQUENCE = {"importance_sampling_level": "sequence"}
SINGLE_PASS: list[dict[str, Any]] = [
    {"loss_type": "grpo", **LATE, "eval_strategy": "steps", "eval_steps": 3},
    {"loss_type": "bnpo", "mask_truncated_completions": True},
    {"loss_type": "dr_grpo", "num_iterations": 2},
    {"loss_type": "dapo", **LATE, "epsilon": 0.02, "epsilon_high": 0.03},
    {"loss_type": "cispo", **LATE, "epsilon_high": 1.01},
    {"loss_type": "grpo", **LATE, "importance_sampling_level": "sequence", "epsilon": 3e-3},
    {"loss_type": "dapo", **LATE, "importance_sampling_level": "sequence"},
    {"loss_type": "grpo", "beta": 0.1, "learning_rate": 2.0},  # KL with the gradient of k2
    {"loss_type": "dapo", **LATE, "beta": 0.1, "use_bias_correction_kl": False},
    {"loss_type": "dapo", "tools": True, "entropy_coef": 0.05},
    {"loss_type": "dapo", "tools": True, **LATE, "temperature": 0.01, "learning_rate": 1e-6},
    {"loss_type": "bnpo", "vllm": True, "use_adaptive_entropy": True, "entropy_target": 9.0},
    {"loss_type": "grpo", "vllm": True, "importance_sampling_level": "sequence"},
]
TWO_PASSES: list[tuple[str, dict[str, Any]]] = [
    ("loss_type='vespo'", {"loss_type": "vespo", **LATE, "learning_rate": 0.1}),
    ("delta=1.3", {"loss_type": "grpo", "delta": 1.3, **LATE}),
    ("top_entropy_quantile=0.5", {"top_entropy_quantile": 0.5}),
    ("use_bias_correction_kl=True", {"beta": 0.1, **LATE}),
    (
        "importance_sampling_level='sequence' of cispo",
        {**LATE, **SEQUENCE, "loss_type": "cispo", "epsilon_high": 2.0},
    ),
]


@dataclass
class Run:
    """What a run left: per micro-batch, per optimizer step, at the end."""

    losses: list[torch.Tensor] = field(default_factory=list)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    logs: list[dict[str, Any]] = field(default_factory=list)
    trainer: Any = None


def make_tokenizer() -> Any:
    return train_tokenizer([" ".join(WORDS)] * 3, 262 + len(TAGS) + 8, list(TAGS))


def make_model(folder: Path, kind: str = "qwen3", **overrides: Any) -> Path:
    """A folder with a tiny model, whose logits are far from equal."""
    options = {
        "vocab_size": 288,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        **overrides,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](**options))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def completion(rng: random.Random) -> str:
    """Both stages, one of them, or the first without its end."""
    text = [" ".join(rng.choices(WORDS, k=rng.randint(1, 3))) for _ in range(3)]
    parts = [text[0], "</stimulus>", "<reaction>", text[1], "</reaction>", text[2]]
    return " ".join(parts[: rng.choice((6, 6, 5, 3, 1))])


def rollouts(tools: bool, logprobs: float) -> Any:
    """A `rollout_func`: the same completions in every run at the same step on the same rank."""

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        tokenizer, rank = trainer.processing_class, trainer.accelerator.process_index
        found: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
        masks = []
        for index, prompt in enumerate(prompts):
            rng = random.Random(f"{trainer.state.global_step} {rank} {index}")
            ids = tokenizer(completion(rng))["input_ids"][:19]
            ids += [tokenizer.eos_token_id] * (rng.random() < 0.8)
            found["prompt_ids"].append(tokenizer(prompt)["input_ids"])
            found["completion_ids"].append(ids)
            found["logprobs"].append([logprobs - rng.random() for _ in ids])
            masks.append([int(k == 0 or rng.random() < 0.7) for k in range(len(ids))])
        return {**found, "env_mask": masks} if tools else found

    return rollout


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text)) % 5) for text in completions]


class Watch(TrainerCallback):
    """Gradients of every optimizer step, clipped, and the logs."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        named = self.run.trainer.accelerator.unwrap_model(model).named_parameters()
        self.run.gradients.append({k: p.grad.clone() for k, p in named if p.grad is not None})

    def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
        self.run.logs.append(dict(logs))


def settings(folder: Path, **options: Any) -> Any:
    from trl import GRPOConfig

    chosen = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 20,
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "temperature": 0.9,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **options,
    }
    return GRPOConfig(str(folder), **chosen)


def train(
    trainer_class: Any,
    model: Path,
    folder: Path,
    *,
    trainer_options: dict[str, Any] | None = None,
    tools: bool = False,
    vllm: bool = False,
    resume: str | None = None,
    **options: Any,
) -> Run:
    """Train ``model`` for three steps."""
    from datasets import Dataset

    run = Run()
    prompts = [" ".join(WORDS[k : k + 3]) for k in range(10)]
    data = Dataset.from_dict({"prompt": prompts})

    class Recorded(trainer_class):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if self.model.training:
                run.losses.append(loss.detach())
                run.inputs.append(inputs)
            return loss

    run.trainer = Recorded(
        str(model),
        reward,
        settings(folder, **options),
        data,
        eval_dataset=data if "eval_strategy" in options else None,
        callbacks=[Watch(run)],
        rollout_func=rollouts(tools, -5.0),
        **(trainer_options or {}),
    )
    if vllm:  # the correction alone: no engine
        run.trainer.use_vllm, run.trainer._last_loaded_step = True, 0
        run.trainer.vllm_generation = type("Engine", (), {"sync_weights": lambda _: None})()
    run.trainer.train(resume_from_checkpoint=resume)
    return run


STAGES = ("stimulus", "reaction")
STAGED = {"loss_type": "grpo", "learning_rate": 0.0, "max_grad_norm": 0.0}


def differences(ours: Run, theirs: Run) -> dict[str, Any]:
    """Largest relative error of loss and gradient, and the logs that differ or are missing."""
    assert len(ours.losses) == len(theirs.losses)
    assert len(ours.gradients) == len(theirs.gradients)
    assert len(ours.logs) == len(theirs.logs)
    found, wanted = torch.stack(ours.losses), torch.stack(theirs.losses)
    loss = float(((found - wanted).abs() / wanted.abs().clamp(min=1e-2)).max())  # NaN stays
    gaps = []
    for ours_step, theirs_step in zip(ours.gradients, theirs.gradients, strict=True):
        assert ours_step.keys() == theirs_step.keys()
        largest = torch.stack([g.abs().max() for g in theirs_step.values()]).max()
        gaps += [(ours_step[k] - g).abs().max() / largest for k, g in theirs_step.items()]
    gradient = float(torch.stack(gaps).max())
    logs = {}
    for ours_log, theirs_log in zip(ours.logs, theirs.logs, strict=True):
        for name, value in theirs_log.items():
            found = ours_log.get(name)
            if any(word in name for word in ("time", "_per_second", "flos")) or found == value:
                continue
            if found is None or not abs(found - value) <= 1e-5 * max(1.0, abs(value)):
                logs[name] = (found, value)
    return {"loss": loss, "gradient": gradient, "logs": logs}

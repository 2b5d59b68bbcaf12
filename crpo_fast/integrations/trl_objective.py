"""TRL's GRPO loss in the terms of the fused one: weights, advantages and options.

Every factor of TRL that multiplies the policy term alone and is not negative goes into the
advantages (min(r c A, clip(r) c A) = c min(r A, clip(r) A) for c >= 0), every denominator into the
token weights. What depends on the logprobs of other tokens, or has a policy term of its own, is
named by `unfused_reason`: TRL's own code then computes it from differentiable logprobs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crpo_fast.config import ConfigError, EntropyConfig
from crpo_fast.integrations.trl_head import HeadFunction, HeadOutput
from crpo_kernels import IGNORE_INDEX, ObjectiveSpec, linear_policy_loss, stage_entropy_weights

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")


def check_options(trainer: Any, entropy: EntropyConfig) -> None:
    """Refuse what would be left out in silence.

    Raises:
        ConfigError: names the option and what to set.
    """
    if trainer.aux_loss_enabled:
        raise ConfigError(
            "router_aux_loss_coef: expected 0, as the fused loss has no load balancing of experts, "
            f"got {trainer.router_aux_loss_coef}. Set GRPOConfig(router_aux_loss_coef=0.0), or "
            "train with trl.GRPOTrainer."
        )
    if trainer._is_vlm:
        raise ConfigError(
            "model: expected a text model, got one with images. Train it with trl.GRPOTrainer."
        )
    is_half = trainer.accelerator.mixed_precision == "fp16" or trainer.model.dtype == torch.float16
    if is_half and not trainer.args.cast_lm_head_to_fp32:
        raise ConfigError(
            "fp16: expected a head in bf16 or fp32, where gradients of a large softmax do not "
            "underflow, got fp16. Set GRPOConfig(bf16=True, fp16=False), or "
            "cast_lm_head_to_fp32=True."
        )
    if entropy.reduction != "sequence_mean":
        raise ConfigError(
            "entropy.reduction: expected 'sequence_mean', whose weights need no counts of other "
            f"micro-batches, got {entropy.reduction!r}. Leave EntropyConfig(reduction=...) out."
        )
    if entropy.anneal != "none" and trainer.args.max_steps <= 0:
        raise ConfigError(
            f"entropy.anneal: expected 'none' without max_steps, got {entropy.anneal!r}. Set "
            "GRPOConfig(max_steps=...), the steps over which the coefficients change."
        )


def loss_mask(inputs: dict[str, Any]) -> Tensor:  # [B, C]
    """Completion tokens that the policy wrote."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def accumulation(trainer: Any) -> float:
    """Micro-batches of the optimizer step; 1 in evaluation."""
    return float(trainer.current_gradient_accumulation_steps) if trainer.model.training else 1.0


def unfused_reason(trainer: Any, inputs: dict[str, Any]) -> str | None:
    """Which of TRL's options needs logprobs before the loss is known; None: a single pass."""
    args = trainer.args
    is_sequence = trainer.importance_sampling_level == "sequence"
    is_on_policy = inputs.get("old_per_token_logps") is None
    is_cispo = trainer.loss_type == "cispo"
    corrects_kl = trainer.beta != 0.0 and args.use_bias_correction_kl
    obstacles = {
        f"loss_type={trainer.loss_type!r}": trainer.loss_type not in LOSS_TYPES,
        f"delta={args.delta}": args.delta is not None and not is_cispo,
        f"top_entropy_quantile={trainer.top_entropy_quantile}": trainer.top_entropy_quantile < 1.0,
        "off_policy_mask_threshold": trainer.off_policy_mask_threshold is not None,
        "use_bias_correction_kl=True": corrects_kl and (is_sequence or not is_on_policy),
        "importance_sampling_level='sequence' with advantages of tokens": (
            is_sequence and inputs["advantages"].dim() > 1
        ),
        "importance_sampling_level='sequence' of cispo": (
            is_sequence and is_cispo and not is_on_policy
        ),
        f"epsilon={trainer.epsilon_low}": trainer.epsilon_low > 1 and not is_cispo,
        f"epsilon_high={trainer.epsilon_high}, a cap below 1": is_cispo
        and trainer.epsilon_high < 1,
    }
    return next((name for name, stands in obstacles.items() if stands), None)


def objective(trainer: Any) -> ObjectiveSpec:
    """TRL's policy term and KL.

    ``use_bias_correction_kl`` multiplies k3 by the ratio: on-policy that has the gradient of k2
    (and the value of k3).
    """
    is_cispo = trainer.loss_type == "cispo"
    is_sequence = trainer.importance_sampling_level == "sequence" and not is_cispo
    return ObjectiveSpec(
        policy="cispo" if is_cispo else "gspo" if is_sequence else "clip",
        clip_low=0.0 if is_cispo else trainer.epsilon_low,
        clip_high=trainer.epsilon_high - is_cispo,  # TRL's bound of cispo is the ratio itself
        kl_coef=trainer.beta,
        kl_estimator="k2" if trainer.args.use_bias_correction_kl else "k3",
    )


def vectors(trainer: Any, inputs: dict[str, Any], mask: Tensor) -> dict[str, Any]:
    """Token weights, advantages, old and reference logprobs [B * C] of `linear_policy_loss`."""
    found = {
        "token_weights": _token_weights(trainer, inputs, mask.float()),
        "advantages": _advantages(trainer, inputs, mask).expand(mask.shape),
        "old_logprobs": inputs.get("old_per_token_logps"),
        "ref_logprobs": inputs["ref_per_token_logps"] if trainer.beta != 0.0 else None,
    }
    return {name: None if x is None else x.flatten() for name, x in found.items()}


def bonus_weights(trainer: Any, mask: Tensor) -> Tensor | None:  # [B, C]
    """TRL's own bonus (``entropy_coef``) as entropy weights, with this step's coefficient."""
    if not trainer._entropy_bonus_enabled:
        return None
    is_idle = trainer.use_adaptive_entropy and (
        trainer._last_world_entropy > trainer.args.entropy_target
    )
    coef = 0.0 if is_idle else trainer.entropy_coef
    return -coef * mask / (mask.sum().clamp(min=1) * accumulation(trainer))


def _token_weights(trainer: Any, inputs: dict[str, Any], mask: Tensor) -> Tensor:  # [B, C]
    steps = accumulation(trainer)
    if trainer.loss_type == "grpo":
        return mask / (mask.sum(1, keepdim=True).clamp(min=1) * len(mask) * steps)
    if trainer.loss_type == "bnpo":
        return mask / (mask.sum().clamp(min=1) * steps)
    if trainer.loss_type == "dr_grpo":
        return mask / (len(mask) * trainer.max_completion_length * steps)
    # dapo and cispo: `num_items_in_batch` counts the rollout of all ranks
    items = inputs["num_items_in_batch"].clamp(min=1) / trainer.accelerator.num_processes
    share = steps / trainer.args.steps_per_generation if trainer.model.training else 1.0
    return mask / (items * share)


def _advantages(trainer: Any, inputs: dict[str, Any], mask: Tensor) -> Tensor:  # [B, 1 or C]
    advantages = inputs["advantages"]
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    if not (trainer.use_vllm and trainer.vllm_importance_sampling_correction):
        return advantages
    ratio = inputs["importance_sampling_ratio"]  # [B, 1 or C]
    if trainer.importance_sampling_level == "sequence" and trainer.loss_type != "cispo":
        # one policy term a sequence, multiplied by each token's ratio: their mean multiplies it
        ratio = (ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return advantages * ratio


def stage_ids(trainer: Any, inputs: dict[str, Any], mask: Tensor) -> Tensor:  # [B, C]
    """Stage of every token, -1 for none and outside ``mask``."""
    ids = inputs["completion_ids"].cpu()
    lengths = inputs["completion_mask"].sum(1).tolist()
    found = torch.full(ids.shape, -1)
    for row, (tokens, length) in enumerate(zip(ids.tolist(), lengths, strict=True)):
        stages = trainer.grammar.stage_ids(tokens[:length], trainer._tokenizer)
        found[row, :length] = torch.tensor(stages, dtype=torch.long)
    return found.to(mask.device).masked_fill(mask == 0, -1)


def stage_weights(trainer: Any, ids: Tensor, coefs: tuple[float, ...]) -> Tensor | None:  # [B, C]
    """Entropy weights of the stages: a mean over the sequences of all ranks and micro-batches."""
    if not any(coefs):
        return None
    found = stage_entropy_weights(
        ids,
        _bounds(ids),
        torch.tensor(coefs, dtype=torch.float32),
        reduction=trainer.entropy.reduction,
        reference_length=trainer.entropy.reference_length,
        num_sequences=len(ids) * accumulation(trainer),
    )
    return found.view(ids.shape)


def stage_sums(ids: Tensor, entropies: Tensor, num_stages: int) -> Tensor:  # [2, K] fp64
    """Sum of the entropies and number of tokens of each stage."""
    is_stage = ids.flatten() == torch.arange(num_stages, device=ids.device)[:, None]  # [K, B * C]
    values = entropies.flatten().double() * is_stage
    return torch.stack((values.sum(1), is_stage.sum(1).double()))


def fused(
    trainer: Any, inputs: dict[str, Any], mask: Tensor, weights: Tensor | None
) -> HeadFunction:
    """What the head computes in place of logprobs: the whole loss, with the stages' ``weights``."""
    count = mask.shape[1]  # C
    terms = [x for x in (weights, bonus_weights(trainer, mask)) if x is not None]
    entropy_weights = sum(terms[1:], terms[0]).flatten() if terms else None

    def compute(hidden: Tensor, weight: Tensor, labels: Tensor, **head: Any) -> HeadOutput:
        labels = labels[:, -count:].masked_fill(mask == 0, IGNORE_INDEX)  # [B, C]
        loss, stats = linear_policy_loss(
            hidden[:, -count:],
            weight,
            labels.flatten(),
            **vectors(trainer, inputs, mask),
            entropy_weights=entropy_weights,
            spec=objective(trainer),
            cu_seqlens=_bounds(mask),
            **head,
        )
        logprobs, old = stats.logprobs.view(labels.shape), inputs.get("old_per_token_logps")
        if old is not None:  # a ratio of 1: TRL masks after its exp, and 0 - old may overflow there
            logprobs = torch.where(mask == 0, old, logprobs)
        entropy = stats.entropy.view(labels.shape)
        return HeadOutput(loss=loss, log_probs=logprobs, entropy=entropy)

    return compute


def _bounds(rows: Tensor) -> Tensor:  # [B + 1] int32 on the CPU
    return torch.arange(len(rows) + 1, dtype=torch.int32) * rows.shape[1]

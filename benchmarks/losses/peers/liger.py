"""liger-kernel: the chunked GRPO loss, the GRPO loss on logits, the fused scaled cross entropy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.losses.baselines import KL_COEF, Candidate, Result, gradients
from benchmarks.losses.cases import Inputs
from benchmarks.losses.needs import Needs

from .common import policy_result, sequences

DISTRIBUTION = "liger-kernel"
LOSS_ONLY = {
    "logprobs": "returns the loss only",
    "entropy": "no entropy",
    "entropy_gradient": "no entropy",
}


def chunked_class() -> Any:
    """The class of the chunked loss."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    return LigerFusedLinearGRPOLoss


def chunked_base() -> Any:
    """The class that has the chunked log-probabilities alone."""
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    return LigerFusedLinearPPOBase


def scaled_function() -> Any:
    """Fused linear scaled cross entropy: its own kernel on sm_90, chunks of torch elsewhere."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return LigerFusedLinearScaledCrossEntropyFunction


def logits_loss() -> Any:
    """The Triton GRPO loss on logits."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    return triton_grpo_loss


def logits_scores() -> Any:
    """The Triton log-probabilities from logits, without gradients."""
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    return fused_selective_log_softmax


def chunked_arguments(inputs: Inputs) -> tuple[dict[str, Any], dict[str, Any]]:
    """What makes the chunked loss, and what it is called with: a batch of padded sequences."""
    length = inputs.sequence_rows
    made = {
        "beta": KL_COEF,
        "compiled": False,
        "use_ref_model": True,
        "chunk_size": 1,
        "loss_type": "dapo",  # the mean over all tokens of the batch
        "temperature": inputs.case.temperature,
    }
    called = {
        "_input": sequences(inputs.hidden, length),  # [B, L, D]
        "lin_weight": inputs.weight,
        "selected_token_ids": sequences(inputs.labels, length),
        "attention_mask": sequences(torch.ones_like(inputs.advantages), length),
        "advantages": sequences(inputs.advantages, length)[:, 0],  # [B]
        "ref_per_token_logps": sequences(inputs.ref_logprobs, length),
    }
    return made, called


def chunked(inputs: Inputs) -> Result:
    """The chunked loss; its sequences are those of the inputs, padded at the end."""
    made, called = chunked_arguments(inputs)
    loss, _ = chunked_class()(**made)(**called)
    return Result(loss, *gradients(loss, inputs))


def chunked_scored(inputs: Inputs) -> Result:
    """The log-probabilities of the chunked loss alone."""
    with torch.no_grad():
        logprobs = chunked_base().chunk_forward(**scores_arguments(inputs))
    return Result(logprobs=logprobs.view(-1))


def scores_arguments(inputs: Inputs) -> dict[str, Any]:
    """All rows as one sequence."""
    return {
        "input_chunk": inputs.hidden.unsqueeze(0),  # [1, T, D]
        "weight": inputs.weight,
        "selected_token_ids": inputs.labels.unsqueeze(0),
        "bias": None,
        "temperature": inputs.case.temperature,
    }


def scaled_arguments(inputs: Inputs) -> dict[str, Any]:
    """What the scaled cross entropy is called with."""
    return {
        "_input": inputs.hidden,
        "weight": inputs.weight,
        "target": inputs.labels,
        "temperature": inputs.case.temperature,
        "return_entropy": True,
    }


def scaled(inputs: Inputs) -> Result:
    """Fused linear scaled cross entropy and the objective in torch."""
    nll, entropy = scaled_function().apply(**scaled_arguments(inputs))
    return policy_result(inputs, -nll, entropy)


def scaled_scored(inputs: Inputs) -> Result:
    """The same without gradients."""
    with torch.no_grad():
        nll, entropy = scaled_function().apply(**scaled_arguments(inputs))
    return Result(logprobs=-nll, entropy=entropy)


def logits_arguments(inputs: Inputs, logits: Tensor) -> dict[str, Any]:
    """What the loss on logits is called with; it is given back per token."""
    length = inputs.sequence_rows
    return {
        "logits": logits,
        "old_logp": None,
        "ref_logp": sequences(inputs.ref_logprobs, length),
        "completion_ids": sequences(inputs.labels, length),
        "advantages": sequences(inputs.advantages, length)[:, 0].contiguous(),
        "temperature": inputs.case.temperature,
        "beta": KL_COEF,
        "eps_low": 0.2,
        "eps_high": 0.2,
        "reduce": False,
    }


def shifted_logits(inputs: Inputs) -> Tensor:  # [B, L + 1, V]
    """Logits of the sequences; the kernels want a row more at the end of each."""
    hidden = sequences(inputs.hidden, inputs.sequence_rows)
    return torch.nn.functional.pad(hidden, (0, 0, 0, 1)) @ inputs.weight.t()


def on_logits(inputs: Inputs) -> Result:
    """The product, then the Triton loss on all logits."""
    per_token, *_ = logits_loss()(**logits_arguments(inputs, shifted_logits(inputs)))
    weights = sequences(inputs.token_weights, inputs.sequence_rows)
    loss = (per_token * weights).sum()
    return Result(loss, *gradients(loss, inputs))


def on_logits_scored(inputs: Inputs) -> Result:
    """The product, then the Triton log-probabilities."""
    with torch.no_grad():
        ids = sequences(inputs.labels, inputs.sequence_rows)
        logprobs = logits_scores()(shifted_logits(inputs), ids, inputs.case.temperature)
    return Result(logprobs=logprobs.view(-1)[: inputs.labels.numel()])


def losses() -> list[Candidate]:
    """With both gradients."""
    return [
        Candidate(
            "liger",
            "Liger chunked GRPO",
            chunked,
            has_entropy_gradient=False,
            needs=Needs(DISTRIBUTION, chunked_class),
            lacks=LOSS_ONLY,
            note="without the entropy term; its own torch.compile off",
        ),
        Candidate(
            "liger_scaled",
            "Liger scaled CE",
            scaled,
            needs=Needs(DISTRIBUTION, scaled_function),
            note="its own kernel on sm_90, elsewhere torch in chunks of 512 rows",
        ),
        Candidate(
            "liger_logits",
            "Liger Triton GRPO on logits",
            on_logits,
            has_entropy_gradient=False,
            needs=Needs(DISTRIBUTION, logits_loss, device="cuda"),
            lacks=LOSS_ONLY,
            note="without the entropy term; all logits exist in the dtype of the inputs",
        ),
    ]


def scores() -> list[Candidate]:
    """Without gradients."""
    return [
        Candidate(
            "liger_scored",
            "Liger chunked, scoring only",
            chunked_scored,
            num_products=1,
            needs=Needs(DISTRIBUTION, chunked_base),
            lacks={"entropy": "no entropy"},
        ),
        Candidate(
            "liger_scaled_scored",
            "Liger scaled CE, scoring only",
            scaled_scored,
            num_products=1,
            needs=Needs(DISTRIBUTION, scaled_function),
            note="its own kernel on sm_90, elsewhere torch in chunks of 512 rows",
        ),
        Candidate(
            "liger_logits_scored",
            "Liger Triton on logits, scoring only",
            on_logits_scored,
            num_products=1,
            needs=Needs(DISTRIBUTION, logits_scores, device="cuda"),
            lacks={"entropy": "no entropy"},
            note="all logits exist in the dtype of the inputs",
        ),
    ]

"""The two public functions: per-token log-probabilities of a head, and the fused policy loss.

    logits_t = softcap(logit_scale * (hidden_t W^T + bias)) / temperature_t         never all at once
    linear_logprobs      log p(label), entropy and lse of every row, differentiable: bring your own loss
    linear_policy_loss   sum_t token_weights_t * [rho_t * policy_term + kl_coef * kl]
                         + sum_t entropy_weights_t * entropy_t + sum_t z_loss_weights_t * lse_t^2

On a CPU bf16 products are rounded to bf16, as in any bf16 head there; everything after them is fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import validate
from .autograd import Objective
from .call import HeadCall
from .dispatch import one_pass_reason
from .spec import Logprobs, ObjectiveSpec, TokenStats
from .weights import sequence_of_token


@torch.compiler.disable
def linear_logprobs(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [T] int64
    *,
    bias: Tensor | None = None,  # [V]
    temperature: Tensor | float = 1.0,  # [T] or one for all
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    rows: Tensor | Sequence[int] | None = None,
    backend: str = "auto",
    mode: str = "auto",
    workspace_bytes: int | None = None,
    process_group: object = None,
    vocab_start: int = 0,
) -> Logprobs:
    """log p(label), entropy and log-sum-exp of every row, without the logits of all rows.

    Args:
        hidden: ``[T, D]`` fp32, bf16 or fp64; leading dimensions are flattened, any strides.
        weight: ``[V, D]`` the lm_head's weight, same dtype.
        labels: ``[T]`` int64 token ids, already shifted; ``IGNORE_INDEX`` rows return 0.
        bias: ``[V]`` added to the products.
        temperature: divides the logits, in fp32; above 0.
        logit_scale: multiplies products and bias.
        logit_softcap: c of c * tanh(x / c).
        rows: host-side indices of the rows that count; others return 0. On a GPU this spares the one
            synchronisation of the call, and every listed row must carry a label.
        backend: "auto", "torch" or "dense" (the oracle: all logits, plain autograd).
        mode: "auto" or "two_pass". "one_pass" needs the loss inside: `linear_policy_loss`.
        workspace_bytes: bound on logits, gradient factors and scratch together (at least one row).
            None: 1 GiB on a CPU; 4 V D bytes and 1024 rows on a GPU.
        process_group: not implemented.
        vocab_start: 0.

    Returns:
        `Logprobs` of ``[T]`` fp32 (fp64 for fp64 inputs), differentiable once in hidden, weight and bias
        through any of the three.

    Raises:
        ValueError: an argument that cannot be right; the message says what to pass.
        NotImplementedError: ``process_group`` was given.
    """
    call = HeadCall(hidden, weight, labels, bias, (temperature, logit_scale, logit_softcap), rows)
    validate.check_vocabulary_shard(process_group, vocab_start)
    call.plan(
        backend, mode, workspace_bytes, one_pass_reason(None, True) if call.needs_any else None
    )
    outputs, _ = call.logprobs()
    return Logprobs(*(call.scatter(value) for value in outputs))


@torch.compiler.disable
def linear_policy_loss(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [T] int64
    *,
    advantages: Tensor | None = None,  # [T]
    token_weights: Tensor,  # [T]
    entropy_weights: Tensor | None = None,  # [T]
    z_loss_weights: Tensor | None = None,  # [T]
    old_logprobs: Tensor | None = None,  # [T]
    rollout_logprobs: Tensor | None = None,  # [T]
    ref_logprobs: Tensor | None = None,  # [T]
    spec: ObjectiveSpec = ObjectiveSpec(),  # noqa: B008  (frozen)
    cu_seqlens: Tensor | None = None,  # [B + 1] int32
    bias: Tensor | None = None,  # [V]
    temperature: Tensor | float = 1.0,  # [T] or one for all
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    rows: Tensor | Sequence[int] | None = None,
    backend: str = "auto",
    mode: str = "auto",
    workspace_bytes: int | None = None,
    process_group: object = None,
    vocab_start: int = 0,
) -> tuple[Tensor, TokenStats]:
    """The fused policy loss and its per-token statistics. Sums, no means: weights hold every denominator.

    Args:
        hidden: see `linear_logprobs`, as every argument that is not described here.
        weight: ``[V, D]``.
        labels: ``[T]``.
        advantages: ``[T]``; may be None for policy "sft", which does not use them.
        token_weights: ``[T]`` multiplies policy and KL term (`aggregation_weights`). A row of weight 0
            adds exactly 0, whatever its old, rollout or reference logprob holds.
        entropy_weights: ``[T]`` > 0 penalises entropy, < 0 rewards it (`stage_entropy_weights`).
        z_loss_weights: ``[T]`` multiplies lse^2.
        old_logprobs: ``[T]`` of the policy at the start of the update. None: on-policy, the ratio is 1
            with the gradient of the logprob.
        rollout_logprobs: ``[T]`` of the engine that sampled, for ``spec.rho_mode``.
        ref_logprobs: ``[T]`` of the reference policy, for ``spec.kl_coef``.
        spec: what is minimised.
        cu_seqlens: ``[B + 1]`` where the sequences begin and end; for gspo, whole sequences in one call.
        bias: ``[V]``.
        temperature: above 0.
        logit_scale: not 0.
        logit_softcap: above 0.
        rows: rows that count.
        backend: "auto", "torch" or "dense".
        mode: "one_pass" makes gradients while a chunk's logits are hot (6NVD operations), "two_pass"
            after all statistics (8NVD, 6NVD within the workspace). "auto": one_pass but for gspo with
            ``old_logprobs``, whose ratio is a mean over this call's own logprobs.
        workspace_bytes: bound on extra memory; a fp32 d_weight that accumulates counts as a gradient.
        process_group: not implemented.
        vocab_start: 0.

    Returns:
        loss: ``[]`` fp32 (fp64), differentiable once. Per-token vectors are constants to it.
        stats: `TokenStats` of ``[T]``, detached.

    Raises:
        ValueError: an argument that cannot be right; the message says what to pass.
        NotImplementedError: ``process_group`` was given.
    """
    call = HeadCall(hidden, weight, labels, bias, (temperature, logit_scale, logit_softcap), rows)
    validate.check_vocabulary_shard(process_group, vocab_start)
    vectors = {
        "token_weights": token_weights,
        "advantages": advantages,
        "entropy_weights": entropy_weights,
        "z_loss_weights": z_loss_weights,
        "old_logprobs": old_logprobs,
        "rollout_logprobs": rollout_logprobs,
        "ref_logprobs": ref_logprobs,
    }
    validate.check_objective(spec, {**vectors, "cu_seqlens": cu_seqlens})
    call.plan(backend, mode, workspace_bytes, one_pass_reason(spec, old_logprobs is None))
    sequence_ids = None
    if spec.policy == "gspo":
        sequence_ids, _ = sequence_of_token(cu_seqlens, call.num_rows, hidden.device)
        sequence_ids = sequence_ids if call.rows is None else sequence_ids[call.rows]
    return call.policy_loss(Objective(spec, call.token_inputs(vectors), sequence_ids))

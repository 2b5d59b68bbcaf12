"""What a call would choose and why, for a first screen or a log, without making the call.

>>> sizes = {"num_rows": 8, "vocab_size": 64, "hidden_size": 16, "backend": "torch"}
>>> explain_choice(**sizes, spec=ObjectiveSpec.preset("grpo"))[0]
'backend torch (asked for), mode one_pass: the coefficients are known before the head runs'
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .aligned import Lengths
from .compilation import uncompiled_reason
from .dispatch import (
    choose_backend,
    choose_plan,
    mode_reason,
    one_pass_reason,
    plan_scoring,
    rows_reason,
    spread,
)
from .factors import NO_NEEDS, Needs
from .lora import operations
from .plan import HeadSizes, Plan
from .quantised import check_head_dtype
from .spec import ObjectiveSpec
from .validate import check_tensors, check_workspace


def explain_choice(
    *,
    num_rows: int,
    vocab_size: int,
    hidden_size: int,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    spec: ObjectiveSpec | None = None,
    is_on_policy: bool = True,
    sequence_lengths: Sequence[int] | None = None,
    backend: str = "auto",
    mode: str = "auto",
    workspace_bytes: int | None = None,
    is_scoring: bool = False,
    head_dtype: torch.dtype | None = None,
    lora_rank: int = 0,
    num_ranks: int = 1,
) -> tuple[str, str]:
    """Backend and mode (or scorer), and how the row passes run, each with its reason.

    Args:
        num_rows: counted tokens of a call.
        vocab_size: V, of all ranks.
        hidden_size: D.
        dtype: of hidden states and weight.
        device: of both.
        spec: of `linear_policy_loss`; None: of `linear_logprobs`.
        is_on_policy: no ``old_logprobs`` are given.
        sequence_lengths: counted tokens of each sequence, ``num_rows`` in all, by which off-policy
            gspo may run in one pass.
        backend: as in the call.
        mode: as in the call.
        workspace_bytes: as in the call.
        is_scoring: of `linear_logprobs` without gradients.
        head_dtype: as in the call, with ``is_scoring``.
        lora_rank: r of ``lora_head`` beside a frozen weight; 0: the head has no adapter.
        num_ranks: of the ``process_group``, over which V is spread evenly.

    Raises:
        ValueError: what a call of these sizes would refuse, or an unknown name; with the reason.
    """
    _check_sizes(num_rows=num_rows, hidden_size=hidden_size, lora_rank=lora_rank)
    shard_size = _shard_size(vocab_size, num_ranks)
    hidden, weight = _stand_ins(shard_size, hidden_size, dtype, _checked_device(device))
    check_workspace(workspace_bytes)
    choice = choose_backend(backend, hidden.device, dtype)
    eager_reason = uncompiled_reason(hidden, num_rows, shard_size)
    needs = _needs(is_scoring, has_adapter=bool(lora_rank))
    sizes = HeadSizes(
        hidden, weight, num_rows, choice.name, workspace_bytes, may_keep=not is_scoring,
        needs=needs[:2], is_compiled=eager_reason is None, head_dtype=head_dtype,
        lora_rank=lora_rank, has_strides=False, most_rows=shard_size if num_ranks > 1 else None,
    )  # fmt: skip
    if head_dtype is not None:
        check_head_dtype(head_dtype, hidden, needs_any=not is_scoring)
    one_pass = None if is_scoring else _one_pass(spec, is_on_policy, sequence_lengths, num_rows)
    plan, why = _plan(sizes, mode, choice.reason, one_pass)
    why += operations(plan, needs, lora_rank) + spread(num_ranks)
    return f"backend {choice.name} ({choice.reason}), {why}", _row_passes(plan, eager_reason)


def _one_pass(
    spec: ObjectiveSpec | None,
    is_on_policy: bool,
    sequence_lengths: Sequence[int] | None,
    num_rows: int,
) -> tuple[str | None, Lengths | None]:
    """Why chunks that know no sequences cannot be one pass, and the sequences where they may be."""
    why_not = one_pass_reason(spec, is_on_policy)
    if spec is None or why_not is None:
        return why_not, None
    return why_not, _checked_lengths(sequence_lengths, num_rows)


def _plan(
    sizes: HeadSizes,
    mode: str,
    backend_reason: str,
    one_pass: tuple[str | None, Lengths | None] | None,  # None: it scores
) -> tuple[Plan, str]:
    """How the call would run, and why."""
    if one_pass is None:
        return plan_scoring(sizes, mode, backend_reason)
    plan, reason = choose_plan(sizes, mode, *one_pass)
    return plan, mode_reason(plan, reason)


def _needs(is_scoring: bool, has_adapter: bool) -> Needs:
    """A head in training, whose weight is frozen under an adapter."""
    if is_scoring:
        return NO_NEEDS
    return Needs(hidden=True, weight=not has_adapter, states=has_adapter, up=has_adapter)


def _stand_ins(
    vocab_size: int, hidden_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Hidden states and weight without memory: the predicates read shapes, dtype and device."""
    hidden = torch.empty(0, hidden_size, dtype=dtype, device=device)
    weight = torch.empty(1, 1, dtype=dtype, device=device).expand(vocab_size, hidden_size)
    check_tensors(hidden, weight, hidden.new_empty(0, dtype=torch.int64), None)
    return hidden, weight


def _row_passes(plan: Plan, eager_reason: str | None) -> str:
    if plan.mode == "fused":
        return "no row passes: statistics are made with the product"
    passes = {
        "triton": "row passes by Triton kernels",
        "torch": rows_reason(eager_reason),
        "dense": "all logits at once",
    }
    return passes[plan.backend]


def _shard_size(vocab_size: int, num_ranks: int) -> int:
    """Rows of the largest of shards as even as can be."""
    _check_sizes(vocab_size=vocab_size)
    _check_sizes(1, num_ranks=num_ranks)
    return -(-vocab_size // num_ranks)


def _check_sizes(least: int = 0, **sizes: int) -> None:
    for name, size in sizes.items():
        if not (isinstance(size, int) and size >= least):
            raise ValueError(
                f"{name}: expected a whole number of at least {least}, got {size!r}. Pass the "
                f"{name} of the call."
            )


def _checked_device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device: expected the name of a device, got {device!r}. Pass 'cpu' or 'cuda'."
        ) from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device: expected one that torch sees, got {device!r} (torch {torch.__version__} sees "
            "no CUDA device). Pass device='cpu', or ask on the machine with the GPU."
        )
    return place


def _checked_lengths(sequence_lengths: Sequence[int] | None, num_rows: int) -> Lengths:
    if sequence_lengths is None:
        return Lengths(None, "the sequences are not known here")
    if any(length < 0 for length in sequence_lengths):
        raise ValueError(
            f"sequence_lengths: expected numbers of at least 0, got {min(sequence_lengths)}. Pass "
            "the counted tokens of every sequence."
        )
    if sum(sequence_lengths) != num_rows:
        raise ValueError(
            f"sequence_lengths: expected {num_rows} tokens (num_rows) in all, got "
            f"{sum(sequence_lengths)}. Pass the counted tokens of every sequence."
        )
    return Lengths(tuple(length for length in sequence_lengths if length))

"""What a call would choose and why, for a first screen or a log, without making the call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .aligned import Lengths
from .compilation import uncompiled_reason
from .dispatch import choose_backend, choose_plan, mode_reason, one_pass_reason, rows_reason
from .spec import ObjectiveSpec


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
) -> tuple[str, str]:
    """Backend and mode, and how the row passes run, each with its reason.

    Args:
        num_rows: counted tokens of a call.
        vocab_size: V.
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

    Raises:
        ValueError: an unknown name, or a backend or mode that cannot run, with the reason.
    """
    why_not = one_pass_reason(spec, is_on_policy)
    choice = choose_backend(backend, torch.device(device), dtype)
    # shapes, dtype and device are all that the predicates read
    hidden = torch.empty(0, hidden_size, dtype=dtype, device=device)
    weight = torch.empty(1, 1, dtype=dtype, device=device).expand(vocab_size, hidden_size)
    eager_reason = uncompiled_reason(hidden, num_rows, vocab_size)
    is_by_sequence = spec is not None and why_not is not None
    plan, reason = choose_plan(
        hidden, weight, num_rows, mode, why_not,
        _checked_lengths(sequence_lengths, num_rows) if is_by_sequence else None,
        backend=choice.name, workspace_bytes=workspace_bytes, is_compiled=eager_reason is None,
    )  # fmt: skip
    passes = {
        "triton": "row passes by Triton kernels",
        "torch": rows_reason(eager_reason),
        "dense": "all logits at once",
    }
    return f"backend {choice.name} ({choice.reason}), {mode_reason(plan, reason)}", passes[
        choice.name
    ]


def _checked_lengths(sequence_lengths: Sequence[int] | None, num_rows: int) -> Lengths:
    if sequence_lengths is None:
        return Lengths(None, "the sequences are not known here")
    if sum(sequence_lengths) != num_rows:
        raise ValueError(
            f"sequence_lengths: expected {num_rows} tokens (num_rows) in all, got "
            f"{sum(sequence_lengths)}. Pass the counted tokens of every sequence."
        )
    return Lengths(tuple(length for length in sequence_lengths if length))

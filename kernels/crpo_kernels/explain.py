"""What a call would choose and why, for a first screen or a log, without making the call."""

from __future__ import annotations

import torch

from .compilation import uncompiled_reason
from .dispatch import choose_backend, choose_mode, mode_reason, one_pass_reason, rows_reason
from .plan import make_plan
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
        backend: as in the call.
        mode: as in the call.
        workspace_bytes: as in the call.

    Raises:
        ValueError: an unknown name, or a backend or mode that cannot run, with the reason.
    """
    why_not = one_pass_reason(spec, is_on_policy)
    chosen_mode = choose_mode(mode, why_not)
    choice = choose_backend(backend, torch.device(device), dtype)
    # shapes, dtype and device are all that the predicates read
    hidden = torch.empty(0, hidden_size, dtype=dtype, device=device)
    weight = torch.empty(1, 1, dtype=dtype, device=device).expand(vocab_size, hidden_size)
    eager_reason = uncompiled_reason(hidden, num_rows, vocab_size)
    plan = make_plan(
        hidden,
        weight,
        num_rows,
        backend=choice.name,
        mode=chosen_mode,
        workspace_bytes=workspace_bytes,
        needs_weight_grad=True,
        is_compiled=eager_reason is None and choice.name == "torch",
    )
    mode_text = mode_reason(plan, why_not)
    passes = rows_reason(eager_reason)
    if choice.name != "torch":
        passes = {"triton": "row passes by Triton kernels", "dense": "all logits at once"}[
            choice.name
        ]
    return f"backend {choice.name} ({choice.reason}), {mode_text}", passes

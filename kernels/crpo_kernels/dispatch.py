"""Which backend, which mode, how many rows at once: predicates with a reason, never try and except.

backend   torch      any device: chunks of rows, plain products, row work in torch
          dense      the oracle: all logits at once, autograd
mode      one_pass   gradients are made while a chunk's logits are hot; 6NVD operations. Needs
                     every coefficient before the head runs.
          two_pass   statistics first, any loss on them, then gradients; 8NVD, or 6NVD where
                     the logits of all rows fit the workspace and are kept.
"""

from __future__ import annotations

import logging
from functools import lru_cache

from .plan import Plan
from .spec import ObjectiveSpec, check_choice

logger = logging.getLogger("crpo_kernels")

BACKENDS = ("auto", "torch", "dense")
MODES = ("auto", "one_pass", "two_pass")


def choose_backend(backend: str) -> str:
    """The backend that runs; ``auto`` is torch."""
    check_choice("backend", backend, BACKENDS)
    return "torch" if backend == "auto" else backend


def one_pass_reason(spec: ObjectiveSpec | None, is_on_policy: bool) -> str | None:
    """Why one_pass cannot run, or None. ``spec`` None: any loss on `linear_logprobs`."""
    if spec is None:
        return (
            "the loss on its outputs, and with it every coefficient, comes after the head has run"
        )
    if spec.policy == "gspo" and not is_on_policy:
        return "the ratio of gspo is a mean over the whole sequence of this call's own logprobs"
    return None


def choose_mode(mode: str, reason: str | None) -> str:
    """The mode that runs; a named mode that cannot run raises with the reason.

    Raises:
        ValueError: an unknown mode, or one_pass where it cannot run.
    """
    check_choice("mode", mode, MODES)
    if mode == "one_pass" and reason is not None:
        raise ValueError(
            f"mode: expected 'auto' or 'two_pass', got 'one_pass': {reason}. Use mode='auto'."
        )
    if mode == "auto":
        return "one_pass" if reason is None else "two_pass"
    return mode


def log_choice(plan: Plan, num_rows: int, reason: str | None, eager_reason: str | None) -> None:
    """Log each choice once per process, with its reason."""
    for message in reasons(plan, num_rows, reason, eager_reason):
        _log_once(message)


def reasons(
    plan: Plan, num_rows: int, reason: str | None, eager_reason: str | None
) -> tuple[str, str]:
    """Backend and mode, and the kind of row passes, each with its reason.

    Args:
        plan: what was chosen.
        num_rows: counted tokens.
        reason: why one_pass cannot run, if it cannot.
        eager_reason: why the row passes are not compiled, if they are not.
    """
    if plan.mode == "one_pass":
        why = "the coefficients are known before the head runs"
    elif plan.chunk_rows >= num_rows:
        why = f"{reason or 'asked for'}; the logits of all rows fit the workspace and are kept"
    else:
        why = f"{reason or 'asked for'}; the logits are computed again for the gradient"
    kind = "compiled" if eager_reason is None else "eager"
    return (
        f"backend {plan.backend}, mode {plan.mode}: {why}",
        f"row passes {kind}: {eager_reason or 'there is a C++ compiler and enough to do'}",
    )


@lru_cache(maxsize=256)
def _log_once(message: str) -> None:
    logger.info(message)

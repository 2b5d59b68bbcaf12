"""A low-rank adapter of the head (arXiv 2106.09685), beside a weight that stays as it is.

    logits = hidden W^T + scaling * (hidden A^T) B^T          A [r, D], B [V, r]

states = scaling * hidden A^T ``[T, r]`` is ordinary torch in front of the head, so autograd carries
the head's gradient of it to A and to hidden. The head adds one product of rank r to every chunk of
logits, and makes d_states = dZ B and d_B = dZ^T states from the same dZ as d_hidden. A sum
of W and B A is never made, nor is d_W unless W itself asks for a gradient.

Under a frozen W: products of 4 T V D + 6 T V r operations, no dZ kept, d_B in fp32 (4 V r bytes).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .factors import Factors, Needs
from .plan import Plan
from .products import without_autocast
from .validate import check_plain, is_number

EXPECTED = "lora_head: expected (A [r, {dim}], B [{vocab}, r], scaling)"
ADVICE = "Pass (lora_A.weight, lora_B.weight, scaling) of the head's adapter; scaling is alpha / r."


def with_adapter(factors: Factors, lora_head: object) -> Factors:
    """``factors`` with the states of an adapter (A, B, scaling), which are part of the graph.

    A and B are cast to the dtype of hidden, as autocast would cast them.

    Raises:
        ValueError: what is wrong and what to pass.
    """
    if lora_head is None:
        return factors
    hidden, weight = factors.hidden, factors.weight
    down, up, scaling = _checked(lora_head, hidden, weight)
    with without_autocast(hidden):
        states = nn.functional.linear(hidden, down.to(hidden.dtype)) * scaling
    return factors._replace(states=states, up=up.to(hidden.dtype))


def rank_of(lora_head: Any) -> int | None:
    """R of an adapter that need not be one; None where there is none to be seen."""
    down = lora_head[0] if isinstance(lora_head, tuple | list) and lora_head else None
    return down.shape[0] if isinstance(down, Tensor) and down.dim() else None


def _checked(lora_head: Any, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, float]:
    vocab, dim = weight.shape
    expected = EXPECTED.format(dim=dim, vocab=vocab)
    if not (isinstance(lora_head, tuple | list) and len(lora_head) == 3):
        size = f" of {len(lora_head)}" if isinstance(lora_head, tuple | list) else ""
        raise ValueError(f"{expected}, got {type(lora_head).__name__}{size}. {ADVICE}")
    down, up, scaling = lora_head
    for name, tensor in (("lora_head A", down), ("lora_head B", up)):
        check_plain(name, tensor)
        if tensor.device != hidden.device or not tensor.is_floating_point():
            raise ValueError(
                f"{name}: expected floating numbers on {hidden.device} as hidden, got "
                f"{tensor.dtype} on {tensor.device}. Pass it moved with .to(hidden)."
            )
    rank = down.shape[0] if down.dim() else 0
    if not rank or tuple(down.shape) != (rank, dim) or tuple(up.shape) != (vocab, rank):
        raise ValueError(f"{expected}, got {list(down.shape)} and {list(up.shape)}. {ADVICE}")
    if not is_number(scaling):
        raise ValueError(f"lora_head scaling: expected a finite number, got {scaling!r}. {ADVICE}")
    return down, up, float(scaling)


def operations(plan: Plan, needs: Needs, rank: int) -> str:
    """The products of a call with an adapter, for the log; empty without one."""
    if not rank:
        return ""
    is_frozen = not needs.weight
    logits = 2 if plan.mode == "two_pass" and plan.kept is None and any(needs) else 1
    full = 2 * (logits + needs.hidden + needs.weight)
    low = 2 * (logits + needs.states + needs.up)
    return (
        f"; lora_head of rank {rank} beside a {'frozen' if is_frozen else 'trained'} weight: "
        f"{full}NVD + {low}NVr operations"
    )

"""Which backend, which mode, how many rows at once: predicates with a reason, never try and except.

backend   triton     CUDA and ROCm (a CPU in Triton's interpreter): chunks of rows, row kernels
          torch      any device: chunks of rows, plain products, row work in torch
          dense      the oracle: all logits at once, autograd
          auto       the first of triton and torch that can run
mode      one_pass   gradients are made while a chunk's logits are hot; 6NVD operations. Needs
                     every coefficient before the head runs. Off-policy gspo: chunks of whole
                     sequences, where the host knows the sequences, the longest fits a chunk, and
                     the operations and bytes of such chunks are no more than two_pass would take
                     (`aligned.modelled_cost`: ragged chunks waste parts of tiles, and more groups
                     more sums of d_weight; two_pass moves or computes the logits once more).
          two_pass   statistics first, any loss on them, then gradients; 8NVD, or 6NVD where
                     e^(z - m) of all rows (torch on a CPU: the logits) fits the workspace and is
                     kept: writing and reading it costs less than a product with the weight (by
                     `aligned`'s rates on a GPU, in bf16, from D = 480 on).
          fused      scores in one kernel: `scorer` says when `auto` does so without being told
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

from .aligned import Lengths, TooLong, align, modelled_cost
from .plan import HeadSizes, Plan, Room, fused_plan, make_plan, make_room
from .scorer import choose_scorer, kernel_obstacle, scorer_reason
from .spec import ObjectiveSpec, check_choice
from .support import Obstacle, describe_triton, triton_obstacle, unasked_reason

logger = logging.getLogger("crpo_kernels")

BACKENDS = ("auto", "triton", "torch", "dense")
MODES = ("auto", "one_pass", "two_pass", "fused")
_KEPT = {
    None: "the logits are computed again for the gradient",
    "logits": "the logits of all rows fit the workspace and are kept",
    "exps": "the exponentials of all rows fit the workspace and are kept",
}


class BackendChoice(NamedTuple):
    """The backend that runs ("triton", "torch" or "dense"), and why it is that one, in words."""

    name: str
    reason: str


def unsupported_reason(
    backend: str,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    mode: str = "auto",
    head_dtype: torch.dtype | None = None,
    lora_rank: int = 0,
) -> str | None:
    """Why ``backend`` cannot run on tensors of this device and dtype, or None where it can.

    With ``mode="fused"`` also why the fused kernel cannot score them there, with a head in
    ``head_dtype`` and an adapter of ``lora_rank`` (0: none); the other modes run wherever their
    backend does.

    Args:
        backend: "auto", "triton", "torch" or "dense".
        device: of hidden and weight.
        dtype: of hidden and weight.
        mode: as in the call; "fused" asks about the scoring kernel.
        head_dtype: as in the call.
        lora_rank: r of ``lora_head``, 0 without one.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> unsupported_reason("triton", "cpu", torch.float64) is None
        False
    """
    check_choice("mode", mode, MODES)
    device = torch.device(device)
    obstacle = _obstacle(backend, device, dtype)
    if obstacle is None and mode == "fused":
        choice = choose_backend(backend, device, dtype)
        obstacle = kernel_obstacle(
            choice.name, choice.reason, device, dtype, head_dtype, lora_rank=lora_rank
        )
    return None if obstacle is None else obstacle.reason


def _obstacle(
    backend: str, device: torch.device, dtype: torch.dtype, *, is_fake: bool = False
) -> Obstacle | None:
    check_choice("backend", backend, BACKENDS)
    return triton_obstacle(device, dtype, is_fake=is_fake) if backend == "triton" else None


def choose_backend(
    backend: str, device: torch.device | str, dtype: torch.dtype, *, is_fake: bool = False
) -> BackendChoice:
    """The backend that runs; ``auto`` is triton where it can run, else torch.

    Args:
        backend: as in the call.
        device: of hidden and weight.
        dtype: of hidden and weight.
        is_fake: they are fake tensors; a backend that is asked for by name is only planned.

    Raises:
        ValueError: an unknown name, or triton where it cannot run, with the reason.

    Example:
        >>> choose_backend("dense", "cpu", torch.float32)
        BackendChoice(name='dense', reason='asked for')
    """
    device = torch.device(device)
    obstacle = _obstacle(backend, device, dtype, is_fake=is_fake)
    if obstacle is not None:
        raise ValueError(
            f"backend: expected 'auto', 'torch' or 'dense' here, got 'triton': {obstacle.reason}. "
            f"{obstacle.remedy}, or pass backend='auto'."
        )
    if backend != "auto":
        return BackendChoice(backend, "asked for")
    anywhere = triton_obstacle(device, dtype, is_fake=True)  # Triton itself, and the dtype
    if anywhere is None:
        reason = unasked_reason(device) or unsupported_reason("triton", device, dtype)
    else:
        reason = anywhere.reason
    if reason is None:
        return BackendChoice("triton", describe_triton(device))
    return BackendChoice("torch", f"triton does not run: {reason}")


def one_pass_reason(spec: ObjectiveSpec | None, is_on_policy: bool) -> str | None:
    """Why one_pass cannot run, or None. ``spec`` None: any loss on `linear_logprobs`."""
    if spec is None:
        return (
            "the loss on its outputs, and with it every coefficient, comes after the head has run"
        )
    if spec.policy == "gspo" and not is_on_policy:
        return "the ratio of gspo is a mean over the whole sequence of this call's own logprobs"
    return None


def choose_plan(
    sizes: HeadSizes, mode: str, why_not: str | None, lengths: Lengths | None
) -> tuple[Plan, str | None]:
    """How a call runs, and why it is not one_pass if it is not.

    Args:
        sizes: of the call.
        mode: as in the call.
        why_not: why chunks that know no sequences cannot be one pass, or None.
        lengths: of the sequences, where whole ones in a chunk can be; else None.

    Raises:
        ValueError: an unknown mode, one_pass where it cannot run, or too small a workspace.
    """
    own = sizes.planned()
    bounds = {
        "backend": sizes.backend, "workspace_bytes": own.workspace_bytes,
        "needs_weight_grad": sizes.needs[1],
    }  # fmt: skip

    def plan_of(mode: str) -> Plan:
        return make_plan(
            own.hidden, own.weight, sizes.num_rows, mode=mode, needs_grad=sizes.may_keep,
            is_compiled=sizes.is_compiled and sizes.backend == "torch", **bounds,
        )  # fmt: skip

    if lengths is None or sizes.backend == "dense":
        return plan_of(choose_mode(mode, why_not)), why_not
    room = make_room(own.hidden, own.weight, sizes.num_rows, **bounds)
    return choose_aligned(mode, lengths, plan_of, room, sizes.needs)


def plan_scoring(sizes: HeadSizes, mode: str, backend_reason: str) -> tuple[Plan, str]:
    """How `linear_logprobs` runs without gradients, and why.

    Args:
        sizes: of the call.
        mode: as in the call.
        backend_reason: why the backend of ``sizes`` runs.

    Raises:
        ValueError: an unknown mode, the fused kernel where it cannot run, or too small a workspace
            for the chunk loop.
    """
    check_choice("mode", mode, MODES)
    choice = choose_scorer(mode, sizes, backend_reason)
    is_fused = choice.name == "fused"
    plan = fused_plan(sizes) if is_fused else choose_plan(sizes, mode, None, None)[0]
    return plan, scorer_reason(choice)


def choose_aligned(
    mode: str,
    lengths: Lengths,
    plan_of: Callable[[str], Plan],
    room: Room,
    needs: tuple[bool, bool],
) -> tuple[Plan, str | None]:
    """The plan of off-policy gspo, and why it is not one_pass if it is not.

    Args:
        mode: as in the call.
        lengths: counted rows of the sequences, where the host knows them.
        plan_of: the plan of a mode, with chunks that know no sequences.
        room: the sizes of the call.
        needs: whether hidden and weight need a gradient.

    Raises:
        ValueError: an unknown mode, or one_pass where it cannot run, with the reason.
    """
    reason = one_pass_reason(ObjectiveSpec("gspo"), is_on_policy=False)
    check_mode(mode)
    if mode == "two_pass":
        return plan_of(mode), "asked for"
    aligned, remedy = None, "Use mode='auto'."
    if lengths.values is None:
        reason = f"{reason}, and {lengths.reason}"
    else:
        aligned = align(plan_of("one_pass"), room, lengths.values)
    if isinstance(aligned, TooLong):
        reason = f"{reason}, and the longest does not fit a chunk of this workspace"
        remedy = (
            f"It has {aligned.longest} counted rows, a chunk {aligned.rows}: pass "
            f"workspace_bytes={aligned.num_bytes}, or mode='auto'."
        )
    if isinstance(aligned, Plan) and mode == "one_pass":
        return aligned, None
    if mode == "one_pass":
        raise ValueError(f"mode: expected 'auto' or 'two_pass', got 'one_pass': {reason}. {remedy}")
    plan = plan_of("two_pass")
    if isinstance(aligned, Plan):
        if modelled_cost(aligned, room, needs) <= modelled_cost(plan, room, needs):
            return aligned, None
        reason = f"{reason}, and chunks of whole sequences would cost more"
    return plan, reason


def choose_mode(mode: str, reason: str | None) -> str:
    """The mode that runs; a named mode that cannot run raises with the reason.

    Raises:
        ValueError: an unknown mode, or one_pass where it cannot run.
    """
    check_mode(mode)
    if mode == "one_pass" and reason is not None:
        raise ValueError(
            f"mode: expected 'auto' or 'two_pass', got 'one_pass': {reason}. Use mode='auto'."
        )
    if mode == "auto":
        return "one_pass" if reason is None else "two_pass"
    return mode


def check_mode(mode: str) -> None:
    """A mode in which a loss or its gradient can be made.

    Raises:
        ValueError: an unknown one, or the one that only scores.
    """
    check_choice("mode", mode, MODES)
    if mode == "fused":
        raise ValueError(
            "mode: expected 'auto', 'one_pass' or 'two_pass' here, got 'fused': a gradient or a "
            "loss is asked for, and the fused kernel only scores. Call linear_logprobs under "
            "torch.no_grad(), or pass mode='auto'."
        )


def log_choice(plan: Plan, backend: BackendChoice, why: str, eager_reason: str | None) -> None:
    """Log each choice once per process; ``why`` is the mode or the scorer with its reason."""
    if backend.reason != "asked for":
        _log_once(f"backend auto: {backend.name} ({backend.reason})")
    _log_once(f"backend {plan.backend}, {why}")
    if plan.backend == "torch":
        _log_once(rows_reason(eager_reason))


def mode_reason(plan: Plan, reason: str | None) -> str:
    """The mode and why.

    Args:
        plan: what was chosen.
        reason: why one_pass cannot run, if it cannot.
    """
    if plan.chunk_ends is not None:
        why = "whole sequences fit a chunk, which then knows the ratios of its rows"
    elif plan.mode == "one_pass":
        why = "the coefficients are known before the head runs"
    else:
        why = f"{reason or 'asked for'}; {_KEPT[plan.kept]}"
    return f"mode {plan.mode}: {why}"


def spread(num_ranks: int) -> str:
    """Over how many ranks a vocabulary is spread, for the log; empty if it is not."""
    return f"; vocabulary-parallel over {num_ranks} ranks" if num_ranks > 1 else ""


def rows_reason(eager_reason: str | None) -> str:
    """How the row passes of the torch backend run; ``eager_reason``: why not compiled, if so."""
    kind = "compiled" if eager_reason is None else "eager"
    return f"row passes {kind}: {eager_reason or 'there is a C++ compiler and enough to do'}"


@lru_cache(maxsize=256)
def _log_once(message: str) -> None:
    logger.info(message)

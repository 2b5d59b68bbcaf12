"""The two weight vectors of the loss: every denominator is in them, and it is global.

    loss = sum_t token_weights_t * token_loss_t + sum_t entropy_weights_t * entropy_t

so a micro-batch, a rank or a packing layout may hold any part of the tokens and the sum over all
parts is the same. Counts that are not given are taken from the call, which is right only when the
call holds everything. All counts are clamped to at least 1. Numbers are fp64 until
the result.

    token_mean     1 / num_tokens
    sequence_mean  1 / (len_b * num_sequences)
    constant       1 / (num_sequences * max_length)
    bnpo           1 / (num_groups * group_tokens[group_ids[b]])

    >>> bounds = torch.tensor([0, 3, 4])                         # sequences of 3 and 1 tokens
    >>> mask = torch.tensor([True, True, False, True])
    >>> aggregation_weights(mask, bounds, aggregation="sequence_mean")
    tensor([0.2500, 0.2500, 0.0000, 0.5000])
    >>> aggregation_weights(mask, bounds, aggregation="token_mean", num_tokens=12)
    tensor([0.0833, 0.0833, 0.0000, 0.0833])
    >>> stage_entropy_weights(torch.tensor([0, 0, 1, -1]), bounds, [-0.02, 0.08], num_sequences=2)
    tensor([-0.0050, -0.0050,  0.0400,  0.0000])

Source: token_mean DAPO (arXiv 2503.14476), sequence_mean GRPO (2402.03300), constant Dr.GRPO
(2503.20783), bnpo as in TRL and in the code of CRPO's authors; stages: CRPO (2606.13176).

Tensors on a device are never read on the host, which would wait for the device: what only their
values can tell is refused on the CPU alone, and not in a graph that torch.compile traces.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .host import is_readable, on_device
from .spec import check_choice
from .support import triton_obstacle, unasked_reason

AGGREGATIONS = ("token_mean", "sequence_mean", "constant", "bnpo")
REDUCTIONS = ("sequence_mean", "present_only", "token_mean")

Count = int | float | Tensor


def aggregation_weights(
    loss_mask: Tensor,  # [T] bool
    cu_seqlens: Tensor,  # [B + 1] int32
    *,
    aggregation: str = "token_mean",
    num_tokens: Count | None = None,
    num_sequences: Count | None = None,
    max_length: Count | None = None,
    group_ids: Tensor | Sequence[int] | None = None,  # [B]
    group_tokens: Tensor | Sequence[float] | None = None,  # [num_groups]
) -> Tensor:  # [T]
    """``token_weights`` of one packed batch; 0 where ``loss_mask`` is False.

    Args:
        loss_mask: ``[T]`` True where a token counts in the loss.
        cu_seqlens: ``[B + 1]`` where the sequences begin and end in the T tokens: 0 first, T last.
        aggregation: "token_mean", "sequence_mean", "constant" (Dr.GRPO) or "bnpo".
        num_tokens: counted tokens of the whole optimizer step.
        num_sequences: sequences of the whole optimizer step.
        max_length: the constant length that "constant" divides by, in tokens.
        group_ids: "bnpo": the group of each sequence of ``cu_seqlens``, fixed before packing.
        group_tokens: "bnpo": counted tokens of each group, over all ranks.

    Returns:
        ``[T]`` in the default floating dtype (or in that of a floating ``loss_mask``).

    Raises:
        ValueError: an unknown aggregation, a count that is missing, or shapes that disagree.
    """
    check_choice("aggregation", aggregation, AGGREGATIONS)
    dtype = loss_mask.dtype if loss_mask.is_floating_point() else torch.get_default_dtype()
    counted = loss_mask.reshape(-1).bool()
    sequence_ids, num_local = sequence_of_token(cu_seqlens, counted.numel(), counted.device)
    mask = counted.to(count_dtype(counted.device))  # [T]
    if aggregation == "token_mean":
        scale = at_least_one(mask.sum() if num_tokens is None else num_tokens, mask)  # []
        return (mask / scale).to(dtype)
    if aggregation == "bnpo":
        per_sequence = _bnpo_denominators(
            mask, sequence_ids, num_local, group_ids, group_tokens
        )  # [B]
        return (mask / per_sequence[sequence_ids]).to(dtype)
    total = at_least_one(num_local if num_sequences is None else num_sequences, mask)  # []
    if aggregation == "constant":
        if max_length is None:
            raise ValueError(
                "max_length: expected a number of tokens for aggregation='constant', got None. "
                "Pass max_length=<longest completion of the run>."
            )
        return (mask / (total * at_least_one(max_length, mask))).to(dtype)
    lengths = mask.new_zeros(num_local).index_add_(0, sequence_ids, mask).clamp_(min=1)  # [B]
    return (mask / (lengths[sequence_ids] * total)).to(dtype)


def _bnpo_denominators(
    mask: Tensor,  # [T]
    sequence_ids: Tensor,  # [T]
    num_local: int,
    group_ids: Tensor | Sequence[int] | None,
    group_tokens: Tensor | Sequence[float] | None,
) -> Tensor:  # [B]
    """num_groups * group_tokens[group of sequence b]."""
    if group_ids is None:
        raise ValueError(
            "group_ids: expected the group of each sequence for aggregation='bnpo', got None. "
            "Pass group_ids=[...], one per sequence of cu_seqlens, fixed before packing."
        )
    host = torch.as_tensor(group_ids).long().reshape(-1)  # [B] where the caller has it
    if host.numel() != num_local:
        raise ValueError(
            f"group_ids: expected {num_local} values, one per sequence of cu_seqlens, "
            f"got {host.numel()}. Pass the group of every sequence in the order of cu_seqlens."
        )
    if group_tokens is not None:
        group_tokens = on_device("group_tokens", group_tokens, mask.device, mask.dtype)
        group_tokens = group_tokens.reshape(-1)  # [num_groups]
    if not num_local:
        return mask.new_empty(0)
    if is_readable(host):
        _check_group_ids(host, group_tokens)
    groups = on_device("group_ids", host, mask.device)  # [B]
    if group_tokens is not None:
        return group_tokens.clamp(min=1)[groups] * group_tokens.numel()
    in_order, places = groups.sort()
    is_next = torch.cat((groups.new_zeros(1), (in_order[1:] != in_order[:-1]).long()))
    ranks = torch.empty_like(groups).scatter_(0, places, is_next.cumsum(0))  # [B] in 0..B - 1
    tokens = mask.new_zeros(num_local).index_add_(0, ranks[sequence_ids], mask)  # [B]
    return tokens.clamp(min=1)[ranks] * (in_order[-1] + 1)


def _check_group_ids(groups: Tensor, group_tokens: Tensor | None) -> None:
    low, high = (int(x) for x in torch.aminmax(groups))
    num_groups = high + 1 if group_tokens is None else group_tokens.numel()
    if low < 0 or high >= num_groups:
        raise ValueError(
            f"group_ids: expected values in 0..{num_groups - 1} ({num_groups} groups), got "
            f"{low}..{high}. Number the groups from 0."
        )


def stage_entropy_weights(
    stage_ids: Tensor,  # [T] int, -1 none
    cu_seqlens: Tensor,  # [B + 1] int32
    coefs: Tensor | Sequence[float],  # [S]
    *,
    reduction: str = "sequence_mean",
    reference_length: float | None = None,
    num_sequences: Count | None = None,
    num_present: Tensor | Sequence[float] | None = None,  # [S]
    num_stage_tokens: Tensor | Sequence[float] | None = None,  # [S]
) -> Tensor:  # [T]
    """``entropy_weights`` of CRPO's stage-wise entropy regularisation (2606.13176).

    With n_bk the tokens of stage k in sequence b:

        sequence_mean  coef_k / (num_sequences * n_bk)       the paper: a missing stage counts 0
        present_only   coef_k / (num_present[k] * n_bk)      mean over the sequences that have it
        token_mean     coef_k / num_stage_tokens[k]

    Args:
        stage_ids: ``[T]`` the stage of each token, 0-based, -1 for none.
        cu_seqlens: ``[B + 1]`` where the sequences begin and end: 0 first, T last.
        coefs: ``[S]`` coefficient of each stage; > 0 penalises its entropy, < 0 rewards it.
        reduction: one of the three above.
        reference_length: a stage shorter than this many tokens has its coefficient multiplied by
            n_bk / reference_length, so that a stage of three tokens is not pressed 30 times harder.
        num_sequences: sequences of the whole optimizer step.
        num_present: ``[S]`` sequences of the whole step that have the stage.
        num_stage_tokens: ``[S]`` tokens of each stage in the whole step.

    Returns:
        ``[T]`` in the default floating dtype (or in that of a floating ``coefs`` tensor).

    Raises:
        ValueError: an unknown reduction, a stage id without a coefficient, or shapes that disagree.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    is_tensor = isinstance(coefs, Tensor) and coefs.is_floating_point()
    dtype = coefs.dtype if is_tensor else torch.get_default_dtype()
    ids = _checked_stages(stage_ids)  # [T]
    stage_coefs = on_device("coefs", coefs, ids.device, count_dtype(ids.device)).reshape(-1)  # [S]
    num_stages = stage_coefs.numel()
    _check_stage_ids(ids, num_stages)
    bounds = on_device(
        "cu_seqlens", _checked_bounds(cu_seqlens, ids.numel()), ids.device
    )  # [B + 1]
    count, look_up = _torch_counts, _torch_look_up
    if triton_reason(ids.device, stage_coefs.requires_grad) is None:
        from .stage_triton import stage_counts_fwd as count
        from .stage_triton import stage_weights_fwd as look_up

        ids, bounds = ids.contiguous(), bounds.contiguous()
    counts = count(ids, bounds, num_stages)  # [B, S]
    totals = {"sequences": num_sequences, "present": num_present, "tokens": num_stage_tokens}
    cells = _cell_weights(
        counts.to(stage_coefs.dtype), stage_coefs, reduction, reference_length, totals
    )  # [B, S]
    return look_up(ids, bounds, cells.to(dtype))


def triton_reason(device: torch.device, needs_gradient: bool = False) -> str | None:
    """Why the Triton kernels do not make stage weights on ``device``, or None where they do.

    Both ways give the same numbers to the bit.

    Args:
        device: of the stage ids.
        needs_gradient: whether somebody differentiates the weights in the coefficients.
    """
    if torch.compiler.is_compiling():
        return "torch.compile traces torch operations"
    if needs_gradient:
        return "coefs needs a gradient, and the kernels have none"
    if reason := unasked_reason(device):
        return reason
    obstacle = triton_obstacle(device, torch.float32)
    return None if obstacle is None else obstacle.reason


def _torch_counts(
    ids: Tensor,  # [T]
    bounds: Tensor,  # [B + 1]
    num_stages: int,
) -> Tensor:  # [B, S] n_bk
    """Tokens of each stage in each sequence."""
    cell, is_cell = _cell_of_token(ids, bounds, num_stages)
    num_local = bounds.numel() - 1
    counts = torch.zeros(max(num_local * num_stages, 1), dtype=torch.int64, device=ids.device)
    counts.index_add_(0, cell, is_cell.long())
    return counts[: num_local * num_stages].view(num_local, num_stages)


def _torch_look_up(
    ids: Tensor,  # [T]
    bounds: Tensor,  # [B + 1]
    cells: Tensor,  # [B, S]
) -> Tensor:  # [T]
    """Each token's cell; 0 for stage -1, NaN for a stage that there is not."""
    cell, is_cell = _cell_of_token(ids, bounds, cells.shape[1])
    flat = torch.cat((cells.reshape(-1), cells.new_zeros(1)))  # [B * S + 1] never empty
    others = torch.zeros_like(flat[cell]).masked_fill(ids != -1, float("nan"))
    return torch.where(is_cell, flat[cell], others)


def _cell_of_token(ids: Tensor, bounds: Tensor, num_stages: int) -> tuple[Tensor, Tensor]:
    """([T] index into the flat [B, S], 0 for tokens without a cell; [T] has one)."""
    is_cell = (ids >= 0) & (ids < num_stages)
    sequence_ids = _sequence_of_token(bounds, ids.numel())
    return (sequence_ids * num_stages + ids).masked_fill(~is_cell, 0), is_cell


def _cell_weights(
    counts: Tensor,  # [B, S] n_bk
    stage_coefs: Tensor,  # [S]
    reduction: str,
    reference_length: float | None,
    totals: dict,
) -> Tensor:  # [B, S]
    """The weight of one token of stage k in sequence b."""
    lengths = counts.clamp(min=1)  # [B, S]
    if reduction == "sequence_mean":
        total = totals["sequences"]
        denominators = lengths * at_least_one(counts.shape[0] if total is None else total, counts)
    elif reduction == "present_only":
        present = (counts > 0).sum(0) if totals["present"] is None else totals["present"]
        denominators = lengths * _per_stage("num_present", present, counts)
    else:
        tokens = counts.sum(0) if totals["tokens"] is None else totals["tokens"]
        denominators = _per_stage("num_stage_tokens", tokens, counts).expand_as(counts)
    weights = stage_coefs / denominators
    if reference_length is None:
        return weights
    if not reference_length > 0:
        raise ValueError(
            f"reference_length: expected a positive number of tokens or None, got "
            f"{reference_length}. Pass None to turn it off."
        )
    return weights * (counts / reference_length).clamp(max=1.0)


def _per_stage(argument: str, values: Tensor | Sequence[float], counts: Tensor) -> Tensor:  # [S]
    tensor = on_device(argument, values, counts.device, counts.dtype).reshape(-1)
    if tensor.numel() != counts.shape[1]:
        raise ValueError(
            f"{argument}: expected {counts.shape[1]} values, one per stage, got {tensor.numel()}. "
            "Pass one count for every coefficient."
        )
    return tensor.clamp(min=1)


def _checked_stages(stage_ids: Tensor) -> Tensor:  # [T]
    if not isinstance(stage_ids, Tensor) or stage_ids.is_floating_point():
        kind = stage_ids.dtype if isinstance(stage_ids, Tensor) else type(stage_ids).__name__
        raise ValueError(
            f"stage_ids: expected an integer tensor [T], got {kind}. Pass "
            "torch.as_tensor(stage_ids).long()."
        )
    return stage_ids.reshape(-1)


def _check_stage_ids(ids: Tensor, num_stages: int) -> None:
    if not (ids.numel() and is_readable(ids)):
        return
    low, high = (int(value) for value in torch.aminmax(ids))
    if low < -1 or high >= num_stages:
        raise ValueError(
            f"stage_ids: expected values in -1..{num_stages - 1} (coefs has {num_stages} stages), "
            f"got {low}..{high}. Give every stage a coefficient."
        )


def sequence_of_token(
    cu_seqlens: Tensor, num_rows: int, device: torch.device
) -> tuple[Tensor, int]:
    """The sequence of every row, ``[T]`` int64, and the number of sequences.

    Raises:
        ValueError: ``cu_seqlens`` does not run from 0 to T without going back (checked on the CPU).
    """
    bounds = on_device("cu_seqlens", _checked_bounds(cu_seqlens, num_rows), device)
    return _sequence_of_token(bounds, num_rows), bounds.numel() - 1


def _sequence_of_token(bounds: Tensor, num_rows: int) -> Tensor:  # [T] int64
    positions = torch.arange(num_rows, device=bounds.device)
    return torch.searchsorted(bounds[1:].long(), positions, right=True)


def _checked_bounds(cu_seqlens: Tensor, num_rows: int) -> Tensor:  # [B + 1]
    """``cu_seqlens`` as a tensor, with its values checked where the host has them."""
    bounds = torch.as_tensor(cu_seqlens)
    if bounds.dim() != 1 or bounds.numel() < 1 or bounds.is_floating_point():
        raise ValueError(
            f"cu_seqlens: expected integers [B + 1], got {bounds.dtype} {list(bounds.shape)}. "
            "Pass the running sum of the sequence lengths, 0 first."
        )
    if is_readable(bounds):
        is_sorted = bool((bounds[1:] >= bounds[:-1]).all())
        if int(bounds[0]) != 0 or int(bounds[-1]) != num_rows or not is_sorted:
            raise ValueError(
                f"cu_seqlens: expected a rising sequence from 0 to T = {num_rows}, got "
                f"{bounds.tolist()[:8]}... ending at {int(bounds[-1])}. "
                "Pass the running sum of the sequence lengths, 0 first."
            )
    return bounds


def count_dtype(device: torch.device) -> torch.dtype:
    """Counts and quotients are made in fp64 and rounded once (mps has no fp64)."""
    return torch.float32 if device.type == "mps" else torch.float64


def at_least_one(count: Count, like: Tensor) -> Tensor:
    """``count`` as a scalar tensor beside ``like``, clamped to 1."""
    return on_device("count", count, like.device, like.dtype).clamp(min=1)

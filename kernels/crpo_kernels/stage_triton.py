"""Stage entropy weights in two Triton kernels: count the tokens of each cell, look each cell up.

A cell is one stage of one sequence; cell (b, k) of B sequences and S stages holds n_bk tokens.

    counts[b, k]  = sum over the tokens t of sequence b of [stage_ids[t] == k]      int32, exact
    cells[b, k]   = the weight of one token of the cell, from `weights`, once, in fp64
    out[t]        = cells[sequence of t, stage_ids[t]], 0 where stage_ids[t] is -1

The first kernel runs one program per sequence (and per block of stages) along the sequence's own
tokens, so that no two programs add to one number: no atomics, bitwise repeatable. The second runs
one program per block of tokens, however long a sequence is, and finds each token's sequence by
bisection of cu_seqlens, which stays in cache: log2(B) loads. It copies numbers and computes none.

Nothing is read on the host. What the host would refuse therefore shows as NaN, which reaches the
loss: tokens behind the last sequence, stage ids below -1 or without a coefficient. Neither kernel
reads or writes outside its tensors whatever cu_seqlens and stage_ids hold.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_triton import launch

BLOCK_T = 256  # tokens per step of a sequence, and per program of the second kernel
MAX_BLOCK_S = 16  # stages per program: BLOCK_T x 16 counts in registers


@triton.jit(do_not_specialize=["num_tokens", "stage_count"])
def stage_counts_fwd_kernel(
    ids_ptr,  # [T] integers
    bounds_ptr,  # [B + 1] integers
    counts_ptr,  # [B, S] int32
    num_tokens,  # T
    stage_count,  # S; num_stages is an option of every launch
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """counts[b, k] for one sequence b and BLOCK_S stages k."""
    sequence = tl.program_id(0).to(tl.int64)
    begin = tl.load(bounds_ptr + sequence).to(tl.int64)
    end = tl.load(bounds_ptr + sequence + 1).to(tl.int64)
    begin = tl.where(begin < 0, 0, begin)
    end = tl.where(end > num_tokens, num_tokens, end)
    offs_s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    found = tl.zeros([BLOCK_T, BLOCK_S], dtype=tl.int32)  # reduced once, after the loop
    for start in range(begin, end, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)  # int64
        ids = tl.load(ids_ptr + offs_t, mask=offs_t < end, other=-1)
        found += (ids[:, None] == offs_s[None, :]).to(tl.int32)
    counts = tl.sum(found, axis=0)  # [BLOCK_S]
    tl.store(counts_ptr + sequence * stage_count + offs_s, counts, mask=offs_s < stage_count)


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "stage_count", "first_step"])
def stage_weights_fwd_kernel(
    ids_ptr,  # [T] integers
    bounds_ptr,  # [B + 1] integers
    cells_ptr,  # [B, S] floating
    weights_ptr,  # [T] as cells
    num_tokens,  # T
    num_sequences,  # B
    stage_count,  # S; num_stages is an option of every launch
    first_step,  # the largest power of two <= B
    BLOCK_T: tl.constexpr,
):
    """out[t] for BLOCK_T tokens."""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < num_tokens
    # The last bound that is not behind the token: of equal bounds the sequence that has tokens.
    sequence = tl.zeros([BLOCK_T], dtype=tl.int32)
    step = first_step
    while step > 0:
        ahead = sequence + step
        mask_b = mask_t & (ahead <= num_sequences)
        bound = tl.load(bounds_ptr + ahead, mask=mask_b, other=0)
        sequence = tl.where(mask_b & (bound <= offs_t), ahead, sequence)
        step = step // 2
    ids = tl.load(ids_ptr + offs_t, mask=mask_t, other=-1)
    is_cell = mask_t & (ids >= 0) & (ids < stage_count) & (sequence < num_sequences)
    cell = sequence.to(tl.int64) * stage_count + ids
    weights = tl.load(cells_ptr + cell, mask=is_cell, other=float("nan"))
    is_none = (ids == -1) & (sequence < num_sequences)
    tl.store(weights_ptr + offs_t, tl.where(is_none, 0.0, weights), mask=mask_t)


def stage_counts_fwd(
    stage_ids: Tensor,  # [T] int
    cu_seqlens: Tensor,  # [B + 1] int
    num_stages: int,
) -> Tensor:  # [B, S] int32
    """Tokens of each stage in each sequence; ids outside 0..S-1 are counted nowhere.

    Args:
        stage_ids: ``[T]`` contiguous, any integer dtype.
        cu_seqlens: ``[B + 1]`` contiguous, int32 or int64, on the same device.
        num_stages: S.

    Returns:
        ``[B, S]`` int32.
    """
    num_sequences = cu_seqlens.numel() - 1
    counts = torch.empty(
        (num_sequences, num_stages), dtype=torch.int32, device=stage_ids.device
    )  # [B, S]
    block_s = min(MAX_BLOCK_S, 1 << max(num_stages - 1, 0).bit_length())
    arguments = {
        "ids_ptr": stage_ids,
        "bounds_ptr": cu_seqlens,
        "counts_ptr": counts,
        "num_tokens": stage_ids.numel(),
        "stage_count": num_stages,
        "BLOCK_T": BLOCK_T,
        "BLOCK_S": block_s,
    }
    grid = (num_sequences, -(-num_stages // block_s))
    launch(stage_counts_fwd_kernel, grid, arguments, num_warps=4)
    return counts


def stage_weights_fwd(
    stage_ids: Tensor,  # [T] int
    cu_seqlens: Tensor,  # [B + 1] int
    cells: Tensor,  # [B, S]
) -> Tensor:  # [T]
    """Each token's cell of ``cells``, 0 for stage -1.

    Args:
        stage_ids: ``[T]`` contiguous, any integer dtype.
        cu_seqlens: ``[B + 1]`` contiguous, int32 or int64, on the same device.
        cells: ``[B, S]`` contiguous, any floating dtype.

    Returns:
        ``[T]`` in the dtype of ``cells``.
    """
    num_sequences, num_stages = cells.shape
    weights = torch.empty(stage_ids.numel(), dtype=cells.dtype, device=cells.device)  # [T]
    arguments = {
        "ids_ptr": stage_ids,
        "bounds_ptr": cu_seqlens,
        "cells_ptr": cells,
        "weights_ptr": weights,
        "num_tokens": stage_ids.numel(),
        "num_sequences": num_sequences,
        "stage_count": num_stages,
        "first_step": (1 << num_sequences.bit_length()) // 2,
        "BLOCK_T": BLOCK_T,
    }
    grid = (-(-stage_ids.numel() // BLOCK_T),)
    launch(stage_weights_fwd_kernel, grid, arguments, num_warps=4)
    return weights

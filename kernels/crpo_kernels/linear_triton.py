"""Scoring in one Triton kernel: the product with the head and its statistics, no logits written.

    z = view(hidden weight^T)      a tile [BLOCK_T, BLOCK_V] at a time, in registers
    m' = max(m, max z),  d = m - m'
    t  = e^d (t + d s) + sum e^(z-m') (z-m'),   s = e^d s + sum e^(z-m'),   y += z where it is y's

for each row, over the tiles of a split of the vocabulary. The (m, s, t, y) of all splits, fp32
`[4, splits, n]`, are joined by a second kernel, blocks of splits in their order (few rows have as
many splits as there are multiprocessors: one after the other, each would wait for memory). It also
writes the table: no atomics, results repeat bit by bit. `linear_tiles` says tiles, splits, order.

Sums start from the finite -1e30, logits of -inf are -1e30, and columns behind the vocabulary are
-2e30: below any maximum, so that their exponential is 0 whatever the row. A NaN stays in s. The
statistics of a tile are taken in two halves: half as many values are alive beside the products.
Operands come through tensor descriptors (TMA) where the tile says so, else through int64 addresses
of rows that are clamped, not masked. 8-bit operands are scaled per row in fp32 after the product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .host import is_fake
from .launch_triton import constant, is_interpreted, is_recording, launch
from .linear_tiles import Tile, choose_order, choose_tile, num_units
from .logits_triton import logits_of
from .row_table import RowTable
from .rows_triton import put_stats, put_sums, view_arguments

if TYPE_CHECKING:
    from .rows import LogitView

NUM_SUMS = 4  # maximum, sum, weighted sum, the label's logit
JOIN_ROWS, JOIN_SPLITS = 32, 32  # of a program that joins the splits, at once

LOG2_E = constant(1.4426950408889634)  # 2^x is one instruction, e^x four

_NOT_SPECIALIZED = ["num_rows", "num_splits", "group_tiles"]
_UNALIGNED = ["labels_ptr", "outer_ptr", "hidden_scale_ptr", "partials_ptr", "table_ptr"]


@triton.jit
def _dot(a, b, sums, BLOCK_D: tl.constexpr):
    """``sums + a @ b`` in fp32; Hopper's 8-bit products keep 14 bits, so each step's are added."""
    return tl.dot(
        a, b, sums, input_precision="ieee", max_num_imprecise_acc=BLOCK_D, out_dtype=tl.float32
    )


@triton.jit
def _add_columns(
    raw, start_v, labels, m, s, t, y,
    bias_ptr, weight_scale_ptr, hidden_scale, outer, inner, vocab_size, WIDTH: tl.constexpr,
):  # fmt: skip
    """Columns ``start_v ..`` of a block of rows of raw products, into the rows' sums."""
    offs_v = start_v + tl.arange(0, WIDTH)
    mask_v = offs_v < vocab_size
    bias = None
    if weight_scale_ptr is not None:
        weight_scale = tl.load(weight_scale_ptr + offs_v, mask=mask_v, other=0.0)
        raw *= hidden_scale[:, None] * weight_scale[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0)[None, :]
    z = logits_of(raw, bias, inner, outer)  # [BLOCK_T, WIDTH]
    if start_v + WIDTH > vocab_size:
        z = tl.where(mask_v[None, :], z, -2e30)
    is_inside = (labels >= start_v) & (labels < start_v + WIDTH)
    if tl.max(is_inside.to(tl.int32), 0) > 0:
        y += tl.sum(tl.where(offs_v[None, :] == labels[:, None], z, 0.0), 1)
    top = tl.maximum(m, tl.max(z, 1))
    x = z - top[:, None]
    e = tl.exp2(x * LOG2_E)
    d = m - top
    w = tl.exp2(d * LOG2_E)
    t = w * (t + d * s) + tl.sum(e * x, 1)
    s = w * s + tl.sum(e, 1)
    return top, s, t, y


@triton.jit(do_not_specialize=_NOT_SPECIALIZED, do_not_specialize_on_alignment=_UNALIGNED)
def linear_stats_kernel(
    hidden,  # [n, D]: a descriptor, or a pointer
    stride_ht,
    stride_hd,
    weight,  # [V, D]: a descriptor, or a pointer
    stride_wv,
    stride_wd,
    labels_ptr,  # [n] int64
    bias_ptr,  # [V] fp32 or None
    outer_ptr,  # [n] fp32 or None
    outer,  # fp32, where outer_ptr is None
    inner,  # fp32 or None: no soft cap
    hidden_scale_ptr,  # [n] fp32 of 8-bit operands, or None
    weight_scale_ptr,  # [V] fp32 or None
    num_rows,
    vocab_size,
    dim,
    partials_ptr,  # [4, splits, n] fp32, written
    num_splits,
    group_tiles,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USES_TMA: tl.constexpr,
    IS_EVEN: tl.constexpr,  # D is a multiple of BLOCK_D
):
    """Sums of every row over every split of the vocabulary."""
    row_tiles = tl.cdiv(num_rows, BLOCK_T)
    vocab_tiles = tl.cast(tl.cdiv(vocab_size, BLOCK_V), tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    for item in range(tl.program_id(0), row_tiles * num_splits, tl.num_programs(0)):
        first = item // (group_tiles * num_splits) * group_tiles
        tiles = tl.minimum(group_tiles, row_tiles - first)
        inside = item - first * num_splits
        split = inside // tiles
        start_t = (first + inside % tiles) * BLOCK_T
        offs_t = start_t + tl.arange(0, BLOCK_T)
        mask_t = offs_t < num_rows
        labels = tl.load(labels_ptr + offs_t, mask=mask_t, other=-1)
        labels = tl.where((labels >= 0) & (labels < vocab_size), labels, -1).to(tl.int32)
        if outer_ptr is not None:
            scale = tl.load(outer_ptr + offs_t, mask=mask_t, other=0.0)[:, None]
        else:
            scale = outer
        hidden_scale = None
        if hidden_scale_ptr is not None:
            hidden_scale = tl.load(hidden_scale_ptr + offs_t, mask=mask_t, other=0.0)
        m = tl.full([BLOCK_T], -1e30, tl.float32)
        s = tl.zeros([BLOCK_T], tl.float32)
        t = tl.zeros([BLOCK_T], tl.float32)
        y = tl.zeros([BLOCK_T], tl.float32)
        begin = (split * vocab_tiles // num_splits).to(tl.int32)
        end = ((split + 1) * vocab_tiles // num_splits).to(tl.int32)
        for tile in range(begin, end):
            start_v = tile * BLOCK_V
            raw = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
            if USES_TMA:
                for k in range(0, dim, BLOCK_D):
                    a = hidden.load([start_t, k])
                    b = weight.load([start_v, k])
                    raw = _dot(a, b.T, raw, BLOCK_D)
            else:
                rows = tl.minimum(offs_t, num_rows - 1).to(tl.int64)
                columns = tl.minimum(start_v + tl.arange(0, BLOCK_V), vocab_size - 1).to(tl.int64)
                steps = offs_d.to(tl.int64)
                a_ptrs = hidden + rows[:, None] * stride_ht + steps[None, :] * stride_hd
                b_ptrs = weight + columns[None, :] * stride_wv + steps[:, None] * stride_wd
                for k in range(0, dim, BLOCK_D):
                    if IS_EVEN:
                        a = tl.load(a_ptrs)
                        b = tl.load(b_ptrs)
                    else:
                        a = tl.load(a_ptrs, mask=offs_d[None, :] < dim - k, other=0.0)
                        b = tl.load(b_ptrs, mask=offs_d[:, None] < dim - k, other=0.0)
                    raw = _dot(a, b, raw, BLOCK_D)
                    a_ptrs += tl.cast(BLOCK_D, tl.int64) * stride_hd
                    b_ptrs += tl.cast(BLOCK_D, tl.int64) * stride_wd
            halves = tl.permute(tl.reshape(raw, [BLOCK_T, 2, BLOCK_V // 2]), [0, 2, 1])
            left, right = tl.split(halves)
            m, s, t, y = _add_columns(
                left, start_v, labels, m, s, t, y, bias_ptr, weight_scale_ptr, hidden_scale,
                scale, inner, vocab_size, BLOCK_V // 2,
            )  # fmt: skip
            m, s, t, y = _add_columns(
                right, start_v + BLOCK_V // 2, labels, m, s, t, y, bias_ptr, weight_scale_ptr,
                hidden_scale, scale, inner, vocab_size, BLOCK_V // 2,
            )  # fmt: skip
        step = num_splits.to(tl.int64) * num_rows
        out_ptrs = partials_ptr + split.to(tl.int64) * num_rows + offs_t
        tl.store(out_ptrs, m, mask_t)
        tl.store(out_ptrs + step, s, mask_t)
        tl.store(out_ptrs + 2 * step, t, mask_t)
        tl.store(out_ptrs + 3 * step, y, mask_t)


@triton.jit(
    do_not_specialize=["num_rows", "num_splits", "vocab_size", "stride_table"],
    do_not_specialize_on_alignment=_UNALIGNED,
)
def linear_join_kernel(
    partials_ptr,  # [4, splits, n] fp32
    num_rows,
    num_splits,
    labels_ptr,  # [n] int64; -1: not in this shard; others outside [0, V) give NaN
    vocab_size,
    inner,  # fp32 or None, which says how finely a top is told
    table_ptr,  # [columns, n] of a wider table, fp32, written
    stride_table,
    IS_SHARD: tl.constexpr,  # sums alone, to be joined with those of other columns
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,  # splits that are read at once
):
    """Statistics of a block of rows from the sums of all splits."""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < num_rows
    step = num_splits.to(tl.int64) * num_rows
    m = tl.full([BLOCK_T], -1e30, tl.float32)
    s = tl.zeros([BLOCK_T], tl.float32)
    t = tl.zeros([BLOCK_T], tl.float32)
    y = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, num_splits, BLOCK_S):
        splits = start + tl.arange(0, BLOCK_S)
        ptrs = partials_ptr + splits.to(tl.int64)[:, None] * num_rows + offs_t[None, :]
        mask = (splits < num_splits)[:, None] & mask_t[None, :]
        own_m = tl.load(ptrs, mask=mask, other=-1e30)  # [BLOCK_S, BLOCK_T]
        own_s = tl.load(ptrs + step, mask=mask, other=0.0)
        own_t = tl.load(ptrs + 2 * step, mask=mask, other=0.0)
        y += tl.sum(tl.load(ptrs + 3 * step, mask=mask, other=0.0), 0)
        top = tl.maximum(m, tl.max(own_m, 0))
        d, own_d = m - top, own_m - top[None, :]
        w, own_w = tl.exp(d), tl.exp(own_d)
        t = w * (t + d * s) + tl.sum(own_w * (own_t + own_d * own_s), 0)
        s = w * s + tl.sum(own_w * own_s, 0)
        m = top
    s = tl.where(mask_t, s, 1.0)
    label = tl.load(labels_ptr + offs_t, mask=mask_t, other=-1)
    is_inside = (label >= 0) & (label < vocab_size)
    label_logit = tl.where(is_inside, y, float("nan"))
    if IS_SHARD:
        put_sums(m, s, t, label_logit, table_ptr + offs_t, stride_table, mask_t)
    else:
        put_stats(label, label_logit, m, s, t, inner, table_ptr + offs_t, stride_table, mask_t)


def operand(matrix: Tensor, block: list[int], *, uses_tma: bool) -> Any:
    """What a kernel reads ``matrix`` ``[n, D]`` through: a descriptor of blocks, or its pointer."""
    return TensorDescriptor.from_tensor(matrix, block) if uses_tma else matrix


def operand_arguments(
    hidden: Tensor,  # [n, D]
    weight: Tensor,  # [V, D]
    tile: Tile,
) -> dict[str, Any]:
    """The kernel's arguments that say what it reads of both operands, and in which blocks."""
    return {
        "hidden": operand(hidden, [tile.block_t, tile.block_d], uses_tma=tile.uses_tma),
        "stride_ht": hidden.stride(0),
        "stride_hd": hidden.stride(1),
        "weight": operand(weight, [tile.block_v, tile.block_d], uses_tma=tile.uses_tma),
        "stride_wv": weight.stride(0),
        "stride_wd": weight.stride(1),
        "dim": hidden.shape[1],
        "BLOCK_T": tile.block_t,
        "BLOCK_V": tile.block_v,
        "BLOCK_D": tile.block_d,
        "USES_TMA": tile.uses_tma,
        "IS_EVEN": hidden.shape[1] % tile.block_d == 0,
    }


def linear_join(
    partials: Tensor,  # [4, splits, n] fp32
    labels: Tensor,  # [n] int64, contiguous
    vocab_size: int,
    inner: float | None,
    table: RowTable,
    rows: slice,
    *,
    is_shard: bool = False,
) -> None:
    """Write the statistics that the sums of all splits make to ``rows`` of the table."""
    _, num_splits, num_rows = partials.shape
    arguments = {
        "partials_ptr": partials,
        "num_rows": num_rows,
        "num_splits": num_splits,
        "labels_ptr": labels,
        "vocab_size": vocab_size,
        "inner": inner,
        "table_ptr": table.values[:, rows],
        "stride_table": table.values.stride(0),
        "IS_SHARD": is_shard,
        "BLOCK_T": JOIN_ROWS,
        "BLOCK_S": JOIN_SPLITS,
    }
    launch(linear_join_kernel, (-(-num_rows // JOIN_ROWS),), arguments, num_warps=4)


def linear_stats(
    hidden: Tensor,  # [n, D] bf16, fp16, fp32, or e4m3 with scales
    weight: Tensor,  # [V, D] of the same dtype
    labels: Tensor,  # [n] int64; -1 where another shard of the vocabulary has the label
    view: LogitView,
    table: RowTable,
    rows: slice,
    *,
    tile: Tile | None = None,
    num_splits: int | None = None,
    scales: tuple[Tensor, Tensor] | None = None,  # fp32 [n] and [V]: hidden and weight times them
    is_shard: bool = False,
) -> None:
    """Write the statistics of ``hidden @ weight.T`` to ``rows`` of the table.

    Beside the table it needs 16 bytes per row and split; ``tile`` and ``num_splits`` None: as
    `linear_tiles` chooses them. ``is_shard``: sums instead, to `row_table.UNJOINED`.

    Raises:
        ValueError: ``num_splits`` below 1, or 8-bit operands on a GPU without a tile for them.
    """
    if not hidden.shape[0]:
        return
    is_narrow = hidden.element_size() < 4
    if is_narrow and is_interpreted() and not is_fake(hidden):  # products of bf16 are wrong there
        hidden, weight = hidden.float(), weight.float()
    (num_rows, dim), vocab_size = hidden.shape, weight.shape[0]
    tile = choose_tile(hidden, weight) if tile is None else tile
    units = num_units(hidden.device, is_planned=is_recording() or is_fake(hidden))
    shape = (num_rows, vocab_size, dim)
    order = choose_order(shape, hidden.element_size(), tile, units, num_splits)
    sizes = (NUM_SUMS, order.num_splits, num_rows)
    partials = torch.empty(sizes, dtype=torch.float32, device=hidden.device)
    hidden_scale, weight_scale = scales or (None, None)
    seen, labels = view_arguments(view), labels.contiguous()
    arguments = {
        **operand_arguments(hidden, weight, tile),
        "labels_ptr": labels,
        **seen,
        "hidden_scale_ptr": hidden_scale,
        "weight_scale_ptr": weight_scale,
        "num_rows": num_rows,
        "vocab_size": vocab_size,
        "partials_ptr": partials,
        "num_splits": order.num_splits,
        "group_tiles": order.group_tiles,
    }
    meta = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    launch(linear_stats_kernel, (order.num_programs,), arguments, **meta)
    linear_join(partials, labels, vocab_size, seen["inner"], table, rows, is_shard=is_shard)

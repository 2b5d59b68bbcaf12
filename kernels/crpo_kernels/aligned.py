"""Chunks of whole sequences: off-policy gspo in one pass.

The ratio of gspo is a mean over a sequence's own logprobs, so a chunk knows the coefficients of its
rows once it holds every row of their sequences. Where chunks begin and end is decided on the host,
which therefore must know the sequences: the counted rows of each, before anything runs.

A chunk may be larger than the usual ring then, as large as the longest sequence, as long as ring
and dZ stay within the workspace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .host import is_readable
from .plan import BYTES_OF_VECTORS, ROW_MULTIPLE, Plan, Room, product_rows

# operations of products in the time of a byte: assumed 720 TFLOP/s beside 3 TB/s, .5 beside .025
OPERATIONS_PER_BYTE_OF_GPU = 240
OPERATIONS_PER_BYTE_OF_CPU = 20


class Lengths(NamedTuple):
    """Counted rows of every sequence that has any, in order; or why the host does not know."""

    values: tuple[int, ...] | None
    reason: str | None = None


class TooLong(NamedTuple):
    """Why whole sequences do not fit a chunk."""

    longest: int  # rows of the longest sequence
    rows: int  # of the largest chunk
    num_bytes: int  # workspace that would do


def counted_lengths(
    cu_seqlens: Tensor | Sequence[int],  # [B + 1], checked
    counted: Tensor | None,  # [n] rows that count, None: all
    given: Tensor | Sequence[int] | None,  # [n] the argument ``rows``
) -> Lengths:
    """How many counted rows each sequence has, where the host knows without asking a device."""
    bounds = torch.as_tensor(cu_seqlens)
    if not is_readable(bounds):
        return Lengths(None, "cu_seqlens is not on the CPU, where chunks are planned")
    if counted is not None and not is_readable(counted):
        counted = None if given is None else torch.as_tensor(given).reshape(-1)
        if counted is None or not is_readable(counted):
            return Lengths(None, "which rows count is not known on the CPU: pass rows from there")
    ends = bounds.long()
    if counted is not None:
        if not bool((counted[1:] > counted[:-1]).all()):
            return Lengths(None, "rows are not in order, so that sequences are not side by side")
        ends = torch.searchsorted(counted.long(), ends)  # [B + 1]
    return Lengths(tuple(length for length in ends.diff().tolist() if length))


def align(plan: Plan, room: Room, lengths: tuple[int, ...]) -> Plan | TooLong:
    """``plan`` of one_pass with chunks of whole sequences.

    Args:
        plan: of the same call, with other chunks.
        room: what its workspace leaves for logits and dZ.
        lengths: counted rows of each sequence, none 0.
    """
    longest, row = max(lengths, default=1), room.row
    most = max(1, room.available // (row.raw + row.d_raw))  # rows of a chunk that is a group
    if longest > most:
        return TooLong(longest, most, _enough(room, longest))
    group = None
    if not room.is_separate:
        limit = min(most, max(longest, room.ring_rows))
    elif _keeps_all(room, longest):
        left = (room.available - room.num_rows * row.d_raw) // row.raw
        limit, group = min(left, max(longest, room.ring_rows)), max(1, room.num_rows)
    else:
        share = 2 if room.most_kept else 1  # chunks of a group, as without sequences
        limit = max(longest, min(room.ring_rows, room.available // (row.raw + share * row.d_raw)))
        group = (room.available - limit * row.raw) // row.d_raw
        group = max(limit, min(group, share * limit))
    ends = chunk_ends(lengths, even_limit(lengths, limit))
    chunk = max((stop - first for first, stop in pairwise((0, *ends))), default=1)
    return replace(plan, chunk_rows=chunk, group_rows=group or chunk, chunk_ends=ends)


def _keeps_all(room: Room, longest: int) -> bool:
    """Whether dZ of all rows fits beside the longest sequence's logits."""
    num_bytes = room.num_rows * room.row.d_raw + longest * room.row.raw
    return room.num_rows <= room.most_kept and num_bytes <= room.available


def _enough(room: Room, longest: int) -> int:
    """A workspace that holds the longest sequence: scratch grows to a quarter of it at most."""
    rows = longest * (room.row.raw + room.row.d_raw) + BYTES_OF_VECTORS * room.num_rows
    sums = min(room.num_rows, product_rows(room.dim)) * room.dim * 4
    return (rows + sums + 16 * room.vocab_size + 8 * room.dim) * 4 // 3 + 1


def chunk_ends(lengths: Sequence[int], limit: int) -> tuple[int, ...]:
    """Where chunks of at most ``limit`` rows end; no sequence is longer than that."""
    ends, start, stop = [], 0, 0
    for length in lengths:
        if stop + length - start > limit:
            ends.append(stop)
            start = stop
        stop += length
    return (*ends, stop) if stop else ()


def even_limit(lengths: Sequence[int], limit: int) -> int:
    """The least limit that needs no more chunks than ``limit``: less memory, even products."""
    num_chunks = len(chunk_ends(lengths, limit))
    low, high = max(lengths, default=1), limit
    while low < high:
        middle = (low + high) // 2
        if len(chunk_ends(lengths, middle)) <= num_chunks:
            high = middle
        else:
            low = middle + 1
    return low


def modelled_cost(plan: Plan, room: Room, needs: tuple[bool, bool]) -> float:
    """Operations of a call, with the bytes of its logits and sums counted as operations.

        products     2 V D a row: logits (twice where they are made again), d_hidden, d_weight;
                     rows of a product rounded up to tiles on a GPU
        rows         fp32 logits written, read twice, and dZ written; kept exponentials besides
                     written and read, logits that are made again written once more
        sums         8 V D bytes for each group whose d_weight is added in fp32

    Args:
        plan: how the call would run.
        room: its sizes.
        needs: whether hidden and weight need a gradient.
    """
    tile = ROW_MULTIPLE if room.is_gpu else 1
    chunks = [chunk.stop - chunk.start for group in plan.groups(room.num_rows) for chunk in group]
    groups = [group[-1].stop - group[0].start for group in plan.groups(room.num_rows)]
    times = 2 if plan.mode == "two_pass" and plan.kept is None and any(needs) else 1
    rows = times * sum(-(-size // tile) * tile for size in chunks)
    rows += sum(needs) * sum(-(-size // tile) * tile for size in groups)
    wide, item = (4 if room.is_separate else room.item), room.item
    bytes_of_logit = (2 + times) * wide + item + (2 * item if plan.kept == "exps" else 0)
    num_bytes = bytes_of_logit * room.num_rows * room.vocab_size
    if needs[1] and len(groups) > 1:
        num_bytes += 8 * room.vocab_size * room.dim * len(groups)
    rate = OPERATIONS_PER_BYTE_OF_GPU if room.is_gpu else OPERATIONS_PER_BYTE_OF_CPU
    return 2.0 * rows * room.vocab_size * room.dim + rate * num_bytes

"""How many rows at once: chunk sizes that keep a call within its workspace, whatever T is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .rows_torch import BLOCK_ELEMENTS

CPU_WORKSPACE_BYTES = 1 << 30
RING_ROWS = 1024  # fp32 rows of logits that may exist whatever T is
BYTES_OF_VECTORS = 128  # per row: the [T] vectors of a call


@dataclass(frozen=True)
class Plan:
    """How one call runs.

    Attributes:
        backend: "torch" or "dense".
        mode: "one_pass" or "two_pass".
        chunk_rows: rows of logits that exist at once.
        block_rows: rows of one block of the row work.
        slab_rows: rows of the vocabulary whose d_weight is added at once where it accumulates.
    """

    backend: str
    mode: str
    chunk_rows: int
    block_rows: int
    slab_rows: int


def make_plan(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    num_rows: int,
    *,
    backend: str,
    mode: str,
    workspace_bytes: int | None,
    needs_weight_grad: bool,
) -> Plan:
    """Choose chunk sizes so that logits, gradient factors and scratch stay within the workspace.

    Never more rows at once than the larger of a ring of 1024 fp32 rows and of what a fp32 d_weight
    would take (4 V D bytes): beyond that d_weight accumulates and memory is flat in T. A workspace
    too small for one row gets one row.
    """
    vocab_size, dim = weight.shape
    vocab_size = max(vocab_size, 1)
    item = hidden.element_size()
    stats_item = 8 if hidden.dtype == torch.float64 else 4
    raw_item = torch.empty((), dtype=raw_dtype(hidden)).element_size()
    separate = item if raw_dtype(hidden) != hidden.dtype else 0
    workspace = default_workspace(weight) if workspace_bytes is None else workspace_bytes
    row_bytes = vocab_size * (raw_item + separate) + 2 * dim * item
    block_rows = min(BLOCK_ELEMENTS // vocab_size, workspace // 8 // (2 * vocab_size * stats_item))
    block_rows = max(1, block_rows)
    slab_rows = max(
        1, min(vocab_size, workspace // 8 // (dim * stats_item), (1 << 25) // (dim * item))
    )
    fixed = 2 * block_rows * vocab_size * stats_item + slab_rows * dim * stats_item
    available = workspace - fixed - BYTES_OF_VECTORS * num_rows
    bound = max(4 * dim if needs_weight_grad else 0, 4 * RING_ROWS) // max(raw_item, item)
    most = max(1, min(bound, available // row_bytes))
    num_chunks = max(1, -(-num_rows // most))
    return Plan(backend, mode, max(1, -(-num_rows // num_chunks)), block_rows, slab_rows)


def raw_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of ``hidden @ weight.T``: fp32 on a GPU; a CPU rounds bf16 products to bf16."""
    if hidden.is_cuda and hidden.dtype == torch.bfloat16:
        return torch.float32
    return hidden.dtype


def default_workspace(weight: Tensor) -> int:
    """1 GiB on a CPU; on a GPU 4 V D bytes and the ring, or half of what is free if less."""
    if weight.device.type != "cuda":
        return CPU_WORKSPACE_BYTES
    wanted = 4 * weight.numel() + 8 * RING_ROWS * weight.shape[0]
    return min(wanted, torch.cuda.mem_get_info(weight.device)[0] // 2)

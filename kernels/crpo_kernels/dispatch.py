"""Which backend, which mode, how many rows at once: predicates with a reason, never try and except.

backend   torch   any device: chunks of rows, plain products, row work in torch
          dense   the oracle: all logits at once, autograd
mode      one_pass   gradients are made while a chunk's logits are hot; 6NVD operations. Needs every
                     coefficient before the head runs.
          two_pass   statistics first, any loss on them, then gradients; 8NVD, or 6NVD where the logits
                     of all rows fit the workspace and are kept.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .rows_torch import BLOCK_ELEMENTS
from .spec import ObjectiveSpec, check_choice

logger = logging.getLogger("crpo_kernels")

BACKENDS = ("auto", "torch", "dense")
MODES = ("auto", "one_pass", "two_pass")
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

    Never more rows at once than the larger of a ring of 1024 fp32 rows and of what a fp32 d_weight would
    take (4 V D bytes): beyond that d_weight accumulates and memory is flat in T. A workspace too small
    for one row gets one row.
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
    """1 GiB on a CPU; on a GPU 4 V D bytes and the ring, or half of what is free where that is less."""
    if weight.device.type != "cuda":
        return CPU_WORKSPACE_BYTES
    wanted = 4 * weight.numel() + 8 * RING_ROWS * weight.shape[0]
    return min(wanted, torch.cuda.mem_get_info(weight.device)[0] // 2)


def choose_backend(backend: str) -> str:
    """The backend that runs; ``auto`` is torch."""
    check_choice("backend", backend, BACKENDS)
    return "torch" if backend == "auto" else backend


def one_pass_reason(spec: ObjectiveSpec | None, inputs_are_on_policy: bool) -> str | None:
    """Why mode one_pass cannot run, or None. ``spec`` None stands for any loss on `linear_logprobs`."""
    if spec is None:
        return (
            "the loss on its outputs, and with it every coefficient, comes after the head has run"
        )
    if spec.policy == "gspo" and not inputs_are_on_policy:
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


@lru_cache(maxsize=None)
def log_choice(backend: str, mode: str, reason: str) -> None:
    """Log a choice once per process."""
    logger.info("backend %s, mode %s: %s", backend, mode, reason)

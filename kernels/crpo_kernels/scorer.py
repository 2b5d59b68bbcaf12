"""Which code scores (log-probabilities without gradients), and why: predicates with a reason.

chunks   the loop of `chunked`: fp32 logits of some rows are written, then read once
fused    `linear_triton`: product and online statistics in one kernel; no logits, O(T) memory
auto     fused where it can run and takes no longer: by the nearest measured shape of this device
         (`score_table`), without one by a model; in Triton's interpreter, which has no times, fused

The model counts operations, and bytes as operations in whose time they move (`aligned`'s rate in
bf16; fp32 products without TF32 are about ten times slower, so a byte costs a tenth of them):

    chunks   2 T V D  +  8 T V bytes                     T rounded up to whole tiles of 128 rows
    fused    2 T V D / SHARE                             likewise
    both     at least the bytes of the weight; the loop reads it once for each chunk

SHARE says how much of the vendor library's rate the kernel's product reaches: an assumption. In
eight bits the kernel counts half the operations of bf16, while the loop multiplies in bf16.

The choice reads sizes and the device's name: it asks no device to wait, nor for free memory, so it
is the same while a CUDA graph is captured. For fake tensors (a plan for a GPU) the model decides,
also where that GPU's own table would say otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .aligned import OPERATIONS_PER_BYTE_OF_GPU
from .host import is_fake
from .linear_tiles import TILES, narrow_reason, target_of
from .plan import RING_ROWS, ROW_MULTIPLE, HeadSizes
from .quantised import FLOAT8
from .score_table import TABLE, Measured, nearest
from .support import Obstacle, triton_obstacle

SHARE = {torch.bfloat16: 0.8, FLOAT8: 0.8, torch.float32: 0.5}
PLANNED = "a GPU that is only planned for"


class ScorerChoice(NamedTuple):
    """The code that scores, and why it is that one."""

    name: str  # "chunks" or "fused"; "dense": all logits at once
    reason: str


WAYS = {
    "chunks": "by chunks of logits",
    "fused": "by the fused kernel",
    "dense": "by all logits at once",
}


def fused_obstacle(sizes: HeadSizes, backend_reason: str) -> Obstacle | None:
    """What keeps the fused kernel from making this call, or None.

    Args:
        sizes: of the call, with the backend that runs.
        backend_reason: why that backend runs.
    """
    hidden = sizes.hidden
    return kernel_obstacle(
        sizes.backend, backend_reason, hidden.device, hidden.dtype, sizes.head_dtype,
        lora_rank=sizes.lora_rank, is_fake=is_fake(hidden),
    )  # fmt: skip


def kernel_obstacle(
    backend: str,
    backend_reason: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dtype: torch.dtype | None,
    *,
    lora_rank: int = 0,
    is_fake: bool = False,
) -> Obstacle | None:
    """What keeps the fused kernel from any tensors of this device and dtype, or None.

    Args:
        backend: that runs.
        backend_reason: why that backend runs.
        device: of hidden and weight; a GPU that is not here is only planned for.
        dtype: of hidden and weight.
        head_dtype: of a quantised head, or None.
        lora_rank: of the head's adapter, 0 without one.
        is_fake: they are fake tensors.
    """
    if lora_rank:
        return Obstacle(
            "the head has an adapter (lora_head), whose product the kernel does not add",
            "Pass mode='two_pass', or the merged weight W + scaling B A without lora_head",
        )
    if backend != "triton":
        own = triton_obstacle(device, dtype, is_fake=is_fake)
        return Obstacle(
            f"the kernel belongs to the backend triton, and {backend} runs ({backend_reason})",
            "Pass backend='triton'" if own is None else own.remedy,
        )
    if head_dtype is None or (device.type == "cuda" and not torch.cuda.is_available()):
        return None
    if TILES[target_of(device)].fp8 is not None:
        return None
    return Obstacle(
        f"no tile of the kernel multiplies e4m3 on {device_name(device)}",
        "Pass mode='two_pass', which widens the rows first",
    )


def choose_scorer(mode: str, sizes: HeadSizes, backend_reason: str) -> ScorerChoice:
    """The code that scores.

    Args:
        mode: as in the call, a known one.
        sizes: of the call, with the backend that runs.
        backend_reason: why that backend runs.

    Raises:
        ValueError: the fused kernel was asked for and cannot run, with the reason.
    """
    obstacle = fused_obstacle(sizes, backend_reason)
    if mode == "fused":
        if obstacle is not None:
            raise ValueError(
                f"mode: expected 'auto', 'one_pass' or 'two_pass' here, got 'fused': "
                f"{obstacle.reason}. {obstacle.remedy}, or pass mode='auto'."
            )
        return ScorerChoice("fused", "asked for")
    if sizes.backend == "dense":
        return ScorerChoice("dense", "it is the oracle")
    if mode != "auto":
        return ScorerChoice("chunks", f"mode {mode} was asked for")
    if sizes.backend != "triton":  # why, stands beside it
        return ScorerChoice("chunks", "the fused kernel needs the backend triton")
    if obstacle is not None:
        return ScorerChoice("chunks", obstacle.reason)
    return cheaper_scorer(sizes)


def cheaper_scorer(sizes: HeadSizes, table: tuple[Measured, ...] = TABLE) -> ScorerChoice:
    """The faster of two that can run, by what is known of this device."""
    hidden = sizes.hidden
    if hidden.device.type == "cpu" and not is_fake(hidden):
        return ScorerChoice("fused", "Triton's interpreter has no times to choose by")
    if reason := unaligned_reason(sizes):
        return ScorerChoice("chunks", f"for the fused kernel {reason}")
    device = device_name(hidden.device)
    dtype = sizes.head_dtype or hidden.dtype
    vocab_size, dim = sizes.weight.shape
    shape = (sizes.num_rows, vocab_size, dim)
    row = nearest(table, device, str(dtype).removeprefix("torch."), shape)
    if row is not None:
        name = "fused" if row.fused_ms <= row.chunk_ms else "chunks"
        return ScorerChoice(
            name,
            f"measured on {device} at T {row.num_rows} V {row.vocab_size} D {row.dim}, the nearest "
            f"shape: fused kernel {row.fused_ms:.3g} ms, chunk loop {row.chunk_ms:.3g} ms",
        )
    share = modelled_share(sizes)
    return ScorerChoice(
        "fused" if share <= 1 else "chunks",
        f"not measured on {device}: by the cost model the fused kernel takes {share:.2f} of the "
        "chunk loop's time",
    )


def unaligned_reason(sizes: HeadSizes) -> str | None:
    """Why the fused kernel would not read 16 bytes at once, or None.

    Eight bits and gathered rows are copies, which are contiguous whatever they were made from.
    """
    hidden, weight = sizes.hidden, sizes.weight
    target = "sm_90" if device_name(hidden.device) == PLANNED else target_of(hidden.device)
    dtype = sizes.head_dtype or hidden.dtype
    are_copied = sizes.head_dtype is not None or not sizes.has_strides
    if are_copied or sizes.is_gathered:
        hidden = torch.empty(hidden.shape, dtype=dtype, device="meta")
    if are_copied:
        weight = torch.empty(weight.shape, dtype=dtype, device="meta")
    return narrow_reason(hidden, weight, target)


def modelled_share(sizes: HeadSizes) -> float:
    """Modelled time of the fused kernel over that of the chunk loop; formulas above."""
    vocab_size, dim = sizes.weight.shape
    dtype, item = sizes.head_dtype or sizes.hidden.dtype, sizes.hidden.element_size()
    rate = OPERATIONS_PER_BYTE_OF_GPU / (10 if sizes.hidden.dtype == torch.float32 else 1)
    rows = max(1, -(-sizes.num_rows // ROW_MULTIPLE)) * ROW_MULTIPLE
    product = 2.0 * rows * vocab_size * dim
    weight = rate * vocab_size * dim * item
    num_chunks = max(1, -(-sizes.num_rows // RING_ROWS))
    chunks = max(product, num_chunks * weight) + rate * 8.0 * sizes.num_rows * vocab_size
    fused = max(product / SHARE[dtype] / (2 if dtype == FLOAT8 else 1), weight)
    return fused / chunks


def device_name(device: torch.device) -> str:
    """The name that the driver gives a device."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return PLANNED
    return torch.cuda.get_device_name(device)


def scorer_reason(choice: ScorerChoice) -> str:
    """For the log."""
    return f"scoring {WAYS[choice.name]}: {choice.reason}"

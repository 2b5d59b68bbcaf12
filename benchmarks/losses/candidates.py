"""Who runs on which device: the lists of candidates.

The order is that of a round, and of what time is kept for when it is short: the floor, ours in its
usual mode and plain torch, then the peers, then our other modes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .baselines import (
    FLOORS,
    BareProducts,
    Candidate,
    fused,
    fused_eager,
    naive,
    naive_scored,
    scored,
    small_workspace,
)
from .cases import Case
from .measure import generates_code
from .peers import loss_peers, score_peers

PRODUCTS = {1: "one bare product", 2: "two bare products", 3: "three bare products"}
PLAIN_NOTE = "fp32 logits of all tokens, autograd"
PLAIN_BYTES = 24  # of plain torch for each logit, at its peak
MEMINFO = Path("/proc/meminfo")
EAGER = "the same as one pass at this size, whose row passes are not compiled here"

LOOP = "the same as scoring: on a CPU there is no other way than the chunk loop"


def loss_candidates(case: Case, device: torch.device, backends: Sequence[str]) -> list[Candidate]:
    """With both gradients; on a GPU also with a frozen head."""
    first, *others = backends
    if device.type != "cuda":
        made = cpu_candidates(first)
        is_eager = "" if generates_code(case, device) else EAGER
        made = [replace(c, obstacle=is_eager) if c.key == "one_pass_eager" else c for c in made]
        made = [replace(c, obstacle=too_large(case)) if c.key == "naive" else c for c in made]
    else:
        has_fp32_out = case.dtype != torch.float32
        made = all_gradients(first, has_fp32_out=has_fp32_out)
        made += frozen_head(first, has_fp32_out=has_fp32_out)
    return made + [c for other in others for c in named_after(other, fused_candidates(other))]


def too_large(case: Case) -> str:
    """Why plain torch would not fit the free memory of a CPU, or ""."""
    if not MEMINFO.exists():
        return ""
    free = 1024 * int(MEMINFO.read_text("utf-8").split("MemAvailable:")[1].split()[0])
    needed = PLAIN_BYTES * case.num_rows * case.vocab_size
    if needed <= free:
        return ""
    return f"needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"


def score_candidates(case: Case, device: torch.device, backends: Sequence[str]) -> list[Candidate]:
    """Log-probabilities and entropies without gradients."""
    first, *others = backends
    has_fp32_out = device.type == "cuda" and case.dtype != torch.float32
    made = scoring(first, has_fp32_out=has_fp32_out) + score_peers(device.type)
    if device.type != "cuda":
        made = [replace(c, obstacle=LOOP) if c.key == "scored_loop" else c for c in made]
    return made + [c for other in others for c in named_after(other, our_scoring(other))]


def named_after(backend: str, candidates: list[Candidate]) -> list[Candidate]:
    """Ours with a further backend, under keys and titles of their own."""
    return [replace(c, key=f"{c.key}:{backend}", title=f"{c.title}, {backend}") for c in candidates]


def cpu_candidates(backend: str = "torch") -> list[Candidate]:
    """On a CPU: ours with and without generated code, beside its floor and peers."""
    one_pass, *others = fused_candidates(backend)
    eager = Candidate(
        "one_pass_eager",
        "crpo_kernels, one pass, no C++ compiler",
        fused_eager,
        "ours",
        note="row passes as ordinary torch operations",
    )
    return [
        *bare_products(3, has_fp32_out=False),
        one_pass,
        Candidate("naive", "plain torch", naive, "plain", note=PLAIN_NOTE),
        *loss_peers("cpu"),
        *others,
        eager,
    ]


def bare_products(num_products: int, *, has_fp32_out: bool) -> list[Candidate]:
    """The floor of what needs so many products, and the same with results in fp32."""
    kinds = [("", "", False), *([("_fp32", ", fp32 out", True)] if has_fp32_out else [])]
    return [
        Candidate(
            f"{FLOORS[num_products]}{suffix}",
            f"{PRODUCTS[num_products]}{words}",
            BareProducts(num_products, has_fp32_out=is_fp32),
            "floor",
            has_entropy_gradient=False,
            num_products=num_products,
        )
        for suffix, words, is_fp32 in kinds
    ]


def fused_candidates(backend: str) -> list[Candidate]:
    """Our loss with both gradients: one pass, and two passes with and without room for E."""
    two_pass, recompute = (fused("two_pass", backend, size) for size in (None, small_workspace))
    return [
        Candidate("one_pass", "crpo_kernels, one pass", fused("one_pass", backend), "ours"),
        Candidate("two_pass", "crpo_kernels, two passes, E kept", two_pass, "ours"),
        Candidate("recompute", "crpo_kernels, two passes, recomputed", recompute, "ours"),
    ]


def all_gradients(backend: str, *, has_fp32_out: bool) -> list[Candidate]:
    """Everything with both gradients: ours, plain torch, its compiler, the peers."""
    return [
        *bare_products(3, has_fp32_out=has_fp32_out),
        *fused_candidates(backend),
        Candidate("naive", "plain torch", naive, "plain", note=PLAIN_NOTE),
        *loss_peers("cuda"),
    ]


def frozen_head(backend: str, *, has_fp32_out: bool) -> list[Candidate]:
    """Without a gradient of the head's weight."""
    ours, title = fused("one_pass", backend), "crpo_kernels, one pass, frozen head"
    plain = "plain torch, frozen head"
    return [
        *bare_products(2, has_fp32_out=has_fp32_out),
        Candidate("frozen", title, ours, "ours", num_products=2),
        Candidate("naive_frozen", plain, naive, "plain", num_products=2, note=PLAIN_NOTE),
    ]


def scoring(backend: str, *, has_fp32_out: bool) -> list[Candidate]:
    """Log-probabilities and entropies without gradients."""
    usual, *others = our_scoring(backend)
    plain = "fp32 logits of all tokens"
    title = "plain torch, scoring"
    return [
        *bare_products(1, has_fp32_out=has_fp32_out),
        usual,
        Candidate("naive_scored", title, naive_scored, "plain", num_products=1, note=plain),
        *others,
    ]


def our_scoring(backend: str) -> list[Candidate]:
    """As dispatch picks it, and its ways by force where they run."""
    usual = Candidate("scored", "crpo_kernels, scoring", scored(backend), "ours", num_products=1)
    loop, title = scored(backend, mode="two_pass"), "crpo_kernels, scoring, chunk loop"
    fused_kernel = scored(backend, mode="fused")
    fp8 = scored(backend, head_dtype=torch.float8_e4m3fn)
    note = "hidden states and head quantised per row, off by default"
    return [
        usual,
        replace(usual, key="scored_loop", title=title, step=loop),
        replace(
            usual,
            key="scored_fused",
            title="crpo_kernels, scoring, fused kernel",
            step=fused_kernel,
            may_refuse=True,
        ),
        replace(
            usual,
            key="scored_fp8",
            title="crpo_kernels, scoring, fp8 head",
            step=fp8,
            note=note,
            coarseness=16.0,
            may_refuse=True,
        ),
    ]

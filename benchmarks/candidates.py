"""Who runs on which device: the lists of candidates."""

from __future__ import annotations

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
from .peers import Compiled, liger_chunked, liger_scaled, trl_chunked

PRODUCTS = {1: "one bare product", 2: "two bare products", 3: "three bare products"}
PLAIN_NOTE = "fp32 logits of all tokens, autograd"


def peers(note: str = "") -> list[Candidate]:
    """The other projects."""
    return [
        Candidate(
            "liger",
            "Liger chunked GRPO",
            liger_chunked,
            has_entropy_gradient=False,
            rounds=1,
            needs="liger_kernel",
            note=f"no entropy term; its own torch.compile off{note}",
        ),
        Candidate(
            "trl", "TRL chunked", trl_chunked, rounds=1, needs="trl", note="chunks of 4096 x 8192"
        ),
    ]


def cpu_candidates() -> list[Candidate]:
    """On a CPU: the torch backend with and without generated code, beside its floor and peers."""
    return [
        Candidate("products", PRODUCTS[3], BareProducts(), has_entropy_gradient=False),
        Candidate("one_pass", "crpo_kernels, one pass", fused("one_pass", "torch")),
        Candidate("two_pass", "crpo_kernels, two passes", fused("two_pass", "torch"), rounds=2),
        Candidate(
            "one_pass_eager",
            "crpo_kernels, one pass, no C++ compiler",
            fused_eager,
            rounds=2,
            note="row passes as ordinary torch operations",
        ),
        Candidate("naive", "plain torch", naive, rounds=1, note=PLAIN_NOTE),
        *peers(", which is faster here"),
    ]


def bare_products(num_products: int, *, has_fp32_out: bool) -> list[Candidate]:
    """The floor of what needs so many products, and the same with results in fp32."""
    key, title = FLOORS[num_products], PRODUCTS[num_products]
    made = [
        Candidate(
            key,
            title,
            BareProducts(num_products),
            has_entropy_gradient=False,
            num_products=num_products,
        )
    ]
    if has_fp32_out:
        step = BareProducts(num_products, has_fp32_out=True)
        made.append(
            Candidate(
                f"{key}_fp32",
                f"{title}, fp32 out",
                step,
                has_entropy_gradient=False,
                num_products=num_products,
            )
        )
    return made


def fused_candidates(backend: str) -> list[Candidate]:
    """Our loss with both gradients: mode A and mode B with and without room for E."""
    two_pass, recompute = (fused("two_pass", backend, size) for size in (None, small_workspace))
    return [
        Candidate("one_pass", "crpo_kernels, mode A", fused("one_pass", backend)),
        Candidate("two_pass", "crpo_kernels, mode B cached", two_pass),
        Candidate("recompute", "crpo_kernels, mode B recompute", recompute),
    ]


def all_gradients(backend: str, *, has_fp32_out: bool) -> list[Candidate]:
    """Everything with both gradients: ours, plain torch, its compiler, the peers."""
    return [
        *bare_products(3, has_fp32_out=has_fp32_out),
        *fused_candidates(backend),
        Candidate("naive", "plain torch", naive, note=PLAIN_NOTE),
        Candidate("liger_scaled", "Liger scaled CE", liger_scaled, needs="liger_kernel"),
        *peers(),
        Candidate(
            "compiled", "plain torch, torch.compile", Compiled(), has_errors=False, note=PLAIN_NOTE
        ),
    ]


def frozen_head(backend: str, *, has_fp32_out: bool) -> list[Candidate]:
    """Without a gradient of the head's weight."""
    ours, title = fused("one_pass", backend), "crpo_kernels, mode A, frozen head"
    return [
        *bare_products(2, has_fp32_out=has_fp32_out),
        Candidate("frozen", title, ours, num_products=2),
        Candidate("naive_frozen", "plain torch, frozen head", naive, num_products=2),
    ]


def scoring(backend: str, *, has_fp32_out: bool) -> list[Candidate]:
    """Log-probabilities and entropies without gradients."""
    return [
        *bare_products(1, has_fp32_out=has_fp32_out),
        Candidate("scored", "crpo_kernels, scoring only", scored(backend), num_products=1),
        Candidate("naive_scored", "plain torch, scoring only", naive_scored, num_products=1),
    ]

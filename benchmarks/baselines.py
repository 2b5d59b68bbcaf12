"""The candidates: ours, the floor of three bare products, plain torch and the chunked peers.

Every candidate computes the same: the on-policy clipped objective, .01 of k3 to the reference and,
where it can, the entropy term with its gradient; then both gradients. A peer that cannot run gives
the reason instead of a number. Further shapes and devices add rows to `CANDIDATES`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

import crpo_kernels as ck
import crpo_kernels.call as kernel_call

from .cases import Inputs

KL_COEF = 0.01


@dataclass(frozen=True)
class Result:
    """Gradients and, where the candidate tells them, per-token values; None for bare products."""

    loss: Tensor | None = None
    d_hidden: Tensor | None = None
    d_weight: Tensor | None = None
    logprobs: Tensor | None = None
    entropy: Tensor | None = None


@dataclass(frozen=True)
class Candidate:
    """One row of the table.

    Attributes:
        key: short name in the JSON.
        title: name in the table.
        step: forward and backward once.
        has_entropy_gradient: whether the entropy term is part of what it computes.
        rounds: timed repetitions; slow ones get fewer.
        needs: distribution that must be installed, or None.
        note: what a reader must know.
    """

    key: str
    title: str
    step: Callable[[Inputs], Result]
    has_entropy_gradient: bool = True
    rounds: int = 3
    needs: str | None = None
    note: str = ""

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        if self.needs is None or importlib.util.find_spec(self.needs) is not None:
            return None
        return f"{self.needs} is not installed"

    def version(self) -> str:
        """The installed version of what it needs."""
        return importlib.metadata.version(self.needs) if self.needs else ""


def gradients(loss: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Both gradients, without accumulation into leaves."""
    d_hidden, d_weight = torch.autograd.grad(loss, (inputs.hidden, inputs.weight))
    return d_hidden, d_weight


class BareProducts:
    """The three products any method needs, into buffers that exist already."""

    def __init__(self) -> None:
        self.buffers: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, inputs: Inputs) -> Result:
        """logits, d_hidden, d_weight."""
        hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
        if self.buffers is None or self.buffers[0].shape[0] != hidden.shape[0]:
            logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
            self.buffers = logits, torch.empty_like(hidden), torch.empty_like(weight)
        logits, d_hidden, d_weight = self.buffers
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.t(), hidden, out=d_weight)
        return Result()


def fused(mode: str) -> Callable[[Inputs], Result]:
    """Our loss in one of its modes."""

    def step(inputs: Inputs) -> Result:
        loss, stats = ck.linear_policy_loss(
            inputs.hidden,
            inputs.weight,
            inputs.labels,
            advantages=inputs.advantages,
            token_weights=inputs.token_weights,
            entropy_weights=inputs.entropy_weights,
            ref_logprobs=inputs.ref_logprobs,
            spec=ck.ObjectiveSpec(kl_coef=KL_COEF),
            temperature=inputs.case.temperature,
            mode=mode,
        )
        return Result(loss, *gradients(loss, inputs), stats.logprobs, stats.entropy)

    return step


def _no_compiler(hidden: Tensor, num_rows: int, vocab_size: int) -> str:  # noqa: ARG001
    return "no C++ compiler (benchmark)"


@contextmanager
def without_compiler() -> Iterator[None]:
    """As on a machine without a C++ compiler."""
    original = kernel_call.uncompiled_reason
    kernel_call.uncompiled_reason = _no_compiler
    try:
        yield
    finally:
        kernel_call.uncompiled_reason = original


def fused_eager(inputs: Inputs) -> Result:
    """Mode one_pass with ordinary torch operations as row passes."""
    with without_compiler():
        return fused("one_pass")(inputs)


def objective(inputs: Inputs, logprobs: Tensor, entropy: Tensor | None) -> Tensor:
    """The loss in plain torch on ``[T]`` vectors."""
    ratio = torch.exp(logprobs - logprobs.detach())
    adv = inputs.advantages
    bracket = -torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv)
    x = inputs.ref_logprobs - logprobs
    bracket = bracket + KL_COEF * (torch.exp(x) - x - 1)
    loss = (inputs.token_weights * bracket).sum()
    return loss if entropy is None else loss + (inputs.entropy_weights * entropy).sum()


def naive(inputs: Inputs) -> Result:
    """All logits in fp32, autograd: what a trainer without a kernel does."""
    logits = (inputs.hidden @ inputs.weight.t()).float() / inputs.case.temperature  # [T, V]
    log_p = logits.log_softmax(1)
    logprobs = log_p.gather(1, inputs.labels.unsqueeze(1)).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    loss = objective(inputs, logprobs, entropy)
    return Result(loss, *gradients(loss, inputs), logprobs.detach(), entropy.detach())


def trl_chunked(inputs: Inputs) -> Result:
    """TRL's chunked log-probabilities and its trainer's way of a loss on them."""
    from trl.kernels import ChunkedLogProbFunction

    logprobs, entropy, *_ = ChunkedLogProbFunction.apply(
        inputs.hidden,
        inputs.weight,
        None,
        inputs.labels,
        inputs.case.temperature,
        8192,
        None,
        1.0,
        ("entropy",),
    )
    loss = objective(inputs, logprobs, entropy)
    return Result(loss, *gradients(loss, inputs), logprobs.detach(), entropy.detach())


def liger_chunked(inputs: Inputs) -> Result:
    """Liger's chunked GRPO loss on eight sequences; it has no entropy term."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    batch = 8 if inputs.labels.numel() % 8 == 0 else 1
    loss_function = LigerFusedLinearGRPOLoss(
        beta=KL_COEF,
        compiled=False,
        use_ref_model=True,
        chunk_size=1,
        loss_type="dapo",
        temperature=inputs.case.temperature,
    )
    loss, _ = loss_function(
        inputs.hidden.view(batch, -1, inputs.hidden.shape[1]),
        inputs.weight,
        inputs.labels.view(batch, -1),
        torch.ones(batch, inputs.labels.numel() // batch),
        inputs.advantages.view(batch, -1)[:, 0],
        ref_per_token_logps=inputs.ref_logprobs.view(batch, -1),
    )
    return Result(loss, *gradients(loss, inputs))


CANDIDATES = (
    Candidate("products", "three bare products", BareProducts(), has_entropy_gradient=False),
    Candidate("one_pass", "crpo_kernels, one pass", fused("one_pass")),
    Candidate("two_pass", "crpo_kernels, two passes", fused("two_pass"), rounds=2),
    Candidate(
        "one_pass_eager",
        "crpo_kernels, one pass, no C++ compiler",
        fused_eager,
        rounds=2,
        note="row passes as ordinary torch operations",
    ),
    Candidate("naive", "plain torch", naive, rounds=1, note="fp32 logits of all tokens, autograd"),
    Candidate(
        "liger",
        "Liger chunked GRPO",
        liger_chunked,
        has_entropy_gradient=False,
        rounds=1,
        needs="liger_kernel",
        note="no entropy term; its own torch.compile off, which is faster here",
    ),
    Candidate(
        "trl", "TRL chunked", trl_chunked, rounds=1, needs="trl", note="chunks of 4096 x 8192"
    ),
)

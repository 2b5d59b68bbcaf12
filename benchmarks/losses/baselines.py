"""What is measured: ours, the bare products that are its floor, and plain torch.

Every candidate computes the same: the on-policy clipped objective, .01 of k3 to the reference and,
where it can, the entropy term with its gradient; then both gradients (with a frozen head, that of
the hidden states; when scoring, none). One that cannot run gives the reason instead of a number.
`candidates` has the lists, `peers` the other projects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

import crpo_kernels as ck
import crpo_kernels.call as kernel_call

from .cases import Case, Inputs
from .needs import NOTHING, Needs

KL_COEF = 0.01
FEWEST_ROWS = 24  # that a small workspace has a byte per logit for
FLOORS = {1: "products_1", 2: "products_2", 3: "products"}  # keys of the bare products
NAIVE = {1: "naive_scored", 2: "naive_frozen", 3: "naive"}  # keys of plain torch


@dataclass(frozen=True)
class Result:
    """Gradients and, where the candidate tells them, per-token values; None for bare products."""

    loss: Tensor | None = None
    d_hidden: Tensor | None = None
    d_weight: Tensor | None = None
    logprobs: Tensor | None = None
    entropy: Tensor | None = None


def objective(inputs: Inputs, logprobs: Tensor, entropy: Tensor | None) -> Tensor:
    """The loss in plain torch on ``[T]`` vectors."""
    ratio = torch.exp(logprobs - logprobs.detach())
    adv = inputs.advantages
    bracket = -torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv)
    x = inputs.ref_logprobs - logprobs
    bracket = bracket + KL_COEF * (torch.exp(x) - x - 1)
    loss = (inputs.token_weights * bracket).sum()
    return loss if entropy is None else loss + (inputs.entropy_weights * entropy).sum()


Objective = Callable[[Inputs, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Candidate:
    """One row of the table.

    Attributes:
        key: short name in the JSON.
        title: name in the table.
        step: forward and backward once.
        kind: "floor", "ours", "plain" or "peer".
        has_entropy_gradient: whether the entropy term is part of what it computes.
        rounds: timed repetitions at most; None: as many as the others.
        num_products: bare products over the head that it cannot do without: its floor.
        has_errors: its errors are measured; not where that would generate code of its own.
        needs: what must be there: package, device, dtype, sizes.
        note: what a reader must know.
        obstacle: why it is not run in this run, or "".
        lacks: what it cannot do (column of the table, e.g. "entropy"), and why.
        objective: the loss on ``[T]`` vectors that it is compared with.
        takes_temperature: else its hidden states are divided by the temperature beforehand.
        coarseness: times the limits of its errors: 16 for an fp8 head, whose numbers have 3 bits
            behind the point where bf16 has 7.
        may_refuse: an error of ours is the reason of an empty row, not a bug: its mode is forced.
    """

    key: str
    title: str
    step: Callable[[Inputs], Result]
    kind: str = "peer"
    has_entropy_gradient: bool = True
    rounds: int | None = None
    num_products: int = 3
    has_errors: bool = True
    needs: Needs = NOTHING
    note: str = ""
    obstacle: str = ""
    lacks: Mapping[str, str] = field(default_factory=dict)
    objective: Objective = objective
    takes_temperature: bool = True
    coarseness: float = 1.0
    may_refuse: bool = False

    @property
    def is_ours(self) -> bool:
        """Whether it is crpo_kernels."""
        return self.kind == "ours"

    @property
    def is_floor(self) -> bool:
        """Whether it is bare products itself."""
        return self.kind == "floor"

    def inputs_of(self, inputs: Inputs) -> Inputs:
        """The inputs as it takes them: fewer than three products leave the head frozen."""
        given = inputs if self.takes_temperature else inputs.at_temperature_one()
        return given if self.num_products == 3 else given.with_frozen_head()

    def missing(self, case: Case, device: torch.device) -> str:
        """Why it cannot run on the case and the device, or ""."""
        return self.obstacle or self.needs.unmet(case, device)

    def version(self) -> str:
        """The installed version of what it needs, or ""."""
        return self.needs.version()


def gradients(loss: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """The gradients of what needs one, without accumulation into leaves."""
    inputs.on_backward()
    wanted = [t for t in (inputs.hidden, inputs.weight) if t.requires_grad]
    d_hidden, *d_weight = torch.autograd.grad(loss, wanted)
    return d_hidden, d_weight[0] if d_weight else None


class BareProducts:
    """The first products that any method needs, into buffers that exist already.

    All share their buffers: on a GPU several sets of them would leave too little for plain torch.

    Args:
        num_products: 1 logits, 2 and d_hidden, 3 and d_weight.
        has_fp32_out: results in fp32 from operands as they are (CUDA only).
    """

    buffers: ClassVar[dict[tuple[str, torch.dtype], Tensor]] = {}

    def __init__(self, num_products: int = 3, *, has_fp32_out: bool = False) -> None:
        self.num_products, self.has_fp32_out = num_products, has_fp32_out

    def __call__(self, inputs: Inputs) -> Result:
        """logits, d_hidden, d_weight."""
        hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
        kind = torch.float32 if self.has_fp32_out else hidden.dtype
        logits = self.buffer("logits", hidden, (hidden.shape[0], weight.shape[0]), kind)
        self._mm(hidden, weight.t(), logits)
        if self.num_products == 1:
            return Result()
        d_raw = logits if kind == hidden.dtype else self.rounded(logits, hidden.dtype)
        self._mm(d_raw, weight, self.buffer("d_hidden", hidden, hidden.shape, kind))
        if self.num_products == 3:
            self._mm(d_raw.t(), hidden, self.buffer("d_weight", hidden, weight.shape, kind))
        return Result()

    def buffer(self, name: str, like: Tensor, shape: Sequence[int], kind: torch.dtype) -> Tensor:
        """A buffer of this shape, made at its first use."""
        known = self.buffers.get((name, kind))
        if known is None or known.shape != tuple(shape) or known.device != like.device:
            self.buffers.pop((name, kind), None)  # frees it before the next one is made
            known = self.buffers[name, kind] = like.new_empty(shape, dtype=kind)
        return known

    def rounded(self, logits: Tensor, kind: torch.dtype) -> Tensor:
        """An operand with values like those of ``logits``, made once: it is not part of the floor.

        Values matter: products of zeros draw less power and run faster.
        """
        known = self.buffers.get(("d_raw", kind))
        if known is None or known.shape != logits.shape or known.device != logits.device:
            self.buffers.pop(("d_raw", kind), None)
            known = self.buffers["d_raw", kind] = logits.to(kind)
        return known

    @staticmethod
    def _mm(a: Tensor, b: Tensor, out: Tensor) -> None:
        if out.dtype == a.dtype:
            torch.mm(a, b, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)


def fused(
    mode: str,
    backend: str = "auto",
    workspace_bytes: int | Callable[[Inputs], int] | None = None,
) -> Callable[[Inputs], Result]:
    """Our loss in one of its modes, with a workspace that may depend on the inputs."""

    def step(inputs: Inputs) -> Result:
        given = workspace_bytes(inputs) if callable(workspace_bytes) else workspace_bytes
        loss, stats = ck.linear_policy_loss(
            **policy_arguments(inputs),
            backend=backend,
            mode=mode,
            workspace_bytes=given,
        )
        return Result(loss, *gradients(loss, inputs), stats.logprobs, stats.entropy)

    return step


def policy_arguments(inputs: Inputs) -> dict[str, Any]:
    """What `crpo_kernels.linear_policy_loss` gets of the inputs."""
    names = ("hidden", "weight", "labels", "advantages", "token_weights", "entropy_weights")
    return {
        **{name: getattr(inputs, name) for name in (*names, "ref_logprobs")},
        "spec": ck.ObjectiveSpec(kl_coef=KL_COEF),
        "temperature": inputs.case.temperature,
    }


def small_workspace(inputs: Inputs) -> int:
    """A byte per logit: too small to keep E of all rows; small cases get what a few rows need."""
    return max(inputs.labels.numel(), FEWEST_ROWS) * inputs.weight.shape[0]


def scored(backend: str = "auto", **options: Any) -> Callable[[Inputs], Result]:
    """Our log-probabilities and entropies without gradients; ``options`` of `linear_logprobs`."""

    def step(inputs: Inputs) -> Result:
        with torch.no_grad():
            out = ck.linear_logprobs(
                inputs.hidden,
                inputs.weight,
                inputs.labels,
                temperature=inputs.case.temperature,
                backend=backend,
                **options,
            )
        return Result(logprobs=out.logprobs, entropy=out.entropy)

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
        return fused("one_pass", "torch")(inputs)


def naive_logprobs(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies ``[T]`` from all logits in fp32."""
    logits = (inputs.hidden @ inputs.weight.t()).float() / inputs.case.temperature  # [T, V]
    log_p = logits.log_softmax(1)
    logprobs = log_p.gather(1, inputs.labels.unsqueeze(1)).squeeze(1)
    return logprobs, -(log_p.exp() * log_p).sum(1)


def naive(inputs: Inputs) -> Result:
    """All logits in fp32, autograd: what a trainer without a kernel does."""
    logprobs, entropy = naive_logprobs(inputs)
    loss = objective(inputs, logprobs, entropy)
    return Result(loss, *gradients(loss, inputs), logprobs.detach(), entropy.detach())


def naive_scored(inputs: Inputs) -> Result:
    """The same without gradients."""
    with torch.no_grad():
        return Result(None, None, None, *naive_logprobs(inputs))

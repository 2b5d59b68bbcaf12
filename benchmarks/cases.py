"""Shapes, and inputs whose distributions look like a language model's.

Random hidden states give every token the same entropy, log V, and flatter whoever skips small
probabilities. Here each hidden state is a sum of a few rows of the head, so that a handful of
tokens compete: entropies of .3 to 3 nats, as in sampled text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One shape to measure."""

    num_rows: int
    vocab_size: int
    dim: int
    dtype: torch.dtype
    temperature: float = 0.85

    @property
    def name(self) -> str:
        """Sizes and dtype, for people."""
        kind = str(self.dtype).removeprefix("torch.")
        return f"T{self.num_rows} V{self.vocab_size} D{self.dim} {kind}"

    @property
    def product_flops(self) -> float:
        """Floating-point operations of one product over the head."""
        return 2.0 * self.num_rows * self.vocab_size * self.dim


CASES = {
    "cpu": Case(2048, 151936, 1024, torch.bfloat16),
    "cuda": Case(8192, 131072, 4096, torch.bfloat16),
}


def nothing() -> None:
    """What happens between forward and backward when nobody watches."""


@dataclass(frozen=True)
class Inputs:
    """What every candidate gets; per-token vectors in fp32."""

    case: Case
    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    labels: Tensor  # [T]
    advantages: Tensor  # [T]
    token_weights: Tensor  # [T]
    entropy_weights: Tensor  # [T]
    ref_logprobs: Tensor  # [T]
    on_backward: Callable[[], None] = nothing  # called between forward and backward

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]

    def with_frozen_head(self) -> Inputs:
        """The same with a head that needs no gradient."""
        return replace(self, weight=self.weight.detach())

    def copy(self) -> Inputs:
        """The same values in other memory."""
        copies = {
            name: value.detach().clone().requires_grad_(value.requires_grad)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **copies)

    def take(self, rows: slice, scale: float = 1.0) -> Inputs:
        """Some rows alone, their weights times ``scale``."""
        names = ("hidden", "labels", "advantages", "ref_logprobs")
        taken = {name: getattr(self, name)[rows] for name in names}
        weights = ("token_weights", "entropy_weights")
        taken |= {name: getattr(self, name)[rows] * scale for name in weights}
        return replace(self, **taken)

    def first(self, num_rows: int) -> Inputs:
        """The first rows alone, with weights that sum to the same."""
        return self.take(slice(0, num_rows), self.labels.numel() / num_rows)


def make_inputs(case: Case, seed: int = 0, device: torch.device | str = "cpu") -> Inputs:
    """Inputs of a case: leaves that need gradients, labels sampled from the rows' candidates.

    Made on ``device`` itself: the values of one seed differ between kinds of devices.
    """
    g = torch.Generator(device).manual_seed(seed)
    at = {"generator": g, "device": device}
    weight = torch.randn(case.vocab_size, case.dim, **at).div_(case.dim**0.5)
    candidates = torch.randint(0, case.vocab_size, (case.num_rows, 4), **at)  # [T, 4]
    peak = math.log(case.vocab_size) + 1.7 + 5 * torch.rand(case.num_rows, 1, **at)
    gaps = torch.tensor([0.0, 1.0, 1.5, 2.0], device=device) * (
        0.5 + 2 * torch.rand(case.num_rows, 1, **at)
    )
    strength = case.temperature * (peak - gaps)  # [T, 4] logits of the candidates
    hidden = (weight[candidates] * strength.unsqueeze(2)).sum(1)  # [T, D]; |w|^2 is about 1
    shares = torch.tensor([0.5, 0.25, 0.15, 0.1], device=device)
    picks = torch.multinomial(shares, case.num_rows, True, generator=g)
    labels = candidates.gather(1, picks.unsqueeze(1)).squeeze(1)  # [T]
    groups = torch.randn(8, **at)  # one advantage a sequence
    advantages = groups.repeat_interleave(-(-case.num_rows // 8))[: case.num_rows]
    ones = torch.ones(case.num_rows, device=device)
    signs = torch.sign(torch.randn(case.num_rows, **at))
    return Inputs(
        case,
        hidden.to(case.dtype).requires_grad_(),
        weight.to(case.dtype).requires_grad_(),
        labels,
        advantages,
        ones / case.num_rows,
        0.02 * signs / case.num_rows,
        -1.5 - torch.rand(case.num_rows, **at),
    )

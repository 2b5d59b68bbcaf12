"""What the logits are made of, and which of it needs a gradient.

    raw_t = hidden_t weight^T + states_t up^T        states = scaling * hidden A^T, up = B

The second product is a low-rank adapter of the head (`lora`), where there is one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """The tensors of a head that may need a gradient."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    states: Tensor | None = None  # [T, r] of the adapter, in the dtype of hidden
    up: Tensor | None = None  # [V, r] likewise

    def needs(self) -> Needs:
        """As autograd says."""
        return Needs(*(needs_gradient(tensor) for tensor in self))


class Adapter(NamedTuple):
    """The factors of an adapter, made outside."""

    states: Tensor  # [T, r]
    up: Tensor  # [V, r]


class Needs(NamedTuple):
    """Which factors need a gradient."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    states: bool = False
    up: bool = False

    def choose(self, values: Any) -> list[Any]:
        """``values``, one a factor, and None where no gradient is needed."""
        return [made if needed else None for made, needed in zip(values, self, strict=True)]


NO_NEEDS = Needs()


def needs_gradient(tensor: Tensor | None) -> bool:
    """Whether a gradient flows to ``tensor``."""
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()

"""Shapes by name, and inputs whose distributions look like a language model's.

Random hidden states give every token the same entropy, log V, and flatter whoever skips small
probabilities. Here the head has a spectrum that falls off as a trained one's does, and each hidden
state is a sum of a few of its rows, so that a handful of tokens compete: entropies of .3 to 3 nats,
as in sampled text. `checkpoint` takes hidden states, head and labels from a model instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SPECTRUM = "spectrum"
NUM_SEQUENCES = 8
ENTROPY_WEIGHT = 0.02  # of a token's entropy beside its policy term
REF_SPREAD = 0.3  # nats between a label's log-probability and the reference's
BEND = 32  # singular values of the head fall as (1 + k / BEND) ** -0.5
SLAB = 1 << 20  # elements of the head that are made at once
COMPETITORS = 4  # tokens that share a row's probability


@dataclass(frozen=True)
class Case:
    """One shape to measure.

    Attributes:
        num_rows: tokens T.
        vocab_size: V.
        dim: hidden size D.
        dtype: of hidden states and head.
        temperature: logits are divided by it.
        shape: the name of the shape, "own" for one from the command line.
        inputs: where the values come from: `SPECTRUM` or "checkpoint <name>".
    """

    num_rows: int
    vocab_size: int
    dim: int
    dtype: torch.dtype
    temperature: float = 0.85
    shape: str = "own"
    inputs: str = SPECTRUM

    @property
    def name(self) -> str:
        """Sizes and dtype, for people."""
        kind = str(self.dtype).removeprefix("torch.")
        return f"T{self.num_rows} V{self.vocab_size} D{self.dim} {kind}"

    @property
    def product_flops(self) -> float:
        """Floating-point operations of one product over the head."""
        return 2.0 * self.num_rows * self.vocab_size * self.dim


# (V, D) of published heads; gemma-256k without its softcap, which most peers cannot; in `ragged`
# no size is a multiple of anything, so that rows are not even aligned.
SHAPES = {
    "qwen3-0.6b": (151_936, 1024),
    "llama3-8b": (128_256, 4096),
    "qwen3-1.7b": (151_936, 2048),
    "qwen3-8b": (151_936, 4096),
    "qwen3.5": (248_320, 2048),
    "gemma-256k": (262_144, 2304),
    "ragged": (50_257, 1001),
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}  # ours takes no float16
GPU_ROWS = 8192
CPU_FLOATS = 128 * 1024  # rows x D of a CPU's cases: all of them in three minutes


def named_case(shape: str, device: str, dtype: torch.dtype = torch.bfloat16) -> Case:
    """A shape of `SHAPES` with the rows that fit the device; one less where it is ragged."""
    vocab_size, dim = SHAPES[shape]
    rows = GPU_ROWS
    if device == "cpu":
        rows = 2 ** math.floor(math.log2(1.25 * CPU_FLOATS / dim))
    rows -= shape == "ragged"
    return Case(rows, vocab_size, dim, dtype, shape=shape)


def nothing() -> None:
    """What happens between forward and backward when nobody watches."""


@dataclass(frozen=True)
class Inputs:
    """What every candidate gets; per-token vectors in fp32.

    Rows belong to sequences of `sequence_rows` rows each (the last one has fewer); the rows of a
    sequence have one advantage.
    """

    case: Case
    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    labels: Tensor  # [T]
    advantages: Tensor  # [T]
    token_weights: Tensor  # [T]
    entropy_weights: Tensor  # [T]
    ref_logprobs: Tensor  # [T]
    on_backward: Callable[[], None] = nothing  # called between forward and backward
    sequence_rows: int = 1

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def with_frozen_head(self) -> Inputs:
        """The same with a head that needs no gradient."""
        return replace(self, weight=self.weight.detach())

    def at_temperature_one(self) -> Inputs:
        """Hidden states divided by the temperature, for those that know none."""
        scaled = (self.hidden.detach() / self.case.temperature).requires_grad_()
        return replace(self, hidden=scaled, case=replace(self.case, temperature=1.0))

    def take(self, rows: slice | Tensor, scale: float = 1.0) -> Inputs:
        """Some rows alone, their weights times ``scale``."""
        names = ("hidden", "labels", "advantages", "ref_logprobs")
        taken = {name: getattr(self, name)[rows] for name in names}
        weights = ("token_weights", "entropy_weights")
        taken |= {name: getattr(self, name)[rows] * scale for name in weights}
        return replace(self, **taken)

    def first(self, num_rows: int) -> Inputs:
        """The first rows alone, with weights that sum to the same."""
        return self.take(slice(0, num_rows), self.labels.numel() / num_rows)

    def sample(self, num_rows: int) -> Inputs:
        """About so many rows, as many of each sequence; those of one that is too short all."""
        total, length = self.labels.numel(), self.sequence_rows
        if num_rows >= total:
            return self
        each = max(1, num_rows // -(-total // length))
        place = torch.arange(total, device=self.labels.device) % length
        rows = place.lt(each).nonzero().squeeze(1)
        return replace(self.take(rows, total / rows.numel()), sequence_rows=each)


def make_inputs(case: Case, seed: int = 0, device: torch.device | str = "cpu") -> Inputs:
    """Inputs of a case: leaves that need gradients, labels sampled from the rows' competitors.

    Made on ``device`` itself: the values of one seed differ between kinds of devices.
    """
    g = torch.Generator(device).manual_seed(seed)
    at = {"generator": g, "device": device}
    weight = random_head(case, seed, torch.device(device))
    competitors = torch.randint(0, case.vocab_size, (case.num_rows, COMPETITORS), **at)
    # logits: the first competitor lies 2 to 8 nats above what all other tokens sum to
    peak = math.log(case.vocab_size) + 2.0 + 6 * torch.rand(case.num_rows, 1, **at)
    gaps = torch.tensor([0.0, 0.8, 1.2, 1.6], device=device) * (
        0.2 + 3 * torch.rand(case.num_rows, 1, **at).square()
    )
    strength = case.temperature * (peak - gaps)  # [T, 4]
    hidden = (weight[competitors].float() * strength.unsqueeze(2)).sum(1)  # [T, D]
    shares = torch.log_softmax(-gaps, 1)  # [T, 4] what the competitors share
    picks = torch.multinomial(shares.exp(), 1, generator=g)  # [T, 1]
    labels = competitors.gather(1, picks).squeeze(1)  # [T]
    return with_weights(case, hidden, weight, labels, shares.gather(1, picks).squeeze(1), g)


def random_head(case: Case, seed: int, device: torch.device) -> Tensor:  # [V, D]
    """Rows of length about 1 whose spectrum falls off, in the dtype of the case.

    Made in slabs with a generator each: on a CPU, whose generators have one thread, side by side.
    """
    falling = (1 + torch.arange(case.dim, device=device) / BEND).rsqrt()
    falling /= falling.square().sum().sqrt()
    weight = torch.empty(case.vocab_size, case.dim, dtype=case.dtype, device=device)
    slabs = weight.split(max(1, SLAB // case.dim))

    def fill(number: int) -> None:
        slab, generator = slabs[number], torch.Generator(device)
        generator.manual_seed(seed * len(slabs) + number)
        slab.copy_(torch.randn(slab.shape, generator=generator, device=device).mul_(falling))

    with ThreadPoolExecutor(torch.get_num_threads() if device.type == "cpu" else 1) as pool:
        list(pool.map(fill, range(len(slabs))))
    return weight


def with_weights(
    case: Case,
    hidden: Tensor,  # [T, D] any dtype
    weight: Tensor,  # [V, D] any dtype
    labels: Tensor,  # [T]
    logprobs: Tensor,  # [T] about those of the labels
    generator: torch.Generator,
) -> Inputs:
    """Inputs from their hidden states, head and labels: leaves that need gradients.

    The reference's log-probabilities lie around ``logprobs``: far below a row's own they would not
    matter, far above them its KL term would be all of the gradient.
    """
    num_rows, device = labels.numel(), labels.device
    at = {"generator": generator, "device": device}
    length = -(-num_rows // NUM_SEQUENCES)
    groups = torch.randn(NUM_SEQUENCES, **at)  # one advantage a sequence
    signs = torch.sign(torch.randn(num_rows, **at))
    return Inputs(
        case,
        hidden.to(case.dtype).requires_grad_(),
        weight.to(case.dtype).requires_grad_(),
        labels,
        groups.repeat_interleave(length)[:num_rows],
        torch.full((num_rows,), 1 / num_rows, device=device),
        ENTROPY_WEIGHT * signs / num_rows,
        (logprobs + REF_SPREAD * torch.randn(num_rows, **at)).clamp(max=0.0),
        sequence_rows=length,
    )

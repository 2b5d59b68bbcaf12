"""torch itself: its linear_cross_entropy, and plain torch through its compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.losses.baselines import Candidate, Result, gradients, naive_logprobs
from benchmarks.losses.cases import Inputs
from benchmarks.losses.needs import Needs

from .common import NO_ENTROPY, NO_TEMPERATURE, mean_nll, policy_result

CPU_ROWS = 512
CPU_NOTE = f"on a CPU {CPU_ROWS} rows at once, not its own choice of chunks, which takes far longer"
COMPILER = Needs("torch", generates_code=True)
ERRORS = ("logprobs", "entropy", "d_hidden", "d_weight")  # columns
ONE_SIZE = "not measured: the few rows of the errors would be compiled on their own"


def linear_cross_entropy() -> Any:
    """The function; torch 2.13 has it."""
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy, 2.13 has")
    return F.linear_cross_entropy


def chunks(device: torch.device) -> Any:
    """Options of its chunked path: its own choice, but for the rows of a chunk on a CPU.

    Of its own choice those are V / D times fewer than all rows, each chunk with the whole head in
    fp32: 20 times as long.
    """
    if device.type != "cpu":
        return torch.nn.LinearCrossEntropyOptions()
    return torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CPU_ROWS, chunking_method=None)


def arguments(inputs: Inputs, reduction: str) -> dict[str, Any]:
    """Of the function."""
    return {
        "input": inputs.hidden,
        "linear_weight": inputs.weight,
        "target": inputs.labels,
        "reduction": reduction,
        "options": chunks(inputs.hidden.device),
    }


def per_token(inputs: Inputs) -> Result:
    """Per-token losses and the objective on them; backward computes the logits again."""
    return policy_result(inputs, -linear_cross_entropy()(**arguments(inputs, "none")).float())


def mean_loss(inputs: Inputs) -> Result:
    """Plain cross entropy: its gradients are made in forward."""
    loss = linear_cross_entropy()(**arguments(inputs, "mean"))
    return Result(loss, *gradients(loss, inputs))


def scored(inputs: Inputs) -> Result:
    """Per-token losses without gradients."""
    with torch.no_grad():
        return Result(logprobs=-linear_cross_entropy()(**arguments(inputs, "none")).float())


class Compiled:
    """Plain torch through torch.compile; the products stay calls of the vendor's library.

    Args:
        dynamic: one code for all sizes, else one for each.
        has_gradients: whether to run backward.
    """

    def __init__(self, *, dynamic: bool, has_gradients: bool = True) -> None:
        self.dynamic, self.has_gradients = dynamic, has_gradients
        self.logprobs: Callable[[Inputs], tuple[Tensor, Tensor]] | None = None

    def __call__(self, inputs: Inputs) -> Result:
        """Forward, and backward where gradients are wanted."""
        if self.logprobs is None:
            self.logprobs = torch.compile(naive_logprobs, dynamic=self.dynamic)
        with torch.set_grad_enabled(self.has_gradients):
            logprobs, entropy = self.logprobs(inputs)
            if not self.has_gradients:
                return Result(logprobs=logprobs, entropy=entropy)
            return policy_result(inputs, logprobs, entropy)


def losses() -> list[Candidate]:
    """With both gradients."""
    needs = Needs("torch", linear_cross_entropy)
    return [
        Candidate(
            "torch_lce",
            "torch linear_cross_entropy",
            per_token,
            has_entropy_gradient=False,
            needs=needs,
            lacks=NO_ENTROPY,
            takes_temperature=False,
            note=f"without the entropy term; {NO_TEMPERATURE}; {CPU_NOTE}",
        ),
        Candidate(
            "torch_lce_mean",
            "torch linear_cross_entropy, mean",
            mean_loss,
            has_entropy_gradient=False,
            needs=needs,
            lacks={**NO_ENTROPY, "logprobs": "returns the mean only"},
            objective=mean_nll,
            takes_temperature=False,
            note=f"plain cross entropy: no weight of a token; {NO_TEMPERATURE}; {CPU_NOTE}",
        ),
    ]


def scores() -> list[Candidate]:
    """Without gradients."""
    return [
        Candidate(
            "torch_lce_scored",
            "torch linear_cross_entropy, scoring only",
            scored,
            has_entropy_gradient=False,
            num_products=1,
            needs=Needs("torch", linear_cross_entropy),
            lacks=NO_ENTROPY,
            takes_temperature=False,
            note=f"{NO_TEMPERATURE}; {CPU_NOTE}",
        ),
    ]


def compiled(device: str) -> Candidate:
    """Plain torch compiled; on a GPU for the one size that is timed, so that it has no errors."""
    is_cpu = device == "cpu"
    return Candidate(
        "compiled",
        "plain torch, torch.compile",
        Compiled(dynamic=is_cpu),
        has_errors=is_cpu,
        needs=COMPILER,
        lacks={} if is_cpu else dict.fromkeys(ERRORS, ONE_SIZE),
        note="fp32 logits of all tokens, autograd",
    )


def compiled_scored(device: str) -> Candidate:
    """The same without gradients."""
    is_cpu = device == "cpu"
    return Candidate(
        "compiled_scored",
        "plain torch, torch.compile, scoring only",
        Compiled(dynamic=is_cpu, has_gradients=False),
        num_products=1,
        has_errors=is_cpu,
        needs=COMPILER,
        lacks={} if is_cpu else dict.fromkeys(ERRORS[:2], ONE_SIZE),
        note="fp32 logits of all tokens",
    )

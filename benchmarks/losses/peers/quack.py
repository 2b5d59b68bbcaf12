"""quack-kernels: chunked linear cross entropy with CuTe kernels for Hopper and later."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.losses.baselines import Candidate, Result, gradients
from benchmarks.losses.cases import Inputs
from benchmarks.losses.needs import Needs

from .common import NO_ENTROPY, NO_TEMPERATURE, mean_nll

HOPPER = ((9, 0), (10, 0), (10, 3), (11, 0), (12, 0))
NEEDS = {
    "device": "cuda",
    "capability": HOPPER,
    "generates_code": True,  # and tries tiles
    "dtypes": (torch.bfloat16, torch.float16),
    "multiples": {"num_rows": 8, "vocab_size": 8, "dim": 8},
}
MEAN_ONLY = "returns the mean only"


def loss_function() -> Any:
    """The public function."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy


def forward_function() -> Any:
    """Its forward pass alone, which has the loss of each token."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy_fwd

    return chunked_linear_cross_entropy_fwd


def loss_arguments(inputs: Inputs) -> dict[str, Any]:
    """Its own chunk size and choice of kernels."""
    return {
        "x": inputs.hidden,
        "weight": inputs.weight,
        "target": inputs.labels,
        "reduction": "mean",
    }


def forward_arguments(inputs: Inputs) -> dict[str, Any]:
    """No gradients."""
    tensors = {"x": inputs.hidden, "weight": inputs.weight, "target": inputs.labels}
    return {**tensors, "need_dx": False, "need_dw": False}


def mean_loss(inputs: Inputs) -> Result:
    """Plain cross entropy and its gradients."""
    loss = loss_function()(**loss_arguments(inputs))
    return Result(loss, *gradients(loss, inputs))


def scored(inputs: Inputs) -> Result:
    """The loss of each token."""
    with torch.no_grad():
        loss, *_ = forward_function()(**forward_arguments(inputs))
    return Result(logprobs=-loss)


def losses() -> list[Candidate]:
    """With both gradients."""
    return [
        Candidate(
            "quack",
            "quack chunked CE",
            mean_loss,
            has_entropy_gradient=False,
            needs=Needs("quack-kernels", loss_function, **NEEDS),
            lacks={**NO_ENTROPY, "logprobs": MEAN_ONLY},
            objective=mean_nll,
            takes_temperature=False,
            note=f"plain cross entropy: no weight of a token; {NO_TEMPERATURE}",
        )
    ]


def scores() -> list[Candidate]:
    """Without gradients."""
    return [
        Candidate(
            "quack_scored",
            "quack chunked CE, scoring only",
            scored,
            has_entropy_gradient=False,
            num_products=1,
            needs=Needs("quack-kernels", forward_function, **NEEDS),
            lacks=NO_ENTROPY,
            takes_temperature=False,
            note=NO_TEMPERATURE,
        )
    ]

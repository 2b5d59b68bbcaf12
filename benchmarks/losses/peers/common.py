"""What the peers share: results from log-probabilities, sequences of rows, reasons."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from benchmarks.losses.baselines import Result, gradients, objective
from benchmarks.losses.cases import Inputs

NO_ENTROPY = {
    "entropy": "cross entropy only: no entropy",
    "entropy_gradient": "cross entropy only: no entropy",
}
NO_TEMPERATURE = "no temperature of its own: gets hidden states divided by it"


def policy_result(inputs: Inputs, logprobs: Tensor, entropy: Tensor | None = None) -> Result:
    """The objective in torch on what a peer returns per token, and backward."""
    loss = objective(inputs, logprobs, entropy)
    told = None if entropy is None else entropy.detach()
    return Result(loss, *gradients(loss, inputs), logprobs.detach(), told)


def mean_nll(inputs: Inputs, logprobs: Tensor, entropy: Tensor | None) -> Tensor:  # noqa: ARG001
    """The loss of peers that return nothing per token: plain cross entropy."""
    return -logprobs.mean()


def sequences(values: Tensor, num_rows: int) -> Tensor:  # [B, L, ...]
    """Rows ``[T, ...]`` as sequences of ``num_rows`` rows; the last one is filled with zeros."""
    missing = -values.shape[0] % num_rows
    padded = F.pad(values, (0, 0) * (values.dim() - 1) + (0, missing)) if missing else values
    return padded.view(-1, num_rows, *values.shape[1:])

"""Other projects as candidates, and plain torch through its compiler."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .baselines import KL_COEF, Result, gradients, naive_logprobs, objective
from .cases import Inputs


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
        torch.ones(batch, inputs.labels.numel() // batch, device=inputs.hidden.device),
        inputs.advantages.view(batch, -1)[:, 0],
        ref_per_token_logps=inputs.ref_logprobs.view(batch, -1),
    )
    return Result(loss, *gradients(loss, inputs))


def liger_scaled(inputs: Inputs) -> Result:
    """Liger's fused linear and scaled cross entropy: its own kernel on sm_90, chunks elsewhere."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
        inputs.hidden,
        inputs.weight,
        inputs.labels,
        temperature=inputs.case.temperature,
        return_entropy=True,
    )
    loss = objective(inputs, -nll, entropy)
    return Result(loss, *gradients(loss, inputs), -nll.detach(), entropy.detach())


class Compiled:
    """Plain torch through torch.compile; the products stay calls of the vendor's library."""

    def __init__(self) -> None:
        self.logprobs: Callable[[Inputs], tuple[Tensor, Tensor]] | None = None

    def __call__(self, inputs: Inputs) -> Result:
        """Forward and backward."""
        if self.logprobs is None:
            self.logprobs = torch.compile(naive_logprobs, dynamic=False)
        logprobs, entropy = self.logprobs(inputs)
        loss = objective(inputs, logprobs, entropy)
        return Result(loss, *gradients(loss, inputs), logprobs.detach(), entropy.detach())

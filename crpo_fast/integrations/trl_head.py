"""The head of a transformers model that TRL trains: logprobs, or a whole loss, without logits.

TRL calls a model with ``fused_lm_head=True`` and reads ``log_probs`` and ``entropy`` of what comes
back. `install_head` answers such calls with the kernels, for the policy, its old logprobs and the
reference alike; every other call (generation) goes on to the forward that was there.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.utils import ModelOutput

from crpo_fast.policy import UnsupportedModelError, head_options
from crpo_kernels import linear_logprobs

# (hidden [B, L, D], weight [V, D], labels [B, L], **head arguments) -> HeadOutput
HeadFunction = Callable[..., "HeadOutput"]


@dataclass
class HeadOutput(ModelOutput):
    """What TRL reads of a forward, and the fused loss.

    Attributes:
        loss: [] with gradients, where a whole loss was asked for.
        log_probs: [B, L] of the labels, nats; 0 where there is none. Constant beside a loss.
        entropy: [B, L] nats, the same.
        aux_loss: never there; TRL asks for it by name.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    aux_loss: Tensor | None = None


def install_head(
    model: Any, *, temperature: float, in_fp32: bool = False, options: Mapping[str, Any]
) -> None:
    """Let ``model(..., labels=labels, fused_lm_head=True, compute=None)`` return a `HeadOutput`.

    Args:
        model: a transformers causal LM, not wrapped by anything.
        temperature: divides the logits.
        in_fp32: run the head in fp32 and outside autocast (TRL's ``cast_lm_head_to_fp32``).
        options: further keyword arguments of the kernels, such as ``workspace_bytes``.

    Raises:
        UnsupportedModelError: the head does something that the kernels do not.
    """
    arguments = {"temperature": temperature, **head_options(model), **options}
    plain = model.forward

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,  # [B, L + 1] not shifted
        compute: HeadFunction | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            return plain(*args, **({} if labels is None else {"labels": labels}), **kwargs)
        assert labels is not None, "there is no logprob without a label"
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]  # [B, L, D]
        head = self.get_output_embeddings()
        _check_weight(head.weight)
        bias = {} if head.bias is None else {"bias": head.bias}
        compute = logprobs if compute is None else compute
        if not in_fp32:
            return compute(hidden, head.weight, labels[:, 1:], **bias, **arguments)
        with torch.autocast(hidden.device.type, enabled=False):
            return compute(hidden.float(), head.weight, labels[:, 1:], **bias, **arguments)

    model.forward = types.MethodType(forward, model)


def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, **head: Any) -> HeadOutput:
    """Differentiable logprobs and entropies of the labels."""
    out = linear_logprobs(hidden, weight, labels.flatten(), **head)
    return HeadOutput(
        log_probs=out.logprobs.view(labels.shape), entropy=out.entropy.view(labels.shape)
    )


def _check_weight(weight: Tensor) -> None:
    if isinstance(weight, DTensor) or hasattr(weight, "ds_id"):
        raise UnsupportedModelError(
            f"lm_head: expected a whole weight, got one that is sharded ({type(weight).__name__}). "
            "Train with DistributedDataParallel or DeepSpeed ZeRO stages 0 to 2, or shard the "
            "blocks alone."
        )

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

from crpo_fast.config import ConfigError
from crpo_fast.integrations.causal_lm import add_fused_head
from crpo_kernels import linear_logprobs

# (hidden [B, L, D], weight [V, D], labels [B, L], **head arguments) -> HeadOutput
HeadFunction = Callable[..., "HeadOutput"]
OPTIONS = ("backend", "workspace_bytes")  # of the kernels, for a user to choose


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
        model: a transformers causal LM, or a peft model around one. TRL's reference is prepared
            already: it loses its own autocast (TRL calls it under one) and stays compiled.
        temperature: divides the logits.
        in_fp32: run the head in fp32 and outside autocast (TRL's ``cast_lm_head_to_fp32``).
        options: further keyword arguments of the kernels, among `OPTIONS`.

    Raises:
        ConfigError: another option, or weights that are sharded already.
        UnsupportedModelError: the head does something that the kernels do not.
    """
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise ConfigError(
            f"kernel_options: expected names among {', '.join(OPTIONS)}, got {unknown[0]!r}. "
            "Leave it out."
        )
    model = _inner(model)
    head = model.get_output_embeddings()
    for_generation = head.forward
    vars(head).pop("forward", None)  # TRL's cast to fp32, which takes no function
    add_fused_head(model)
    fused_head, plain = head.forward, model.forward

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(
        self: Any,  # noqa: ARG001  (a method of the model)
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,  # [B, L + 1] not shifted
        compute: HeadFunction | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            return plain(*args, **({} if labels is None else {"labels": labels}), **kwargs)
        assert labels is not None, "there is no logprob without a label"

        def run(hidden: Tensor, weight: Tensor, **found: Any) -> HeadOutput:
            arguments = {"temperature": temperature, **found, **options}
            function, hidden = compute or logprobs, hidden[:, :-1]  # [B, L, D]
            if not in_fp32:
                return function(hidden, weight, labels[:, 1:], **arguments)
            with torch.autocast(hidden.device.type, enabled=False):
                return function(hidden.float(), weight, labels[:, 1:], **arguments)

        return plain(*args, head=run, **kwargs)

    def head_forward(hidden: Tensor, *arguments: Any) -> Any:
        return fused_head(hidden, *arguments) if arguments else for_generation(hidden)

    model.forward = types.MethodType(forward, model)
    head.forward = head_forward


def _inner(model: Any) -> Any:
    """The transformers model in accelerate's and peft's wrappers.

    Raises:
        ConfigError: a part of its head is on other ranks.
    """
    from accelerate.utils import extract_model_from_parallel  # TRL brings it

    inner: Any = extract_model_from_parallel(
        model, keep_fp32_wrapper=False, keep_torch_compile=False
    )
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    weight = getattr(inner.get_output_embeddings(), "weight", None)
    if isinstance(weight, DTensor) or (isinstance(weight, Tensor) and weight.dim() != 2):
        raise ConfigError(
            "model: expected whole weights when the trainer is made, got a part of the head (the "
            "reference's under FSDP, any under ZeRO-3). Set GRPOConfig(beta=0.0) or pass "
            "peft_config, which need no second model, or use DDP or ZeRO-2."
        )
    return inner


def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, **head: Any) -> HeadOutput:
    """Differentiable logprobs and entropies of the labels."""
    out = linear_logprobs(hidden, weight, labels.flatten(), **head)
    return HeadOutput(
        log_probs=out.logprobs.view(labels.shape), entropy=out.entropy.view(labels.shape)
    )

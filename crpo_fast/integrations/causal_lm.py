"""A transformers causal LM for any trainer: its forward ends in the fused loss, not in logits.

    add_fused_head(model)            # once, before the model is sharded, wrapped or compiled

    def loss_of(hidden, weight, **options):                    # [B, L, D], [V, D]
        return linear_policy_loss(hidden, weight, labels, advantages=..., token_weights=...,
                                  **options)

    loss, stats = model(input_ids, attention_mask=mask, head=loss_of)

``model`` is the outermost wrapper. The call goes through every wrapper's ``__call__`` down to that
of the head, so that all their hooks run: gradients are reduced, sharded weights are whole and in
the compute dtype. ``lm_head.weight`` read from outside is not: under FSDP2 it is a DTensor, which
the loss refuses, and its ``full_tensor()`` gives wrong gradients without an error.

Per-token vectors travel inside the function, as FSDP casts the float tensors among a forward's
arguments to the compute dtype. ``options`` are the head's bias, logit scale, soft cap and LoRA.

DDP, FSDP and DeepSpeed average gradients over ranks: multiply token_weights and entropy_weights,
whose denominators count the tokens of all ranks, by the number of ranks.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from crpo_fast.lora import copies_of
from crpo_fast.model_check import UnsupportedModelError, head_options

HeadFunction = Callable[..., Any]  # (hidden [B, L, D], weight [V, D], **options) -> tensors
_OF_LOGITS = ("labels", "logits_to_keep")  # arguments of a forward that make or cut logits


def add_fused_head(model: Any) -> Any:
    """Give ``model.forward`` the keyword ``head``; without it nothing changes. Returns ``model``.

    Parameters, names, tying, ``generate``, ``save_pretrained`` and the signature stay as they are.
    Called twice it does nothing.

    Args:
        model: a transformers causal LM, or a peft model around one. Adapters may come later, on
            the head too; wrappers must.

    Raises:
        UnsupportedModelError: logits are not scale * (hidden W^T + bias), capped or not.
        ValueError: ``model`` is wrapped or sharded already.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from crpo_kernels import linear_logprobs
        >>> sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8}
        >>> model = LlamaForCausalLM(LlamaConfig(
        ...     **sizes, num_hidden_layers=1, num_attention_heads=2))
        >>> ids, labels = torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, -100]])
        >>> def logprobs(hidden, weight, **options):             # [B, L, D], [V, D]
        ...     return linear_logprobs(hidden, weight, labels, **options).logprobs
        >>> found = add_fused_head(model)(ids, head=logprobs)    # [B * L]
        >>> plain = model(ids).logits.log_softmax(-1)            # the same model without ``head``
        >>> bool((found[:2] - plain[0, [0, 1], [2, 3]]).abs().max() < 1e-5)
        True
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(getattr(inner, "forward", None), "crpo_options"):
        return model
    function = getattr(getattr(inner, "forward", None), "__func__", None)
    if function is None or not hasattr(inner, "get_output_embeddings"):
        raise ValueError(
            f"model: expected a transformers causal LM, got {type(model).__name__}. Call "
            "add_fused_head before torch.compile, DDP, FSDP and DeepSpeed."
        )
    head = inner.get_output_embeddings()
    if hasattr(head, "base_layer"):
        raise ValueError(
            f"model: expected an output head without adapters, got {type(head).__name__}. Call "
            "add_fused_head before peft: the loss then takes the adapter along."
        )
    options = head_options(inner)
    for linear in copies_of(head):
        if type(linear).forward is not nn.Linear.forward:
            raise UnsupportedModelError(
                f"model: expected a plain nn.Linear as output head, got {type(linear).__name__}, "
                "which computes in its own way. Leave the head out of quantisation."
            )
        linear.forward = types.MethodType(_head_forward, linear)
    inner.forward = types.MethodType(_with_head(function, options), inner)
    return model


def _head_forward(
    self: nn.Linear, hidden: Tensor, head: HeadFunction | None = None, options: Any = None
) -> Any:
    """The head's forward: logits, or ``head`` of the weight that its wrapper made whole.

    Raises:
        ValueError: no wrapper did, or lm_head with an adapter is an FSDP2 unit of its own.
    """
    if head is None:
        return type(self).forward(self, hidden)
    if isinstance(self.weight, DTensor):
        raise ValueError(
            "model: expected a whole head, got a DTensor: the FSDP2 unit that owns it did not run. "
            "Call model(...), not model.forward(...); with an adapter on the head, fully_shard the "
            "blocks and the model, and not the head."
        )
    if self.weight.dim() != 2:
        raise ValueError(
            f"model: expected a whole head [V, D], got a shard of {list(self.weight.shape)}. A "
            "tied embedding must not be an FSDP1 unit of its own: wrap the blocks alone."
        )
    bias = {} if self.bias is None else {"bias": self.bias}
    return head(hidden, self.weight, **bias, **options)


def _with_head(plain: Callable[..., Any], options: dict[str, float]) -> Callable[..., Any]:
    """``plain``, a model's forward, with one argument more, under the signature of ``plain``.

    ``generate`` looks there for what a model accepts.
    """

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, head: HeadFunction | None = None, **inputs: Any) -> Any:
        if head is None:
            return plain(self, *args, **inputs)
        inputs = {name: value for name, value in inputs.items() if value is not None}
        for name in _OF_LOGITS:
            if name in inputs:
                raise ValueError(
                    f"{name}: expected none beside head, which makes no logits. Use it inside the "
                    "function that head names."
                )
        inputs |= {"return_dict": True, "use_cache": False}
        hidden = self.base_model(*args, **inputs).last_hidden_state  # [B, L, D]
        output = self.get_output_embeddings()
        adapter = _adapter(output)
        if adapter:
            output = output.base_layer
        return output(hidden, head, {**options, **adapter})

    forward.crpo_options = options  # type: ignore[attr-defined]
    return forward


def _adapter(head: Any) -> dict[str, tuple[Tensor, Tensor, float]]:
    """``lora_head`` of peft's LoRA layer around the head; nothing without one.

    Raises:
        UnsupportedModelError: an adapter that the loss cannot take along.
    """
    if not hasattr(head, "base_layer") or head.disable_adapters or head.merged:
        return {}
    names = [name for name in head.active_adapters if name in getattr(head, "lora_A", {})]
    is_plain = len(names) == 1 and not getattr(head, "lora_variant", None)
    if not is_plain or head.lora_A[names[0]].bias is not None:
        raise UnsupportedModelError(
            f"model: expected one plain LoRA adapter on the head, got {type(head).__name__} with "
            f"{list(head.active_adapters)}. Take lm_head out of target_modules, or activate one."
        )
    name = names[0]
    dropout = head.lora_dropout[name]
    if head.training and getattr(dropout, "p", 0.0) > 0.0:
        raise UnsupportedModelError(
            f"model: expected no dropout in the head's adapter, got {dropout.p}. Pass "
            "lora_dropout=0.0, or take lm_head out of target_modules."
        )
    return {"lora_head": (head.lora_A[name].weight, head.lora_B[name].weight, head.scaling[name])}

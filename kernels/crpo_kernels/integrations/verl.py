"""verl's fused linear-for-PPO on our kernels: log-probabilities and entropies for its losses.

    (hidden_states, vocab_weights, input_ids, temperature) -> (log_probs, entropy)

With ``use_fused_kernels`` verl's models compute these two in their forward and no logits. `patch`
replaces both of its implementations (`FusedLinearForPPO`, in torch, and `linear_cross_entropy`, in
Triton) in this process; `verl_patch` does so on import, which a line of verl's config asks for.
Signatures: verl 0.9.1, ``verl/utils/experimental/torch_functional.py`` and
``verl/utils/kernel/linear_cross_entropy.py``. Four things differ:

    entropy       fp32, where verl's torch version rounds it to the dtype of hidden_states
    d_weight      added up in fp32, where verl's torch version adds chunks in that of the weight
    temperature   also a tensor: one value, one for each row of input_ids, or one for each token
    shape         that of input_ids, where verl's Triton version returns [B * S]

verl gives its fused heads neither bias nor logit scale nor soft cap: models that have one (Gemma 2,
Cohere, Granite) are wrong with ``use_fused_kernels``, with these functions as with verl's own.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from crpo_kernels.api import linear_logprobs

TESTED = "0.9.1"  # of verl
BACKENDS = ("torch", "liger")  # verl's own names; here all of them mean backend="auto"


def fused_linear_for_ppo(
    hidden_states: Tensor,  # [T, D] or [B, S, D]
    vocab_weights: Tensor,  # [V, D]
    input_ids: Tensor,  # [T] or [B, S] already rolled: the token that each state predicts
    temperature: Tensor | float = 1.0,
    *,
    backend: str = "auto",
    workspace_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token of ``input_ids`` and the entropy, of logits / temperature.

    Args:
        hidden_states: ``[T, D]`` or ``[B, S, D]`` fp32, bf16 or fp64.
        vocab_weights: ``[V, D]`` in the same dtype, or any under autocast.
        input_ids: ``[T]`` or ``[B, S]`` labels in 0..V - 1; -100 gives 0 in both results.
        temperature: a number, or a tensor of one value, of one for each of the B sequences, or of
            one for each token.
        backend: as in `linear_logprobs`.
        workspace_bytes: as in `linear_logprobs`.

    Returns:
        log_probs, entropy: both in the shape of ``input_ids``, fp32 (fp64 for fp64), in nats,
        differentiable once in hidden_states and vocab_weights.

    Raises:
        ValueError: shapes that disagree, or what `linear_logprobs` refuses, such as a sharded
            weight.

    Example:
        >>> import torch
        >>> weight = torch.log(torch.tensor([[1.0], [9.0]]))     # p = 1/4, 3/4 at temperature 2
        >>> found = fused_linear_for_ppo(torch.ones(1, 1), weight, torch.tensor([1]), 2.0)
        >>> [round(value.item(), 4) for value in found]          # log 3/4, H
        [-0.2877, 0.5623]
    """
    if input_ids.shape != hidden_states.shape[:-1]:
        raise ValueError(
            f"input_ids: expected {list(hidden_states.shape[:-1])}, one id for each row of "
            f"hidden_states, got {list(input_ids.shape)}. Pass the ids rolled by one, unsliced."
        )
    out = linear_logprobs(
        hidden_states,
        vocab_weights,
        input_ids,
        temperature=_per_token(temperature, input_ids),
        backend=backend,
        workspace_bytes=workspace_bytes,
    )
    return out.logprobs.view(input_ids.shape), out.entropy.view(input_ids.shape)


def _per_token(temperature: Tensor | float, input_ids: Tensor) -> Tensor | float:  # [T] or a number
    """A temperature as `linear_logprobs` takes it."""
    if not isinstance(temperature, Tensor) or temperature.numel() in (1, input_ids.numel()):
        return temperature
    if input_ids.dim() == 2 and temperature.shape in ((len(input_ids),), (len(input_ids), 1)):
        return temperature.reshape(-1, 1).expand(input_ids.shape)  # [B, S]
    raise ValueError(
        f"temperature: expected a number or a tensor of 1, B or B x S values for input_ids "
        f"{list(input_ids.shape)}, got {list(temperature.shape)}. Pass one value for every row of "
        "input_ids."
    )


class FusedLinearForPPO(nn.Module):
    """The module of this name in verl: `fused_linear_for_ppo` as ``forward``.

    Args:
        chunk_size: verl's rows of a chunk. No result depends on it and nothing here reads it: our
            chunks fill the default ``workspace_bytes``.
        impl_backend: "torch" or "liger", as verl's config names its own implementations; ours is
            chosen by the device.

    Raises:
        ValueError: another ``impl_backend``.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()
        if impl_backend not in BACKENDS:
            raise ValueError(
                f"impl_backend: expected one of {list(BACKENDS)}, got {impl_backend!r}. Set "
                "actor_rollout_ref.model.fused_kernel_options.impl_backend=torch."
            )
        self.chunk_size = chunk_size
        self.impl_backend = impl_backend

    def forward(
        self,
        hidden_states: Tensor,  # [T, D] or [B, S, D]
        vocab_weights: Tensor,  # [V, D]
        input_ids: Tensor,  # [T] or [B, S]
        temperature: Tensor | float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """`fused_linear_for_ppo`: its shapes, units and errors."""
        return fused_linear_for_ppo(hidden_states, vocab_weights, input_ids, temperature)


def linear_cross_entropy(
    hidden: Tensor,  # [T, D] or [B, S, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [T] or [B, S]
    temperature: Tensor | float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """The Triton function of this name in verl: `fused_linear_for_ppo` with two more arguments.

    Args:
        hidden: as hidden_states there.
        weight: as vocab_weights there.
        labels: as input_ids there.
        temperature: as there.
        reduction: "none".
        dist_process_group: None, or a group of one rank.

    Returns:
        log_probs, entropy: as there.

    Raises:
        ValueError: a reduction, which verl's own training never asks for.
        NotImplementedError: a tensor-parallel group of several ranks (verl on Megatron).
    """
    if reduction != "none":
        raise ValueError(
            f"reduction: expected 'none', got {reduction!r}. Reduce the log_probs that come back."
        )
    if dist_process_group is not None and dist_process_group.size() > 1:
        raise NotImplementedError(
            "dist_process_group: expected None or one rank, got "
            f"{dist_process_group.size()}. Leave verl's Megatron engine its own kernel: do not "
            "call patch() there."
        )
    return fused_linear_for_ppo(hidden, weight, labels, temperature)


# module of verl -> name there, ours, and the parameters that both must have
_TARGETS: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "verl.utils.experimental.torch_functional": (
        *("FusedLinearForPPO", FusedLinearForPPO),
        ("self", "hidden_states", "vocab_weights", "input_ids", "temperature"),
    ),
    "verl.utils.kernel.linear_cross_entropy": (
        *("linear_cross_entropy", linear_cross_entropy),
        ("ctx", "hidden", "weight", "labels", "temperature", "reduction", "dist_process_group"),
    ),
}
_originals: dict[str, Any] = {}


def patch() -> None:
    """Put ours in the place of both of verl's fused heads, in this process; again does nothing.

    verl looks its heads up in every forward, so that models made earlier have them too.

    Raises:
        RuntimeError: this verl's functions take other arguments than the tested ones; nothing is
            replaced.
    """
    if _originals:
        return
    found = {module: _original(module) for module in _TARGETS}
    for module, original in found.items():
        name, ours, _ = _TARGETS[module]
        setattr(importlib.import_module(module), name, ours)
        _originals[module] = original


def unpatch() -> None:
    """Give verl its own functions back."""
    while _originals:
        module, original = _originals.popitem()
        setattr(importlib.import_module(module), _TARGETS[module][0], original)


def _original(module: str) -> Any:
    """The function or class of verl, if it takes what ours takes."""
    name, _, wanted = _TARGETS[module]
    original = getattr(importlib.import_module(module), name, None)
    owner: Any = getattr(original, "__self__", original)  # of a bound `apply`: its Function
    forward: Callable[..., Any] | None = getattr(owner, "forward", None)
    found = tuple(inspect.signature(forward).parameters) if forward is not None else None
    if found != wanted:
        raise RuntimeError(
            f"verl: expected {module}.{name} with the parameters {wanted}, as in verl {TESTED}, "
            f"got {found}. Install verl=={TESTED}, or do without patch() and verl_patch."
        )
    return original

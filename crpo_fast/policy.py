"""The policy: a transformers causal LM, sharded, whose head computes the fused loss.

The head's *instance* forward is patched: without ``compute`` it is the plain projection
(generation), with it the fused function gets the unsharded weight. Everything goes through
``__call__``, so that FSDP's hooks fire; reaching for ``lm_head.weight`` from outside gives silently
wrong gradients at more than one rank.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import embedding

from crpo_fast import attention, distributed, lora
from crpo_fast.distributed import World
from crpo_fast.model_check import check_packing, head_options
from crpo_fast.packing import MicroBatch
from crpo_fast.score_head import ERRORS, exact_differences
from crpo_kernels import linear_logprobs

if TYPE_CHECKING:
    from crpo_fast.loss import LossSpec

# compute(hidden [R, D], weight [V, D], **head arguments) -> tensor or pytree of tensors
HeadFunction = Callable[..., Any]


@dataclass(frozen=True)
class Policy:
    """A sharded model, which keeps its parameters, tying, ``generate`` and ``save_pretrained``."""

    model: Any  # PreTrainedModel with the method of install_head
    world: World
    head_options: dict[str, float] = field(default_factory=dict)

    def __call__(self, batch: MicroBatch, compute: HeadFunction) -> Any:
        """``compute`` on the hidden states of the batch's rows; see ``HeadFunction``."""
        return self.model.policy_forward(batch, compute, self.head_options)

    def logprobs(self, batch: MicroBatch, temperature: float, **options: Any) -> Tensor:
        """[R] fp32 logprobs of the labels, nats; no gradients, and no stale weights after it."""
        return self.score(batch, temperature, **options)[0]

    @torch.no_grad()
    def score(
        self,
        batch: MicroBatch,
        temperature: float,
        *,
        head_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`logprobs`, and with ``head_dtype`` how far some of them are from exact ones, nats."""
        labels = batch.labels

        def compute(hidden: Tensor, weight: Tensor, **head: Any) -> tuple[Tensor, Tensor | None]:
            rows = range(labels.numel())  # all count: nobody has to ask a GPU
            shared: dict[str, Any] = {"temperature": temperature, **head, **options}
            out = linear_logprobs(
                hidden, weight, labels, rows=rows, head_dtype=head_dtype, **shared
            )
            errors = None
            if head_dtype is not None:
                errors = exact_differences(out.logprobs, hidden, weight, labels, **shared)
            return out.logprobs, errors

        with self._evaluating():
            return self(batch, compute)

    def with_logprobs(self, batch: MicroBatch, name: str, spec: LossSpec) -> MicroBatch:
        """``batch`` with the vector ``name``: this policy's logprobs, as ``spec`` scores."""
        logprobs, errors = self.score(batch, spec.temperature, **spec.score_options)
        found = {name: logprobs} if errors is None else {name: logprobs, ERRORS[name]: errors}
        return batch.with_vectors(**found)

    def check_packing(self) -> None:
        """Two forwards of a few tokens; see ``model_check.check_packing``. A collective."""
        name = type(self.model).__name__
        with self._evaluating():
            check_packing(lambda batch, compute: self(batch.to(self.world.device), compute), name)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Without dropout, an adapter's too; afterwards no stale gathered weights are left."""
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)
            distributed.reshard(self.model)

    def gathered(self) -> AbstractContextManager[nn.Module]:
        """The whole model on every rank, for generation."""
        return distributed.gathered(self.model)


@dataclass(frozen=True)
class BasePolicy(Policy):
    """The base model of an adapted policy: the KL reference without a copy. It only scores."""

    def __call__(self, batch: MicroBatch, compute: HeadFunction) -> Any:
        """As ``Policy``, with the adapters off."""
        with lora.switched_off(self.model):
            return super().__call__(batch, compute)


def create(
    model: Any,
    world: World,
    *,
    compute_dtype: torch.dtype,
    activation_checkpointing: bool = False,
    freeze_head: bool = False,
    trainable: bool = True,
) -> Policy:
    """Patch the head, then shard ``model`` in place.

    Raises:
        UnsupportedModelError: the model makes its logits in a way the loss does not know.
    """
    model.to(world.device)
    with lora.switched_off(model):
        options = head_options(model)
    model.requires_grad_(trainable)
    if lora.settings_of(model) is not None:
        lora.freeze_base(model)
    if freeze_head:
        model.get_output_embeddings().requires_grad_(False)
    if activation_checkpointing and trainable:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    install_head(model)
    distributed.shard(model, world, methods=("policy_forward",), compute_dtype=compute_dtype)
    model.train(trainable)
    return Policy(model, world, options)


def copy_weights(source: Policy, target: Policy) -> None:
    """Copy the local shards of ``source`` into the equally sharded ``target``, in its dtype."""
    pairs = zip(source.model.parameters(), target.model.parameters(), strict=True)
    with torch.no_grad():
        for a, b in pairs:
            _local(b).copy_(_local(a))


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def install_head(model: Any) -> None:
    """Give the head a second mode and the model the method ``policy_forward``."""
    head = model.get_output_embeddings()
    plain = head.forward

    def forward(self: nn.Linear, hidden: Tensor, compute: Any = None, options: Any = None) -> Any:
        if compute is None:
            return plain(hidden)
        assert not isinstance(self.weight, DTensor), "the head must run inside its FSDP unit"
        bias = {} if self.bias is None else {"bias": self.bias}
        return compute(hidden, self.weight, **bias, **lora.head_factors(self), **options)

    def policy_forward(self: Any, batch: MicroBatch, compute: Any, options: Any) -> Any:
        # the batch is one opaque leaf: FSDP casts every float tensor that it finds in the arguments
        implementation, packed = self.config._attn_implementation, batch.attention_mask is None
        where = attention.flash_bounds(implementation, batch.position_ids) if packed else {}
        hidden = self.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,  # with a cache, packed sequences would see each other
            **where,
        ).last_hidden_state  # [B, L, D]
        # rows repeat where prompts are shared; an indexed sum over threads would vary in its last
        # bits from run to run, and an embedding's does not
        hidden = embedding(batch.rows, hidden.flatten(0, 1))  # [R, D]
        return self.get_output_embeddings()(hidden, compute, options)

    head.forward = types.MethodType(forward, head)
    model.policy_forward = types.MethodType(policy_forward, model)

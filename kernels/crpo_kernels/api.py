"""The two public functions: per-token log-probabilities of a head, and the fused policy loss.

    logits_t = softcap(logit_scale * (hidden_t W^T + bias)) / temperature_t      some rows at once
    linear_logprobs      log p(label), entropy and lse of every row, differentiable: your own loss
    linear_policy_loss   sum_t token_weights_t * [rho_t * policy_term + kl_coef * kl]
                         + sum_t entropy_weights_t * entropy_t + sum_t z_loss_weights_t * lse_t^2

Both take the head the same way:

    hidden           [T, D] fp32, bf16 or fp64; leading dimensions are flattened, any strides
    weight           [V, D] the lm_head's weight, same dtype (or any under autocast)
    labels           [T] int64 token ids, already shifted; IGNORE_INDEX rows return 0 everywhere.
                     Ids outside [0, V) are refused on the CPU; on a GPU, where reading them stops
                     the host, with CRPO_CHECK_LABELS=1 in the environment
    bias             [V] added to the products
    temperature      divides the logits, in fp32; a float or fp32 [T], above 0
    logit_scale      multiplies products and bias
    logit_softcap    c of c * tanh(x / c), after the scale and before the temperature; None: no cap
    rows             host-side indices of the rows that count; others return 0. On a GPU this spares
                     the one synchronisation of the call, and every listed row must carry a label;
                     torch.arange(T) says that all do. While a CUDA graph is captured: on the device
    backend          "triton" (bf16 and fp32 on CUDA and ROCm; on a CPU in Triton's interpreter,
                     TRITON_INTERPRET=1), "torch" (any device), "dense" (the oracle: all logits,
                     plain autograd), "auto": triton where it can run, else torch; the logger
                     crpo_kernels says which and why
    mode             "one_pass": gradients are made while a chunk's logits are hot (6NVD work).
                     "two_pass": after the statistics of all rows; 6NVD where e^(z - m) of all rows
                     (torch on a CPU: their logits) fits the workspace and is kept until the first
                     backward, else 8NVD, as is every further backward.
                     "auto": one_pass wherever the coefficients are known before the head runs, and
                     for off-policy gspo where chunks of whole sequences fit and cost no more: give
                     cu_seqlens (and rows) on the CPU, a GPU is not asked for them. Logged once
                     "fused": `linear_logprobs` without gradients in one Triton kernel
    workspace_bytes  bound on logits, gradient factors and scratch together, refused below what one
                     row needs; a fp32 d_weight that accumulates counts as a gradient. None: 1 GiB
                     on a CPU, 4 V D + 8192 V bytes on a GPU, or half of what is free if less;
                     a number where torch.utils.checkpoint runs the call again, as that may change.
                     The fused kernel makes no logits: it only bounds what it gathers of hidden
    lora_head        (A, B, scaling) of a low-rank adapter, A [r, D], B [V, r], of any floating
                     dtype: adds scaling * (hidden A^T) B^T to the products. A and B get gradients,
                     weight only if it asks for one; for a frozen one no V x D tensor is made
                     (4NVD + 6NVr work). The fused kernel does not take it
    process_group    ranks that share one head (`vocab_parallel`): each passes its own rows of the
                     vocabulary as weight [V of this rank, D], bias and B, and the same of all else;
                     labels stay ids of the whole vocabulary. The loss and every result are those
                     of the whole on each rank, d_hidden is complete, d_weight and d_bias are the
                     rank's own. One all-gather of [4, chunk rows] a chunk, one all-reduce of
                     d_hidden. No "dense" backend, and no operator for torch.compile
    vocab_start      rows of the vocabulary before those of this rank's weight; shards may differ in
                     size and tile the vocabulary. Padded: pass weight[:valid], empty where none is

`linear_policy_loss` alone takes the vectors ``[T]`` of its signature (of any dtype: they become
fp32, fp64 with fp64 inputs; constants for autograd; logprobs in nats), and

    spec             `ObjectiveSpec`: policy term, clip bounds, KL estimator, mismatch correction
    cu_seqlens       [B + 1] int32, where sequences begin and end: 0 first, T last

    >>> hidden = torch.ones(1, 1)                                    # one token, D = 1
    >>> weight = torch.log(torch.tensor([[1.0], [3.0]]))             # V = 2: p = 1/4, 3/4
    >>> out = linear_logprobs(hidden, weight, torch.tensor([1]))
    >>> [round(value.item(), 4) for value in out]                    # log 3/4, H, log 4, in nats
    [-0.2877, 0.5623, 1.3863]
    >>> linear_logprobs(hidden, weight, torch.tensor([-100])).logprobs
    tensor([0.])
    >>> one = torch.ones(1)
    >>> loss, stats = linear_policy_loss(
    ...     hidden, weight, torch.tensor([1]), advantages=2 * one, token_weights=one,
    ...     entropy_weights=0.5 * one)
    >>> round(loss.item(), 4)                                        # -2 + 0.5 * 0.5623
    -1.7188
    >>> stats.sums()["ratio"].tolist()                               # sum, count
    [1.0, 1.0]

Source: the objective is GRPO's (arXiv 2402.03300, equation 3) with the per-stage entropy term of
CRPO (2606.13176); gradients in one pass: docs/kernels.md.

Results are fp32 (fp64 for fp64 inputs). On a CPU bf16 products are rounded to bf16, as in any bf16
head there; everything after them is fp32. Inputs are never changed. In a graph of torch.compile a
call is one operator (`traced`), but for backend="dense", which breaks the graph.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .call import HeadCall
from .lora import rank_of
from .spec import Logprobs, ObjectiveSpec, RunOptions, TokenStats
from .traced import HeadInputs, traced_logprobs, traced_policy_loss
from .validate import check_objective
from .vocab_parallel import shard_request

UNTRACED_REASON = (
    "backend: 'dense' has no operator that torch.compile could put into a graph, nor has a call "
    "with a process_group. Pass backend='auto' and no process_group, or compile without "
    "fullgraph=True."
)


def linear_logprobs(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [T] int64
    *,
    bias: Tensor | None = None,  # [V]
    temperature: Tensor | float = 1.0,  # [T] or one for all
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    rows: Tensor | Sequence[int] | None = None,
    backend: str = "auto",
    mode: str = "auto",
    workspace_bytes: int | None = None,
    process_group: object = None,
    vocab_start: int = 0,
    head_dtype: torch.dtype | None = None,
    lora_head: tuple[Tensor, Tensor, float] | None = None,  # A [r, D], B [V, r], scaling
) -> Logprobs:
    """The log-probability of each label, the entropy and the log-sum-exp, without all logits.

    Arguments as in the module's docstring. ``mode="one_pass"`` needs the loss inside
    (`linear_policy_loss`) and is refused when a gradient is asked for. Without a gradient
    ("scoring") "auto" takes the fused kernel or the chunk loop, whichever is faster by what is
    known of the device (`scorer`); "fused" insists on the first, the other names on the second.

    ``head_dtype=torch.float8_e4m3fn`` scores with weight and hidden rounded to eight bits, each row
    by its own scale (`quantised`): approximate logprobs, to be compared with exact ones before they
    are trusted. Each call quantises the weight anew (the chunk loop: each chunk of rows); the fused
    kernel gets a copy of V D bytes, which is no part of ``workspace_bytes``.

    Returns:
        `Logprobs` of ``[T]`` in nats, differentiable once in hidden, weight, bias, A and B through
        any of the three.

    Raises:
        ValueError: an argument that cannot be right; the message says what to pass.
    """
    transform = (temperature, logit_scale, logit_softcap)
    inputs = HeadInputs(hidden, weight, labels, bias, transform, rows, lora_head)
    run = RunOptions(backend, mode, workspace_bytes, head_dtype)
    where = (process_group, vocab_start)
    if torch.compiler.is_compiling() and backend != "dense" and process_group is None:
        shard_request(*where, run)
        return traced_logprobs(inputs, run)
    return _outside_graphs(_logprobs, inputs, run, where)


def _logprobs(inputs: HeadInputs, run: RunOptions, where: tuple[object, int]) -> Logprobs:
    options = ("linear_logprobs", *_head_options(inputs))
    call = HeadCall(*inputs, request=shard_request(*where, run, *options))
    call.plan_logprobs(run, any(call.needs))
    outputs, _ = call.logprobs()
    return Logprobs(*(call.scatter(value) for value in outputs))


def linear_policy_loss(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [T] int64
    *,
    advantages: Tensor | None = None,  # [T] may be None for "sft", which does not use them
    token_weights: Tensor,  # [T] `aggregation_weights`; weight 0 adds exactly 0
    entropy_weights: Tensor | None = None,  # [T] `stage_entropy_weights`; > 0 penalises entropy
    z_loss_weights: Tensor | None = None,  # [T]
    old_logprobs: Tensor | None = None,  # [T] at the start of the update; None: on-policy, ratio 1
    rollout_logprobs: Tensor | None = None,  # [T] of the engine that sampled, for rho_mode
    ref_logprobs: Tensor | None = None,  # [T] of the reference policy, for kl_coef
    spec: ObjectiveSpec = ObjectiveSpec(),  # noqa: B008  (frozen)
    cu_seqlens: Tensor | None = None,  # [B + 1] for gspo: whole sequences in one call
    bias: Tensor | None = None,  # [V]
    temperature: Tensor | float = 1.0,  # [T] or one for all
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    rows: Tensor | Sequence[int] | None = None,
    backend: str = "auto",
    mode: str = "auto",
    workspace_bytes: int | None = None,
    process_group: object = None,
    vocab_start: int = 0,
    lora_head: tuple[Tensor, Tensor, float] | None = None,  # A [r, D], B [V, r], scaling
) -> tuple[Tensor, TokenStats]:
    """The fused policy loss: sums, no means, because the weights hold every denominator.

    Arguments as in the module's docstring; T packed tokens, logprobs and entropies in nats.

    Returns:
        loss: ``[]``, differentiable once in hidden, weight, bias, A and B; all else is constant.
        stats: `TokenStats` of ``[T]``, detached.

    Raises:
        ValueError: an argument that cannot be right; the message says what to pass.

    Source:
        GRPO (arXiv 2402.03300, equation 3) with CRPO's stage entropy (2606.13176).
    """
    vectors = {
        "token_weights": token_weights,
        "advantages": advantages,
        "entropy_weights": entropy_weights,
        "z_loss_weights": z_loss_weights,
        "old_logprobs": old_logprobs,
        "rollout_logprobs": rollout_logprobs,
        "ref_logprobs": ref_logprobs,
    }
    transform = (temperature, logit_scale, logit_softcap)
    inputs = HeadInputs(hidden, weight, labels, bias, transform, rows, lora_head)
    run = RunOptions(backend, mode, workspace_bytes)
    where = (process_group, vocab_start)
    if torch.compiler.is_compiling() and backend != "dense" and process_group is None:
        shard_request(*where, run)
        return traced_policy_loss(inputs, run, vectors, spec, cu_seqlens)
    return _outside_graphs(_policy_loss, inputs, run, where, vectors, spec, cu_seqlens)


def _policy_loss(
    inputs: HeadInputs,
    run: RunOptions,
    where: tuple[object, int],
    vectors: dict[str, Tensor | None],
    spec: ObjectiveSpec,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, TokenStats]:
    check_objective(spec, {**vectors, "cu_seqlens": cu_seqlens})
    given = [name for name, vector in vectors.items() if vector is not None]
    options = ("linear_policy_loss", spec, given, *_head_options(inputs))
    call = HeadCall(*inputs, request=shard_request(*where, run, *options))
    return call.policy_loss(call.plan_loss(run, vectors, spec, cu_seqlens))


def _head_options(inputs: HeadInputs) -> tuple:
    """What ranks that share a head must all be told of it, but for tensors."""
    numbers = [x for x in inputs.transform if not isinstance(x, Tensor)]
    return (inputs.bias is None, inputs.rows is None, rank_of(inputs.lora_head), numbers)


def _outside_graphs(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``function`` as it is: traced piece by piece it would be slow.

    A frame that torch.compile has given up comes here too, so that nothing below is traced either.
    Where torch.compile was not even imported (which takes a second) nobody traces.
    """
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(msg=UNTRACED_REASON)
        return torch.compiler.disable(function)(*arguments)
    if "torch._dynamo" in sys.modules:
        return _untraced(function)(*arguments)
    return function(*arguments)


@cache
def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compiler.disable(function)

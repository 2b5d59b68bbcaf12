"""trl: chunked log-probabilities and entropies, and the same from logits by a Triton kernel."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.losses.baselines import Candidate, Result
from benchmarks.losses.cases import Inputs
from benchmarks.losses.needs import Needs

from .common import policy_result

CHUNK = 8192  # columns of the head; the rows of a chunk are its own constant, 4096
CHUNK_NOTE = "chunks of 4096 x 8192"
LOGITS_NOTE = "all logits exist in the dtype of the inputs"


def chunked_function() -> Any:
    """The autograd function of the trainer's loss."""
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction


def logits_function() -> Any:
    """The Triton kernel on logits."""
    from trl.kernels import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy


def chunked_arguments(inputs: Inputs) -> tuple[Any, ...]:
    """Its `forward` takes them in this order, `apply` no names."""
    return (
        inputs.hidden,
        inputs.weight,
        None,  # bias
        inputs.labels,
        inputs.case.temperature,
        CHUNK,
        None,  # softcap
        1.0,  # logit scale
        ("entropy",),
    )


def chunked(inputs: Inputs) -> Result:
    """TRL's chunked log-probabilities and its trainer's way of a loss on them."""
    logprobs, entropy, *_ = chunked_function().apply(*chunked_arguments(inputs))
    return policy_result(inputs, logprobs, entropy)


def chunked_scored(inputs: Inputs) -> Result:
    """The same without gradients."""
    with torch.no_grad():
        logprobs, entropy, *_ = chunked_function().apply(*chunked_arguments(inputs))
    return Result(logprobs=logprobs, entropy=entropy)


def logits_arguments(inputs: Inputs) -> dict[str, Any]:
    """The product, and what the kernel takes beside it."""
    logits = inputs.hidden @ inputs.weight.t()  # [T, V]
    return {"logits": logits, "index": inputs.labels, "temperature": inputs.case.temperature}


def on_logits(inputs: Inputs) -> Result:
    """The product, then the Triton kernel on all logits."""
    return policy_result(inputs, *logits_function()(**logits_arguments(inputs)))


def on_logits_scored(inputs: Inputs) -> Result:
    """The same without gradients."""
    with torch.no_grad():
        return Result(None, None, None, *logits_function()(**logits_arguments(inputs)))


def losses() -> list[Candidate]:
    """With both gradients."""
    needs, on_gpu = Needs("trl", chunked_function), Needs("trl", logits_function, device="cuda")
    return [
        Candidate("trl", "TRL chunked", chunked, needs=needs, note=CHUNK_NOTE),
        Candidate("trl_logits", "TRL Triton on logits", on_logits, needs=on_gpu, note=LOGITS_NOTE),
    ]


def scores() -> list[Candidate]:
    """Without gradients."""
    return [
        Candidate(
            "trl_scored",
            "TRL chunked, scoring only",
            chunked_scored,
            num_products=1,
            needs=Needs("trl", chunked_function),
            note=CHUNK_NOTE,
        ),
        Candidate(
            "trl_logits_scored",
            "TRL Triton on logits, scoring only",
            on_logits_scored,
            num_products=1,
            needs=Needs("trl", logits_function, device="cuda"),
            note=LOGITS_NOTE,
        ),
    ]

"""cut-cross-entropy: filtered, without the filter, and its torch.compile implementation.

Its `cce` leaves gradients of small probabilities out. Newer sources have a preset `cce_exact`
(no filter, fp32 accumulation); the release 25.1.1 on PyPI has `filter_eps=None` instead, which
drops the filter and keeps accumulating in the dtype of the inputs.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import replace
from typing import Any

import torch

from benchmarks.losses.baselines import Candidate, Result
from benchmarks.losses.cases import Inputs
from benchmarks.losses.needs import Needs

from .common import NO_ENTROPY, NO_TEMPERATURE, policy_result

DISTRIBUTION = "cut-cross-entropy"
HALVES = (torch.bfloat16, torch.float16)
NO_TERM = f"without the entropy term; {NO_TEMPERATURE}"


def linear_cross_entropy() -> Any:
    """The public function."""
    from cut_cross_entropy import linear_cross_entropy as function

    return function


def filtered() -> dict[str, Any]:
    """As it comes."""
    return {"impl": "cce"}


def exact() -> dict[str, Any]:
    """Without the filter: the preset where there is one."""
    names = ("cut_cross_entropy", "cut_cross_entropy.cce_utils")
    if all(importlib.util.find_spec(name) is not None for name in names):
        presets = importlib.import_module("cut_cross_entropy.cce_utils").CCEPresets
        if "cce_exact" in presets.names:
            return {"impl": "cce_exact"}
    return {"impl": "cce", "filter_eps": None}


def compiled() -> dict[str, Any]:
    """All logits, through torch.compile."""
    return {"impl": "torch_compile"}


class CutCrossEntropy:
    """One of its implementations with per-token losses, so that any objective of them can follow.

    Args:
        options: what is passed beside the tensors; asked for at the first call.
        has_gradients: whether to run backward.
    """

    def __init__(self, options: Any, *, has_gradients: bool = True) -> None:
        self.options, self.has_gradients = options, has_gradients

    def arguments(self, inputs: Inputs) -> dict[str, Any]:
        """What the function is called with."""
        tensors = {"e": inputs.hidden, "c": inputs.weight, "targets": inputs.labels}
        return {**tensors, "reduction": "none", **self.options()}

    def __call__(self, inputs: Inputs) -> Result:
        """Forward, and backward where gradients are wanted."""
        with torch.set_grad_enabled(self.has_gradients):
            logprobs = -linear_cross_entropy()(**self.arguments(inputs))
            return (
                policy_result(inputs, logprobs) if self.has_gradients else Result(logprobs=logprobs)
            )


def candidates(*, has_gradients: bool) -> list[Candidate]:
    """The three implementations, with gradients or without."""
    anywhere = Needs(DISTRIBUTION, linear_cross_entropy, generates_code=True)
    on_gpu = replace(anywhere, device="cuda", dtypes=HALVES)  # tries tiles at its first call
    kinds = [
        ("cce_exact", "cut-cross-entropy exact", exact, on_gpu, ""),
        ("cce", "cut-cross-entropy filtered", filtered, on_gpu, "; small gradients left out"),
        ("cce_compiled", "cut-cross-entropy torch_compile", compiled, anywhere, "; all logits"),
    ]
    if not has_gradients:
        del kinds[1]  # the filter is one of gradients
    return [
        Candidate(
            key if has_gradients else f"{key}_scored",
            title if has_gradients else f"{title}, scoring only",
            CutCrossEntropy(options, has_gradients=has_gradients),
            has_entropy_gradient=False,
            num_products=3 if has_gradients else 1,
            needs=needs,
            lacks=NO_ENTROPY,
            takes_temperature=False,
            note=(NO_TERM if has_gradients else NO_TEMPERATURE) + note,
        )
        for key, title, options, needs, note in kinds
    ]


def losses() -> list[Candidate]:
    """With both gradients."""
    return candidates(has_gradients=True)


def scores() -> list[Candidate]:
    """Without gradients."""
    return candidates(has_gradients=False)

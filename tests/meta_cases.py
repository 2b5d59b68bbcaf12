"""Calls with all that a call can get, for the device "meta", whose tensors have no values."""

from __future__ import annotations

from typing import Any

import torch

import crpo_kernels as ck
from numerics import spec_of

T, V, D = 24, 40, 16
ROWS = [i for i in range(T) if i % 4]


def arguments(device: str, on_policy: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Everything a call can get, on ``device``; row 0 and every fourth are ignored."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, V, (T,), generator=g)
    labels[::4] = ck.IGNORE_INDEX
    names = ["advantages", "token_weights", "entropy_weights", "z_loss_weights", "ref_logprobs"]
    names += ["rollout_logprobs"] + ([] if on_policy else ["old_logprobs"])
    vectors = {name: torch.randn(T, generator=g).to(device) for name in names}
    return {
        "hidden": torch.randn(T, D, generator=g).to(device, dtype).requires_grad_(),
        "weight": torch.randn(V, D, generator=g).to(device, dtype).requires_grad_(),
        "labels": labels.to(device),
        "bias": torch.randn(V, generator=g).to(device).requires_grad_(),
        "temperature": torch.ones(T).to(device),
        "logit_softcap": 30.0,
        "cu_seqlens": torch.tensor([0, 10, 24], dtype=torch.int32).to(device),
        **vectors,
    }


def both_calls(given: dict[str, Any], preset: str, **way: Any) -> None:
    """Loss, statistics and gradients; and a loss of one's own on `linear_logprobs`."""
    options = dict(given)
    tensors = [options.pop(name) for name in ("hidden", "weight", "labels")]
    way = {"rows": ROWS, **way}
    spec = spec_of(preset, rho_mode="truncate")
    loss, stats = ck.linear_policy_loss(*tensors, **options, spec=spec, **way)
    stats.sums()
    loss.backward()
    head = {name: options[name] for name in ("bias", "temperature", "logit_softcap")}
    way.pop("mode", None)
    out = ck.linear_logprobs(*tensors, **head, **way)
    (out.logprobs.sum() + out.entropy.sum() + out.lse.sum()).backward()

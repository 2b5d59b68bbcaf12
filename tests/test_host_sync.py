"""The host never waits for the device: with ``rows`` given, no call looks at a value.

Without a GPU a call runs on the device "meta", whose tensors have no values: whoever asks for one
(item, bool, nonzero, unique, a mask as index) gets an error, as the control shows, and every branch
that is for CPU tensors alone is not taken. Copies from the host are seen by a dispatch mode and
have to be the kind that does not wait. With a GPU the same calls run under torch's own alarm.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import crpo_kernels as ck
from crpo_kernels.validate import counted_rows
from meta_cases import ROWS, T, arguments, both_calls
from numerics import PRESETS
from triton_tools import why_no_triton

BACKENDS = [
    pytest.param("triton", marks=pytest.mark.skipif(bool(why_no_triton()), reason="no triton")),
    "torch",
]


class HostCopies(TorchDispatchMode):
    """Fails on a copy between host and device that waits."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        is_copy = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        tensors = [x for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor)]
        if is_copy and len({x.device for x in tensors}) > 1 and any(x.numel() for x in tensors):
            waits = not kwargs.get("non_blocking", len(args) > 2 and args[2])
            assert not waits, f"{func} from {args} to {out.device} waits for the device"
        return out


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_value_is_asked_for(backend, preset, on_policy, noted_launches):
    given = arguments("meta", on_policy, torch.bfloat16)
    for mode in ("two_pass", "one_pass"):
        if preset == "gspo" and mode == "one_pass":  # off-policy the host must know the sequences
            given["cu_seqlens"] = given["cu_seqlens"].new_tensor([0, 10, 24], device="cpu")
        for workspace in (None, 60_000):
            noted_launches.clear()
            with HostCopies():
                both_calls(given, preset, backend=backend, mode=mode, workspace_bytes=workspace)
            assert bool(noted_launches) == (backend == "triton")
    for name in ("hidden", "weight", "bias"):
        assert given[name].grad.shape == given[name].shape


@pytest.mark.parametrize("kind", ["list", "host", "device", "all"])
def test_rows_in_every_form(kind, noted_launches):
    rows = {"list": ROWS, "host": torch.tensor(ROWS), "device": torch.tensor(ROWS).to("meta")}
    rows["all"] = torch.arange(T)
    given = arguments("meta", False, torch.bfloat16)
    given["cu_seqlens"] = torch.tensor([0, 10, 24])  # of the host
    with HostCopies():
        both_calls(given, "gspo", backend="torch", rows=rows[kind])


def test_the_control_without_rows_asks(noted_launches):
    given = arguments("meta", True, torch.bfloat16)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"nonzero|meta"):
        both_calls(given, "dapo", backend="torch", rows=None)


def test_rows_that_are_all_rows_gather_nothing():
    labels = torch.arange(6)
    for device in ("cpu", "meta"):
        assert counted_rows(range(6), labels.to(device)) is None
        assert counted_rows(torch.arange(6), labels.to(device)) is None
        assert counted_rows([5, 4, 3, 2, 1, 0], labels.to(device)) is not None
        assert counted_rows([0, 1, 2], labels.to(device)).shape == (3,)
    labels[2] = ck.IGNORE_INDEX
    assert counted_rows(range(6), labels).tolist() == [0, 1, 3, 4, 5]
    assert counted_rows([4, 2, 0], labels).tolist() == [4, 0]


def test_the_control_of_copies():
    with HostCopies(), pytest.raises(AssertionError, match="waits for the device"):
        torch.ones(3).to("meta")


def weight_calls(device: str) -> None:
    """The two weight vectors, with counts in every form."""
    mask = torch.ones(T, dtype=torch.bool, device=device)
    stage_ids = torch.zeros(T, dtype=torch.long, device=device)
    bounds = torch.tensor([0, 10, 24], dtype=torch.int32)
    for cu_seqlens in (bounds, bounds.to(device, non_blocking=True)):
        for count in (None, 7, 7.5, torch.tensor(7.0)):
            for aggregation in ("token_mean", "sequence_mean", "constant"):
                ck.aggregation_weights(
                    mask, cu_seqlens, aggregation=aggregation, num_tokens=count,
                    num_sequences=count, max_length=9,
                )  # fmt: skip
            for reduction in ("sequence_mean", "present_only", "token_mean"):
                per_stage = None if count is None else [3, 4]
                ck.stage_entropy_weights(
                    stage_ids, cu_seqlens, [0.1, -0.2], reduction=reduction, num_sequences=count,
                    num_present=per_stage, num_stage_tokens=per_stage, reference_length=5,
                )  # fmt: skip
        groups = torch.tensor([0, 1])
        for group_ids in ([0, 1], groups, groups.to(device, non_blocking=True)):
            ck.aggregation_weights(
                mask, cu_seqlens, aggregation="bnpo", group_ids=group_ids, group_tokens=[3, 4]
            )


def test_weights_ask_for_no_value(noted_launches):
    with HostCopies():
        weight_calls("meta")


@pytest.mark.gpu
@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_raises_no_alarm(backend, preset, on_policy):
    given = arguments("cuda", on_policy, torch.bfloat16)
    both_calls(given, preset, backend=backend)  # compiles, fills the allocators
    rows = torch.tensor(ROWS, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both_calls(given, preset, backend=backend, rows=rows)
        both_calls(given, preset, backend=backend, rows=ROWS)
        weight_calls("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")

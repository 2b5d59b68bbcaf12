"""The stage kernels against the torch path, bit for bit, and against numbers made by hand."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import triton_tools
from crpo_kernels import aggregation_weights, stage_entropy_weights, weights

if reason := triton_tools.why_no_triton():
    pytest.skip(reason, allow_module_level=True)

from crpo_kernels import stage_triton
from crpo_kernels.stage_triton import stage_counts_fwd, stage_weights_fwd

LENGTHS = {
    "several": [5, 0, 8, 17, 1],  # with blocks of 8: below, none, exactly, over
    "empty ends": [0, 0, 3, 0, 0, 0, 23, 0],
    "one": [19],
    "tokens": [1] * 9,
    "powers": [4] * 8,
    "nothing but empty": [0, 0, 0],
    "no sequences": [],
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of tokens and stages at these sizes."""
    monkeypatch.setattr(stage_triton, "BLOCK_T", 8)
    monkeypatch.setattr(stage_triton, "MAX_BLOCK_S", 4)


@pytest.fixture
def both(monkeypatch, device):
    """Calls on the CPU with torch, then with the kernels: on the GPU or interpreted."""

    def call(stage_ids, cu_seqlens, coefs, **options):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        assert weights.triton_reason(torch.device("cpu")) is not None
        expected = stage_entropy_weights(stage_ids, cu_seqlens, coefs, **options)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert weights.triton_reason(torch.device(device)) is None
        moved = (x.to(device) if isinstance(x, torch.Tensor) else x for x in (cu_seqlens, coefs))
        made = stage_entropy_weights(stage_ids.to(device), *moved, **options)
        monkeypatch.delenv("TRITON_INTERPRET")
        assert made.dtype == expected.dtype
        return made.cpu(), expected

    return call


def case(lengths, num_stages, dtype=torch.int64, seed=0):
    g = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.tensor([0, *lengths], dtype=dtype).cumsum(0, dtype=dtype)
    stage_ids = torch.randint(-1, num_stages, (sum(lengths),), generator=g).to(dtype)
    return stage_ids, cu_seqlens, torch.randn(num_stages, generator=g).tolist()


def given(num_stages, is_given):
    if not is_given:
        return {}
    counts = torch.arange(num_stages, dtype=torch.float64)  # 0 first: clamped to 1
    return {"num_sequences": 11, "num_present": counts, "num_stage_tokens": (7 * counts).tolist()}


@pytest.mark.parametrize("reduction", weights.REDUCTIONS)
@pytest.mark.parametrize("num_stages", [1, 5, 7, 33])
@pytest.mark.parametrize("is_given", [False, True])
def test_equals_torch_to_the_bit(both, guarded_empty, reduction, num_stages, is_given):
    for number, lengths in enumerate(LENGTHS.values()):
        options = {"reduction": reduction, **given(num_stages, is_given)}
        options["reference_length"] = (None, 2.5)[number % 2]
        made, expected = both(*case(lengths, num_stages, seed=number), **options)
        assert torch.equal(made, expected), lengths
        assert made.shape == (sum(lengths),)


@pytest.mark.parametrize("ids_dtype", [torch.int8, torch.int32, torch.int64])
@pytest.mark.parametrize("bounds_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(both, guarded_empty, ids_dtype, bounds_dtype, dtype):
    stage_ids, cu_seqlens, coefs = case(LENGTHS["several"], 5)
    made, expected = both(
        stage_ids.to(ids_dtype), cu_seqlens.to(bounds_dtype), torch.tensor(coefs, dtype=dtype)
    )
    assert made.dtype == dtype
    assert torch.equal(made, expected)


def test_by_hand(both, guarded_empty):
    stage_ids = torch.tensor([-1, 0, 0, 1, 1, 1, -1, 0, 2])  # sequences of 6, 0 and 3 tokens
    cu_seqlens = torch.tensor([0, 6, 6, 9], dtype=torch.int32)
    coefs = [-0.6, 0.3, 1.2]
    made, _ = both(stage_ids, cu_seqlens, coefs)
    expected = [0, -0.1, -0.1, 0.1 / 3, 0.1 / 3, 0.1 / 3, 0, -0.2, 0.4]
    torch.testing.assert_close(made, torch.tensor(expected))
    made, _ = both(stage_ids, cu_seqlens, coefs, reduction="present_only", reference_length=4)
    expected = [0, -0.075, -0.075, 0.075, 0.075, 0.075, 0, -0.075, 0.3]
    torch.testing.assert_close(made, torch.tensor(expected))
    made, _ = both(
        stage_ids, cu_seqlens, coefs, reduction="token_mean", num_stage_tokens=[6, 30, 4]
    )
    torch.testing.assert_close(made, torch.tensor([0, -0.1, -0.1, *[0.01] * 3, 0, -0.1, 0.3]))


@pytest.mark.parametrize("num_stages", [1, 4, 33])
def test_counts_are_exact(device, guarded_empty, num_stages):
    lengths = [3, 0, 600, 8]
    stage_ids, cu_seqlens, _ = case(lengths, num_stages, torch.int32)
    counts = stage_counts_fwd(stage_ids.to(device), cu_seqlens.to(device), num_stages).tolist()
    parts = [part.tolist() for part in stage_ids.split(lengths)]
    assert counts == [[part.count(k) for k in range(num_stages)] for part in parts]


def test_counts_that_fp32_cannot_hold(device, monkeypatch):
    monkeypatch.setattr(stage_triton, "BLOCK_T", 2**20 if device == "cpu" else 2**10)
    count = 2**24 + 1
    stage_ids = torch.zeros(count, dtype=torch.int8, device=device)
    counts = stage_counts_fwd(stage_ids, torch.tensor([0, count], device=device), 1)
    assert counts.tolist() == [[count]]


def test_ids_of_any_stride(both):
    stage_ids, cu_seqlens, coefs = case(LENGTHS["several"], 5)
    spread = torch.full((stage_ids.numel(), 2), 3)
    spread[:, 0] = stage_ids
    assert torch.equal(*both(spread[:, 0], cu_seqlens, coefs))


def test_what_the_host_cannot_see_is_nan(device, guarded_empty):
    """On a device nobody reads the values: wrong ones must reach the loss, and no other memory."""
    behind = torch.zeros(30, dtype=torch.int64, device=device)
    behind[:6] = torch.tensor([0, 2, -2, 1, -1, 0])
    stage_ids = behind[:6]
    cells = torch.arange(1.0, 5.0, device=device).view(2, 2)  # 2 sequences, 2 stages
    nan = float("nan")
    cu_seqlens = torch.tensor([0, 3, 6], dtype=torch.int32, device=device)
    expected = torch.tensor([1, nan, nan, 4, 0, 3])
    made = stage_weights_fwd(stage_ids, cu_seqlens, cells).cpu()
    torch.testing.assert_close(made, expected, equal_nan=True)
    torch_made = weights._torch_look_up(stage_ids, cu_seqlens, cells).cpu()
    torch.testing.assert_close(torch_made, expected, equal_nan=True)
    short = torch.tensor([0, 3, 4], device=device)
    made = stage_weights_fwd(stage_ids, short, cells).cpu()
    torch.testing.assert_close(made, torch.tensor([1, nan, nan, 4, nan, nan]), equal_nan=True)
    long = torch.tensor([0, 3, 29], device=device)
    assert stage_counts_fwd(stage_ids, long, 2).tolist() == [[1, 0], [1, 1]]


class NoWaiting(TorchDispatchMode):
    """Fails where the host would wait for the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select"), name
        tensors = [x for x in (*args, made) if isinstance(x, torch.Tensor)]
        if name in ("_to_copy", "copy_"):
            assert len({x.device.type for x in tensors}) == 1, f"{name}: {tensors}"
        return made


def test_nothing_waits_for_the_device():
    with FakeTensorMode(), NoWaiting():
        stage_ids = torch.empty(9, dtype=torch.int64, device="cuda")
        cu_seqlens = torch.empty(4, dtype=torch.int32, device="cuda")
        counts = {"num_sequences": 7, "num_present": [1, 2], "num_stage_tokens": (4, 5)}
        for reduction in weights.REDUCTIONS:
            for options in ({}, counts):
                made = stage_entropy_weights(
                    stage_ids, cu_seqlens, [0.3, -0.1], reduction=reduction, **options
                )
                assert (made.device.type, made.shape) == ("cuda", (9,))
        weights.at_least_one(3, made)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["triton", "torch"])
def test_nothing_waits_for_this_device(way, monkeypatch):
    stage_ids, cu_seqlens, coefs = case(LENGTHS["several"], 5)
    made = {}
    for device in ("cpu", "cuda", "cuda"):  # the first call on the device compiles
        if device == "cuda" and way == "torch":
            monkeypatch.setattr(weights, "triton_reason", lambda *_: "not here")
        bounds = cu_seqlens.to(device)
        ids, mask = stage_ids.to(device), (stage_ids >= 0).to(device)
        groups = torch.arange(5, device=device)
        torch.cuda.set_sync_debug_mode("error" if "cuda" in made else "default")
        try:
            made[device] = [stage_entropy_weights(ids, bounds, coefs, num_sequences=9)]
            made[device] += [
                aggregation_weights(mask, bounds, aggregation=name, max_length=9, **options)
                for name in weights.AGGREGATIONS
                for options in ({"group_ids": groups, "group_tokens": [3.0] * 5},)
            ]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for on_cpu, on_device in zip(made["cpu"], made["cuda"], strict=True):
        assert torch.equal(on_device.cpu(), on_cpu)


def test_the_reason_says_who_cannot(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert weights.triton_reason(cpu, needs_gradient=True).startswith("coefs needs a gradient")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert weights.triton_reason(cuda) == "torch.compile traces torch operations"
    monkeypatch.undo()
    monkeypatch.setattr("crpo_kernels.support.triton_version", lambda: None)
    assert weights.triton_reason(cuda) == "Triton is not installed"


def test_coefficients_keep_their_gradient(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    coefs = torch.tensor([0.5, -2.0], requires_grad=True)
    stage_ids, cu_seqlens = torch.tensor([0, 0, 1, -1, 1]), torch.tensor([0, 3, 5])
    stage_entropy_weights(stage_ids, cu_seqlens, coefs).sum().backward()
    assert coefs.grad.tolist() == [0.5, 1.0]

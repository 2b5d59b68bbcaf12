"""Bad input ends in an error that names the argument, its value and what to type."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import crpo_kernels as ck
from crpo_kernels.spec import ObjectiveSpec
from crpo_kernels.validate import check_labels
from numerics import make_problem


def call(function="loss", **changes):
    """One valid call with some arguments replaced; None removes one."""
    problem = make_problem(num_rows=6)
    arguments = {
        "hidden": problem.hidden.float(),
        "weight": problem.weight.float(),
        "labels": problem.labels,
    }
    if function == "loss":
        arguments |= {
            "advantages": torch.ones(6),
            "token_weights": torch.ones(6),
            "cu_seqlens": torch.tensor([0, 6]),
        }
    arguments |= changes
    positional = [arguments.pop(name) for name in ("hidden", "weight", "labels")]
    run = ck.linear_policy_loss if function == "loss" else ck.linear_logprobs
    return run(*positional, **arguments)


def shifted(value, at=2):
    labels = make_problem(num_rows=6).labels
    labels[at] = value
    return labels


class FakeDTensor(torch.Tensor):
    """Looks like torch.distributed's DTensor."""

    placements = "(Shard(dim=0),)"

    def full_tensor(self):
        """What the message names."""


HEAD_CASES = {
    "labels_beyond_v": ({"labels": shifted(101)}, r"labels: .* 0\.\.100 or -100, got 101 at row 2"),
    "negative_label": ({"labels": shifted(-1)}, "got -1 at row 2"),
    "float_labels": ({"labels": torch.zeros(6)}, "labels: expected int64"),
    "labels_length": ({"labels": torch.zeros(5).long()}, "labels: expected T = 6 values.* got 5"),
    "labels_list": ({"labels": [1] * 6}, "labels: expected a torch.Tensor, got list"),
    "weight_dtype": ({"weight": torch.ones(101, 16).bfloat16()}, "weight: .* got torch.bfloat16"),
    "weight_device": ({"weight": torch.ones(101, 16, device="meta")}, "weight: .* got meta"),
    "weight_on_a_gpu": (
        {"hidden": torch.ones(6, 16, device="meta"), "labels": torch.ones(6, device="meta").long()},
        r"weight: expected a tensor on meta as hidden, got cpu. Pass weight.to\(hidden.device\)",
    ),
    "hidden_dtype": (
        {"hidden": torch.ones(6, 16).bfloat16()},
        r"weight: expected torch.bfloat16 as hidden, got torch.float32. Pass weight.to\(hidden",
    ),
    "vocabulary_beyond_int32": (
        {"weight": torch.ones(1, 16).expand(2**31, 16)},
        r"weight: expected V of at most 2147483647 rows .* got V = 2147483648. Pass .* weight\[:",
    ),
    "weight_transposed": ({"weight": torch.ones(16, 101)}, r"weight: .*\[V, 16\].* transpose"),
    "dtensor": (
        {"weight": torch.ones(101, 16).as_subclass(FakeDTensor)},
        r"weight: expected a plain Tensor, got a DTensor .* inside the forward .* weight.full",
    ),
    "half": ({"hidden": torch.ones(6, 16).half()}, "hidden: .* got torch.float16"),
    "vector_hidden": ({"hidden": torch.ones(16)}, r"hidden: expected \[T, D\]"),
    "bias_shape": ({"bias": torch.ones(5)}, "bias: expected floating .101."),
    "temperature_zero": ({"temperature": 0}, "temperature: .* above 0, got 0"),
    "temperature_negative": ({"temperature": -1.0}, "temperature: .* got -1.0"),
    "temperature_nan": ({"temperature": float("nan")}, "temperature: .* got nan"),
    "temperature_row": (
        {"temperature": torch.tensor([1.0, 0.0, 1, 1, 1, 1])},
        "temperature: expected finite values above 0, got 0.0",
    ),
    "temperature_length": ({"temperature": torch.ones(4)}, "temperature: expected T = 6 values"),
    "temperature_text": ({"temperature": "1"}, "temperature: .* a tensor .T. or .* got '1'. Pass"),
    "temperature_none": ({"temperature": None}, "temperature: .* got None. Pass"),
    "temperature_list": ({"temperature": [1.0] * 6}, r"temperature: .* got \[1.0, 1.0"),
    "temperature_row_infinite": (
        {"temperature": torch.full((6,), float("inf"))},
        "temperature: expected finite values above 0, got inf",
    ),
    "scale_text": ({"logit_scale": "2"}, "logit_scale: expected a finite number .* got '2'"),
    "scale_tensor": ({"logit_scale": torch.tensor(2.0)}, r"logit_scale: .* got tensor\(2"),
    "softcap_text": ({"logit_softcap": "30"}, "logit_softcap: .* got '30'. Pass a Python"),
    "softcap_tensor": ({"logit_softcap": torch.tensor(30.0)}, r"logit_softcap: .* got tensor\(30"),
    "rows_text": ({"rows": "all"}, "rows: expected integer indices, got str 'all'. Pass"),
    "rows_set": ({"rows": {1, 2}}, "rows: expected integer indices, got set '.1, 2.'. Pass"),
    "no_columns": (
        {"hidden": torch.ones(6, 0), "weight": torch.ones(101, 0)},
        r"hidden: expected D of at least 1 .* got \[6, 0\]",
    ),
    "scale": ({"logit_scale": 0.0}, "logit_scale: .* got 0.0"),
    "softcap": ({"logit_softcap": -2.0}, "logit_softcap: .* got -2.0"),
    "rows": ({"rows": [1, 6]}, r"rows: expected distinct indices in 0\.\.5, got values in 1\.\.6"),
    "rows_mask": (
        {"rows": torch.ones(6, dtype=torch.bool)},
        r"rows: expected integer indices, got torch.bool. Pass mask.nonzero\(\)",
    ),
    "rows_twice": ({"rows": [1, 1]}, "rows: expected distinct"),
    "backend": ({"backend": "tritn"}, "backend: expected one of .* got 'tritn'"),
    "mode": ({"mode": "one-pass"}, "mode: expected one of .* Did you mean 'one_pass'"),
    "workspace": ({"workspace_bytes": 0}, "workspace_bytes: expected bytes above 0 or None, got 0"),
    "workspace_text": ({"workspace_bytes": "1GiB"}, "workspace_bytes: .* got '1GiB'"),
    "workspace_bool": ({"workspace_bytes": True}, "workspace_bytes: .* got True"),
    "workspace_below_a_row": (
        {"workspace_bytes": 1403},
        r"workspace_bytes: expected at least 1404, .* V = 101 .* got 1403\. Pass .*=1404 or more",
    ),
    "vocab_start": ({"vocab_start": 8}, "vocab_start: expected 0 without a process_group, got 8"),
}
META_CASES = {
    "vocabulary_beyond_int32": ({"weight": (2**31, 16)}, "weight: .* got V = 2147483648"),
    "labels_length": ({"labels": (5,)}, "labels: expected T = 6 values"),
}
LOSS_CASES = {
    "advantages_length": (
        {"advantages": torch.ones(2)},
        r"advantages: expected T = 6 values, one per row of hidden, got 2 .*repeat_interleave",
    ),
    "advantages_missing": ({"advantages": None}, "advantages: .* policy='clip', got None"),
    "token_weights": ({"token_weights": None}, "token_weights: .* aggregation_weights"),
    "token_weights_length": ({"token_weights": torch.ones(7)}, "token_weights: expected T = 6"),
    "complex": (
        {"advantages": torch.ones(6, dtype=torch.complex64)},
        "advantages: expected real numbers, got torch.complex64. Pass advantages.real",
    ),
    "entropy_length": ({"entropy_weights": torch.ones(1)}, "entropy_weights: expected T = 6"),
    "old_list": ({"old_logprobs": [0.0] * 6}, "old_logprobs: expected a torch.Tensor"),
    "ref_device": ({"ref_logprobs": torch.ones(6, device="meta")}, "ref_logprobs: .* got meta"),
    "kl": (
        {"spec": ObjectiveSpec.preset("crpo")},
        "ref_logprobs: expected a tensor with kl_coef=0.01, got None",
    ),
    "rho": (
        {"spec": ObjectiveSpec(rho_mode="mask")},
        "rollout_logprobs: expected a tensor with rho_mode='mask', got None",
    ),
    "gspo": (
        {"spec": ObjectiveSpec.preset("gspo"), "cu_seqlens": None},
        "cu_seqlens: expected a tensor with policy='gspo', got None",
    ),
    "gspo_cu": (
        {"spec": ObjectiveSpec.preset("gspo"), "cu_seqlens": torch.tensor([0, 5])},
        "cu_seqlens: expected a rising sequence from 0 to T = 6",
    ),
    "gspo_one_pass": (
        {
            "spec": ObjectiveSpec.preset("gspo"),
            "old_logprobs": torch.zeros(6),
            "mode": "one_pass",
            "workspace_bytes": 3000,
        },
        r"the longest does not fit .* has 4 counted rows, a chunk 2: pass workspace_bytes=\d+, or",
    ),
    "spec_name": ({"spec": "crpo"}, r"spec: .* got 'crpo'. Pass ObjectiveSpec.preset\('crpo'\)"),
}


@pytest.mark.parametrize("case", HEAD_CASES)
@pytest.mark.parametrize("function", ["loss", "logprobs"])
def test_head(case, function):
    changes, message = HEAD_CASES[case]
    with pytest.raises(ValueError, match=message):
        call(function, **changes)


@pytest.mark.parametrize("case", META_CASES)
def test_head_without_values(case):
    """Tensors of sizes that fit no machine, on a device where nothing can be read."""
    changes, message = META_CASES[case]
    shapes = {"hidden": (6, 16), "weight": (101, 16), "labels": (6,)} | changes
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    tensors["labels"] = tensors["labels"].long()
    with pytest.raises(ValueError, match=message):
        call("logprobs", **tensors)


def test_labels_elsewhere_are_read_only_when_the_environment_asks(monkeypatch):
    labels = torch.empty(6, dtype=torch.int64, device="meta")  # reading it is an error
    for value in (None, "", "0"):
        monkeypatch.delenv("CRPO_CHECK_LABELS", raising=False)
        if value is not None:
            monkeypatch.setenv("CRPO_CHECK_LABELS", value)
        assert check_labels(labels, 6, 101).shape == (6,)
    monkeypatch.setenv("CRPO_CHECK_LABELS", "1")
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        check_labels(labels, 6, 101)


@pytest.mark.gpu
@pytest.mark.parametrize("value", [101, -1, -101])
def test_labels_on_a_gpu_are_checked_when_the_environment_asks(monkeypatch, value):
    monkeypatch.setenv("CRPO_CHECK_LABELS", "1")
    with pytest.raises(ValueError, match=rf"labels: .* got {value} at row 2\."):
        check_labels(shifted(value).cuda(), 6, 101)


def test_a_dtensor_is_refused_whatever_computes():
    """A real one: the loss outside the forward of the module that FSDP2 shards."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weight = distribute_tensor(torch.ones(101, 16), mesh, [Shard(0)])
        for backend in ("auto", "torch", "dense"):
            with pytest.raises(ValueError, match=r"weight: expected a plain Tensor, got a DTensor"):
                call(weight=weight, backend=backend)
    finally:
        dist.destroy_process_group()


EXPLAIN_CASES = {
    "dtype": ({"dtype": torch.float16}, "hidden: expected float32.* got torch.float16"),
    "vocabulary": ({"vocab_size": 2**31}, "weight: expected V .* got V = 2147483648"),
    "rows": ({"num_rows": -4}, "num_rows: expected a whole number of at least 0, got -4"),
    "device": ({"device": "gpu"}, "device: expected the name of a device, got 'gpu'"),
    "workspace": ({"workspace_bytes": -3}, "workspace_bytes: expected bytes above 0 .* got -3"),
    "lengths": (
        {"sequence_lengths": [6, -2], "spec": ck.ObjectiveSpec("gspo"), "is_on_policy": False},
        "sequence_lengths: expected numbers of at least 0, got -2",
    ),
}


@pytest.mark.parametrize("case", EXPLAIN_CASES)
def test_what_a_call_would_refuse_is_not_explained(case):
    changes, message = EXPLAIN_CASES[case]
    with pytest.raises(ValueError, match=message):
        ck.explain_choice(**{"num_rows": 4, "vocab_size": 10, "hidden_size": 4} | changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_not_explained():
    with pytest.raises(ValueError, match=r"device: .* got 'cuda' .* Pass device='cpu'"):
        ck.explain_choice(num_rows=4, vocab_size=10, hidden_size=4, device="cuda")


@pytest.mark.parametrize("ids", [[0, 1, 0], torch.zeros(3)], ids=["list", "float"])
def test_stage_ids_of_another_kind(ids):
    with pytest.raises(ValueError, match=r"stage_ids: expected an integer tensor .T., got"):
        ck.stage_entropy_weights(ids, torch.tensor([0, 3]), [0.1, 0.2])


@pytest.mark.parametrize("case", LOSS_CASES)
def test_loss(case):
    changes, message = LOSS_CASES[case]
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_one_pass_is_refused_for_logprobs_that_need_a_gradient():
    leaf = make_problem(num_rows=6).hidden.float().requires_grad_()
    with pytest.raises(ValueError, match=r"comes after the head has run\. Use mode='auto'"):
        call("logprobs", hidden=leaf, mode="one_pass")


@pytest.mark.parametrize("function", ["loss", "logprobs"])
def test_what_is_no_process_group_is_refused(function):
    with pytest.raises(ValueError, match=r"process_group: expected a .*ProcessGroup"):
        call(function, process_group=object())


def test_an_ignored_row_may_have_any_temperature():
    temperature = torch.ones(6)
    temperature[0] = 0.0  # row 0 is ignored
    assert call(temperature=temperature)[0].isfinite()


def test_the_valid_call_runs():
    assert call()[0].isfinite()
    assert call("logprobs").entropy.shape == (6,)

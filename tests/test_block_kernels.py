"""Liger's kernels in the blocks: who gets them and why, and the same numbers with them.

The values come from Triton's interpreter, in a process of its own: Liger is imported there with
TRITON_INTERPRET=1. Needs liger-kernel (pip install "crpo-fast[liger]").
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import children
from crpo_fast.block_kernels import COMPARED, choose_block_kernels, with_block_kernels
from crpo_fast.models_build import ModelError

WORKER = Path(__file__).with_name("block_kernels_worker.py")
needs_liger = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None,
    reason='liger-kernel is not installed: pip install "crpo-fast[liger]"',
)


def settings(model_type: str = "llama", hidden_act: str = "silu") -> SimpleNamespace:
    return SimpleNamespace(model_type=model_type, hidden_act=hidden_act)


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that knows two architectures."""

    def gated(*, model, cross_entropy=True, swiglu=True):
        model.patched = cross_entropy, swiglu

    def geglu(*, model, cross_entropy=False, fused_linear_cross_entropy=True, geglu=True):
        model.patched = cross_entropy, fused_linear_cross_entropy, geglu

    monkeypatch.setattr("crpo_fast.block_kernels.find_spec", lambda name: name)
    monkeypatch.setattr(
        "crpo_fast.block_kernels._patches",
        lambda: {"llama": gated, "gemma2": geglu, "mixtral": gated},
    )


@pytest.mark.usefixtures("liger")
@pytest.mark.parametrize(
    ("device", "dtype", "config", "obstacle"),
    [
        ("cuda", "bfloat16", settings(), ""),
        ("cuda:1", "float32", settings("gemma2", "gelu_pytorch_tanh"), ""),
        ("cpu", "bfloat16", settings(), "need a GPU, this is cpu"),
        ("cuda", "float64", settings(), "compute in float32, not float64"),
        ("cuda", "bfloat16", settings("cohere"), "does not know the model type cohere"),
        ("cuda", "bfloat16", settings(hidden_act="gelu"), "swiglu is for silu, .* is gelu"),
    ],
)
def test_choice(device: str, dtype: str, config: SimpleNamespace, obstacle: str) -> None:
    assert choose_block_kernels("none", device, dtype, config)[0] == "none"
    name, reason = choose_block_kernels("auto", device, dtype, config)
    if not obstacle:
        assert (name, reason) == (
            "liger",
            f"liger-kernel is installed, and compared with {config.model_type}'s own",
        )
        assert choose_block_kernels("liger", device, dtype, config)[0] == "liger"
        return
    assert name == "none"
    words = rf"model\.block_kernels: .* got 'liger': .*{obstacle}.* --model\.block_kernels auto\."
    with pytest.raises(ModelError, match=words) as caught:
        choose_block_kernels("liger", device, dtype, config)
    assert reason in str(caught.value)


@pytest.mark.usefixtures("liger")
def test_a_type_that_was_not_compared_gets_them_by_name_alone() -> None:
    arguments = ("cuda", "bfloat16", settings("mixtral"))
    name, reason = choose_block_kernels("auto", *arguments)
    assert (name, "were not compared with mixtral's own" in reason) == ("none", True)
    assert choose_block_kernels("liger", *arguments)[0] == "liger"


def test_without_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crpo_fast.block_kernels.find_spec", lambda name: None)
    name, reason = choose_block_kernels("auto", "cuda", "bfloat16", settings())
    assert (name, "crpo-fast[liger]" in reason) == ("none", True)


@pytest.mark.usefixtures("liger")
def test_losses_stay_off_and_every_model_of_a_run_is_patched() -> None:
    config = settings("gemma2", "gelu_pytorch_tanh")
    make = with_block_kernels(lambda: SimpleNamespace(config=config), "auto", "cuda", "bfloat16")
    assert make().patched == (False, False, True)
    assert make().patched == (False, False, True)  # the KL reference
    make = with_block_kernels(lambda: SimpleNamespace(config=config), "auto", "cpu", "bfloat16")
    assert not hasattr(make(), "patched")


@needs_liger
def test_liger_in_the_blocks_gives_the_same_loss_and_gradients() -> None:
    done = subprocess.run(
        [sys.executable, str(WORKER)],
        env=children.environment(TRITON_INTERPRET="1"),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == set(COMPARED)
    for name, result in found.items():
        assert result["logprobs"] < 1e-5, name  # nats
        assert 0 < result["gradient"] < 1e-5, name
        left = 2 if name in ("olmo2", "olmo3") else 0  # of queries and keys
        assert result["norms"] - left == result["liger_norms"] >= 3, name
        assert result["is_head_ours"], name
        assert result["is_forward_theirs"], name

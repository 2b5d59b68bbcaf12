"""The package needs torch and nothing else."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys

import pytest

import crpo_kernels as ck

BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "transformers", "trl", "liger_kernel"):
            raise ModuleNotFoundError(f"blocked: {name}")

sys.meta_path.insert(0, Blocker())
import torch
import crpo_kernels as ck
h, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
loss, stats = ck.linear_policy_loss(
    h, w, torch.arange(3), token_weights=torch.ones(3), spec=ck.ObjectiveSpec.preset("sft")
)
loss.backward()
weights = ck.stage_entropy_weights(torch.tensor([0, 0, -1]), torch.tensor([0, 3]), [1.0])
assert weights.tolist() == [0.5, 0.5, 0.0]
try:
    ck.linear_policy_loss(
        h, w, torch.arange(3), token_weights=torch.ones(3), backend="triton",
        spec=ck.ObjectiveSpec.preset("sft"),
    )
except ValueError as error:
    assert "Triton is not installed" in str(error), error
else:
    raise AssertionError("backend='triton' without triton")
print(float(w.grad.abs().sum()) > 0, "triton" in sys.modules, "transformers" in sys.modules)
print("torch._dynamo" in sys.modules)  # which takes a second and more
"""


@pytest.mark.parametrize("interpret", [None, "1"])
def test_imports_and_runs_with_torch_alone(root, interpret):
    """Even where the environment asks for the interpreter of a triton that is not there."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", BLOCKED],
        env=environment | ({"TRITON_INTERPRET": interpret} if interpret else {}),
        capture_output=True,
        text=True,
        cwd=root / "kernels",
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["True", "False", "False", "False"]


def test_triton_is_imported_by_triton_modules_only(root):
    found = {}
    for path in sorted((root / "kernels" / "crpo_kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "triton" for name in names):
                found.setdefault(path.stem, []).append(node.lineno)
    assert found, "no module imports triton"
    assert {name: lines for name, lines in found.items() if not name.endswith("_triton")} == {}


def test_signatures_are_the_contract():
    head = (
        "bias=None, temperature=1.0, logit_scale=1.0, logit_softcap=None, rows=None, "
        "backend='auto', mode='auto', workspace_bytes=None, process_group=None, vocab_start=0"
    )
    expected = {
        ck.linear_logprobs: f"hidden, weight, labels, *, {head}, head_dtype=None, lora_head=None",
        ck.linear_policy_loss: (
            "hidden, weight, labels, *, advantages=None, token_weights, entropy_weights=None, "
            "z_loss_weights=None, old_logprobs=None, rollout_logprobs=None, ref_logprobs=None, "
            f"spec={ck.ObjectiveSpec()!r}, cu_seqlens=None, {head}, lora_head=None"
        ),
        ck.aggregation_weights: (
            "loss_mask, cu_seqlens, *, aggregation='token_mean', num_tokens=None, "
            "num_sequences=None, max_length=None, group_ids=None, group_tokens=None"
        ),
        ck.stage_entropy_weights: (
            "stage_ids, cu_seqlens, coefs, *, reduction='sequence_mean', reference_length=None, "
            "num_sequences=None, num_present=None, num_stage_tokens=None"
        ),
    }
    for function, signature in expected.items():
        parameters = inspect.signature(function).parameters.values()
        plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
        assert str(inspect.Signature(plain)) == f"({signature})", function.__name__


def test_public_names():
    assert ck.IGNORE_INDEX == -100
    assert set(ck.__all__) >= {
        "linear_logprobs",
        "linear_policy_loss",
        "ObjectiveSpec",
        "TokenStats",
        "aggregation_weights",
        "stage_entropy_weights",
        "IGNORE_INDEX",
    }

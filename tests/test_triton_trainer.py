"""The trainer on the Triton backend, interpreted: the same gradients and metrics as on torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import children
from crpo_fast import distributed, policy, probes, train
from crpo_fast.config import Config, ConfigError, parse_arguments
from crpo_fast.distributed import World
from crpo_fast.live_bytes import local
from crpo_fast.loss import LossSpec, micro_batch_loss
from crpo_fast.session import check_loss_backend, check_workspace
from crpo_fast.step import micro_batches
from plan_worker import RealStep
from triton_tools import why_no_triton

ROOT = Path(__file__).parent.parent
TINY = str(Path(__file__).with_name("tiny.toml"))
ONE_STEP_EACH = ["--phases.0.steps", "1", "--phases.1.steps", "1", "--checkpoint.every", "0"]
CASES = {
    "crpo, KL and stage entropy": [],
    "gspo": ["--phases.1.algorithm", "gspo"],
    "small chunks, truncated rho": [
        *("--objective.rho_mode", "truncate", "--train.workspace_mib", "1"),
        *("--model.build.no_tie_embeddings", "--train.layout", "padded"),
    ],
}
pytestmark = pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))


@pytest.fixture
def alone() -> Iterator[World]:
    yield distributed.init(threads=1)
    distributed.shutdown()


def gradients(step: RealStep, backend: str) -> dict[str, Tensor]:
    """Of one update; the pass of the reference is made by the same backend."""
    options = {**dict(step.spec.options), "backend": backend}
    spec: LossSpec = replace(step.spec, options=tuple(options.items()))
    torch.manual_seed(0)
    batches = micro_batches(
        step.sequences(), spec, step.policy, token_budget=step.config.train.token_budget,
        layout=step.config.train.layout, reference=step.reference,
    )  # fmt: skip
    found: dict[str, Tensor] = {}
    for batch in batches:
        loss, stats = micro_batch_loss(step.policy, batch, spec)
        loss.backward()
        found["loss"] = found.get("loss", 0) + loss.detach()
        found["entropy"] = found.get("entropy", 0) + stats.entropy.sum()
        found["kl"] = found.get("kl", 0) + stats.kl.sum()
    for name, parameter in step.policy.model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = local(parameter.grad).clone()
        parameter.grad = None
    return found


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_gradients_are_those_of_the_torch_backend(settings: list[str], alone: World) -> None:
    step = RealStep(parse_arguments([TINY, *settings]), alone, prompt=20, completion=12)
    with torch.no_grad():  # away from the reference and the uniform distribution
        for parameter in step.policy.model.parameters():
            parameter.mul_(1.3)
    expected = gradients(step, "torch")
    found = gradients(step, "triton")
    for name, value in expected.items():
        scale = value.abs().max()
        assert scale > 0 or name == "kl", name
        torch.testing.assert_close(found[name], value, rtol=0, atol=float(1e-5 * scale + 1e-12))


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_same_run_with_the_interpreter_picks_triton_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of cold start and two of CRPO, whose rewards differ within every group."""
    arguments = [TINY, "--phases.0.steps", "1", "--phases.1.steps", "2", "--checkpoint.every", "0"]
    arguments += ["--rewards.functions", "faulty_rewards:length", "--eval.limit", "1"]
    arguments += ["--phases.0.sequences_per_step", "2", "--rollout.prompts_per_step", "1"]
    arguments += ["--rollout.max_tokens", "8"]
    environment = children.environment(CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1")
    command = [sys.executable, str(ROOT / "crpo_fast" / "train.py"), *arguments]
    done = subprocess.run(
        [*command, "--run.dir", str(tmp_path / "triton")],
        capture_output=True, text=True, check=False, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said = " ".join(done.stdout.split())
    assert "backend triton (Triton " in said
    assert "'s interpreter on the CPU (TRITON_INTERPRET=1)), mode one_pass: the" in said
    assert "row passes by Triton kernels" in said
    assert "scoring by the fused kernel: Triton's interpreter has no times to choose by" in said
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert train.main([*arguments, "--run.dir", str(tmp_path / "torch")]) == 0
    plain = " ".join(capsys.readouterr().out.split())
    assert "backend torch (triton does not run: " in plain
    found, expected = metrics(tmp_path / "triton"), metrics(tmp_path / "torch")
    assert len(found) == len(expected) == 3
    names = ("loss", "grad_norm", "entropy", "reward", "kl", "logprobs", "ratio", "is_top1")
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert theirs["grad_norm"] > 0.01
        for name in names:
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


def test_probes_and_passes_without_gradients_take_the_configured_backend(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Reference, old logprobs and probe prompts: all calls of the kernels get the same options."""
    asked: list[tuple[str, Any, Any]] = []
    for module in (probes, policy):
        plain = module.linear_logprobs

        def recorded(*args: Any, _plain: Any = plain, _name: str = module.__name__, **kwargs: Any):
            asked.append((_name, kwargs.get("backend"), kwargs.get("workspace_bytes")))
            return _plain(*args, **kwargs)

        monkeypatch.setattr(module, "linear_logprobs", recorded)
    arguments = ["--train.loss_backend", "torch", "--train.workspace_mib", "3", *ONE_STEP_EACH]
    arguments += ["--train.updates_per_rollout", "2", "--train.minibatches", "2"]
    assert train.main([TINY, "--run.dir", str(tmp_path / "r"), *arguments]) == 0
    assert {name for name, _, _ in asked} == {"crpo_fast.probes", "crpo_fast.policy"}
    assert {(backend, size) for _, backend, size in asked} == {("torch", 3 * 2**20)}


def test_a_workspace_smaller_than_a_row_is_refused(alone: World) -> None:
    config = parse_arguments([TINY, "--train.workspace_mib", "1"])
    head = torch.nn.Embedding(1, 16)
    head.weight = torch.nn.Parameter(torch.empty(200_000, 16, device="meta"))
    model = SimpleNamespace(get_output_embeddings=lambda: head)
    with pytest.raises(
        ConfigError,
        match=r"train\.workspace_mib: 1 MiB is too little\. workspace_bytes: expected at least "
        r"2400192, .* got 1048576\. Leave --train\.workspace_mib out",
    ):
        check_workspace(config, model, torch.device("cpu"))


def test_a_backend_that_cannot_run_is_refused_before_anything_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--train.loss_backend", "triton", "--model.compute_dtype", "float64"]
    assert train.main([TINY, "--run.dir", str(tmp_path / "r"), *arguments]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "train.loss_backend: expected auto, torch or dense here, got 'triton': hidden is " in said
    )
    assert "Type --train.loss_backend auto." in said
    config: Config = parse_arguments([TINY, "--train.loss_backend", "triton"])
    with pytest.raises(ConfigError, match=r"no GPU: hidden is on mps"):
        check_loss_backend(config, torch.device("mps"))

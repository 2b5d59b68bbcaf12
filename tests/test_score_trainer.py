"""Passes without gradients in the trainer: who scores them, and an eight-bit head's error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from crpo_fast import distributed, policy, probes, score_head, train
from crpo_fast.config import ConfigError, parse_arguments
from crpo_fast.distributed import World
from crpo_fast.loss import LossSpec, scoring_options
from crpo_fast.metrics import Sums
from crpo_fast.plan_moments import planned_backend
from crpo_fast.session import check_scoring
from crpo_fast.step import micro_batches
from crpo_fast.updates import add_old_logprobs
from plan_worker import RealStep
from triton_tools import why_no_triton

TINY = str(Path(__file__).with_name("tiny.toml"))
needs_triton = pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))


@pytest.fixture
def alone() -> Iterator[World]:
    yield distributed.init(threads=1)
    distributed.shutdown()


@pytest.fixture
def step(alone: World) -> RealStep:
    made = RealStep(parse_arguments([TINY]), alone, 10, 6)
    with torch.no_grad():  # away from the reference and the uniform distribution
        for parameter in made.policy.model.parameters():
            parameter.mul_(1.5)
    return made


def spec_of(step: RealStep, **options: Any) -> LossSpec:
    """The step's, with other options of scoring; ``backend`` is one of the loss as well."""
    backend = options.pop("backend", "torch")
    return replace(step.spec, options=(("backend", backend),), scoring=tuple(options.items()))


def batches_of(step: RealStep, spec: LossSpec) -> list:
    torch.manual_seed(0)
    return micro_batches(
        step.sequences(), spec, step.policy, token_budget=32, layout="packed",
        reference=step.reference,
    )  # fmt: skip


@needs_triton
def test_reference_and_old_logprobs_launch_the_fused_kernel(
    step: RealStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default, in the interpreter; the values are those of the chunk loop."""
    from crpo_kernels import linear_triton

    started, plain = [], linear_triton.launch
    monkeypatch.setattr(
        linear_triton,
        "launch",
        lambda kernel, *a, **k: (started.append(kernel.__name__), plain(kernel, *a, **k)),
    )
    spec, loop = spec_of(step, backend="triton"), spec_of(step, backend="triton", mode="two_pass")
    passes = [add_old_logprobs([[], batches_of(step, s)], s, step.policy)[1] for s in (spec, loop)]
    count = len(passes[0])
    assert count > 1
    assert started == ["linear_stats_kernel", "linear_join_kernel"] * (2 * count)
    for fused, chunks in zip(*passes, strict=True):
        for name in ("ref_logprobs", "old_logprobs"):
            a, b = fused.vectors[name], chunks.vectors[name]
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        assert (fused.vectors["ref_logprobs"] - fused.vectors["old_logprobs"]).abs().max() > 1e-3
        assert not set(score_head.ERRORS.values()) & fused.vectors.keys()


def test_the_errors_of_an_eight_bit_head(step: RealStep) -> None:
    """Against exact logprobs of rows spread over a micro-batch; root mean square and largest."""
    exact = batches_of(step, spec_of(step))
    found = batches_of(step, spec_of(step, head_dtype=torch.float8_e4m3fn))
    sums, errors = Sums(), []
    for a, b in zip(exact, found, strict=True):
        difference = b.vectors["ref_logprobs"] - a.vectors["ref_logprobs"]
        assert difference.abs().max() > 0
        every = -(-difference.numel() // score_head.NUM_ROWS)
        torch.testing.assert_close(b.vectors["ref_errors"], difference[::every], rtol=0, atol=1e-6)
        score_head.add_errors(sums, b.vectors)
        errors.append(difference[::every].double())
    metrics = sums.means()
    score_head.finish_errors(metrics)
    together = torch.cat(errors)
    assert metrics["score_head/rms"] == pytest.approx(float(together.square().mean().sqrt()), 1e-3)
    assert metrics["score_head/max"] == pytest.approx(float(together.abs().max()), rel=1e-3)
    assert f"off by {metrics['score_head/rms']:.2g} nats (rms; at most " in score_head.sentence(
        metrics
    )
    assert score_head.sentence({"loss": 1.0}) == ""
    score_head.finish_errors(nothing := {"score_head/rms": None, "score_head/max": None})
    assert score_head.sentence(nothing) == ""


def test_a_rank_without_a_row_has_no_errors() -> None:
    none = torch.zeros(0)
    found = score_head.exact_differences(
        none, torch.zeros(0, 4), torch.randn(5, 4), none.long(), temperature=1.0
    )
    assert found.shape == (0,)
    score_head.add_errors(sums := Sums(), {"ref_errors": found})
    metrics = sums.means()
    score_head.finish_errors(metrics)
    assert metrics == {"score_head/rms": None, "score_head/max": None}


def run(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    more = ["--phases.0.steps", "1", "--phases.1.steps", "2", "--checkpoint.every", "0"]
    assert train.main([TINY, "--run.dir", str(folder), *more, *arguments]) == 0
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_with_an_eight_bit_head_says_its_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In metrics and once on the screen; off, there is neither, and the loss is another."""
    plain = run(tmp_path / "plain")
    said = " ".join(capsys.readouterr().out.split())
    assert "scoring by chunks of logits: the fused kernel needs the backend triton rollouts" in said
    assert "fp8" not in said
    assert not any("score_head" in name for record in plain for name in record)
    found = run(tmp_path / "fp8", "--train.score_head", "fp8")
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("train.score_head fp8: logprobs without gradients are off by ") == 1
    assert "; head in fp8" in said
    assert "score_head/rms" not in found[0]  # sft has no pass without gradients
    for ours, exact in zip(found[1:], plain[1:], strict=True):
        assert 0 < ours["score_head/rms"] <= ours["score_head/max"] < 0.5
        assert ours["kl"] != exact["kl"]


def test_options_of_scoring() -> None:
    def of(*arguments: str) -> dict[str, Any]:
        return scoring_options(parse_arguments([TINY, *arguments]))

    assert of() == {}
    assert of("--train.score_kernel", "chunks") == {"mode": "two_pass"}
    assert of("--train.score_kernel", "fused") == {"mode": "fused"}
    assert of("--train.score_head", "fp8") == {"head_dtype": torch.float8_e4m3fn}
    with pytest.raises(
        ConfigError, match=r"train\.score_head: expected one of full, fp8, got 'f8'"
    ):
        of("--train.score_head", "f8")
    with pytest.raises(ConfigError, match=r"train\.score_head: expected full with .* float64"):
        of("--train.score_head", "fp8", "--model.compute_dtype", "float64")


def test_a_kernel_that_cannot_run_is_refused_before_anything_loads() -> None:
    config = parse_arguments(
        [TINY, "--train.score_kernel", "fused", "--train.loss_backend", "torch"]
    )
    with pytest.raises(
        ConfigError,
        match=r"train\.score_kernel: expected auto or chunks here, got 'fused': the kernel belongs "
        r"to the backend triton, and torch runs \(asked for\)\. Type --train\.score_kernel auto\.",
    ):
        check_scoring(config, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"train\.score_kernel: .* the kernel belongs"):
        planned_backend(config, "cuda")
    config = parse_arguments([TINY, "--train.score_kernel", "fused"])
    if why_no_triton() is None:  # a GPU that need not be here
        assert planned_backend(config, "cuda").name == "triton"


def test_probes_are_exact_and_take_the_kernel_of_the_config(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, set] = {}
    for module in (probes, policy):
        plain = module.linear_logprobs

        def recorded(*args: Any, _plain: Any = plain, _name: str = module.__name__, **kwargs: Any):
            way = (kwargs.get("mode"), kwargs.get("head_dtype"))
            asked.setdefault(_name, set()).add(way)
            return _plain(*args, **kwargs)

        monkeypatch.setattr(module, "linear_logprobs", recorded)
    run(tmp_path / "r", "--train.score_head", "fp8", "--train.score_kernel", "chunks")
    assert asked == {
        "crpo_fast.probes": {("two_pass", None)},
        "crpo_fast.policy": {("two_pass", torch.float8_e4m3fn)},
    }

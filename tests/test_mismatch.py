"""The first batch after a start shows whether the engine serves the weights that are trained."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from crpo_fast import train
from crpo_fast.batch import RolloutGroup
from crpo_fast.rollout.static import StaticEngine

TINY = str(Path(__file__).with_name("tiny.toml"))


def shift_logprobs(patch: pytest.MonkeyPatch, nats: float) -> None:
    """The engine's logprobs are ``nats`` larger than those of its samples."""
    generate = StaticEngine.generate

    def shifted(self: StaticEngine, *args: Any, **kwargs: Any) -> list[RolloutGroup]:
        groups = generate(self, *args, **kwargs)
        for sample in (s for g in groups for s in g.samples):
            sample.logprobs[:] = [x + nats for x in sample.logprobs]
        return groups

    patch.setattr(StaticEngine, "generate", shifted)


def test_other_weights_in_the_engine_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [TINY, "--run.dir", str(tmp_path / "r"), "--train.max_steps", "1"]
    shift_logprobs(monkeypatch, -0.5)
    assert train.main(arguments) == 1
    error = capsys.readouterr().err
    assert "the engine serves other weights" in error
    assert "0.5000 nats" in error
    monkeypatch.setattr(StaticEngine, "renormalises", True)
    wide = ["--run.resume", "never", "--rollout.top_p", "0.6", "--rollout.max_mismatch", "0.2"]
    assert train.main([*arguments, *wide]) == 0  # 0.2 + |log 0.6| = 0.71
    assert torch.distributed.is_initialized() is False


@pytest.mark.parametrize(
    ("mode", "cut", "rho"), [([], 0.0, 1.0), (["truncate"], 1.0, 1.2), (["mask"], 1.0, 0.0)]
)
def test_metrics_of_an_engine_that_is_off_by_a_known_amount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: list[str], cut: float, rho: float
) -> None:
    """Its logprobs are too small by .3 nats: every rho is e^.3, in all updates of a rollout."""
    shift_logprobs(monkeypatch, -0.3)
    correction = ["--objective.rho_mode", *mode, "--objective.rho_cap", "1.2"] if mode else []
    settings = ["--rollout.max_mismatch", "1", "--train.updates_per_rollout", "2"]
    settings += ["--train.minibatches", "1", "--train.max_steps", "1", "--train.threads", "1"]
    settings += ["--rewards.functions", "faulty_rewards:length"]
    assert train.main([TINY, "--run.dir", str(tmp_path / "r"), *settings, *correction]) == 0
    last = json.loads((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()[-1])
    expected = {
        "mismatch": 0.3,
        "mismatch/max": 0.3,
        "mismatch/kl": math.exp(0.3) - 1.3,
        "rho/mean": math.exp(0.3),
        "rho/min": math.exp(0.3),
        "rho/max": math.exp(0.3),
        "rho/ess": 1.0,
        "rho/cut": cut,
        "rho": rho,
    }
    assert {k: last[k] for k in expected} == pytest.approx(expected, abs=1e-5)
    # of new and old: it moves with the update, unless every token is masked; rho does not move
    assert (last["ratio"] != 1.0) == (rho > 0)

"""The first batch after a start shows whether the engine serves the weights that are trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from crpo_fast import train
from crpo_fast.batch import RolloutGroup, SamplingParams
from crpo_fast.rollout.static import StaticEngine

TINY = str(Path(__file__).with_name("tiny.toml"))


def test_other_weights_in_the_engine_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = StaticEngine.generate

    def from_other_weights(
        self: StaticEngine, ids: list[list[int]], size: int, params: SamplingParams, seed: int
    ) -> list[RolloutGroup]:
        groups = generate(self, ids, size, params, seed)
        for sample in (s for g in groups for s in g.samples):
            sample.logprobs[:] = [x - 0.5 for x in sample.logprobs]
        return groups

    arguments = [TINY, "--run.dir", str(tmp_path / "r"), "--train.max_steps", "1"]
    monkeypatch.setattr(StaticEngine, "generate", from_other_weights)
    assert train.main(arguments) == 1
    error = capsys.readouterr().err
    assert "the engine serves other weights" in error
    assert "0.5000 nats" in error
    monkeypatch.setattr(StaticEngine, "renormalises", True)
    wide = ["--run.resume", "never", "--rollout.top_p", "0.6", "--rollout.max_mismatch", "0.2"]
    assert train.main([*arguments, *wide]) == 0  # 0.2 + |log 0.6| = 0.71
    assert torch.distributed.is_initialized() is False

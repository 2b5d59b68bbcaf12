"""What `CRPOTrainer` refuses before it trains, with what to pass instead."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch

from crpo_fast.config import ConfigError
from crpo_fast.models import build_model

pytest.importorskip("trl", reason="trl is not installed: pip install 'crpo-fast[integrations]'")

from crpo_fast.integrations import trl
from crpo_fast.integrations.trl_head import install_head


def test_stage_entropy_without_stages_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"got none\. Pass stages='mental_r1', or entropy=Ent"):
        trl._grammar("none", trl.EntropyConfig())
    assert trl._grammar("none", trl.EntropyConfig(magnitude=0.0)).num_stages == 0
    assert trl._grammar("mental_r1", trl.EntropyConfig()).num_stages == 5


def test_what_the_head_cannot_do_is_refused_at_once() -> None:
    model = build_model(
        "qwen3", vocab_size=19, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1,
        intermediate_size=8, tie_word_embeddings=True, max_positions=16, attention="sdpa", seed=0,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"among backend, workspace_bytes, got 'workspace_mib'"):
        install_head(model, temperature=1.0, options={"workspace_mib": 1})
    model.lm_head.weight = torch.nn.Parameter(torch.empty(0))  # as ZeRO-3 leaves it
    with pytest.raises(ConfigError, match=r"expected whole weights .* Set GRPOConfig\(beta=0.0\)"):
        install_head(model, temperature=1.0, options={})


@pytest.mark.parametrize("found", [None, ModuleType("trl")], ids=["none", "without the trainer"])
def test_without_its_trainer_the_range_of_trl_is_named(found, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", found)
    monkeypatch.delitem(sys.modules, "crpo_fast.integrations.trl")
    with pytest.raises(ImportError, match=r"TRL >=1.16,<1.17, got: .* Type pip install .*trl>=1.1"):
        importlib.import_module("crpo_fast.integrations.trl")

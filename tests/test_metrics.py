"""(sum, count) pairs: what one all-reduce makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from crpo_fast.controller import DualAscent, DualOptions, StageController
from crpo_fast.entropy_watch import EntropyWatch
from crpo_fast.metrics import Metrics, Sums, strict
from crpo_fast.mismatch import finish_mismatch
from crpo_fast.outcome import write_plots


def of_rank(mean: str = "kl", total: float = 1.0, count: int = 1) -> Sums:
    sums = Sums()
    sums.add("entropy", total, count)
    sums.add(mean, 3.0, 2)
    sums.add_total("skipped", 1)
    return sums


def together(first: Sums, second: Sums) -> Metrics:
    """Means of two ranks, as the second one sees them."""
    sent: list[Tensor] = []
    first.means(lambda x: sent.append(x) or x)
    return second.means(lambda x: x + sent[0])


def test_pooled_over_ranks_and_not_averaged() -> None:
    found = together(of_rank(total=6.0, count=3), of_rank(total=10.0, count=1))
    assert found == {"entropy": 4.0, "kl": 1.5, "skipped": 2.0}  # not (2 + 10) / 2
    empty = together(of_rank(total=6.0, count=3), of_rank(total=0.0, count=0))
    assert empty["entropy"] == 2.0


def test_ranks_with_other_names_are_not_added_up() -> None:
    with pytest.raises(AssertionError, match="other metrics than"):
        together(of_rank("kl"), of_rank("mismatch"))


def test_the_mean_of_nothing_is_not_zero() -> None:
    """A stage whose tokens were certain has the entropy 0, one that does not occur has none."""
    sums = Sums()
    sums.add("certain", 0.0, 3)
    sums.add("absent", 0.0, 0)
    sums.add_total("counted", 0)
    sums.add_extremes("rho", torch.empty(0))
    found = sums.means()
    assert found == {"certain": 0.0, "absent": None, "counted": 0.0, "rho/max": None}
    assert json.loads(json.dumps(strict(found), allow_nan=False)) == found
    sums.add("rho/square", 0.0, 0)
    sums.add("rho/mean", 0.0, 0)
    unknown = sums.means()
    finish_mismatch(unknown)
    assert unknown["rho/ess"] is None


def test_controller_moves_by_an_entropy_of_zero_and_not_by_none() -> None:
    dual = DualAscent(["certain", "absent"], [0.0, 0.0], DualOptions(0.5, targets=(1.0, 1.0)))
    watch = EntropyWatch(controller=StageController([0.0, 0.0], dual=dual))
    metrics = {"stage_entropy/0": 0.0, "stage_entropy/1": None}
    watch.update(metrics, 2, step=0, at=1)
    assert dual.coefs[0] < 0 == dual.coefs[1]
    assert "stage_gap/0" in metrics
    assert "stage_gap/1" not in metrics


def test_curves_break_where_nothing_was_seen(tmp_path: Path) -> None:
    values = [0.5, 0.25, None, 0.0, 1.0]
    records = [{"step": i, "reward": v, "loss": None} for i, v in enumerate(values)]
    write_plots(records, [], tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.svg", "reward.svg"]
    assert "loss: no values" in (tmp_path / "loss.svg").read_text()
    assert (tmp_path / "reward.svg").read_text().count('<polyline class="line"') == 2

"""(sum, count) pairs: what one all-reduce makes of them."""

from __future__ import annotations

import pytest
from torch import Tensor

from crpo_fast.metrics import Sums


def of_rank(mean: str = "kl", total: float = 1.0, count: int = 1) -> Sums:
    sums = Sums()
    sums.add("entropy", total, count)
    sums.add(mean, 3.0, 2)
    sums.add_total("skipped", 1)
    return sums


def together(first: Sums, second: Sums) -> dict[str, float]:
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

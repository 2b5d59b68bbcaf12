"""Few settings of many options: every two values of two options meet in one of them."""

from __future__ import annotations

from itertools import combinations, product
from random import Random
from typing import Any


def pairwise(options: dict[str, tuple]) -> list[dict[str, Any]]:
    """Few settings in which every two values of two options occur together; always the same."""
    random = Random(0)
    names = list(options)
    missing = {
        ((a, x), (b, y))
        for a, b in combinations(names, 2)
        for x, y in product(options[a], options[b])
    }
    chosen = []
    while missing:
        candidates = [{name: random.choice(options[name]) for name in names} for _ in range(2000)]
        best = max(candidates, key=lambda settings: len(missing & pairs(settings)))
        missing -= pairs(best)
        chosen.append(best)
    return chosen


def pairs(settings: dict[str, Any]) -> set:
    """The pairs of values that occur together in ``settings``."""
    return set(combinations(settings.items(), 2))

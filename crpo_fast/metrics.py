"""Metrics: (sum, count) pairs, one all-reduce per step, one line of metrics.jsonl per step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Sums:
    """Sums and counts by name. Averages are formed once, after the reduction over ranks."""

    def __init__(self) -> None:
        self._pairs: dict[str, list[float]] = {}

    def add(self, name: str, total: float | Tensor, count: float | Tensor) -> None:
        """Add ``total`` over ``count`` things to ``name``."""
        pair = self._pairs.setdefault(name, [0.0, 0.0])
        pair[0] += float(total)
        pair[1] += float(count)

    def means(self, all_sum: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Global means; every rank must hold the same names. A count of 0 gives 0."""
        names = sorted(self._pairs)
        values = torch.tensor([self._pairs[n] for n in names], dtype=torch.float64).reshape(-1, 2)
        reduced = all_sum(values)
        return {n: float(t / c) if c else 0.0 for n, (t, c) in zip(names, reduced, strict=True)}


class JsonLines:
    """Append-only JSONL; rank 0 writes, the others do nothing."""

    def __init__(self, path: Path, *, enabled: bool = True) -> None:
        self.path, self.enabled = path, enabled

    def write(self, record: dict[str, Any]) -> None:
        """One line, flushed."""
        if self.enabled:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All complete records."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]  # a torn last line has no newline

    def keep(self, condition: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the records that a resumed run will write again (and a torn last line)."""
        if self.enabled and self.path.exists():
            kept = [r for r in self.read() if condition(r)]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
            os.replace(temporary, self.path)

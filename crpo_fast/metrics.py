"""Metrics: (sum, count) pairs, one all-reduce per step, one line of metrics.jsonl per step."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crpo_fast.console import notice

Metrics = dict[str, float | None]  # of a step; None: the mean or extreme of nothing


class Sums:
    """Means as (sum, count) pairs, totals, and extremes, by name.

    Averages are formed once, after the reduction over ranks and over the updates of a step. What
    is added from a device waits there until something is asked: then all of it is read at once.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[str, str, list[Tensor]]] = []  # kind, name, scalars of a device
        self._pairs: dict[str, list[float]] = {}
        self._totals: dict[str, float] = {}
        self._peaks: dict[str, float] = {}  # a minimum as the maximum of the negative values

    def add(self, name: str, total: float | Tensor, count: float | Tensor) -> None:
        """Add ``total`` over ``count`` things to the mean ``name``."""
        pair = self._pairs.setdefault(name, [0.0, 0.0])
        if device := _device_of(total, count):
            self._waiting.append(("mean", name, [_scalar(total, device), _scalar(count, device)]))
            return
        pair[0] += float(total)
        pair[1] += float(count)

    def add_total(self, name: str, value: float) -> None:
        """Add ``value`` to the total ``name``, which is never divided."""
        self._totals[name] = self._totals.get(name, 0.0) + float(value)

    def add_extremes(self, name: str, values: Tensor, *, minimum: bool = False) -> None:
        """Let ``values``, of any number, count for ``<name>/max`` (and ``<name>/min``)."""
        signs = {f"{name}/max": 1.0, **({f"{name}/min": -1.0} if minimum else {})}
        for key, sign in signs.items():
            before = self._peaks.setdefault(key, -math.inf)
            if not values.numel():
                continue
            peak = (sign * values).max()
            if device := _device_of(peak):
                self._waiting.append(("peak", key, [_scalar(peak, device)]))
            else:
                self._peaks[key] = _larger(before, float(peak))

    def _settle(self) -> None:
        """Read what waits on the device: one transfer, which waits for the device."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        values = iter(torch.stack([x for _, _, scalars in waiting for x in scalars]).tolist())
        for kind, name, _ in waiting:
            if kind == "peak":
                self._peaks[name] = _larger(self._peaks[name], next(values))
            else:
                self.add(name, next(values), next(values))

    def count(self, name: str) -> float:
        """The count behind the mean ``name``; 0 where there is none."""
        self._settle()
        return self._pairs.get(name, [0.0, 0.0])[1]

    def total(self, name: str) -> float:
        """The sum behind the mean ``name``; 0 where there is none."""
        self._settle()
        return self._pairs.get(name, [0.0, 0.0])[0]

    def reduced(
        self,
        all_sum: Callable[[Tensor], Tensor],
        all_max: Callable[[dict[str, float]], dict[str, float]] = dict,
    ) -> Sums:
        """The same over all ranks; every rank must hold the same names.

        Args:
            all_sum: sums a tensor over ranks (called once).
            all_max: by name the largest value of any rank (called where there are extremes).
        """
        self._settle()
        names, totals = sorted(self._pairs), sorted(self._totals)
        checksum = zlib.crc32("\n".join([*names, "", *totals]).encode())
        values = [x for n in names for x in self._pairs[n]] + [self._totals[n] for n in totals]
        vector = torch.tensor([*values, checksum, 1], dtype=torch.float64)
        *sums, checksums, ranks = all_sum(vector).tolist()
        assert checksums == ranks * checksum, f"ranks would add up other metrics than {names}"
        result = Sums()
        result._pairs = {n: sums[2 * i : 2 * i + 2] for i, n in enumerate(names)}
        result._totals = dict(zip(totals, sums[2 * len(names) :], strict=True))
        if self._peaks:
            result._peaks = all_max({n: self._peaks[n] for n in sorted(self._peaks)})
        return result

    def merge(self, other: Sums) -> None:
        """Add what ``other`` holds."""
        other._settle()
        for name, (total, count) in other._pairs.items():
            self.add(name, total, count)
        for name, value in other._totals.items():
            self.add_total(name, value)
        for name, value in other._peaks.items():
            self._peaks[name] = _larger(self._peaks.get(name, -math.inf), value)

    def means(self, all_sum: Callable[[Tensor], Tensor] | None = None) -> Metrics:
        """Means and extremes (None where nothing was seen: 0 is a value) and totals by name."""
        sums = self if all_sum is None else self.reduced(all_sum)
        sums._settle()
        found: Metrics = {n: t / c if c else None for n, (t, c) in sorted(sums._pairs.items())}
        found |= sums._totals
        for name, peak in sums._peaks.items():
            sign = -1.0 if name.endswith("/min") else 1.0
            found[name] = None if peak == -math.inf else sign * peak
        return found


def _device_of(*values: float | Tensor) -> torch.device | None:
    """The device that holds one of ``values``; None where the host has all of them."""
    found = (x.device for x in values if isinstance(x, Tensor) and x.device.type != "cpu")
    return next(found, None)


def _scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """``value`` as fp64 on ``device``, without waiting for it."""
    if isinstance(value, Tensor) and value.device == device:
        return value.detach().to(torch.float64).reshape(())
    return torch.full((), float(value), dtype=torch.float64, device=device)


def _larger(a: float, b: float) -> float:
    """The larger one; NaN if either is."""
    return b if b > a or math.isnan(b) else a


class JsonLines:
    """Append-only JSONL, in the order of ``step``; rank 0 writes, the others do nothing.

    Lines that cannot be written (disk full) wait in memory for the next write; a checkpoint is
    written only after all of them.
    """

    def __init__(self, path: Path, *, enabled: bool = True) -> None:
        self.path, self.enabled, self.position = path, enabled, 0
        self._pending: list[str] = []

    @property
    def name(self) -> str:
        """Of the file; ``position`` is how many lines it has."""
        return self.path.name

    def write(self, record: dict[str, Any]) -> None:
        """One line, at once. Strict JSON: a number that is not finite is written as null."""
        if not self.enabled:
            return
        first = not self._pending
        self.position += 1
        self._pending.append(json.dumps(strict(record), allow_nan=False) + "\n")
        failure = self._append()
        if failure and first:
            notice(f"warning: {failure}; its lines wait in memory")

    def sync(self) -> str:
        """Flush all lines to the disk; why that failed, or ""."""
        if not self.enabled or not (self.path.exists() or self._pending):
            return ""
        return self._append(flush=True)

    def _append(self, *, flush: bool = False) -> str:
        data = "".join(self._pending).encode()
        try:
            with self.path.open("ab", buffering=0) as file:
                start, rest = file.tell(), memoryview(data)
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                    if flush:
                        os.fsync(file.fileno())
                except OSError:
                    file.truncate(start)  # no torn line in the middle
                    raise
        except OSError as error:
            return f"{self.path} could not be written ({error.strerror})"
        self._pending.clear()
        return ""

    def read(self) -> list[dict[str, Any]]:
        """All complete records."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]  # a torn last line has no newline

    def cut(self, step: int, lines: int) -> None:
        """Cut back to the first ``lines``, which a checkpoint of ``step`` came after.

        The later ones are written again, a torn last line goes. If lines before the checkpoint are
        lost, a line says so.
        """
        if not self.enabled or not self.path.exists():
            return
        end = count = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            found = _step_of(line)
            if count == lines or found is None or found > step:
                break
            end, count = end + len(line), count + 1
        if count < lines:
            notice(
                f"warning: {self.path}: {lines - count} of the {lines} lines before the "
                f"checkpoint of step {step} are lost; line {count + 1} is missing or unreadable"
            )
        self.position = count
        os.truncate(self.path, end)


def _step_of(line: bytes) -> int | None:
    """The step of a whole line, None for anything else."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def strict(value: Any) -> Any:
    """``value`` as JSON can hold it: None for every number that is not finite."""
    if isinstance(value, dict):
        return {k: strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

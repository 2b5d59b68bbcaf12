"""What a person sees of a step: what it cost by the clock, and the line that shows it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import torch

from crpo_fast import distributed, timing
from crpo_fast.console import Field, duration
from crpo_fast.distributed import World
from crpo_fast.experience import Experience


def tokens_and_seconds(batch: Experience, world: World, passes: float) -> dict[str, float]:
    """Token counts of the step over all ranks, and its seconds: of the slowest rank, by part.

    They begin at the previous record: the checkpoint and the evaluation after a step are in the
    next one.

    Args:
        batch: of this rank.
        world: this process among its peers.
        passes: how often each sequence was trained on (see `UpdatePlan.passes`); one with an empty
            completion is in no micro-batch.
    """
    seconds = timing.lap()
    seconds = distributed.largest({**seconds, "step": sum(seconds.values())}, world)
    lengths = sum(map(len, batch.sequences))
    trained = passes * sum(len(s) for s in batch.sequences if s.completion_ids)
    local = torch.tensor([lengths, trained, batch.num_sampled], dtype=torch.float64)
    tokens, trained, sampled = distributed.all_sum(local.to(world.device)).tolist()
    return {"tokens": tokens, **timing.rates(seconds, tokens, trained, sampled)}


class PhaseLine:
    """What the line of a phase says after each step.

    Args:
        algorithm: of the phase.
        length: its steps.
        names: of the stages.
        floor: nats; a stage that starts lower is compared with this when the worst is chosen.
        records: of this phase, from earlier starts of the run: its stages began there.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        algorithm: str,
        length: int,
        names: Sequence[str],
        *,
        floor: float,
        records: Iterable[Mapping[str, Any]] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._algorithm, self._length, self._names = algorithm, length, list(names)
        self._floor, self._clock, self._begun = floor, clock, clock()
        self._done, self._tokens = 0, 0.0  # since begin
        self._starts: dict[int, float] = {}
        for record in records:
            self._note_starts(record)

    def begin(self, done: int) -> list[Field]:
        """The fields before the first step of this start, after ``done`` earlier ones."""
        self._begun, self._done, self._tokens = self._clock(), 0, 0.0
        return [(0, f"{self._algorithm} {done}/{self._length}")]

    def after(
        self,
        done: int,
        metrics: Mapping[str, Any],
        evaluations: Mapping[str, Mapping[str, Any]],
    ) -> list[Field]:
        """The fields after step ``done`` (from 1).

        Args:
            done: steps of the phase.
            metrics: of the step.
            evaluations: of the run so far, by name.
        """
        self._note_starts(metrics)
        fields: list[Field] = [(0, f"{self._algorithm} {done}/{self._length}")]
        if "reward" in metrics:
            fields.append((1, f"reward {_number(metrics['reward'], '.3f')}"))
            fields.append((3, _quality(metrics, evaluations)))
            fields += [(4, self._worst_stage(metrics))] if self._names else []
            fields.append((7, f"kl {_number(metrics.get('kl'), '.4f')}"))
            fields.append((8, f"clip {_number(metrics.get('clip_fraction'), '.3f')}"))
        fields.append((1 if len(fields) == 1 else 6, f"loss {_number(metrics['loss'], '.4f')}"))
        fields.append((9, f"grad {_number(metrics.get('grad_norm'), '.2f')}"))
        if metrics.get("skipped"):
            fields.append((2, f"skipped {metrics['skipped']:.0f}"))
        self._done, self._tokens = self._done + 1, self._tokens + metrics["tokens"]
        elapsed = max(1e-9, self._clock() - self._begun)
        eta = elapsed / self._done * (self._length - done)
        return [*fields, (5, f"{self._tokens / elapsed:,.0f} tok/s"), (2, f"eta {duration(eta)}")]

    def _note_starts(self, metrics: Mapping[str, Any]) -> None:
        for k in range(len(self._names)):
            if k not in self._starts and _is_number(entropy := metrics.get(f"stage_entropy/{k}")):
                self._starts[k] = entropy

    def _worst_stage(self, metrics: Mapping[str, Any]) -> str:
        """The stage farthest from its target, or that has grown most since its start."""
        found: list[tuple[float, str]] = []
        for k, name in enumerate(self._names):
            entropy, target = metrics.get(f"stage_entropy/{k}"), metrics.get(f"stage_target/{k}")
            if not _is_number(entropy):  # it does not occur in this step
                continue
            if _is_number(target):
                gap = abs(math.log(entropy / target)) if entropy > 0 else math.inf
                found.append((gap, f"{name} {entropy:.2f} ({entropy / target:.1f}x target)"))
                continue
            start = self._starts[k]
            grown = f"{entropy / start:.1f}x start" if start > 0 else "started at 0"
            found.append((entropy / max(start, self._floor), f"{name} {entropy:.2f} ({grown})"))
        return f"worst stage {max(found)[1]}" if found else "no stage found"


def _quality(metrics: Mapping[str, Any], evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """Weighted F1 of the latest evaluation, else the share of right answers of this step."""
    trained = {name: e for name, e in evaluations.items() if name != "untrained"}
    if not trained:
        share = metrics.get("completions/right")
        return f"right {100 * share:.1f} % (sampled)" if share is not None else "F1 unknown"
    name = max(trained, key=lambda name: trained[name]["step"])
    return f"F1 {trained[name]['weighted_f1']:.1f} ({name.replace('_', ' ')})"


def _is_number(value: Any) -> TypeGuard[float]:
    """A stage that does not occur has None; JSON has null for what is not finite, too."""
    return value is not None and math.isfinite(value)


def _number(value: Any, form: str) -> str:
    return "?" if value is None or not math.isfinite(value) else format(value, form)

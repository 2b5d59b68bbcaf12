"""When a run saves, which checkpoint is the best, and what happens when the disk is full."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from crpo_fast import checkpoint
from crpo_fast.checkpoint import Best, Progress, SaveError
from crpo_fast.checkpoint_files import one_line
from crpo_fast.config import Config
from crpo_fast.console import Reporter
from crpo_fast.distributed import World
from crpo_fast.run_folder import RunFolder


class Log(Protocol):
    """A file that grows with the run; a checkpoint is written only after all of it."""

    @property
    def name(self) -> str:
        """Of the file."""
        ...

    @property
    def position(self) -> int:
        """How many records it has."""
        ...

    def sync(self) -> str:
        """Write what waits; why that failed, or ""."""
        ...


@dataclass
class Saver:
    """Writes the checkpoints of a run; all ranks hold one and agree on what it says.

    A checkpoint that cannot be written costs nothing but itself: the warning names the free space
    and what is left, training goes on, and the next one is tried at its time.

    Attributes:
        saved_step: the step of the newest checkpoint of this folder that is known to be whole, -1:
            none.
        lapses: how often `latest`, `best` or the removal of old checkpoints failed in this start.
    """

    config: Config
    folder: RunFolder
    world: World
    reporter: Reporter
    logs: tuple[Log, ...]
    saved_step: int = -1
    lapses: int = 0

    @property
    def metric(self) -> str:
        """What ``best`` means: weighted_f1 of an evaluation, reward of the steps, or none."""
        chosen = self.config.checkpoint.best
        if chosen != "auto":
            return chosen
        return "weighted_f1" if self.config.eval.every else "reward"

    def is_best(self, progress: Progress, scores: dict[str, float]) -> bool:
        """Whether ``scores`` (by metric) of the step of ``progress`` beat all before."""
        if self.metric not in scores:
            return False
        best = progress.best
        if best is None or best.metric != self.metric:
            return True
        return scores[self.metric] > best.score

    def judged(self, progress: Progress, scores: dict[str, float]) -> Progress:
        """``progress`` with its own step as the best one, if it is."""
        if not self.is_best(progress, scores):
            return progress
        return replace(progress, best=Best(progress.step, scores[self.metric], self.metric))

    def note_best(self, progress: Progress, scores: dict[str, float]) -> Progress:
        """``judged`` for a step that may be saved already (only then it can be the best)."""
        if self.saved_step != progress.step:
            return progress
        progress = self.judged(progress, scores)
        self._settle("writing best", checkpoint.mark_best, progress.best)
        return progress

    def count_reward(self, progress: Progress, reward: float | None) -> Progress:
        """Add a step's mean reward to those since the last regular checkpoint."""
        if reward is None:
            return progress
        total, count = progress.rewards
        return replace(progress, rewards=(total + reward, count + 1))

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        *,
        scores: dict[str, float],
        regular: bool,
    ) -> Progress:
        """Save and prune; a collective. ``saved_step`` tells whether it worked.

        Args:
            model: the (sharded) policy.
            optimizer: of the phase.
            progress: what to store.
            scores: of this step's evaluation, if there was one.
            regular: due by ``checkpoint.every`` or the end of a phase: the mean reward since the
                one before is its score.

        Returns:
            The progress to go on with.
        """
        folder, best = self.folder.checkpoints, progress.best
        if regular:
            total, count = progress.rewards
            scores = {**scores, **({"reward": total / count} if count else {})}
            progress = replace(progress, rewards=(0.0, 0))
        progress = self.judged(progress, scores)
        progress = replace(progress, logged={log.name: log.position for log in self.logs})
        veto = "; ".join(filter(None, (log.sync() for log in self.logs)))
        try:
            checkpoint.save(folder, model, optimizer, progress, self.world, veto=veto)
        except SaveError as error:
            self._warn(error)
            return replace(progress, best=best)
        self.saved_step = progress.step
        self._settle("writing latest", checkpoint.mark_latest, progress.step)
        self._settle("writing best", checkpoint.mark_best, progress.best)
        keep = self.config.checkpoint.keep
        self._settle("removing old checkpoints", checkpoint.prune, keep, progress)
        return progress

    def _settle(self, what: str, act: Callable[..., None], *args: Any) -> None:
        """Do what the checkpoints are whole without (rank 0); a failure is said and counted."""
        if not self.world.is_main:
            return
        try:
            act(self.folder.checkpoints, *args)
        except OSError as error:
            self.lapses += 1
            self.reporter.warning(
                f"{self.folder.checkpoints}: {what} failed ({one_line(error)}), {self.lapses} such "
                f"failure(s) since the start; step_{self.saved_step} is whole and training goes on"
            )

    def _warn(self, error: SaveError) -> None:
        newest = (
            f"step_{self.saved_step} stays the newest" if self.saved_step >= 0 else "there is none"
        )
        self.reporter.warning(
            f"{error}; {newest}. Training goes on and the next checkpoint is tried at its "
            "time. Free space, or type --checkpoint.keep 1."
        )

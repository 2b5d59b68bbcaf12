"""A loss or gradient that is not finite: the update is skipped, counted, and its batch saved.

    <run>/nonfinite/step_<n>/rank_<r>.safetensors   <i>.<name> for every tensor of micro-batch i:
                                                    ids, labels, the vectors of the loss, logprobs
    <run>/nonfinite/step_<n>/rank_<r>.json          metrics, gradients and weights not finite

The folders hold token ids of posts and stay on this machine; the newest ``KEPT`` are kept.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from crpo_fast import distributed
from crpo_fast.console import notice
from crpo_fast.distributed import World
from crpo_fast.metrics import Metrics, strict
from crpo_fast.packing import MicroBatch

KEPT = 5  # folders
_NAMED = 20  # parameters that the JSON names


class NonFiniteError(RuntimeError):
    """Too many updates in a row had a loss or gradient that is not finite."""


@dataclass
class Guard:
    """Counts skipped updates; equal on every rank, and part of a checkpoint.

    Attributes:
        limit: skipped updates in a row that end the run.
        folder: <run>/nonfinite.
        report: prints a line.
        in_a_row, total: skipped updates, since the last good one and of the whole run.
    """

    limit: int
    folder: Path
    world: World
    report: Callable[[str], None]
    in_a_row: int = 0
    total: int = 0

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint needs to go on counting."""
        return {"in_a_row": self.in_a_row, "total": self.total}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take up a saved state."""
        self.in_a_row, self.total = int(state["in_a_row"]), int(state["total"])

    @property
    def is_exhausted(self) -> bool:
        """Must the run end?"""
        return self.in_a_row >= self.limit

    def done(self) -> None:
        """An update was good."""
        self.in_a_row = 0

    def skipped(
        self,
        where: str,
        model: nn.Module,
        batches: list[MicroBatch],
        logprobs: list[Tensor],
        metrics: Metrics,
    ) -> None:
        """An update was skipped; ``where`` is step_<n>, which names the folder."""
        self.in_a_row, self.total = self.in_a_row + 1, self.total + 1
        folder = self.folder / where
        try:
            if self.world.is_main:
                _make_room(self.folder, where)
            _write(folder, self.world, model, batches, logprobs, metrics)
            tensors = folder / "rank_0.safetensors"
            saved = f"its batch: {folder} (safetensors.torch.load_file({str(tensors)!r}))"
        except (OSError, SafetensorError) as error:  # looking at it later is not worth the run
            saved = f"its batch could not be saved: {error}"
            if not self.world.is_main:
                notice(f"{where}: rank {self.world.rank}: {saved}")
        self.report(
            f"{where}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}: not finite. "
            f"The update was skipped ({self.in_a_row} in a row, the run stops at {self.limit}); "
            f"{saved}"
        )

    def error(self, is_saved: bool, checkpoints: Path) -> NonFiniteError:
        """Why the run ends; the last good weights are in ``checkpoints`` if ``is_saved``."""
        last = (
            f"The last good weights are the newest in {checkpoints}."
            if is_saved
            else f"What is in {checkpoints} is from before: these weights could not be saved."
        )
        return NonFiniteError(
            f"loss or gradient of {self.in_a_row} updates in a row not finite (train.max_nonfinite "
            f"{self.limit}); none of them changed the weights. {last} Their batches are in "
            f"{self.folder}. Lower optim.lr, or look for NaN in the data and the model "
            "(model.compute_dtype float32 helps): type --optim.lr <smaller> --run.dir <new folder> "
            f"--run.resume {checkpoints}/step_<n>."
        )


def is_finite(model: nn.Module, world: World) -> bool:
    """Are all weights of all ranks finite? A collective."""
    return not distributed.all_max(len(_not_finite(dict(model.named_parameters()))), world)


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    local = {n: t.to_local() if isinstance(t, DTensor) else t for n, t in tensors.items()}
    return [name for name, t in local.items() if not bool(torch.isfinite(t).all())]


def _make_room(parent: Path, name: str) -> None:
    others = [p for p in parent.glob("step_*") if p.name != name]
    others.sort(key=lambda p: (p.stat().st_mtime_ns, p.name))
    for path in others[: max(0, len(others) - KEPT + 1)]:
        shutil.rmtree(path)


def _write(
    folder: Path,
    world: World,
    model: nn.Module,
    batches: list[MicroBatch],
    logprobs: list[Tensor],
    metrics: Metrics,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for i, (batch, values) in enumerate(zip(batches, logprobs, strict=True)):
        named = {k: v for k, v in vars(batch).items() if isinstance(v, Tensor)}
        for name, value in {**named, **batch.vectors, "logprobs": values}.items():
            tensors[f"{i}.{name}"] = value.detach().cpu().clone().contiguous()
    stem = folder / f"rank_{world.rank}"
    save_file(tensors, stem.with_suffix(".safetensors"))
    parameters = dict(model.named_parameters())
    gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    record: dict[str, Any] = {
        "rank": world.rank,
        "world_size": world.size,
        "micro_batches": len(batches),
        "metrics": {k: v if v is None or math.isfinite(v) else str(v) for k, v in metrics.items()},
        "gradients_not_finite": _not_finite(gradients)[:_NAMED],
        "weights_not_finite": _not_finite(parameters)[:_NAMED],
    }
    stem.with_suffix(".json").write_text(
        json.dumps(strict(record), indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )

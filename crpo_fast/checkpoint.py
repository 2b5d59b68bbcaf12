"""Checkpoints: safetensors and JSON only (no code in them), written whole or not at all.

    checkpoints/step_<n>/   model.safetensors  optimizer.safetensors  state.json
    checkpoints/latest      the name of the newest one

Weights and optimizer state are gathered to rank 0 and stored unsharded, so that a checkpoint can be
resumed at any number of ranks. state.json is written last; a folder without it is not a checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from crpo_fast import distributed
from crpo_fast.console import notice
from crpo_fast.distributed import World

_SEPARATOR = "|"  # between a parameter's name and the name of its optimizer tensor


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written; the message names it and says what to type."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands: ``phase_steps`` steps of phase ``phase`` are done, ``step`` in all.

    Attributes:
        phase, phase_steps, step: counters.
        caps: for every phase begun so far, how many steps it ran (a capped run is a prefix of a
            longer one).
        seconds: wall time of the run so far.
        controllers: their state, by name.
        is_phase_end: the phase's last step is done; such checkpoints hold the KL reference of the
            next phase.
    """

    phase: int = 0
    phase_steps: int = 0
    step: int = 0
    caps: tuple[int, ...] = ()
    seconds: float = 0.0
    is_phase_end: bool = False
    controllers: dict[str, Any] = field(default_factory=dict)


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    world: World,
) -> Path:
    """Write ``folder/step_<n>``; a collective, only rank 0 writes.

    The tensors go to ``step_<n>.tmp``, are flushed to the disk, and the folder is renamed: a run
    that is killed while saving leaves the previous checkpoint as it was.
    """
    target = folder / f"step_{progress.step}"
    weights = distributed.model_state(model)
    state = distributed.optimizer_state(model, optimizer)
    if world.is_main:
        temporary = target.with_name(target.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write_tensors(temporary / "model.safetensors", _unshared(weights))
        _write_tensors(temporary / "optimizer.safetensors", _flatten(state["state"]))
        _write_json(
            temporary / "state.json",
            {"progress": asdict(progress), "param_groups": state["param_groups"]},
        )
        if target.exists():  # the same step of an earlier start of this run
            shutil.rmtree(target)
        os.replace(temporary, target)
        _flush(folder)
        _write_text(folder / "latest", target.name)
    distributed.barrier()
    return target


def load_progress(path: Path) -> Progress:
    """Read the counters of a checkpoint.

    Raises:
        CheckpointError: the folder is not a whole checkpoint.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        record: dict[str, Any] = state["progress"]
        record["caps"] = tuple(record["caps"])
        return Progress(**record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not a whole checkpoint ({type(error).__name__}: {error}). "
            "Type --run.resume <run>/checkpoints/step_<n> with one that has a state.json."
        ) from error


def load_model(path: Path, model: nn.Module) -> None:
    """Load the weights of a checkpoint into a (sharded) model."""
    weights = load_file(path / "model.safetensors")
    if getattr(model.config, "tie_word_embeddings", False):
        embedding = next(name for name in weights if name.endswith("embed_tokens.weight"))
        weights["lm_head.weight"] = weights[embedding]
    distributed.load_model_state(model, weights)


def load_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimizer state of a checkpoint."""
    groups = json.loads((path / "state.json").read_text(encoding="utf-8"))["param_groups"]
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(path / "optimizer.safetensors").items():
        name, kind = key.split(_SEPARATOR)
        state.setdefault(name, {})[kind] = value
    distributed.load_optimizer_state(model, optimizer, {"state": state, "param_groups": groups})


def find(folder: Path) -> list[tuple[Path, Progress]]:
    """All whole checkpoints below ``folder``, newest first; names others on stdout, skips them."""
    found = []
    for path in folder.glob("step_*"):
        if path.suffix == ".tmp":
            continue
        try:
            found.append((path, load_progress(path)))
        except CheckpointError as error:
            notice(f"skipping {error}")
    return sorted(found, key=lambda pair: -pair[1].step)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints; ends of phases (KL references) stay."""
    for path, progress in find(folder)[max(1, keep) :]:
        if not progress.is_phase_end:
            shutil.rmtree(path)


def _flatten(state: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    return {
        f"{name}{_SEPARATOR}{kind}": value.contiguous()
        for name, tensors in state.items()
        for kind, value in tensors.items()
    }


def _unshared(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    seen: set[int] = set()
    kept = {}
    for name, value in weights.items():  # tied weights appear twice; safetensors wants them once
        if value.data_ptr() not in seen or value.numel() == 0:
            seen.add(value.data_ptr())
            kept[name] = value.contiguous()
    return kept


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path)
    _flush(path)


def _write_json(path: Path, value: Any) -> None:
    _write_text(path, json.dumps(value, indent=1))


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    _flush(temporary)
    os.replace(temporary, path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

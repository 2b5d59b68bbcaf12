"""Checkpoints: safetensors and JSON only (no code in them), written whole or not at all.

    checkpoints/step_<n>/   model.safetensors  optimizer.safetensors  state.json
    checkpoints/latest      the name of the newest one
    checkpoints/best        the name of the best one (checkpoint.best), which is never pruned

Weights and optimizer state are gathered to rank 0 and stored unsharded, so that a checkpoint can be
resumed at any number of ranks. Nothing else is needed to go on to the bit: rows, seeds and learning
rates are pure functions of (seed, step, rank), and all generators are seeded anew in every step.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from crpo_fast import checkpoint_files as files
from crpo_fast import distributed, lora
from crpo_fast.checkpoint_files import CheckpointError as CheckpointError
from crpo_fast.console import notice
from crpo_fast.distributed import World

_NAME = re.compile(r"step_(0|[1-9][0-9]{0,11})")


class SaveError(RuntimeError):
    """A file of the run could not be written; the message says what is left and what to type."""


@dataclass(frozen=True)
class Best:
    """The best step so far: its ``score`` in ``metric`` (weighted_f1: percent, or reward)."""

    step: int
    score: float
    metric: str


@dataclass(frozen=True)
class Progress:
    """Where a run stands: ``phase_steps`` steps of phase ``phase`` are done, ``step`` in all.

    Attributes:
        phase, phase_steps, step: counters.
        caps: for every phase begun so far, how many steps it ran (a capped run is a prefix of a
            longer one).
        seconds: wall time of the run so far.
        controllers: state of what adapts in a phase (alarm, entropy, nonfinite), by name.
        is_phase_end: the phase's last step is done; such checkpoints hold the KL reference of the
            next phase.
        best: the best step so far, if any.
        rewards: (sum, count) of the steps' mean rewards since the last regular checkpoint.
        logged: lines of each log of the run, by file name; later ones are written again.
    """

    phase: int = 0
    phase_steps: int = 0
    step: int = 0
    caps: tuple[int, ...] = ()
    seconds: float = 0.0
    is_phase_end: bool = False
    controllers: dict[str, Any] = field(default_factory=dict)
    best: Best | None = None
    rewards: tuple[float, int] = (0.0, 0)
    logged: dict[str, int] = field(default_factory=dict)


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    world: World,
    *,
    veto: str = "",
) -> Path:
    """Write ``folder/step_<n>``; a collective, only rank 0 writes.

    The files go to ``step_<n>.tmp``, are flushed to the disk, and the folder is renamed: a run
    that is killed while saving leaves the previous checkpoint as it was.

    Args:
        folder: of the checkpoints.
        model: the (sharded) policy.
        optimizer: of the phase.
        progress: counters and controllers.
        world: all ranks call this.
        veto: why rank 0 must not save; "" = it may.

    Raises:
        SaveError: on all ranks; what was begun is removed, earlier checkpoints are as they were.
    """
    target = folder / f"step_{progress.step}"
    is_adapted = lora.settings_of(model) is not None
    weights = lora.stored(model, distributed.model_state(model, trained_only=is_adapted))
    if _tied(model):  # gathered from several ranks the pair is no longer one tensor
        weights.pop("lm_head.weight", None)
    state = distributed.optimizer_state(model, optimizer)
    failure = veto
    if world.is_main and not failure:
        try:
            _write(target, weights, state, progress)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(_temporary(target), ignore_errors=True)
            failure = f"{files.one_line(error)}; {_free(folder)}"
    failure = distributed.all_gather(failure, world)[0]
    if failure:
        raise SaveError(f"{target} could not be written ({failure})")
    return target


def _write(
    target: Path, weights: dict[str, Tensor], state: dict[str, Any], progress: Progress
) -> None:
    temporary = _temporary(target)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    files.write(
        temporary,
        _unshared(weights),
        _flatten(state["state"]),
        {"progress": asdict(progress), "param_groups": state["param_groups"]},
    )
    old = target.with_name(target.name + ".old")
    if target.exists():  # the same step again: ``tidy`` puts it back if we die in between
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
    os.replace(temporary, target)
    files.flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _temporary(target: Path) -> Path:
    return target.with_name(target.name + ".tmp")


def _free(folder: Path) -> str:
    usage = shutil.disk_usage(folder)
    return f"{usage.free / 2**20:,.0f} MiB of {usage.total / 2**20:,.0f} MiB are free there"


def tidy(folder: Path) -> None:
    """Remove what a killed save left behind; a checkpoint that was being replaced comes back."""
    for old in folder.glob("step_*.old"):
        target = old.with_suffix("")
        if target.exists():
            shutil.rmtree(old)
        else:
            os.replace(old, target)
    for temporary in folder.glob("*.tmp"):
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink()


def load_progress(path: Path) -> Progress:
    """Check a whole checkpoint, checksums included, and read its counters.

    Raises:
        CheckpointError: the folder is not a whole checkpoint.
    """
    return _progress(path, files.verify(path)["progress"])


def _progress(path: Path, record: Any) -> Progress:
    try:
        progress = _parse(record)
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(path, f"state.json: progress: {error}") from error
    name = _NAME.fullmatch(path.name)
    if name and int(name[1]) != progress.step:
        raise CheckpointError(path, f"state.json is of step {progress.step}")
    return progress


def _parse(record: Any) -> Progress:
    names = {f.name for f in fields(Progress)}
    if not isinstance(record, dict) or record.keys() != names:
        raise ValueError(f"expected {sorted(names)}, got {record!r}")
    caps = record["caps"]
    if not isinstance(caps, list):
        raise ValueError(f"caps: expected a list, got {caps!r}")
    if not isinstance(record["logged"], dict):
        raise ValueError(f"logged: expected counts by name, got {record['logged']!r}")
    counts = [record[k] for k in ("phase", "phase_steps", "step")]
    counts += [*caps, *record["logged"].values()]
    if not all(type(n) is int and 0 <= n < 10**12 for n in counts):
        raise ValueError(f"expected counters, got {counts!r}")
    if len(caps) != record["phase"] + 1 or caps[-1] != record["phase_steps"]:
        raise ValueError(f"caps: expected {record['phase'] + 1} with the phase's steps, got {caps}")
    if type(record["is_phase_end"]) is not bool or not isinstance(record["controllers"], dict):
        raise ValueError("expected is_phase_end true or false and controllers as an object")
    seconds, best, (total, count) = record["seconds"], record["best"], record["rewards"]
    if best is not None:
        best = Best(**best)
        if type(best.step) is not int or not isinstance(best.metric, str):
            raise ValueError(f"best: expected step, score and metric, got {best!r}")
    numbers = [seconds, total, count, best.score if best else 0.0]
    if not all(type(x) in (int, float) and math.isfinite(x) for x in numbers):
        raise ValueError(f"expected finite numbers, got {numbers!r}")
    changes: dict[str, Any] = {"caps": tuple(caps), "best": best, "rewards": (total, count)}
    return Progress(**{**record, **changes})


def load_model(path: Path, model: nn.Module) -> None:
    """Load the weights of a checkpoint into a (sharded) model.

    Raises:
        CheckpointError: they are of another model.
    """
    weights, own = load_file(path / files.MODEL), lora.stored(model, model.state_dict())
    for embedding in _tied(model):
        weights["lm_head.weight"] = weights[embedding]
    expected = {name: value.shape for name, value in own.items()}
    files.check_tensors(path, files.MODEL, weights, expected)
    distributed.load_model_state(model, weights, strict=lora.settings_of(model) is None)


def _tied(model: Any) -> list[str]:
    """Name of the embedding that is the head as well, if that is so and the weights are stored."""
    is_tied = getattr(model.config, "tie_word_embeddings", False)
    if not is_tied or lora.settings_of(model) is not None:
        return []
    embedding = model.get_input_embeddings().weight
    return [name for name, parameter in model.named_parameters() if parameter is embedding]


def load_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimizer state of a checkpoint; its settings stay those of the config.

    Args:
        path: of the checkpoint.
        model: the (sharded) policy.
        optimizer: a fresh one.

    Raises:
        CheckpointError: it is the state of other parameters.
    """
    groups = files.read_state(path)["param_groups"]
    shapes = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
    listed = sorted(name for group in groups for name in group["params"])
    if listed != sorted(shapes) or len(groups) != len(optimizer.param_groups):
        raise CheckpointError(path, "state.json: param_groups are those of another model")
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(path / files.OPTIMIZER).items():
        name, _, kind = key.partition(files.SEPARATOR)
        state.setdefault(name, {})[kind] = value
    if not state:  # no update so far was done: torch would make up the state of one
        return
    kinds = set().union(*state.values())
    tensors = {f"{n} {k}": v for n, s in state.items() for k, v in s.items()}
    expected = {
        f"{n} {k}": torch.Size() if k == "step" else s for n, s in shapes.items() for k in kinds
    }
    files.check_tensors(path, files.OPTIMIZER, tensors, expected)
    own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    distributed.load_optimizer_state(model, optimizer, {"state": state, "param_groups": groups})
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def load_controller(controller: Any, state: Any, source: Path | None) -> None:
    """Give a controller its saved ``state``; None = there is none.

    Raises:
        CheckpointError: it is not what the controller saved.
    """
    try:
        if state is not None:
            controller.load_state_dict(state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(source or Path(), f"state.json: controllers: {error!r}") from error


def listed(folder: Path) -> list[Path]:
    """The folders that have the name of a checkpoint, newest first; none is looked into."""
    named = [(m, p) for p in folder.glob("step_*") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(named, key=lambda pair: -int(pair[0][1]))]


def find(folder: Path) -> Iterator[tuple[Path, Progress]]:
    """Whole checkpoints below ``folder``, newest first; a line names each that is not."""
    for path in listed(folder):
        try:
            yield path, load_progress(path)
        except CheckpointError as error:
            notice(f"skipping {path}: not a whole checkpoint ({error.why})")


def phase_end(folder: Path, progress: Progress) -> Path | None:
    """The whole checkpoint at the end of the phase before that of ``progress``, on the same way."""
    step = sum(progress.caps[: progress.phase])
    path = folder / f"step_{step}"
    if progress.phase == 0 or not path.is_dir():
        return None
    end = load_progress(path)
    same = end.is_phase_end and end.caps == progress.caps[: progress.phase]
    return path if same else None


def copy(path: Path, folder: Path) -> None:
    """Copy a checkpoint into ``folder``, where there is none of its name; whole or not at all."""
    with files.whole_folder(folder / path.name) as temporary:
        temporary.mkdir()
        for name in (files.MODEL, files.OPTIMIZER, files.STATE):
            shutil.copyfile(path / name, temporary / name)
            files.flush(temporary / name)
        files.flush(temporary)
    files.flush(folder)


def prune(folder: Path, keep: int, progress: Progress) -> None:
    """Delete old checkpoints up to ``progress``.

    The newest ``keep``, the best one and the ends of phases (KL references) stay.
    """
    ends = {sum(progress.caps[:n]) for n in range(1, progress.phase + 1)}
    if progress.is_phase_end:
        ends.add(progress.step)
    kept = {*ends, progress.best.step} if progress.best else ends
    done = [p for p in listed(folder) if _step(p) <= progress.step]
    for path in done[max(1, keep) :]:
        if _step(path) not in kept:
            shutil.rmtree(path)
    for aside in folder.glob("step_*.aside"):  # the run has passed it again
        if (name := _NAME.fullmatch(aside.stem)) and int(name[1]) <= progress.step:
            shutil.rmtree(aside)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def mark_latest(folder: Path, step: int) -> None:
    """Write ``folder/latest``; for people, nothing reads it."""
    files.write_text(folder / "latest", f"step_{step}")


def mark_best(folder: Path, best: Best | None) -> None:
    """Write ``folder/best``, or remove it when no checkpoint is the best yet."""
    if best is None:
        (folder / "best").unlink(missing_ok=True)
    else:
        files.write_text(folder / "best", f"step_{best.step}")


def best_path(folder: Path) -> Path | None:
    """The checkpoint that ``folder/best`` names; None: there is none, or it names anything else."""
    file = folder / "best"
    if not file.is_file():
        return None
    name = file.read_bytes()[:64].decode("ascii", "replace").strip()
    return folder / name if _NAME.fullmatch(name) else None


def set_aside(paths: list[Path]) -> None:
    """Rename checkpoints to step_<n>.aside: the run goes another way before their step.

    ``prune`` deletes them when the run has passed their step.
    """
    for path in paths:
        aside = path.with_name(path.name + ".aside")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)


def later(folder: Path, step: int) -> list[Path]:
    """The folders named as checkpoints after ``step``, newest first."""
    return [path for path in listed(folder) if _step(path) > step]


def _flatten(state: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    return {
        f"{name}{files.SEPARATOR}{kind}": value.contiguous()
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

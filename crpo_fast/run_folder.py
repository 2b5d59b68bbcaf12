"""The run folder: one config, its checkpoints, what was logged, and how far it got.

runs/<name>/  config.toml  metrics.jsonl  samples.jsonl  evaluations.json  summary.json
              data/  tokenizer/  plots/  checkpoints/  final/  lock (while a run uses the folder)
              resumed_from.json (after --run.resume best | <checkpoint>)
"""

from __future__ import annotations

import json
import time
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w

from crpo_fast import checkpoint, distributed
from crpo_fast.checkpoint import CheckpointError, Progress
from crpo_fast.checkpoint_files import write_text
from crpo_fast.config import Config, ConfigError, to_dict
from crpo_fast.console import notice
from crpo_fast.distributed import World
from crpo_fast.lock import RunLock
from crpo_fast.loss import loss_spec

# sections and keys that may differ between the starts of one run
_FREE = (
    "run",
    "quiet",
    "track",
    "checkpoint",
    "report",
    "train.max_steps",
    "train.threads",
    "train.timeout",
    "train.max_nonfinite",
    "rewards.workers",
    "rewards.timeout",
    "rewards.start_timeout",
    "rewards.max_error_rate",
)


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    path: Path

    @property
    def origin(self) -> Path:
        """Where ``run.resume`` took the last start that went elsewhere: source and step."""
        return self.path / "resumed_from.json"

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    def summary(self) -> dict[str, Any] | None:
        """summary.json of a finished run, else None."""
        file = self.path / "summary.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def read_evaluations(self) -> dict[str, Any]:
        """Evaluations done so far, by name, in their order."""
        file = self.path / "evaluations.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def write_json(self, name: str, value: Any) -> None:
        """Write ``name`` whole or not at all."""
        file = self.path / name
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        temporary.replace(file)


@dataclass(frozen=True)
class Resume:
    """Where to continue.

    Attributes:
        progress: of the checkpoint.
        path: the checkpoint; None = at the start.
        phase_start: the checkpoint that holds the weights the phase began with, if any.
        other_way: later whole checkpoints of the folder that are not on the way from here.
        is_own: the checkpoint lies in the folder of the run.
        source: what ``run.resume`` names, where this start goes there; "": it goes on.
    """

    progress: Progress
    path: Path | None = None
    phase_start: Path | None = None
    other_way: tuple[Path, ...] = ()
    is_own: bool = False
    source: str = ""


@dataclass
class Opened:
    """A run folder that is ours: where to go on, or the summary of a finished run.

    Attributes:
        folder, resume: the paths and the point to continue from.
        summary: of a finished run; None = there is something to do.
        lock: rank 0's; None on the others.
    """

    folder: RunFolder
    resume: Resume
    summary: dict[str, Any] | None = None
    lock: RunLock | None = None

    def close(self) -> None:
        """Let other runs have the folder."""
        if self.lock is not None:
            self.lock.release()


def open_run(config: Config, world: World) -> Opened:
    """Lock, check and prepare the folder, find where to go on. A collective.

    Rank 0 alone looks and decides, the others are told: what is refused is refused on all ranks,
    and what is skipped is named once.

    Raises:
        ConfigError: the folder is in use, or of another run, or cannot be written.
        CheckpointError: ``run.resume`` names a checkpoint that is not whole.
    """
    opened, failure = None, None
    if world.is_main:
        try:
            opened = _open(config)
        except (ConfigError, CheckpointError) as error:
            failure = error
        except OSError as error:
            failure = ConfigError(
                f"run.dir: expected a folder that can be written, got {config.run.dir} ({error}). "
                "Type --run.dir <new folder>."
            )
    told = None if opened is None else replace(opened, lock=None)
    told, message = distributed.all_gather((told, str(failure or "")), world)[0]
    if message:
        raise failure or ConfigError(message)
    return opened or told


def _open(config: Config) -> Opened:
    folder = RunFolder(Path(config.run.dir))
    folder.path.mkdir(parents=True, exist_ok=True)
    lock = RunLock(folder.path)  # before anything here is read or changed
    try:
        if config.run.resume == "never" and (folder.path / "config.toml").exists():
            lock = _move_aside(folder, lock)
        return _prepare(config, folder, lock)
    except BaseException:
        lock.release()
        raise


def _move_aside(folder: RunFolder, lock: RunLock) -> RunLock:
    old = folder.path.with_name(f"{folder.path.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
    folder.path.rename(old)
    folder.path.mkdir()
    (old / "lock").unlink(missing_ok=True)
    lock.release()
    notice(f"run.resume never: moved the earlier run to {old}")
    return RunLock(folder.path)


def _prepare(config: Config, folder: RunFolder, lock: RunLock) -> Opened:
    saved = folder.path / "config.toml"
    if saved.exists():
        _refuse_other_config(config, saved)
    elif any(p.name not in ("lock", "config.toml.tmp") for p in folder.path.iterdir()):
        raise ConfigError(
            f"run.dir: expected an empty folder or a run, got {folder.path} with other files in "
            "it. Type --run.dir <new folder>."
        )
    checkpoint.tidy(folder.checkpoints)
    resume, summary = resume_point(config, folder), folder.summary()
    goes_back = resume.source and resume.is_own
    if config.run.resume == "auto":  # the next start with a source is another command
        folder.origin.unlink(missing_ok=True)
    if summary and summary["phase_steps"] == phase_lengths(config) and not goes_back:
        return Opened(folder, resume, summary, lock)
    write_text(saved, tomli_w.dumps(to_dict(config)))
    folder.checkpoints.mkdir(exist_ok=True)
    (folder.path / "summary.json").unlink(missing_ok=True)  # it is not finished any more
    if resume.other_way:
        names = ", ".join(p.name for p in resume.other_way)
        notice(f"going on from step {resume.progress.step}: renamed {names} to step_<n>.aside")
        checkpoint.set_aside(list(resume.other_way))
    if resume.phase_start is not None and not resume.is_own:
        checkpoint.copy(resume.phase_start, folder.checkpoints)
    if resume.source:  # the last step of going there: a start killed before it goes there again
        folder.write_json(folder.origin.name, _origin(resume.source, resume.progress.step))
    checkpoint.mark_best(folder.checkpoints, resume.progress.best)
    return Opened(folder, resume, None, lock)


def _refuse_other_config(config: Config, saved: Path) -> None:
    before = _flat(tomllib.loads(saved.read_text(encoding="utf-8")))
    now = _flat(to_dict(config))
    keys = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    different = [k for k in keys if not k.startswith(_FREE)]
    if different:
        lines = "\n".join(f"  {k}: {before.get(k)!r} -> {now.get(k)!r}" for k in different)
        raise ConfigError(
            f"run.dir: {saved.parent} already holds a run with another config:\n{lines}\n"
            "Type --run.dir <new folder> for a new run, or --run.resume never to move the old "
            "one aside."
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = [(str(i), v) for i, v in enumerate(value)]
    else:
        return {prefix: value}
    return {
        k: v for key, x in items for k, v in _flat(x, f"{prefix}.{key}" if prefix else key).items()
    }


def phase_lengths(config: Config) -> list[int]:
    """Steps of every phase under ``train.max_steps``."""
    cap = config.train.max_steps
    return [min(p.steps, cap) if cap else p.steps for p in config.phases]


def resume_point(config: Config, folder: RunFolder) -> Resume:
    """Where ``run.resume`` leads; a run that went there at its last start goes on from its newest.

    Raises:
        CheckpointError: ``run.resume`` names one that is not whole.
        ConfigError: it names one that is not on the way of this config, or there is no best one.
    """
    if config.run.resume == "never":
        return Resume(Progress())
    if config.run.resume == "auto":
        return _newest(config, folder)
    source = config.run.resume
    source = source if source == "best" else str(Path(source).resolve())
    if (step := _step_of_origin(folder, source)) is not None:
        resume = _newest(config, folder)
        if resume.path is not None and resume.progress.step >= step:
            notice(
                f"run.resume: the last start went to {source} (step {step}) already; going on from "
                f"{resume.path.name}. To go there again remove {folder.origin}."
            )
            return resume
    return replace(_at(config, folder, _named(config, folder)), source=source)


def _origin(source: str, step: int) -> dict[str, Any]:
    return {"source": source, "step": step}


def _step_of_origin(folder: RunFolder, source: str) -> int | None:
    """The step at which the last start began if it went to ``source``."""
    if not folder.origin.exists():
        return None
    try:
        record = json.loads(folder.origin.read_text(encoding="utf-8"))
        step = int(record["step"])
        return step if record == _origin(source, step) else None
    except (ValueError, KeyError, TypeError) as error:
        notice(f"warning: {folder.origin} is not of this program ({error!r}); not looked at")
        return None


def _at(config: Config, folder: RunFolder, path: Path) -> Resume:
    """The checkpoint ``path``, of this run or of another one."""
    progress = checkpoint.load_progress(path)
    if not _is_prefix(progress, phase_lengths(config)):
        raise ConfigError(
            f"run.resume: {path} (phase {progress.phase}, step {progress.phase_steps}) is not "
            "on the way of this config. Type --train.max_steps as in the run that wrote it."
        )
    resume = _with_reference(config, path, progress)
    if path.resolve().parent == folder.checkpoints.resolve():
        later = checkpoint.later(folder.checkpoints, progress.step)
        return replace(resume, other_way=tuple(later), is_own=True)
    # nothing here is on the way from there, and the best one is not here
    others = checkpoint.listed(folder.checkpoints)
    return replace(resume, progress=replace(progress, best=None), other_way=tuple(others))


def _newest(config: Config, folder: RunFolder) -> Resume:
    """The newest whole checkpoint that is a prefix of the run that is asked for.

    A longer ``train.max_steps`` continues from the last checkpoint that both runs share. A line
    names every checkpoint that is skipped, and why.
    """
    lengths, other_way = phase_lengths(config), list[Path]()
    for path, progress in checkpoint.find(folder.checkpoints):
        if not _is_prefix(progress, lengths):
            other_way.append(path)
            continue
        try:
            resume = _with_reference(config, path, progress)
        except CheckpointError as error:
            notice(f"skipping {path}: {error.why}")
        else:
            return replace(resume, other_way=tuple(other_way), is_own=True)
    if len(checkpoint.listed(folder.checkpoints)) > len(other_way):
        notice(f"no whole checkpoint is left in {folder.checkpoints}: starting from the beginning")
    return Resume(Progress(), other_way=tuple(other_way))


def _named(config: Config, folder: RunFolder) -> Path:
    if config.run.resume != "best":
        return Path(config.run.resume)
    path = checkpoint.best_path(folder.checkpoints)
    if path is None:
        raise ConfigError(
            f"run.resume: expected a best checkpoint, got none in {folder.checkpoints}. Type "
            "--run.resume auto for the newest one."
        )
    return path


def _is_prefix(progress: Progress, lengths: list[int]) -> bool:
    done = progress.caps[: progress.phase]
    return (
        progress.phase < len(lengths)
        and list(done) == lengths[: progress.phase]
        and progress.phase_steps <= lengths[progress.phase]
    )


def needs_phase_start(config: Config, phase: int) -> bool:
    """Must the checkpoint at the end of the phase before be there to resume ``phase``?"""
    if config.lora.rank:  # the KL reference is the base model
        return False
    return phase > 0 and loss_spec(config, config.phases[phase], []).objective.kl_coef > 0


def _with_reference(config: Config, path: Path, progress: Progress) -> Resume:
    """The resume point with the start of its phase, which the KL reference needs."""
    needed = needs_phase_start(config, progress.phase)
    start, why = None, "it is not beside it"
    try:
        start = checkpoint.phase_end(path.parent, progress) if needed else None
    except CheckpointError as error:
        why = f"{error.path.name}: {error.why}"
    if needed and start is None:
        raise CheckpointError(path, f"no KL reference, the end of phase {progress.phase}: {why}")
    return Resume(progress, path, start)

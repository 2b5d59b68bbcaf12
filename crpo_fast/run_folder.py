"""The run folder: one config, its checkpoints, what was logged, and how far it got.

runs/<name>/  config.toml  metrics.jsonl  samples.jsonl  evaluations.json  summary.json
              data/  tokenizer/  plots/  checkpoints/  final/
"""

from __future__ import annotations

import json
import time
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w

from crpo_fast import checkpoint
from crpo_fast.checkpoint import Progress
from crpo_fast.config import Config, ConfigError, to_dict
from crpo_fast.console import notice

# sections and keys that may differ between the starts of one run
_FREE = (
    "run",
    "checkpoint",
    "train.max_steps",
    "train.threads",
    "train.timeout",
    "train.max_nonfinite",
)


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    def summary(self) -> dict[str, Any] | None:
        """summary.json of a finished run, else None."""
        file = self.path / "summary.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def read_evaluations(self) -> dict[str, Any]:
        """Evaluations done so far, by name."""
        file = self.path / "evaluations.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def write_json(self, name: str, value: Any) -> None:
        """Write ``name`` whole or not at all."""
        file = self.path / name
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        temporary.replace(file)


def prepare(config: Config) -> RunFolder:
    """Make or check the folder (rank 0 only).

    A folder with another config is refused; ``resume = never`` moves what is there aside.

    Raises:
        ConfigError: names the keys that differ and what to type.
    """
    folder = RunFolder(Path(config.run.dir))
    saved = folder.path / "config.toml"
    if saved.exists() and config.run.resume == "never":
        old = folder.path.with_name(f"{folder.path.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
        folder.path.rename(old)
        notice(f"run.resume never: moved the earlier run to {old}")
    if saved.exists():
        _refuse_other_config(config, saved)
    elif folder.path.exists() and any(folder.path.iterdir()):
        raise ConfigError(
            f"run.dir: expected an empty folder or a run, got {folder.path} with other files in "
            "it. Type --run.dir <new folder>."
        )
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    saved.write_text(tomli_w.dumps(to_dict(config)), encoding="utf-8")
    return folder


def existing(config: Config) -> RunFolder:
    """The folder that rank 0 prepared."""
    return RunFolder(Path(config.run.dir))


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


@dataclass(frozen=True)
class Resume:
    """Where to continue.

    Attributes:
        progress: of the checkpoint.
        path: the checkpoint; None = at the start.
        phase_start: the checkpoint that holds the weights the phase began with, if any.
    """

    progress: Progress
    path: Path | None = None
    phase_start: Path | None = None


def resume_point(config: Config, folder: RunFolder) -> Resume:
    """The newest checkpoint that is a prefix of the run that is asked for.

    A longer ``train.max_steps`` continues from the last checkpoint that both runs share.
    """
    if config.run.resume == "never":
        return Resume(Progress())
    lengths = phase_lengths(config)
    found = checkpoint.find(folder.checkpoints)
    if config.run.resume != "auto":
        path = Path(config.run.resume)
        progress = checkpoint.load_progress(path)
        if not _is_prefix(progress, lengths):
            raise ConfigError(
                f"run.resume: {path} (phase {progress.phase}, step {progress.phase_steps}) is not "
                "on the way of this config. Type --train.max_steps as in the run that wrote it."
            )
        return _resume(path, progress, found)
    for path, progress in found:
        if _is_prefix(progress, lengths):
            return _resume(path, progress, found)
    return Resume(Progress())


def _is_prefix(progress: Progress, lengths: list[int]) -> bool:
    done = progress.caps[: progress.phase]
    return (
        progress.phase < len(lengths)
        and list(done) == lengths[: progress.phase]
        and progress.phase_steps <= lengths[progress.phase]
    )


def _resume(path: Path, progress: Progress, found: list[tuple[Path, Progress]]) -> Resume:
    ends = {p.phase: q for q, p in found if p.is_phase_end}
    return Resume(progress, path, ends.get(progress.phase - 1))


def advance(progress: Progress, **changes: Any) -> Progress:
    """``progress`` with changes."""
    return replace(progress, **changes)

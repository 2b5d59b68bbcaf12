"""Where metrics also go: TensorBoard, Weights & Biases, Trackio. Rank 0 alone has them.

Numbers only: no post, prompt, completion, label, path or other text of the run or its config is
handed to a tracker. metrics.jsonl and evaluations.json stay the truth; a tracker is told what it
lacks of them when a run starts (again), so that a killed and resumed run has every step once.
A tracker that fails is warned about once and counted, and never stops the run.

Entries have a position: s for the metrics of step s, s + 1/2 for the evaluation after it.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from crpo_fast.config import Config, ConfigError, TrackConfig, to_dict
from crpo_fast.run_folder import phase_lengths

# name in track.to -> the module that it needs; extras of the distribution have the same names
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
_EVALUATION = 0.5
_EVALUATED = ("weighted_f1", "accuracy", "macro_f1", "format_rate", "parse_rate")


class Tracker(Protocol):
    """One open tracker.

    Attributes:
        held: the position up to which it has everything; -1: nothing.
    """

    held: float

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Finite numbers of one step; an evaluation comes apart, under ``eval/``."""
        ...

    def close(self) -> None:
        """Write what is pending."""
        ...


def check(config: TrackConfig) -> None:
    """Refuses what cannot be opened, before anything is loaded.

    Raises:
        ConfigError: an unknown name, or a package that is not installed.
    """
    for name in config.to:
        if name not in PACKAGES:
            raise ConfigError(
                f"track.to: expected some of {', '.join(PACKAGES)}, got {name!r}. "
                "Type e.g. --track.to tensorboard."
            )
        if find_spec(PACKAGES[name]) is None:
            raise ConfigError(
                f"track.to: expected installed packages, got {name!r}, which is not. "
                f'Type pip install "crpo-fast[{name}]".'
            )
    if config.wandb_mode not in ("offline", "online"):
        raise ConfigError(
            f"track.wandb_mode: expected offline or online, got {config.wandb_mode!r}. "
            "Type --track.wandb_mode offline."
        )


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a record of metrics.jsonl without its step."""
    return {
        name: float(value)
        for name, value in record.items()
        if isinstance(value, int | float) and math.isfinite(value) and name != "step"
    }


def evaluation_numbers(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """The overall scores of an evaluation, percent; names of data sets and labels stay here."""
    return {f"eval/{name}": float(evaluation[name]) for name in _EVALUATED if name in evaluation}


def hyper_parameters(config: Config) -> dict[str, float]:
    """Numbers and flags of the config by dotted key; texts (paths, names) stay here."""
    found: dict[str, float] = {}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(inner, f"{key}.{name}" if key else name)
        elif isinstance(value, list):
            for index, inner in enumerate(value):
                walk(inner, f"{key}.{index}")
        elif isinstance(value, int | float):
            found[key] = value

    walk(to_dict(config), "")
    return found


class Trackers:
    """All open trackers of a run; with none it costs nothing.

    Args:
        warn: says something to the user.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._open: dict[str, Tracker] = {}
        self.failures: dict[str, int] = {}  # calls that failed, by tracker

    def add(self, name: str, make: Callable[[], Tracker]) -> None:
        """Open one."""
        try:
            self._open[name] = make()
        except Exception as error:
            self._failed(name, error, "could not be opened")

    def metrics(self, record: Mapping[str, Any]) -> None:
        """One record of metrics.jsonl."""
        self._log(record["step"], numbers(record))

    def evaluation(self, evaluation: Mapping[str, Any]) -> None:
        """One evaluation; another one after the same step says the same and is left out."""
        self._log(evaluation["step"] + _EVALUATION, evaluation_numbers(evaluation))

    def close(self) -> None:
        """Close all, and say what they lack."""
        for name, tracker in self._open.items():
            try:
                tracker.close()
            except Exception as error:
                self._failed(name, error, "could not be closed")
        self._open = {}
        for name, count in self.failures.items():
            if count > 1:
                self._warn(f"{name}: {count} calls failed; metrics.jsonl has everything.")

    def _log(self, position: float, metrics: Mapping[str, float]) -> None:
        for name, tracker in self._open.items():
            if position <= tracker.held:
                continue
            try:
                tracker.log(int(position), metrics)
                tracker.held = position
            except Exception as error:
                self._failed(name, error, f"failed at step {int(position)}")

    def _failed(self, name: str, error: Exception, what: str) -> None:
        count = self.failures[name] = self.failures.get(name, 0) + 1
        if count == 1:
            text = f"{name} {what}: {type(error).__name__}: {_one_line(str(error))}"
            self._warn(f"{text}. The run goes on; metrics.jsonl has everything.")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200] or "no reason given"


def start(
    config: Config,
    folder: Path,
    records: Callable[[], Iterable[Mapping[str, Any]]],
    evaluations: Mapping[str, Mapping[str, Any]],
    warn: Callable[[str], None],
    *,
    enabled: bool = True,
) -> Trackers:
    """Open what ``track.to`` names and tell it what it lacks.

    Args:
        config: of the run.
        folder: of the run; the trackers' identity in it is kept over starts.
        records: gives those of metrics.jsonl up to where the run stands.
        evaluations: by name, up to there.
        warn: says something to the user.
        enabled: False on the ranks that have no trackers.
    """
    trackers = Trackers(warn)
    if not config.track.to or not enabled:
        return trackers
    from crpo_fast import tracker_backends as backends

    entries = [(r["step"], r) for r in records()]
    entries += [(e["step"] + _EVALUATION, e) for e in evaluations.values()]
    entries.sort(key=lambda entry: entry[0])
    done = entries[-1][0] if entries else -1
    identity = _identity(folder, phase_lengths(config), int(done))
    name = config.track.name or identity
    options: dict[str, Any] = {"project": config.track.project, "name": name}
    options["config"] = hyper_parameters(config)
    makers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: backends.TensorBoard(folder / "tensorboard", int(done)),
        "wandb": lambda: backends.WandB(folder, identity, config.track.wandb_mode, **options),
        "trackio": lambda: backends.Trackio(identity, **options),
    }
    for tracker in dict.fromkeys(config.track.to):
        trackers.add(tracker, makers[tracker])
    for position, entry in entries:
        told = trackers.metrics if position == int(position) else trackers.evaluation
        told(entry)
    return trackers


def _identity(folder: Path, lengths: list[int], done: int) -> str:
    """The run's name among others of its trackers: made up once, kept in trackers.json.

    A new one where the steps from ``done`` on will be others than those that were told already
    (another ``train.max_steps``): neither wandb nor trackio takes steps back.
    """
    file = folder / "trackers.json"
    if file.exists():
        saved = json.loads(file.read_text(encoding="utf-8"))
        if saved["phase_steps"] == lengths:
            return saved["id"]
        identity = saved["id"] if done >= sum(saved["phase_steps"]) else _new_identity()
    else:
        identity = _new_identity()
    temporary = file.with_suffix(".tmp")
    content = {"id": identity, "phase_steps": lengths}
    temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    temporary.replace(file)
    return identity


def _new_identity() -> str:
    return f"crpo-{secrets.token_hex(4)}"

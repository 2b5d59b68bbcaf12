"""Reads a run folder, finished or not; what is missing or unreadable becomes a sentence."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crpo_fast.config import Config, to_dict
from crpo_fast.stages import Stage, StageGrammar


class ReportError(ValueError):
    """There is nothing to report on; the message says what to type."""


@dataclass
class RunFiles:
    """What a run folder holds.

    Attributes:
        path: of the folder.
        config: config.toml as written.
        metrics, samples, starts: records of the JSONL files.
        evaluations: by name, in the order in which they were made.
        summary: of a finished run, else empty.
        notes: what is missing or could not be read.
    """

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_run(path: Path) -> RunFiles:
    """All files of a run.

    Raises:
        ReportError: no such folder, or none of a run's files in it.
    """
    run = RunFiles(path)
    known = ("config.toml", "metrics.jsonl", "evaluations.json")
    if not any((path / name).is_file() for name in known):
        raise ReportError(
            f"run: expected the folder of a run ({', '.join(known)}), got {path}. "
            "Type python -m crpo_fast.report runs/<name>."
        )
    run.config = _toml(path / "config.toml", run.notes)
    run.evaluations = _json(path / "evaluations.json", run.notes, "no evaluation was made")
    if (path / "summary.json").exists():
        run.summary = _json(path / "summary.json", run.notes, "")
    run.metrics = _lines(path / "metrics.jsonl", run.notes, "no step was finished")
    run.samples = _lines(path / "samples.jsonl", run.notes, "no completion was recorded")
    run.starts = _lines(path / "starts.jsonl", run.notes, "command and versions are not known")
    return run


def _toml(file: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        notes.append(f"{file.name}: {_why(error)}")
        return {}


def _json(file: Path, notes: list[str], absent: str) -> dict[str, Any]:
    if not file.exists():
        notes.append(f"{file.name} is not there: {absent}.")
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    except (OSError, ValueError) as error:
        notes.append(f"{file.name}: {_why(error)}")
        return {}


def _lines(file: Path, notes: list[str], absent: str) -> list[dict[str, Any]]:
    """Whole records; a torn last line is normal in a run that was killed and is counted too."""
    if not file.exists():
        notes.append(f"{file.name} is not there: {absent}.")
        return []
    records, bad = [], 0
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            bad += 1
            continue
        if isinstance(value, dict):
            records.append(value)
    if bad:
        notes.append(f"{file.name}: {bad} line(s) could not be read and are left out.")
    return records


def _why(error: Exception) -> str:
    return f"could not be read ({type(error).__name__}: {error})."


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested tables -> {"a.b.0.c": value}; a list without tables stays one value."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list | tuple) and any(isinstance(v, dict) for v in value):
        items = [(str(i), v) for i, v in enumerate(value)]
    else:
        return {prefix: list(value) if isinstance(value, tuple) else value}
    parts = [flatten(v, f"{prefix}.{k}" if prefix else k) for k, v in items]
    return {key: v for part in parts for key, v in part.items()}


def config_differences(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Keys whose value is not the default, with the default (None: it has none)."""
    default = flatten(to_dict(Config()))
    return [
        {"key": key, "value": value, "default": default.get(key)}
        for key, value in flatten(config).items()
        if key not in default or default[key] != value
    ]


def grammar_of(config: dict[str, Any]) -> tuple[list[str], tuple[str, ...]]:
    """(names of the stages, literal tags) of a run's config."""
    tables = config.get("stages") or []
    settings = {**to_dict(Config())["grammar"], **config.get("grammar", {})}
    options = {"answer_tag": settings["answer_tag"]}
    if tables:
        stages = tuple(Stage(t["name"], t.get("tag") or t["name"]) for t in tables)
        grammar = StageGrammar(stages=stages, **options)
    elif settings["preset"] == "none":
        grammar = StageGrammar(stages=(), **options)
    else:
        grammar = StageGrammar.preset(settings["preset"], **options)
    return grammar.names, grammar.tags

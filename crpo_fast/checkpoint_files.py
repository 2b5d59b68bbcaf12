"""The files of one checkpoint: written with their checksums, and believed only after a check.

    model.safetensors  optimizer.safetensors  state.json

state.json holds sizes and SHA-256 of the two others and a SHA-256 of itself. Tensors and JSON are
the only formats, so there is nothing in a checkpoint that could run; ``verify`` also refuses what
is torn, changed or of the wrong type, before any of it reaches the model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
SEPARATOR = "|"  # between a parameter's name and the name of its optimizer tensor
FORMAT = 2
_MAX_STATE_BYTES = 64 * 2**20
_KEYS = {"format", "progress", "param_groups", "files", "sha256"}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; ``why`` is one line, the message also says what to type."""

    def __init__(self, path: Path, why: str) -> None:
        self.path, self.why = path, one_line(why)
        super().__init__(
            f"{path}: not a whole checkpoint ({self.why}). Type --run.resume auto for the newest "
            "whole one of the run folder, or --run.resume <run>/checkpoints/step_<n>."
        )


def one_line(text: object) -> str:
    """``text`` as one printable line of at most 300 characters; it may come from a crafted file."""
    line = " ".join(str(text).split())
    return "".join(c if c.isprintable() else "?" for c in line)[:300]


def write(
    folder: Path,
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    state: dict[str, Any],
) -> None:
    """Write the three files into the existing ``folder`` and flush them; state.json is the last.

    Raises:
        OSError, SafetensorError: the disk is full, or another failure of the file system.
    """
    files = {}
    for name, tensors in ((MODEL, weights), (OPTIMIZER, optimizer)):
        save_file(tensors, folder / name)
        flush(folder / name)
        files[name] = {
            "bytes": (folder / name).stat().st_size,
            "sha256": _digest_of(folder / name),
        }
    body = {"format": FORMAT, **state, "files": files}
    sealed = {**body, "sha256": _seal(json.loads(json.dumps(body)))}
    write_text(folder / STATE, json.dumps(sealed, indent=1))
    flush(folder)


def verify(folder: Path) -> dict[str, Any]:
    """state.json of a whole checkpoint: every checksum fits, every header and type is right.

    Raises:
        CheckpointError: names the folder and the first thing that is wrong.
    """
    try:
        state = _read_state(folder)
        for name, expected in state["files"].items():
            _check_file(folder / name, expected)
        shapes = _shapes(folder / MODEL)
        _check_optimizer(_shapes(folder / OPTIMIZER), shapes)
        _check_groups(state["param_groups"])
    except (OSError, SafetensorError, ValueError, RecursionError, OverflowError) as error:
        raise CheckpointError(folder, str(error) or type(error).__name__) from error
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """state.json alone, with its own checksum checked; the tensors are not looked at.

    Raises:
        CheckpointError: it is missing, torn or changed.
    """
    try:
        return _read_state(folder)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(folder, str(error) or type(error).__name__) from error


def _read_state(folder: Path) -> dict[str, Any]:
    file = folder / STATE
    if not file.is_file():
        raise ValueError(f"{STATE} is missing")
    if file.stat().st_size > _MAX_STATE_BYTES:
        raise ValueError(f"{STATE} has {file.stat().st_size} bytes")
    try:
        state = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{STATE} is no JSON: {error}") from error
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"{STATE}: expected an object with a format")
    if state["format"] != FORMAT:
        raise ValueError(f"{STATE}: expected format {FORMAT}, got {state['format']!r}")
    if state.keys() != _KEYS:
        raise ValueError(f"{STATE}: expected the keys {sorted(_KEYS)}, got {sorted(state)}")
    if state["sha256"] != _seal({k: v for k, v in state.items() if k != "sha256"}):
        raise ValueError(f"{STATE}: the checksum of its own content differs")
    files = state["files"]
    if not isinstance(files, dict) or files.keys() != {MODEL, OPTIMIZER}:
        raise ValueError(f"{STATE}: expected the files {MODEL} and {OPTIMIZER}, got {files!r}")
    return state


def _seal(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _digest_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_file(file: Path, expected: Any) -> None:
    if not isinstance(expected, dict) or expected.keys() != {"bytes", "sha256"}:
        raise ValueError(f"{STATE}: expected bytes and sha256 of {file.name}, got {expected!r}")
    if not file.is_file():
        raise ValueError(f"{file.name} is missing")
    size = file.stat().st_size
    if size != expected["bytes"]:
        raise ValueError(f"{file.name}: expected {expected['bytes']} bytes, got {size}")
    if _digest_of(file) != expected["sha256"]:
        raise ValueError(f"{file.name}: the checksum differs")


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name; the header's names, types and offsets are checked by safetensors."""
    with safe_open(file, framework="pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def _check_optimizer(
    state: dict[str, tuple[int, ...]], weights: dict[str, tuple[int, ...]]
) -> None:
    for key, shape in state.items():
        name, separator, kind = key.partition(SEPARATOR)
        if not separator or not re.fullmatch(r"[a-z_]+", kind):
            raise ValueError(f"{OPTIMIZER}: expected <parameter>|<state>, got {key!r}")
        if shape and name in weights and shape != weights[name]:
            raise ValueError(
                f"{OPTIMIZER}: expected the shape {weights[name]} of {key}, got {shape}"
            )


def _check_groups(groups: Any) -> None:
    if not isinstance(groups, list) or not groups:
        raise ValueError(f"{STATE}: expected a list of param_groups, got {type(groups).__name__}")
    for group in groups:
        if not isinstance(group, dict) or not _are_names(group.get("params")):
            raise ValueError(f"{STATE}: expected param_groups with lists of names as params")
        for key, value in group.items():
            values = value if isinstance(value, list) else [value]
            if key != "params" and not all(_is_plain(v) for v in values):
                raise ValueError(f"{STATE}: param_groups: {key} is {value!r}")


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_plain(value: Any) -> bool:
    return value is None or (isinstance(value, bool | int | float) and math.isfinite(value))


def check_tensors(
    folder: Path, file: str, found: dict[str, Tensor], expected: dict[str, torch.Size]
) -> None:
    """Refuse tensors of another model before they reach it.

    Raises:
        CheckpointError: names or shapes differ; names the first.
    """
    for name in sorted(found.keys() ^ expected.keys()):
        what = "is not in the model" if name in found else "is missing"
        raise CheckpointError(folder, f"{file} is of another model: {name!r} {what}")
    for name, tensor in found.items():
        if tensor.shape != expected[name] or not tensor.is_floating_point():
            got = f"{tensor.dtype} {tuple(tensor.shape)}"
            want = tuple(expected[name])
            raise CheckpointError(
                folder, f"{file} is of another model: {name!r}: expected {want}, got {got}"
            )


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)
    os.replace(temporary, path)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Where to write what becomes the folder ``path`` when the block ends without an error."""
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    yield temporary
    os.replace(temporary, path)


def flush(path: Path) -> None:
    """Have the kernel write a file or folder to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

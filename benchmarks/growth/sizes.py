"""The sizes at which growth is measured, by device, with those of the command line instead."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from benchmarks.losses.cases import DTYPES, Case
from benchmarks.output import positive

PARTS = ("planned", "ranks", "rows", "vocab", "dim", "workspace", "chunk")


@dataclass(frozen=True)
class Sizes:
    """What each sweep goes through; the other sizes of a sweep are those of its case.

    Attributes:
        timed: the case of the times against rows T (its rows are not used).
        held: the case of the memory against T; on a CPU smaller, as no code is generated there.
        across: rows, and D, of the sweep over V; its vocabulary is not used.
        along: rows and V of the sweep over D.
        fixed: the case of the sweeps over workspace_bytes and over the rows of a chunk.
        rows, vocab, dim: T, V and D of the sweeps.
        workspace: MiB.
        chunk: rows of fp32 logits at most (``plan.RING_ROWS``).
        ranks: processes of the training step.
        group: samples a prompt (GRPO's G) of the training step.
        rounds: timed repetitions of a point that takes less than a second.
    """

    timed: Case
    held: Case
    across: Case
    along: Case
    fixed: Case
    rows: tuple[int, ...]
    vocab: tuple[int, ...]
    dim: tuple[int, ...]
    workspace: tuple[int, ...]
    chunk: tuple[int, ...]
    ranks: tuple[int, ...]
    group: tuple[int, ...]
    rounds: int


def _sizes(device: str, dtype: torch.dtype) -> Sizes:
    """Real sizes for a GPU; on a CPU narrow ones, so that 65536 rows take seconds."""
    rows = (256, 1024, 4096, 16_384, 65_536)
    vocab = (32_768, 65_536, 131_072, 262_144)
    common: dict[str, Any] = {"rows": rows, "vocab": vocab, "ranks": (1, 2, 4)}
    common |= {"group": (2, 4, 8, 16, 32)}
    if device == "cuda":
        large = Case(8192, 131_072, 4096, dtype)
        common["rows"] = (256, 1024, 4096, 16_384, 32_768, 65_536)
        return Sizes(
            timed=large,
            held=large,
            across=replace(large, dim=2048),
            along=replace(large, num_rows=2048),
            fixed=large,
            dim=(512, 1024, 2048, 4096, 8192),
            workspace=(256, 512, 1024, 2048, 4096),
            chunk=(128, 256, 512, 1024, 2048, 4096),
            rounds=7,
            **common,
        )
    return Sizes(
        timed=Case(0, 16_384, 64, dtype),
        held=Case(0, 8192, 16, dtype),
        across=Case(256, 0, 128, dtype),
        along=Case(256, 16_384, 0, dtype),
        fixed=Case(4096, 8192, 64, dtype),
        dim=(256, 512, 1024, 2048, 4096),
        workspace=(2, 4, 8, 16, 32),
        chunk=(32, 128, 512, 2048),
        rounds=3,
        **common,
    )


def chosen_sizes(options: Any) -> Sizes:
    """The sizes of a device, with what ``options`` has of its own."""
    name = str(getattr(options, "device", "cpu")).split(":")[0]
    sizes = _sizes(name, DTYPES[getattr(options, "dtype", None) or "bfloat16"])
    own: dict[str, Any] = {}
    for field in fields(Sizes):
        value = getattr(options, field.name, None)
        if isinstance(getattr(sizes, field.name), tuple) and isinstance(value, Sequence) and value:
            own[field.name] = tuple(sorted(set(value)))
    fixed = {"num_rows": "at_rows", "vocab_size": "at_vocab", "dim": "at_dim"}
    at = {name: size for name, key in fixed.items() if (size := getattr(options, key, None))}
    cases = {n: replace(getattr(sizes, n), **at) for n in CASES} if at else {}
    return replace(sizes, **own, **cases)


CASES = ("timed", "held", "across", "along", "fixed")


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """The options that stand for sizes."""
    helps = {
        "rows": "T of the sweep over rows",
        "vocab": "V of the sweep over vocabularies",
        "dim": "D of the sweep over hidden sizes",
        "workspace": "MiB of the sweep over workspace_bytes",
        "chunk": "most rows of fp32 logits at once, of the sweep over chunks",
        "ranks": "processes of the training step",
        "group": "samples a prompt (GRPO's G) of the training step",
    }
    for name, text in helps.items():
        parser.add_argument(f"--{name}", type=positive, nargs="+", metavar="N", help=text)
    for name, text in (("rows", "T"), ("vocab", "V"), ("dim", "D")):
        parser.add_argument(
            f"--at-{name}", type=positive, metavar="N", help=f"{text} where it is not swept"
        )
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")

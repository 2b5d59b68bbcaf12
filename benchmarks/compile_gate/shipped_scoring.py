"""What the compile gate compiles of the scoring kernel: all tiles of a target, options in pairs.

A target has tiles of its own, so each launch is for one target. Operands are as calls may have
them: read through descriptors, on a pitch that descriptors cannot have, of a hidden size that is no
multiple of a step, or of no 16 bytes at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from crpo_kernels.launch_triton import Launch, recording
from crpo_kernels.linear_tiles import TILES, choose_tile
from crpo_kernels.linear_triton import linear_stats
from crpo_kernels.row_table import OUTPUTS, SUMS, RowTable
from crpo_kernels.rows import LogitView

from .pairwise import pairwise
from .report import Job

ROWS, ODD_ROWS, FEW = 8192, 3001, 64
LARGE, ODD = 151_936, 50_257  # vocabularies
OPTIONS: dict[str, tuple] = {
    "kind": ("many", "fp8"),
    "dim": (1024, 1000, 1003),
    "pitch": (0, 4),  # elements between the rows of hidden and weight
    "has_all": (False, True),  # bias, soft cap and a temperature per token
}
KINDS = ("many", "few", "fp8", "single")
DTYPES = {"fp8": torch.float8_e4m3fn, "single": torch.float32}


def scoring_jobs() -> list[Job]:
    """The launches of all targets; the least is one row, one column and D = 1."""
    jobs = []
    aligned = pairwise({"kind": KINDS, "dim": (1024,), "pitch": (0,), "has_all": (False, True)})
    least: dict[str, Any] = {"kind": "least", "dim": 1, "pitch": 0, "has_all": True}
    chosen = [*aligned, *pairwise(OPTIONS), least]
    for target, tiles in TILES.items():
        if target == "interpreter":
            continue
        for settings in chosen:
            if settings["kind"] == "fp8" and tiles.fp8 is None:
                continue
            name = f"score {settings['kind']} D{settings['dim']}+{settings['pitch']}"
            name += " bias softcap temperatures" * bool(settings["has_all"])
            is_exact = settings["kind"] == "single"
            jobs += [
                Job(name, x.kernel, x.arguments, x.meta, is_exact=is_exact, targets=(target,))
                for x in scoring_launches(target, **settings)
            ]
    return jobs


def scoring_launches(
    target: str,
    kind: str,
    dim: int,
    pitch: int,
    has_all: bool,
) -> list[Launch]:
    """The launches of one call on ``target``; arguments as in OPTIONS."""
    num_rows = {"few": FEW, "many": ROWS, "least": 1}.get(kind, ODD_ROWS)
    vocab_size = LARGE if pitch == 0 else ODD
    if kind == "least":
        vocab_size = 1
    dtype = DTYPES.get(kind, torch.bfloat16)
    with FakeTensorMode(), recording() as launches:

        def matrix(size: int) -> Tensor:  # [size, D]
            return torch.empty(size, dim + pitch, dtype=dtype)[:, :dim]

        hidden, weight = matrix(num_rows), matrix(vocab_size)
        view = LogitView.make(
            torch.empty(vocab_size) if has_all else None,
            torch.empty(num_rows) if has_all else 0.7,
            1.0,
            30.0 if has_all else None,
        )
        scales = (torch.empty(num_rows), torch.empty(vocab_size)) if kind == "fp8" else None
        labels = torch.empty(num_rows, dtype=torch.int64)
        table = RowTable((*SUMS, *OUTPUTS), num_rows, labels, torch.float32)
        tile = choose_tile(hidden, weight, target)
        rows = slice(0, num_rows)
        linear_stats(
            hidden, weight, labels, view, table, rows, tile=tile, scales=scales,
            is_shard=kind == "few",
        )  # fmt: skip
    return launches

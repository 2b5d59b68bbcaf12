"""The sizes of a gate: real ones for a GPU, tiny ones for a rehearsal in Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.losses.cases import Case

from .targets import TARGETS

BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Scale:
    """What is run where.

    Attributes:
        device: of all tensors.
        precision: the shape whose values are compared with fp64.
        presets: the shape of the objectives, in each of ``dtypes``.
        behaviour: the shape of memory, repeatability, NaN and graphs.
        wrap: the shape whose element offsets pass 2^31; rows from ``late`` on lie behind it.
        tables: pairs of a shape with targets and the shape that stands for it.
        rounds: timed repetitions.
        is_rehearsal: nothing is said about time.
    """

    device: torch.device
    precision: Case
    presets: Case
    dtypes: tuple[torch.dtype, ...]
    behaviour: Case
    wrap: Case
    late: int
    tables: tuple[tuple[Case, Case], ...]
    rounds: int
    is_rehearsal: bool = False


def real_scale(device: torch.device) -> Scale:
    """For one card: no size of rows or vocabulary is a multiple of a block."""
    shapes = [Case(*shape, BF16) for shape in TARGETS]
    return Scale(
        device=device,
        precision=Case(1537, 128_255, 2048, BF16),
        presets=Case(257, 5003, 128, BF16),
        dtypes=(FP32, BF16),
        behaviour=Case(4095, 65_543, 1024, BF16),
        wrap=Case(16_384, 151_936, 8192, BF16),
        late=14_134,  # of 151 936 elements each are 2^31
        tables=tuple((shape, shape) for shape in shapes),
        rounds=11,
    )


def rehearsal_scale() -> Scale:
    """For a CPU; fp32, since the interpreter rounds bf16 stores another way than a GPU."""
    return Scale(
        device=torch.device("cpu"),
        precision=Case(12, 300, 64, FP32),
        presets=Case(7, 130, 64, FP32),
        dtypes=(FP32,),
        behaviour=Case(10, 200, 64, FP32),
        wrap=Case(12, 130, 64, FP32),
        late=9,
        tables=tuple((Case(*shape, BF16), Case(8, 128, 64, FP32)) for shape in TARGETS),
        rounds=1,
        is_rehearsal=True,
    )

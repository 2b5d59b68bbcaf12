"""Gate: both ways to score over T, V and D, as rows to paste into `crpo_kernels.score_table`.

The chunk loop and the fused kernel score the same inputs in the same rounds, and must agree.
"""

from __future__ import annotations

import torch

import crpo_kernels as ck
from benchmarks.clock import Clock, summary
from benchmarks.deadline import LATE
from benchmarks.losses.cases import SHAPES, Case, Inputs, make_inputs
from benchmarks.losses.measure import release
from benchmarks.machine import gpu_name, machine
from benchmarks.output import say
from crpo_kernels.linear_tiles import TILES, target_of
from crpo_kernels.score_table import Measured

from .behaviour import needs_memory
from .report import Part
from .scale import Scale
from .scoring import NARROW_NATS
from .table import NO_CLAIM

ROWS = (128, 1024, 8192)
WAYS = {"chunks": "two_pass", "fused": "fused"}
FP8 = torch.float8_e4m3fn
LIMITS = {None: 1e-3, FP8: NARROW_NATS}  # in nats between both ways; the loop adds in fp32


def scorers(part: Part, scale: Scale) -> None:
    """Every head with every number of rows, then fp8 where the device multiplies it."""
    part.results["rows"] = []
    heads = [(97, 64), (130, 64)] if scale.is_rehearsal else sorted(set(SHAPES.values()))
    rows = (3, 9) if scale.is_rehearsal else ROWS
    dtype = torch.float32 if scale.is_rehearsal else torch.bfloat16
    for vocab_size, dim in heads:
        case = Case(max(rows), vocab_size, dim, dtype)
        part.run(f"V {vocab_size} D {dim}", lambda c=case: one_head(part, scale, c, rows))
        release(scale.device)
    lines = [paste(row) for row in part.results["rows"]]
    if scale.is_rehearsal:
        part.results["note"] = NO_CLAIM
        say(f"rows for score_table.TABLE ({NO_CLAIM}; do not paste them):")
    elif lines:
        say("rows for score_table.TABLE:")
    for line in lines:
        say(f"    {line},")


def one_head(part: Part, scale: Scale, case: Case, rows: tuple[int, ...]) -> None:
    """All numbers of rows of one head, in both precisions."""
    needs_memory(scale, (8 * case.num_rows + 12 * case.vocab_size) * case.dim / 2**30 + 3)
    inputs = make_inputs(case, device=scale.device)
    has_fp8 = TILES[target_of(scale.device)].fp8 is not None
    for num_rows in rows:
        for head_dtype in (None, FP8) if has_fp8 else (None,):
            if part.is_late():
                part.skip(f"T {num_rows} V {case.vocab_size} D {case.dim}", LATE)
                continue
            one_shape(part, scale, inputs.first(num_rows), head_dtype)


def one_shape(part: Part, scale: Scale, inputs: Inputs, head_dtype: torch.dtype | None) -> None:
    """Both ways in turn: medians, and how far their logprobs are apart."""
    (num_rows, dim), vocab_size = inputs.hidden.shape, inputs.weight.shape[0]
    clock, seconds, logprobs = Clock(scale.device), {way: [] for way in WAYS}, {}
    for way, mode in WAYS.items():  # compiles, and sets libraries up
        logprobs[way] = score(inputs, mode, head_dtype)
    for _ in range(scale.rounds):
        for way, mode in WAYS.items():
            seconds[way].append(clock.seconds(lambda m=mode: score(inputs, m, head_dtype)))
    name = gpu_name(machine(scale.device)) or "no GPU"
    dtype = str(head_dtype or inputs.hidden.dtype).removeprefix("torch.")
    ms = {way: 1e3 * summary(values)["median"] for way, values in seconds.items()}
    row = Measured(name, dtype, num_rows, vocab_size, dim, ms["chunks"], ms["fused"])
    part.results["rows"].append(row._asdict())
    limit = LIMITS[head_dtype]
    apart = float((logprobs["chunks"] - logprobs["fused"]).abs().max())
    part.at_most(f"T {num_rows} V {vocab_size} D {dim} {dtype}: nats apart", apart, limit)


def score(inputs: Inputs, mode: str, head_dtype: torch.dtype | None) -> torch.Tensor:  # [T]
    """Logprobs by one of the ways."""
    with torch.no_grad():
        out = ck.linear_logprobs(
            inputs.hidden, inputs.weight, inputs.labels, backend="triton", mode=mode,
            temperature=inputs.case.temperature, head_dtype=head_dtype,
            rows=range(inputs.labels.numel()),
        )  # fmt: skip
    return out.logprobs


def paste(row: dict) -> str:
    """A row as it stands in the table."""
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
    return f"Measured({', '.join(repr(value) for value in rounded.values())})"

"""What the compile gate asks of a kernel: targets with their limits, reports, rules, the table.

Job        one launch to compile, and which rules it has to meet
Report     what the compiler made of it for one target
problems   the rules: every reason why a report fails
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

KIB = 1024
VERDICT = 120  # characters of each end of a long one
EXACT_STACK = 16  # bytes
WIDE = 16  # bytes that one thread loads with the widest instruction that all targets have


@dataclass(frozen=True)
class Target:
    """A GPU to compile for.

    Attributes:
        name: what --target takes.
        backend: "cuda" or "hip".
        arch: compute capability x 10, or AMD's name.
        warp_size: threads.
        shared_limit: bytes of shared memory that one program can have at most.
        matrix_instruction: what a kernel with `tl.dot` must contain.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int
    matrix_instruction: str


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * KIB, "mma.sync"),
        Target("sm_90", "cuda", 90, 32, 227 * KIB, "wgmma.mma_async"),
        Target("sm_100", "cuda", 100, 32, 227 * KIB, "tcgen05.mma"),
        Target("gfx942", "hip", "gfx942", 64, 64 * KIB, "v_mfma"),
    )
}


@dataclass(frozen=True)
class Job:
    """One launch to compile.

    Attributes:
        name: the configuration, for people.
        kernel: a ``triton.jit`` function.
        arguments: name -> tensor (without memory will do), number, None, or a constexpr's value.
        meta: num_warps and num_stages.
        streams_rows: whatever its loops load must come 128 bits at a time.
        is_objective: no instruction in it may drop a NaN.
        is_exact: it multiplies fp32 tiles as they are, to check by: without tensor cores, and with
            EXACT_STACK bytes of stack at most (ptxas for sm_90 wants 8 at 96 registers).
        targets: names of those that may launch it; empty: all.
    """

    name: str
    kernel: Any
    arguments: dict[str, Any]
    meta: dict[str, int] = field(default_factory=dict)
    streams_rows: bool = False
    is_objective: bool = False
    is_exact: bool = False
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What became of a kernel; sizes in bytes.

    Attributes:
        kernel: its name.
        configuration: the job's name.
        target: the target's name.
        registers: of one thread.
        stack_bytes: of one thread; spilled registers live there.
        num_spilled: spilled registers (AMD counts them, NVIDIA does not).
        shared_bytes: shared memory of one program.
        has_dot: the source multiplies tiles.
        matrix_instruction: the tensor-core instruction found, if any.
        load_bytes: per global load inside loops, what one thread gets.
        min_max: instructions that drop a NaN.
        error: why there is nothing to report.
    """

    kernel: str
    configuration: str
    target: str
    registers: int = 0
    stack_bytes: int = 0
    num_spilled: int = 0
    shared_bytes: int = 0
    has_dot: bool = False
    matrix_instruction: str | None = None
    load_bytes: tuple[int, ...] = ()
    min_max: tuple[str, ...] = ()
    error: str | None = None


def problems(report: Report, job: Job) -> list[str]:
    """Every reason why this report fails the gate."""
    if report.error is not None:
        return [report.error]
    target = TARGETS[report.target]
    found = []
    if report.stack_bytes > EXACT_STACK * job.is_exact or report.num_spilled:
        found.append(f"spills: {report.stack_bytes} bytes of stack, {report.num_spilled} registers")
    if report.shared_bytes > target.shared_limit:
        found.append(f"shared memory: {report.shared_bytes} bytes, limit {target.shared_limit}")
    is_scalar = report.matrix_instruction != target.matrix_instruction
    if report.has_dot and not job.is_exact and is_scalar:
        found.append(
            f"tl.dot became {report.matrix_instruction or 'scalar code'}, "
            f"not {target.matrix_instruction}"
        )
    if job.streams_rows and min(report.load_bytes, default=0) < WIDE:
        found.append(
            f"narrow loads: {list(report.load_bytes)} bytes in loops, each at least {WIDE}"
        )
    if job.is_objective and report.min_max:
        number = len(report.min_max)
        found.append(f"drops NaN: {number} instructions, the first is {report.min_max[0]}")
    return found


def table(rows: list[dict]) -> str:
    """The rows of a run as aligned columns."""
    head = (
        "kernel", "configuration", "target", "registers", "stack", "shared", "of",
        "matrix", "loads", "seconds", "verdict",
    )  # fmt: skip
    lines = [head, *(cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def cells(row: dict) -> tuple[str, ...]:
    """One row of the table."""
    verdict = "; ".join(row["problems"]) or "ok"
    if len(verdict) > 2 * VERDICT:  # a compiler shows the code first and says what is wrong last
        verdict = f"{verdict[:VERDICT]} ... {verdict[-VERDICT:]}"
    sizes = row["load_bytes"]
    wide = f"{sum(size >= WIDE for size in sizes)}/{len(sizes)} wide" if sizes else "-"
    matrix = row["matrix_instruction"] or "-"
    numbers = ("registers", "stack_bytes", "shared_bytes")
    values = ["-" if row["error"] else str(row[name]) for name in numbers]
    limit = str(TARGETS[row["target"]].shared_limit)
    return (
        row["kernel"], row["configuration"], row["target"], *values, limit,
        matrix, wide, f"{row['seconds']:.1f}", verdict,
    )  # fmt: skip


def row_of(report: Report, job: Job, seconds: float) -> dict:
    """A report with its verdict, as JSON has it."""
    return {**asdict(report), "seconds": round(seconds, 2), "problems": problems(report, job)}

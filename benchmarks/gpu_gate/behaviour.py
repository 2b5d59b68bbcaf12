"""Gate: memory within its bound, bitwise repeatability, NaN, CUDA graphs, offsets beyond int32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import crpo_kernels as ck
from benchmarks.live_bytes import memory_of
from benchmarks.losses.accuracy import exact_result, rms
from benchmarks.losses.baselines import (
    Candidate,
    Result,
    fused,
    gradients,
    policy_arguments,
    scored,
    small_workspace,
)
from benchmarks.losses.cases import Inputs, make_inputs
from benchmarks.losses.measure import release
from benchmarks.roofline import extra_memory, planned

from .precision import CACHED_LIMIT, GRADIENT_LIMIT, RMS_LIMIT, check_gradients, modes
from .report import CannotRun, Part
from .scale import Scale

BYTES_OF_VECTORS = 256  # per row: constants of a call and its table of results
ALLOCATOR = 1 << 25  # what a CUDA allocator adds by rounding sizes up
PATHS = {
    "one_pass": "one pass",
    "one_pass_groups": "one pass",
    "two_pass": "two passes, E kept",
    "recompute": "two passes, recomputed",
    "frozen": "frozen head",
    "scored": "scoring only",
}


def memory(part: Part, scale: Scale) -> None:
    """The peak of each mode against what the plan allows."""
    inputs = make_inputs(scale.behaviour, device=scale.device)
    case = scale.behaviour
    shape = (case.num_rows, case.vocab_size, case.dim)
    dtype = str(case.dtype).split(".")[1]
    for mode in modes():

        def check(mode: Candidate = mode) -> None:
            path, is_small = PATHS[mode.key], mode.key in ("one_pass_groups", "recompute")
            asked = small_workspace(inputs) if is_small else None
            sizes = planned(shape, dtype, asked, path)
            step = (
                scored("triton")
                if mode.num_products == 1
                else fused(path_mode(path), "triton", workspace_bytes=sizes.workspace)
            )
            measured = replace(mode, step=step)
            given = mode.inputs_of(inputs)
            measured.step(given)  # libraries allocate their own at the first call
            release(scale.device)
            bound = sum(extra_memory(sizes, path).values()) + BYTES_OF_VECTORS * case.num_rows
            bound += ALLOCATOR if scale.device.type == "cuda" else 0
            found = memory_of(measured, given)
            part.at_most(f"{mode.title}: peak bytes", found["extra_bytes"], bound, **found)

        part.run(mode.title, check)


def path_mode(path: str) -> str:
    """The ``mode`` of a path of the cost model."""
    return "two_pass" if path.startswith("two passes") else "one_pass"


def repeatability(part: Part, scale: Scale) -> None:
    """Two runs of each mode, bit by bit."""
    inputs = make_inputs(scale.behaviour, device=scale.device)
    for mode in modes():

        def check(mode: Candidate = mode) -> None:
            given = mode.inputs_of(inputs)
            first, second = mode.step(given), mode.step(given)
            for name in ("loss", "logprobs", "entropy", "d_hidden", "d_weight"):
                value, again = getattr(first, name), getattr(second, name)
                if value is not None:
                    differ = int((bits(value) != bits(again)).sum())
                    part.at_most(f"{mode.title}: {name}, elements that differ", differ, 0)

        part.run(mode.title, check)


def bits(value: Tensor) -> Tensor:
    """The bits of floating-point numbers as integers."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return value.detach().contiguous().view(kinds[value.element_size()])


def nan(part: Part, scale: Scale) -> None:
    """NaN in a counted row reaches the loss; in an ignored row it reaches nothing."""
    inputs = make_inputs(scale.behaviour, device=scale.device)
    row = inputs.labels.numel() // 3
    for mode in ("one_pass", "two_pass"):
        for name in ("hidden", "advantages", "ref_logprobs"):
            part.run(f"{name}, {mode}", lambda m=mode, n=name: check_nan(part, inputs, row, m, n))


def check_nan(part: Part, inputs: Inputs, row: int, mode: str, name: str) -> None:
    """One poisoned value, counted and ignored."""
    clean, poisoned = policy_arguments(inputs), policy_arguments(inputs)
    value = getattr(inputs, name).detach().clone()
    value[row] = float("nan")
    poisoned[name] = value.requires_grad_(name == "hidden")
    loss, *made = run_call(poisoned, mode)
    title = f"NaN in {name}, {mode}"
    part.holds(f"{title}: counted, the loss is NaN", bool(loss.isnan()), loss=float(loss))
    part.holds(f"{title}: counted, its d_hidden is NaN", bool(made[0][row].isnan().any()))
    labels = inputs.labels.clone()
    labels[row] = ck.IGNORE_INDEX
    loss, *made = run_call({**poisoned, "labels": labels}, mode)
    expected, *wanted = run_call({**clean, "labels": labels}, mode)
    error = float((loss - expected).abs())
    part.at_most(f"{title}: ignored, change of the loss", error, 0)
    for kind, got, want in zip(("d_hidden", "d_weight"), made, wanted, strict=True):
        change = float((got.float() - want.float()).abs().max())
        part.at_most(f"{title}: ignored, change of {kind}", change, 0)


def run_call(arguments: dict[str, Any], mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, d_hidden, d_weight) of one call."""
    loss, _ = ck.linear_policy_loss(**arguments, backend="triton", mode=mode)
    d_hidden, d_weight = torch.autograd.grad(loss, (arguments["hidden"], arguments["weight"]))
    return loss.detach(), d_hidden, d_weight


def graphs(part: Part, scale: Scale) -> None:
    """A step captured into a CUDA graph and replayed on other values."""
    for mode in ("one_pass", "two_pass", "fused"):
        part.run(f"graph, {mode}", lambda m=mode: check_graph(part, scale, m))


def check_graph(part: Part, scale: Scale, mode: str) -> None:
    """Replay equals an ordinary run bit by bit. Without CUDA the step runs twice, uncaptured."""
    inputs = make_inputs(scale.behaviour, device=scale.device)
    other = make_inputs(scale.behaviour, seed=1, device=scale.device)
    rows = torch.arange(0, inputs.labels.numel(), 2, device=scale.device)
    workspace = 8 * inputs.labels.numel() * inputs.weight.shape[0]  # the same plan every time

    def step(given: Inputs) -> Result:
        if mode == "fused":
            return scored("triton", mode=mode, rows=rows)(given)
        arguments = policy_arguments(given)
        loss, stats = ck.linear_policy_loss(
            **arguments, backend="triton", mode=mode, rows=rows, workspace_bytes=workspace
        )
        return Result(loss, *gradients(loss, given), stats.logprobs, stats.entropy)

    expected = step(other)
    replay = captured(step, inputs) if scale.device.type == "cuda" else None
    with torch.no_grad():
        for own, value in zip(inputs.tensors(), other.tensors(), strict=True):
            own.copy_(value)
    got = replay() if replay else step(inputs)
    if replay is None:
        part.skip(f"graph capture, {mode}", "no CUDA device: the step ran uncaptured with rows=")
    names = ("logprobs", "entropy")
    for name in names if mode == "fused" else ("loss", *names, "d_hidden", "d_weight"):
        a, b = bits(getattr(got, name)), bits(getattr(expected, name))
        part.at_most(f"graph, {mode}: {name}, elements that differ", int((a != b).sum()), 0)


def captured(step: Callable[[Inputs], Result], inputs: Inputs) -> Callable[[], Result]:
    """A function that replays ``step(inputs)`` on whatever values the inputs then hold."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled and libraries set up before the capture
        for _ in range(2):
            step(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step(inputs)

    def replay() -> Result:
        graph.replay()
        torch.cuda.synchronize()
        return result

    return replay


def wrap(part: Part, scale: Scale) -> None:
    """Rows whose element offsets lie behind 2^31: through the loss, and each row kernel alone."""
    for name, check in (("loss", check_wrap_loss), ("kernels", check_wrap_kernels)):

        def enough(check: Callable[[Part, Scale], None] = check) -> None:
            needs_memory(scale, 50)
            check(part, scale)

        part.run(name, enough)
        release(scale.device)


def needs_memory(scale: Scale, gib: float) -> None:
    """Stop a check that this card cannot hold.

    Raises:
        CannotRun: less memory is free.
    """
    release(scale.device)
    if scale.device.type == "cuda":
        free = torch.cuda.mem_get_info(scale.device)[0] / 2**30
        if free < gib:
            raise CannotRun(f"needs {gib:.0f} GiB of free device memory, got {free:.1f}")


def check_wrap_loss(part: Part, scale: Scale) -> None:
    """Only the late rows have weights: values and gradients against fp64 of those rows alone."""
    inputs = make_inputs(scale.wrap, device=scale.device)
    late = slice(scale.late, scale.wrap.num_rows)
    with torch.no_grad():
        inputs.token_weights[: scale.late] = 0.0
        inputs.entropy_weights[: scale.late] = 0.0
    chosen = torch.randperm(inputs.weight.shape[0], device=scale.device)[:2048]
    columns = torch.cat([chosen, inputs.labels[late][-64:]])
    got = fused("one_pass", "triton")(inputs)
    assert got.d_hidden is not None, "the head is trained"
    assert got.logprobs is not None, "the loss says them"
    early = int(got.d_hidden[: scale.late].count_nonzero())
    part.at_most("rows without weight: elements of d_hidden that are not 0", early, 0)
    truth = exact_result(inputs.take(late), columns, with_entropy=True)
    assert truth.logprobs is not None, "the truth has everything"
    part.at_most(
        f"rows from {scale.late} on: logprobs, rms in nats",
        rms(got.logprobs[late], truth.logprobs, relative=False),
        RMS_LIMIT,
    )
    found = replace(got, d_hidden=got.d_hidden[late])
    title = f"rows from {scale.late} on"
    check_gradients(part, title, found, truth, columns, GRADIENT_LIMIT)


def check_wrap_kernels(part: Part, scale: Scale) -> None:
    """The row kernels on one buffer of all rows; some rows against fp64."""
    from crpo_kernels.exps_triton import row_exp
    from crpo_kernels.row_table import OUTPUTS, SUMS, RowTable
    from crpo_kernels.rows import LogitView
    from crpo_kernels.rows_triton import row_grad, row_stats
    from crpo_kernels.terms import Coefficients

    case, device = scale.wrap, scale.device
    g = torch.Generator(device).manual_seed(0)
    raw = torch.empty(case.num_rows, case.vocab_size, device=device).normal_(0, 3, generator=g)
    labels = torch.randint(case.vocab_size, (case.num_rows,), generator=g, device=device)
    view = LogitView.make(None, case.temperature, 1.0, None)
    table = RowTable((*SUMS, *OUTPUTS), case.num_rows, raw, torch.float32)
    row_stats(raw, labels, view, table, slice(0, case.num_rows))
    slopes = [torch.randn(case.num_rows, generator=g, device=device) for _ in range(2)]
    d_raw = torch.full(raw.shape, float("nan"), dtype=case.dtype, device=device)
    coefficients = Coefficients(slopes[0], slopes[1], None)
    row_grad(raw, d_raw, labels, view, table.stats(), coefficients)
    unwritten = sum(int(part_of.isnan().sum()) for part_of in d_raw.split(256))
    part.at_most("row_grad: elements that were not written", unwritten, 0)
    edge = scale.late
    rows = torch.tensor([0, edge - 1, edge, edge + 1, case.num_rows - 1], device=device)
    exact = raw[rows].double().requires_grad_()
    log_p = (exact / case.temperature).log_softmax(1)
    logprobs = log_p.gather(1, labels[rows].unsqueeze(1)).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    loss = (logprobs * slopes[0][rows]).sum() + (entropy * slopes[1][rows]).sum()
    (true,) = torch.autograd.grad(loss, exact)
    for name, value in (("logprobs", logprobs), ("entropy", entropy)):
        error = float((table.column(name)[rows] - value.detach()).abs().max())
        part.at_most(f"row_stats: {name}, largest error in nats", error, RMS_LIMIT)
    error = rms(d_raw[rows], true, relative=True)
    part.at_most("row_grad: relative rms", error, GRADIENT_LIMIT, rows=rows.tolist())
    row_exp(raw, d_raw, view, table.column("maximum"))
    row_grad(d_raw, d_raw, labels, view, table.stats(), coefficients, is_exp=True)
    error = rms(d_raw[rows], true, relative=True)
    part.at_most("row_exp and row_grad of E: relative rms", error, CACHED_LIMIT)

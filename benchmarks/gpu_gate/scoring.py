"""Gate: the kernel that scores without logits, alone, by every way it can read its operands.

Values against fp64 with every option, logits of -inf, NaN, labels of other shards, offsets beyond
int32 in both operands, bitwise repeatability, memory of O(T), and a sweep of tiles and splits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.clock import Clock, summary
from benchmarks.deadline import LATE
from benchmarks.losses.accuracy import exact_result, rms
from benchmarks.losses.cases import Case, Inputs, make_inputs
from benchmarks.losses.measure import release
from crpo_kernels.linear_tiles import (
    CANDIDATES,
    TILES,
    Tile,
    choose_order,
    choose_tile,
    target_of,
)
from crpo_kernels.quantised import quantised
from crpo_kernels.row_table import OUTPUTS, SUMS, RowTable
from crpo_kernels.rows import LogitView

from .behaviour import ALLOCATOR, bits, needs_memory
from .precision import RIVAL, RMS_LIMIT, ROUNDING, VALUE_LIMIT, option_sets, rival_result
from .report import Part
from .scale import Scale

BYTES_OF_ROW = 64  # table and constants
NARROW_ROWS = 257
NARROW_NATS = 2e-2  # Hopper adds 8-bit products in 14 bits: 2^-13 of logits of some tens, and more
NATS = {torch.float32: 2e-5, torch.bfloat16: VALUE_LIMIT}


def score(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [T]
    view: LogitView,
    **options: Any,
) -> RowTable:
    """Statistics of all rows by the kernel; nothing that it does not write is a number."""
    from crpo_kernels.linear_triton import linear_stats

    table = RowTable((*SUMS, *OUTPUTS), labels.numel(), hidden, torch.float32)
    table.values.fill_(float("nan"))
    linear_stats(hidden, weight, labels, view, table, slice(0, labels.numel()), **options)
    return table


def plain_view(case: Case) -> LogitView:
    """Temperature alone."""
    return LogitView.make(None, case.temperature, 1.0, None)


def ways(
    hidden: Tensor, weight: Tensor, splits: tuple[int, ...] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """How the kernel may run on these operands: splits, descriptors or pointers."""
    tile = choose_tile(hidden, weight)
    yield "as chosen", {}
    for num_splits in splits:
        yield f"{num_splits} splits", {"num_splits": num_splits}
    if tile.uses_tma:
        yield "pointers", {"tile": replace(tile, uses_tma=False)}


def scoring(part: Part, scale: Scale) -> None:
    """All checks."""
    inputs = make_inputs(scale.precision, device=scale.device)
    part.run("precision", lambda: check_precision(part, inputs))
    release(scale.device)
    small = make_inputs(replace(scale.presets, dtype=scale.precision.dtype), device=scale.device)
    for name, given in option_sets(small).items():
        part.run(name, lambda n=name, g=given: check_option(part, small, n, g))
    part.run("special values", lambda: check_special(part, small))
    behaviour = make_inputs(scale.behaviour, device=scale.device)
    part.run("repeatability", lambda: check_repeats(part, behaviour))
    part.run("8 bits", lambda: check_narrow(part, behaviour.first(NARROW_ROWS)))
    part.run("memory", lambda: check_memory(part, scale, behaviour))
    release(scale.device)
    part.run("offsets beyond int32", lambda: check_wrap(part, scale))
    release(scale.device)


def check_precision(part: Part, inputs: Inputs) -> None:
    """Against fp64; at most what a fp32 product followed by fp64 errs, and a fifth."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    truth = exact_result(inputs, inputs.labels[:8], with_entropy=True)
    rival = rival_result(inputs)
    for way, options in ways(hidden, weight, (1, 2, 5)):
        table = score(hidden, weight, inputs.labels, plain_view(inputs.case), **options)
        for name in ("logprobs", "entropy"):
            true = getattr(truth, name)
            theirs = rms(getattr(rival, name), true, relative=False)
            error = rms(table.column(name), true, relative=False)
            bound = min(RIVAL * theirs + ROUNDING, RMS_LIMIT)
            part.at_most(f"{way}: {name}, rms in nats", error, bound, rival=theirs)


def exact_rows(inputs: Inputs, view: LogitView) -> Tensor:  # [T, V]
    """Logits in fp64."""
    outer = view.outer.double() if isinstance(view.outer, Tensor) else view.outer
    bias = None if view.bias is None else view.bias.double()
    raw = inputs.hidden.detach().double() @ inputs.weight.detach().double().t()
    return LogitView(bias, view.inner, outer).apply_(raw)


def check_option(part: Part, inputs: Inputs, name: str, given: dict[str, Any]) -> None:
    """One set of options, every way of running."""
    temperature = given.get("temperature", inputs.case.temperature)
    view = LogitView.make(
        given.get("bias"), temperature, given.get("logit_scale", 1.0), given.get("logit_softcap")
    )
    z = exact_rows(inputs, view)
    log_p = z.log_softmax(1)
    entropy = -torch.where(log_p > -1e29, log_p.exp() * log_p, 0.0).sum(1)
    tops, places = z.topk(2, 1)
    is_clear = tops[:, 0] - tops[:, 1] > NATS[inputs.hidden.dtype]
    is_clear[1::2] = False  # whose labels are another's
    labels = places[:, 0].clone()
    labels[1::2] = inputs.labels[1::2]
    logprobs = log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
    is_seen = logprobs > -1e29  # not of the padding
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    for way, options in ways(hidden, weight):
        table = score(hidden, weight, labels, view, **options)
        error = (table.column("logprobs").double() - logprobs)[is_seen].abs().max()
        part.at_most(f"{name}, {way}: logprobs", float(error), NATS[hidden.dtype])
        error = (table.column("entropy").double() - entropy).abs().max()
        part.at_most(f"{name}, {way}: entropy", float(error), NATS[hidden.dtype])
        missed = int((table.column("is_top1")[is_clear] != 1).sum())
        part.at_most(f"{name}, {way}: tops that are not told", missed, 0)


def check_special(part: Part, inputs: Inputs) -> None:
    """A beginning of -inf logits, NaN in one row and in the last column, labels elsewhere."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    labels, vocab_size = inputs.labels.clone(), weight.shape[0]
    bias = torch.zeros(vocab_size, device=hidden.device)
    bias[: vocab_size // 2] = -torch.inf
    labels[:] = vocab_size - 1
    labels[0], labels[1] = -1, vocab_size
    view = LogitView.make(bias, inputs.case.temperature, 1.0, None)
    log_p = exact_rows(inputs, view).log_softmax(1)[:, -1]
    poisoned, broken = hidden.clone(), weight.clone()
    poisoned[3, 0] = broken[-1, 0] = torch.nan
    for way, options in ways(hidden, weight, (1, 3)):
        found = score(hidden, weight, labels, view, **options).column("logprobs")
        error = float((found.double() - log_p)[2:].abs().max())
        part.at_most(f"half of -inf, {way}: logprobs", error, NATS[hidden.dtype])
        part.holds(f"label of another shard, {way}", bool(found[0] < -1e29))
        part.holds(f"label of none, {way}", bool(found[1].isnan()))
        table = score(poisoned, weight, labels, view, **options)
        lse = table.column("lse")
        part.holds(f"NaN in a row, {way}", bool(lse[3].isnan() and lse.isnan().sum() == 1))
        lse = score(hidden, broken, labels, view, **options).column("lse")
        part.holds(f"NaN in the last column, {way}", bool(lse.isnan().all()))


def check_narrow(part: Part, inputs: Inputs) -> None:
    """A quantised head, against fp64 of what its eight bits stand for; a row of zeros, a NaN."""
    target = target_of(inputs.hidden.device)
    if TILES[target].fp8 is None:
        part.skip("8 bits", f"no tile multiplies e4m3 on {target}")
        return
    hidden, weight = inputs.hidden.detach().clone(), inputs.weight.detach()
    hidden[2], hidden[3, 0] = 0.0, torch.nan
    states, columns = quantised(hidden), quantised(weight)
    exact = (pair.values.double() * pair.scales.double().unsqueeze(1) for pair in (states, columns))
    z = next(exact) @ next(exact).t() / inputs.case.temperature
    logprobs = z.log_softmax(1).gather(1, inputs.labels.unsqueeze(1)).squeeze(1)
    others = torch.arange(hidden.shape[0], device=hidden.device) != 3
    for way, options in ways(states.values, columns.values, (1, 3)):
        found = score(
            states.values, columns.values, inputs.labels, plain_view(inputs.case),
            scales=(states.scales, columns.scales), **options,
        ).column("logprobs")  # fmt: skip
        error = float((found.double() - logprobs)[others].abs().max())
        part.at_most(f"8 bits, {way}: logprobs", error, NARROW_NATS)
        part.holds(f"8 bits, {way}: NaN in a row", bool(found.isnan().nonzero().tolist() == [[3]]))


def check_repeats(part: Part, inputs: Inputs) -> None:
    """Two runs, bit by bit."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    for way, options in ways(hidden, weight):
        first, second = (
            bits(score(hidden, weight, inputs.labels, plain_view(inputs.case), **options).values)
            for _ in range(2)
        )
        differ = int((first != second).sum())
        part.at_most(f"repeated, {way}: elements that differ", differ, 0)


def check_memory(part: Part, scale: Scale, inputs: Inputs) -> None:
    """Peak bytes beside the operands: sums of each split, results, and nothing of V."""
    if scale.device.type != "cuda":
        part.skip("memory of the scoring kernel", "no CUDA device counts bytes here")
        return
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    view = plain_view(inputs.case)
    score(hidden, weight, inputs.labels, view)
    release(scale.device)
    torch.cuda.reset_peak_memory_stats(scale.device)
    before = torch.cuda.memory_allocated(scale.device)
    score(hidden, weight, inputs.labels, view)
    used = torch.cuda.max_memory_allocated(scale.device) - before
    units = torch.cuda.get_device_properties(scale.device).multi_processor_count
    shape = (hidden.shape[0], weight.shape[0], weight.shape[1])
    tile = choose_tile(hidden, weight)
    order = choose_order(shape, hidden.element_size(), tile, units)
    bound = (16 * order.num_splits + BYTES_OF_ROW) * hidden.shape[0] + ALLOCATOR
    part.at_most("scoring kernel: peak bytes", used, bound, splits=order.num_splits)


def check_wrap(part: Part, scale: Scale) -> None:
    """Operands of more than 2^31 elements: a long head, then many rows."""
    needs_memory(scale, 16)
    elements = 1 << 12 if scale.is_rehearsal else 2**31
    dim = 16 if scale.is_rehearsal else 8192
    many, few = elements // dim + 77, 65
    for name, num_rows, vocab_size in (("weight", few, many), ("hidden", many, few)):
        case = Case(num_rows, vocab_size, dim, scale.precision.dtype)
        g = torch.Generator(scale.device).manual_seed(5)
        hidden, weight = (
            torch.randn(n, dim, generator=g, device=scale.device, dtype=case.dtype).div_(dim**0.5)
            for n in (num_rows, vocab_size)
        )
        weight *= 3 * dim**0.25
        labels = torch.arange(num_rows, device=scale.device) % vocab_size
        labels[-few:] = vocab_size - 1 - torch.arange(few, device=scale.device) % vocab_size
        checked = torch.arange(num_rows - few, num_rows, device=scale.device)
        z = torch.cat([hidden[checked].double() @ w.double().t() for w in weight.split(8192)], 1)
        log_p = (z / case.temperature).log_softmax(1)
        true = log_p.gather(1, labels[checked].unsqueeze(1)).squeeze(1)
        tile = choose_tile(hidden, weight)
        for uses_tma in {tile.uses_tma, False}:
            found = score(
                hidden, weight, labels, plain_view(case), tile=replace(tile, uses_tma=uses_tma)
            )
            error = float((found.column("logprobs")[checked].double() - true).abs().max())
            title = f"{name} of {many * dim} elements, {'descriptors' if uses_tma else 'pointers'}"
            part.at_most(f"{title}: logprobs", error, NATS[case.dtype])
            unwritten = int(found.values.isnan().sum())
            part.at_most(f"{title}: results that were not written", unwritten, 0)
        del hidden, weight, z, log_p
        release(scale.device)


def sweep_tiles(part: Part, scale: Scale) -> None:
    """Times of other tiles and splits at the shapes of the targets and at few rows."""
    part.results["scoring"] = []
    sizes = [(16, 300, 64)] if scale.is_rehearsal else SWEPT
    for num_rows, vocab_size, dim in sizes:
        dtype = scale.precision.dtype
        inputs = make_inputs(Case(num_rows, vocab_size, dim, dtype), device=scale.device)
        chosen = choose_tile(inputs.hidden, inputs.weight)
        for tile in (chosen, *CANDIDATES.get(target_of(scale.device), ())):
            for num_splits in (None, 1, 2, 8):
                name = f"T{num_rows} V{vocab_size} D{dim}, {tile}, {num_splits or 'chosen'} splits"
                if part.is_late():
                    part.skip(name, LATE)
                    continue
                part.run(
                    name, lambda t=tile, n=num_splits, i=inputs: one_tile(part, scale, i, t, n)
                )
        release(scale.device)


SWEPT = [(8192, 131_072, 4096), (8192, 151_936, 1024), (64, 151_936, 1024)]


def one_tile(part: Part, scale: Scale, inputs: Inputs, tile: Tile, num_splits: int | None) -> None:
    """One row of the sweep."""
    clock, view = Clock(scale.device), plain_view(inputs.case)
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()

    def step() -> RowTable:
        return score(hidden, weight, inputs.labels, view, tile=tile, num_splits=num_splits)

    step()
    seconds = summary([clock.seconds(step) for _ in range(scale.rounds)])
    part.results["scoring"].append(
        {
            "case": inputs.case.name,
            "tile": f"{tile.block_t}x{tile.block_v}x{tile.block_d}",
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            "programs": tile.programs,
            "reads": "descriptors" if tile.uses_tma else "pointers",
            "splits": num_splits or "chosen",
            "tflops": inputs.case.product_flops / seconds["median"] / 1e12,
            "seconds": seconds,
        }
    )

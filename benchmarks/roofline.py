"""The cost model: operations, bytes and floor of each step, from datasheet rates alone.

    python -m benchmarks roofline --shape 8192,131072,4096 --device h100

The floor of a step is the larger of operations / rate and bytes / bandwidth. Chunks and groups are
those that crpo_kernels would choose. Counted are every operand read once and every result written
once per launch: no step finds another's data in the cache, because a chunk of logits is larger than
it; what stays in the cache makes a step faster than its bytes say. Launches cost nothing here.
Nothing in the output is a measurement (devices.py says where the rates come from).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from crpo_kernels.linear_tiles import PLANNED_UNITS, TILES, Order, Tile, choose_order
from crpo_kernels.plan import default_workspace, make_plan, padded, product_rows
from crpo_kernels.validate import MAX_VOCAB

from .devices import DEVICES, SUSTAINED_BANDWIDTH, SUSTAINED_PRODUCTS, Device

ITEM = {"bfloat16": 2, "float32": 4}  # what the kernels take
STATS_OPERATIONS = 8  # per logit: scale, maximum, shift, exp, two sums
SPLIT_BYTES = 16  # of a row: what a split of the vocabulary leaves of it
GRAD_OPERATIONS = 6  # per logit: scale, shift, exp, two factors, rounding


@dataclass(frozen=True)
class Sizes:
    """One call: T rows, V vocabulary, D hidden, and how crpo_kernels cuts it."""

    rows: int
    vocab: int
    dim: int
    item: int  # bytes of hidden, weight and dZ
    chunk: int  # rows of fp32 logits at once
    group: int  # rows of dZ at once
    workspace: int  # bytes asked for
    has_exps: bool = True  # two passes may keep E of all rows
    tile: Tile = TILES["sm_90"].many  # of fused scoring
    units: int = PLANNED_UNITS  # multiprocessors

    @property
    def num_chunks(self) -> int:
        """How often the weight is read for logits."""
        return -(-self.rows // self.chunk)

    @property
    def num_groups(self) -> int:
        """How many parts d_weight has."""
        return -(-self.rows // self.group)

    @property
    def order(self) -> Order:
        """How fused scoring deals out its work."""
        return choose_order((self.rows, self.vocab, self.dim), self.item, self.tile, self.units)


@dataclass(frozen=True)
class Step:
    """A step of a path over all rows."""

    name: str
    operations: float
    num_bytes: float
    is_product: bool = False
    note: str = ""

    def floor(self, product_rate: float, vector_rate: float, bandwidth: float) -> float:
        """Seconds."""
        rate = product_rate if self.is_product else vector_rate
        return max(self.operations / rate, self.num_bytes / bandwidth)

    def bound(self, device: Device, dtype: str) -> str:
        """What the floor is made of on ``device``."""
        rate = device.product_flops(dtype) if self.is_product else device.single_flops
        return (
            "operations"
            if self.operations / rate >= self.num_bytes / device.bandwidth
            else ("bytes")
        )


def planned(
    shape: tuple[int, int, int], dtype: str, workspace: int | None, path: str = "one pass"
) -> Sizes:
    """The sizes that crpo_kernels chooses on a GPU whose memory is free."""
    rows, vocab, dim = shape
    kind = getattr(torch, dtype)
    with FakeTensorMode():
        weight = torch.empty(vocab, dim, dtype=kind, device="cuda")
        plan = make_plan(
            torch.empty(rows, dim, dtype=kind, device="cuda"),
            weight,
            rows,
            backend="triton",
            mode="two_pass" if path.startswith("two passes") else "one_pass",
            workspace_bytes=workspace,
            needs_weight_grad=PATHS[path].needs_weight,
            is_compiled=False,
            needs_grad=path != "two passes, recomputed",  # nothing is kept for it
        )
        asked = default_workspace(weight) if workspace is None else workspace
    group = min(plan.group_rows, rows)
    chunk, has_exps = min(plan.chunk_rows, rows), plan.kept == "exps"
    return Sizes(rows, vocab, dim, ITEM[dtype], chunk, group, asked, has_exps)


def z_product(s: Sizes, name: str = "Z product") -> Step:
    """Logits of all rows, fp32, chunk by chunk."""
    num_bytes = s.item * (s.rows * s.dim + s.num_chunks * s.vocab * s.dim) + 4 * s.rows * s.vocab
    return Step(name, _product(s), num_bytes, True, f"{s.num_chunks} chunks of {s.chunk} rows")


def _product(s: Sizes) -> float:
    return 2.0 * s.rows * s.vocab * s.dim


def row_stats(s: Sizes) -> Step:
    """Maximum, sums and the objective of each row."""
    return Step("row_stats", STATS_OPERATIONS * s.rows * s.vocab, 4 * s.rows * s.vocab)


def row_grad(s: Sizes) -> Step:
    """The gradient of the logits, into another buffer."""
    return Step("row_grad", GRAD_OPERATIONS * s.rows * s.vocab, (4 + s.item) * s.rows * s.vocab)


def make_cache(s: Sizes) -> Step:
    """E = exp(z - m) of each row, kept for backward."""
    return Step("E cache", 3.0 * s.rows * s.vocab, (4 + s.item) * s.rows * s.vocab)


def cached_grad(s: Sizes) -> Step:
    """The gradient of the logits from E."""
    return Step("row_grad of E", GRAD_OPERATIONS * s.rows * s.vocab, 2 * s.item * s.rows * s.vocab)


def d_hidden(s: Sizes) -> Step:
    """DZ W, a product for each part of a group: fp32 results that are rounded afterwards."""
    step = min(s.group, product_rows(s.dim))
    sizes = [min(s.group, s.rows - first) for first in range(0, s.rows, s.group)]
    parts = sum(-(-size // step) for size in sizes)
    num_bytes = s.item * (s.rows * s.vocab + parts * s.vocab * s.dim)
    num_bytes += (4 + 4 + s.item) * s.rows * s.dim  # written, read, rounded
    return Step("d_hidden", _product(s), num_bytes, True, f"{parts} of {step} rows")


def d_weight(s: Sizes) -> Step:
    """dZ^T hidden: one product, or one per group that adds to a fp32 sum in its epilogue."""
    num_bytes = s.item * (s.rows * s.vocab + s.rows * s.dim)
    if s.num_groups == 1:
        return Step(
            "d_weight", _product(s), num_bytes + s.item * s.vocab * s.dim, True, "1 product"
        )
    num_bytes += 4 * s.vocab * s.dim * (2 * s.num_groups - 1)  # the first group only writes
    note = f"{s.num_groups} products; the fp32 sum is read and written in them"
    return Step("d_weight", _product(s), num_bytes, True, note)


def fp32_sum(s: Sizes) -> list[Step]:
    """The rounding of a fp32 d_weight, where one accumulates."""
    size = s.vocab * s.dim
    cast = Step("fp32 d_weight, rounded", size, (4 + s.item) * size, note="in backward")
    return [] if s.num_groups == 1 else [cast]


def one_pass(s: Sizes) -> list[Step]:
    """One pass: 6NVD."""
    gradients = [row_grad(s), d_hidden(s), d_weight(s), *fp32_sum(s)]
    return [z_product(s), row_stats(s), *gradients]


def two_passes_kept(s: Sizes) -> list[Step]:
    """Two passes with E kept: 6NVD. One dZ of all rows."""
    whole = Sizes(s.rows, s.vocab, s.dim, s.item, s.chunk, s.rows, s.workspace)
    first = [z_product(s), row_stats(s), make_cache(s)]
    return [*first, cached_grad(s), d_hidden(whole), d_weight(whole)]


def two_passes_recomputed(s: Sizes) -> list[Step]:
    """Two passes with the logits computed twice: 8NVD."""
    first = [z_product(s), row_stats(s), z_product(s, "Z product again")]
    return [*first, row_grad(s), d_hidden(s), d_weight(s), *fp32_sum(s)]


def frozen_head(s: Sizes) -> list[Step]:
    """One pass without d_weight: 4NVD."""
    return [z_product(s), row_stats(s), row_grad(s), d_hidden(s)]


def scoring(s: Sizes) -> list[Step]:
    """Log-probabilities without gradients: 2NVD."""
    return [z_product(s), row_stats(s)]


def fused_scoring(s: Sizes) -> list[Step]:
    """The same without logits in memory: the weight is read once per group of row tiles.

    A program takes statistics between its products: their times add up, unless two programs share
    a multiprocessor. Hidden states of a group are counted once: they stay in the cache.
    """
    order = s.order
    tiles = -(-s.rows // s.tile.block_t)
    groups = -(-tiles // order.group_tiles)
    sums = SPLIT_BYTES * order.num_splits * s.rows
    num_bytes = s.item * (s.rows * s.dim + groups * s.vocab * s.dim) + sums
    note = f"{order.num_splits} splits, {groups} groups of {order.group_tiles} row tiles"
    return [
        Step("fused product", _product(s), num_bytes, True, note),
        Step("statistics in it", STATS_OPERATIONS * s.rows * s.vocab, 0),
        Step("join of the splits", STATS_OPERATIONS * order.num_splits * s.rows, sums),
    ]


@dataclass(frozen=True)
class Path:
    """A way through the head, with the bare products that nobody can do without."""

    steps: Callable[[Sizes], list[Step]]
    num_products: int
    needs_weight: bool = True


PATHS = {
    "one pass": Path(one_pass, 3),
    "two passes, E kept": Path(two_passes_kept, 3),
    "two passes, recomputed": Path(two_passes_recomputed, 3),
    "frozen head": Path(frozen_head, 2, needs_weight=False),
    "scoring only": Path(scoring, 1, needs_weight=False),
    "fused scoring": Path(fused_scoring, 1, needs_weight=False),
}


def extra_memory(s: Sizes, path: str) -> dict[str, int]:
    """Bytes beyond the inputs that a path may hold: logits and gradient factors, fp32 sum, results.

    In one pass d_hidden exists twice in backward: scaled by the gradient from above into another
    tensor, so that it can run again. Vectors of one value a row are left out.
    """
    if path == "fused scoring":
        return {"sums of the splits": SPLIT_BYTES * s.order.num_splits * s.rows}
    kept = {"scoring only": 0, "two passes, E kept": s.rows}.get(path, s.group)
    pitch = padded(s.vocab)
    has_sum = path in ("one pass", "two passes, recomputed") and s.num_groups > 1
    return {
        "fp32 logits": 4 * s.chunk * pitch,
        "E cache" if path == "two passes, E kept" else "gradient factors": s.item * kept * pitch,
        "fp32 part of d_hidden": 4 * min(kept, product_rows(s.dim)) * s.dim,
        "fp32 d_weight": 4 * s.vocab * s.dim if has_sum else 0,
        "d_hidden, twice": 0 if path == "scoring only" else 2 * s.item * s.rows * s.dim,
        "d_weight": s.item * s.vocab * s.dim if PATHS[path].needs_weight else 0,
    }


def table(path: str, s: Sizes, device: Device, dtype: str) -> str:
    """The steps of one path, their sum, and the memory it may hold."""
    if path == "two passes, E kept" and not s.has_exps:
        size = s.item * s.rows * padded(s.vocab) / 2**30
        return f"{path}: E of all rows, {size:.2f} GiB, exceeds the workspace: recomputed instead"
    num_products, steps = PATHS[path].num_products, PATHS[path].steps(s)
    peak = device.product_flops(dtype)
    spec = (peak, device.single_flops, device.bandwidth)
    real = (peak * SUSTAINED_PRODUCTS, device.single_flops, device.bandwidth * SUSTAINED_BANDWIDTH)
    held = "no logits" if path == "fused scoring" else f"logits of {s.chunk} rows"
    head = f"  {'step':<24}{'operations':>11}{'bytes':>10}{'floor ms':>10}  {'bound by':<12}"
    lines = [
        f"{path}: {2 * sum(step.is_product for step in steps)}NVD; {held}",
        f"{head}{'sustained ms':>12}  note",
    ]
    lines += [
        f"  {step.name:<24}{step.operations:>11.3g}{step.num_bytes:>10.3g}"
        f"{1e3 * step.floor(*spec):>10.3f}  {step.bound(device, dtype):<12}"
        f"{1e3 * step.floor(*real):>12.3f}  {step.note}".rstrip()
        for step in steps
    ]
    totals = [1e3 * sum(step.floor(*rates) for step in steps) for rates in (spec, real)]
    bare = [1e3 * num_products * _product(s) / rates[0] for rates in (spec, real)]
    need = f"{num_products} bare product{'s' * (num_products > 1)}"
    for title, (a, b) in (("total", totals), (need, bare)):
        lines.append(f"  {title:<24}{'':>11}{'':>10}{a:>10.3f}  {'':<12}{b:>12.3f}")
    ratios = [f"{total / products:.3f}" for total, products in zip(totals, bare, strict=True)]
    memory = extra_memory(s, path)
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items() if size)
    lines += [
        f"  total / products: {ratios[0]}, sustained {ratios[1]}",
        f"  memory beyond the inputs at most {sum(memory.values()) / 2**30:.2f} GiB: {parts}",
    ]
    return "\n".join(lines)


def page(shape: tuple[int, int, int], device_name: str, dtype: str, workspace: int | None) -> str:
    """Everything about one shape."""
    device, (rows, vocab, dim) = DEVICES[device_name], shape
    tiles = TILES[device.target]
    kind = tiles.few if rows <= tiles.few.block_t else tiles.many
    tile = tiles.single if dtype == "float32" else kind
    sizes = {
        path: replace(planned(shape, dtype, workspace, path), tile=tile, units=device.units)
        for path in PATHS
    }
    title = (
        f"T{rows} V{vocab} D{dim} {dtype} on {device_name} ({device.title}): products "
        f"{device.product_flops(dtype) / 1e12:.0f} TFLOP/s, memory {device.bandwidth / 1e12:.2f} "
        f"TB/s (datasheet); sustained = {SUSTAINED_PRODUCTS:.0%} and {SUSTAINED_BANDWIDTH:.0%} of "
        f"them (assumed). Workspace {sizes['one pass'].workspace / 2**30:.2f} GiB. A model, no "
        "measurement."
    )
    return "\n\n".join([title, *(table(path, sizes[path], device, dtype) for path in PATHS)])


def shape(text: str) -> tuple[int, int, int]:
    """T,V,D from the command line.

    Raises:
        argparse.ArgumentTypeError: not three positive whole numbers, or a V that no call takes.
    """
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(
            f"expected T,V,D (rows, vocabulary, hidden size), got {text!r}. "
            "Write --shape 8192,131072,4096."
        )
    rows, vocab, dim = map(int, parts)
    if vocab > MAX_VOCAB:
        raise argparse.ArgumentTypeError(
            f"expected V of at most {MAX_VOCAB} (columns of the logits are int32), got {vocab}. "
            "Write --shape 8192,131072,4096."
        )
    return rows, vocab, dim


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--shape", type=shape, action="append", required=True, help="T,V,D; may be repeated"
    )
    parser.add_argument("--device", choices=sorted(DEVICES), default="h100")
    parser.add_argument("--dtype", choices=sorted(ITEM), default="bfloat16")
    parser.add_argument("--workspace", type=int, help="workspace_bytes (default: as in a call)")


def run(options: argparse.Namespace, command: str) -> int:  # noqa: ARG001
    """Print a page for each shape."""
    try:
        pages = [page(s, options.device, options.dtype, options.workspace) for s in options.shape]
    except ValueError as error:  # as a call would say it
        print(f"roofline: {error}")
        return 2
    print("\n\n\n".join(pages))
    return 0

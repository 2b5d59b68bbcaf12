"""Rows of raw products for the row kernels, and their truth in fp64, written out on its own."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crpo_kernels.row_table import OUTPUTS, SUMS, RowTable
from crpo_kernels.rows import LogitView, RowStats
from crpo_kernels.terms import Coefficients
from triton_tools import Guarded

STORE_ERROR = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}
SMALLEST = {torch.bfloat16: 0.0, torch.float16: 2.0**-24, torch.float32: 0.0}  # step near 0


@dataclass
class Rows:
    """C rows of raw products and what a loss says to them."""

    raw: Tensor  # [C, V] fp32
    labels: Tensor  # [C]
    slopes: Tensor  # [3, C] g, q, l
    bias: Tensor | None = None  # [V] fp32
    scale: float = 1.0
    softcap: float | None = None
    temperature: Tensor | float = 1.0  # [C] fp32 or one for all

    def view(self) -> LogitView:
        """The options as the kernels take them."""
        return LogitView.make(self.bias, self.temperature, self.scale, self.softcap)


@dataclass
class Truth:
    """fp64 results of some rows."""

    logprobs: Tensor  # [C]
    entropy: Tensor  # [C]
    lse: Tensor  # [C]
    is_top1: Tensor  # [C] bool
    maximum: Tensor  # [C]
    d_raw: Tensor  # [C, V]
    d_logits: Tensor  # [C, V]
    logits: Tensor  # [C, V]


def make_rows(num_rows, vocab, device="cpu", *, seed=0, spread=3.0, options=()) -> Rows:
    """Random rows with the named options ("bias", "scale", "softcap", "tokens", "all")."""
    g = torch.Generator().manual_seed(seed)
    rows = Rows(
        (spread * torch.randn(num_rows, vocab, generator=g)).to(device),
        torch.randint(0, vocab, (num_rows,), generator=g).to(device),
        torch.randn(3, num_rows, generator=g).to(device),
    )
    found = {
        "bias": {"bias": torch.randn(vocab, generator=g).to(device)},
        "scale": {"scale": -0.37},
        "softcap": {"softcap": 4.0},
        "tokens": {"temperature": (0.5 + torch.rand(num_rows, generator=g)).to(device)},
        "all": {"temperature": 1.7},
    }
    return replace(rows, **{k: v for name in options for k, v in found[name].items()})


def truth_of(rows: Rows, *, has_labels: bool = True) -> Truth:
    """The design's formulas in fp64; -inf logits have probability 0.

    Without labels the gradient is that of rows whose label another shard has.
    """
    labels = rows.labels if has_labels else torch.zeros_like(rows.labels)
    raw = rows.raw.double()
    shifted = raw if rows.bias is None else raw + rows.bias.double()
    z, slope = rows.scale * shifted, torch.full_like(raw, rows.scale)
    if rows.softcap is not None:
        tanh = torch.tanh(z / rows.softcap)
        z, slope = rows.softcap * tanh, slope * (1 - tanh * tanh)
    tau = rows.temperature
    column = tau.double().unsqueeze(1) if isinstance(tau, Tensor) else tau
    z, slope = (z / column).clamp(min=-1e30), slope / column
    lse = z.logsumexp(1)
    log_p = z - lse.unsqueeze(1)
    p = log_p.exp()
    p_log_p = torch.where(p > 0, p * log_p, 0.0)
    entropy = -p_log_p.sum(1)
    g, q, l = rows.slopes.double().unsqueeze(2)  # noqa: E741  [C, 1] each
    own = torch.zeros_like(z).scatter_(1, labels.unsqueeze(1), float(has_labels))
    d_logits = g * (own - p) - q * (p_log_p + p * entropy.unsqueeze(1)) + l * p
    logprobs = log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
    maximum = z.amax(1)
    label = z.gather(1, labels.unsqueeze(1)).squeeze(1)
    return Truth(logprobs, entropy, lse, label == maximum, maximum, d_logits * slope, d_logits, z)


def run_stats(rows: Rows, *, before=0, after=0, columns=(*SUMS, *OUTPUTS)) -> RowTable:
    """`row_stats` into rows ``before ..`` of a guarded table: all written, nothing beside."""
    from crpo_kernels.rows_triton import row_stats

    num_rows = rows.raw.shape[0]
    table = RowTable(columns, before + num_rows + after, rows.raw, torch.float32)
    guarded = Guarded((len(columns), before + num_rows + after), torch.float32, rows.raw.device)
    table.values = guarded.tensor
    own = slice(before, before + num_rows)
    row_stats(rows.raw, rows.labels, rows.view(), table, own)
    guarded.check()
    assert table.values[:, :before].isnan().all()
    assert table.values[:, before + num_rows :].isnan().all()
    table.values = table.values[:, own]
    return table


def run_grad(
    rows: Rows, stats: RowStats, dtype=torch.float32, *, has=(True, True), out=None
) -> Tensor:  # [C, V]
    """`row_grad` into a guarded buffer (or ``out``); ``has`` an entropy and a lse slope."""
    from crpo_kernels.rows_triton import row_grad

    g, q, l = rows.slopes  # noqa: E741
    guarded = Guarded(tuple(rows.raw.shape), dtype, rows.raw.device)
    d_raw = guarded.tensor if out is None else out
    coefficients = Coefficients(g, q if has[0] else None, l if has[1] else None)
    row_grad(rows.raw, d_raw, rows.labels, rows.view(), stats, coefficients)
    guarded.check()
    return d_raw


def assert_stats(table: RowTable, truth: Truth, tolerance: float) -> None:
    """Statistics within ``tolerance`` nats; the lse within it and half a step of fp32."""
    for name in ("logprobs", "entropy", "lse"):
        value, expected = table.column(name).double(), getattr(truth, name)
        allowed = tolerance + (expected.abs() * 2.0**-23 if name == "lse" else 0.0)
        error = (value - expected).abs()
        worst = int((error - allowed).argmax())
        assert (error <= allowed).all(), f"{name} row {worst}: {value[worst]} {expected[worst]}"
    assert torch.equal(table.column("is_top1"), truth.is_top1.float())


def assert_grad(d_raw: Tensor, expected: Tensor, tolerance: float) -> None:
    """Each element within its store's rounding and ``tolerance`` of its row's largest."""
    value = d_raw.double()
    step = STORE_ERROR[d_raw.dtype] * (
        2 if not d_raw.is_cuda and d_raw.dtype == torch.bfloat16 else 1
    )
    scale = expected.abs().amax(1, keepdim=True)
    allowed = step * expected.abs() + tolerance * scale + SMALLEST[d_raw.dtype]
    error = (value - expected).abs().nan_to_num(math.inf)
    worst = divmod(int((error - allowed).argmax()), d_raw.shape[1])
    assert (error <= allowed).all(), (
        f"row {worst[0]}, column {worst[1]}: {value[worst]} for {expected[worst]}"
    )

"""The row kernels alone against fp64: every vocabulary size, option, buffer and special value.

Tolerances: logits of some tens are rounded to 1e-6 in fp32, and a logprob or an entropy is a sum of
two such numbers; a gradient is compared in units of the largest of its row.
"""

from __future__ import annotations

import itertools
import math
import mmap

import pytest
import torch

import triton_tools

if reason := triton_tools.why_no_triton():
    pytest.skip(reason, allow_module_level=True)

import crpo_kernels as ck
from crpo_kernels import rows_triton
from crpo_kernels.row_table import COLUMNS
from numerics import assert_near
from row_cases import (
    Rows,
    assert_grad,
    assert_stats,
    make_rows,
    run_grad,
    run_stats,
    truth_of,
)
from triton_cases import LOOSER
from triton_tools import Guarded

BLOCK = 64
NATS = 2e-6 * LOOSER
GRAD = 2e-6 * LOOSER
NO_RESERVE = 0x4000  # Linux' MAP_NORESERVE: no memory is promised for pages that nobody touches
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several tiles at these sizes."""
    monkeypatch.setattr(rows_triton, "BLOCK_V", BLOCK)


def check(rows: Rows, dtype=torch.float32, tolerance=1.0, **options) -> None:
    """Statistics and gradient of ``rows`` equal the truth."""
    truth, table = truth_of(rows), run_stats(rows)
    assert_stats(table, truth, tolerance * NATS)
    assert_grad(run_grad(rows, table.stats(), dtype, **options), truth.d_raw, tolerance * GRAD)


@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 203, 700])
def test_any_vocabulary_size(vocab, device):
    for options in ((), ("bias", "scale", "softcap", "tokens")):
        rows = make_rows(3, vocab, device, seed=vocab, options=options)
        rows.labels[0], rows.labels[1] = 0, vocab - 1  # first column, and the last of the tail
        check(rows)


def test_the_shipped_tile(device, monkeypatch):
    monkeypatch.undo()
    assert rows_triton.BLOCK_V == 2048
    for vocab in (2048, 4099):
        check(make_rows(2, vocab, device, options=("bias",)))


@pytest.mark.parametrize("temperature", [(), ("all",), ("tokens",)], ids="+".join)
def test_every_combination_of_options(temperature, device):
    for number in range(4):
        for chosen in itertools.combinations(("bias", "scale", "softcap"), number):
            check(make_rows(3, 150, device, seed=number, options=chosen + temperature))


@pytest.mark.parametrize("has", list(itertools.product((True, False), repeat=2)))
def test_slopes_of_entropy_and_lse_may_be_missing(has, device):
    rows = make_rows(4, 90, device, options=("bias",))
    stats = run_stats(rows).stats()
    d_raw = run_grad(rows, stats, has=has)
    for index, is_there in zip((1, 2), has, strict=True):
        rows.slopes[index] *= is_there
    assert_grad(d_raw, truth_of(rows).d_raw, GRAD)


def test_slopes_may_be_expanded_and_bias_may_be_strided(device):
    """What autograd passes for a sum has stride 0, and a bias may be a view."""
    rows = make_rows(4, 90, device, options=("bias", "tokens"))
    rows.bias = torch.randn(90, 2, device=device)[:, 1]
    rows.temperature = torch.rand(4, 3, device=device)[:, 1] + 0.5
    rows.labels = torch.stack((rows.labels, torch.full_like(rows.labels, -7)), 1)[:, 0]
    rows.slopes = torch.tensor([[0.7], [-0.3], [0.2]], device=device).expand(3, 4)
    check(rows)
    rows.bias = torch.tensor([0.4], device=device).expand(90)
    check(rows)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("pitch", [203, 208, 211])
def test_every_buffer_and_pitch(dtype, pitch, device):
    """Elements within their store's rounding; the interpreter truncates in bf16, a GPU rounds."""
    rows = make_rows(4, 203, device, options=("tokens",))
    wide = torch.full((5, pitch), torch.nan, device=device)
    wide[1:, :203] = rows.raw
    rows.raw = wide[1:, :203]  # begins in the middle of its storage
    truth, table = truth_of(rows), run_stats(rows)
    out = torch.full((5, pitch), -77.0, dtype=dtype, device=device)
    run_grad(rows, table.stats(), dtype, out=out[:4, :203])
    assert_grad(out[:4, :203], truth.d_raw, GRAD)
    assert (out[4] == -77.0).all()
    assert (out[:, 203:] == -77.0).all()
    assert_grad(run_grad(rows, table.stats(), dtype), truth.d_raw, GRAD)  # pitch 206


def test_rows_in_the_middle_of_a_table(device):
    rows = make_rows(3, 70, device)
    alone = run_stats(rows).values
    assert torch.equal(run_stats(rows, before=2, after=1).values, alone)
    table = run_stats(rows, columns=COLUMNS)
    assert table.values[7:].isnan().all()  # what the objective writes
    assert torch.equal(table.values[:7], alone)


def test_inputs_stay_and_results_repeat_bit_by_bit(device):
    rows = make_rows(4, 130, device, options=("bias", "softcap", "tokens"))
    kept = [x.clone() for x in (rows.raw, rows.labels, rows.bias, rows.temperature, rows.slopes)]
    found = []
    for _ in range(2):
        table = run_stats(rows)
        found.append((table.values.clone(), run_grad(rows, table.stats())))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    now = (rows.raw, rows.labels, rows.bias, rows.temperature, rows.slopes)
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))


@pytest.mark.parametrize("which", ["some", "first tile", "all but one", "tail"])
def test_minus_inf_has_probability_zero(which, device):
    rows = make_rows(3, 203, device, options=("bias", "tokens"))
    columns = {
        "some": slice(5, 190, 3),
        "first tile": slice(0, BLOCK),
        "all but one": slice(0, 202),
        "tail": slice(192, 203),
    }[which]
    rows.raw[:2, columns] = -torch.inf
    rows.labels[:] = int(rows.raw[0].isfinite().nonzero()[-1])
    check(rows)
    d_raw = run_grad(rows, run_stats(rows).stats())
    assert not d_raw[:2, columns].any()


def test_a_label_of_probability_zero(device):
    rows = make_rows(2, 130, device)
    rows.raw[0, 100], rows.labels[0] = -torch.inf, 100
    table = run_stats(rows)
    assert float(table.column("logprobs")[0]) == pytest.approx(-1e30)
    d_raw, truth = run_grad(rows, table.stats()), truth_of(rows)
    assert_grad(d_raw, truth.d_raw, GRAD)
    assert_stats(table, truth, NATS * 1e30)


def test_labels_outside_the_vocabulary_read_nothing(device):
    """-1 says that another shard has the label; any other makes the row's logprob NaN."""
    rows = make_rows(5, 150, device, options=("bias", "tokens"))
    truth = truth_of(rows)
    for row, label in ((1, -1), (2, 150), (3, ck.IGNORE_INDEX), (4, 2**40)):
        rows.labels[row] = label
    table = run_stats(rows)
    assert table.column("logprobs")[1] == -1e30
    assert table.column("logprobs").isnan().tolist() == [False, False, True, True, True]
    assert not table.column("is_top1")[1:].any()
    for name in ("entropy", "lse"):
        assert_near(table.column(name), getattr(truth, name), NATS, name)
    without = truth_of(rows, has_labels=False)
    d_raw = run_grad(rows, table.stats())
    assert_grad(d_raw[:1], truth.d_raw[:1], GRAD)
    assert_grad(d_raw[1:2], without.d_raw[1:2], GRAD)


def test_a_row_of_only_minus_inf_is_uniform(device):
    rows = make_rows(2, 150, device, options=("bias",))
    rows.raw[1] = -torch.inf
    table = run_stats(rows)
    assert float(table.column("entropy")[1]) == pytest.approx(math.log(150), rel=1e-6)
    assert float(table.column("logprobs")[1]) == pytest.approx(-math.log(150), rel=1e-6)
    d_raw = run_grad(rows, table.stats())
    assert d_raw.isfinite().all()
    alone = make_rows(2, 150, device, options=("bias",))
    assert torch.equal(d_raw[0], run_grad(alone, run_stats(alone).stats())[0])


@pytest.mark.parametrize("offset", [1e4, -1e4, 2.0**13])
def test_a_common_offset_cancels(offset, device):
    """Sums are shifted: fp32 logits near 1e4 are steps of 1e-3, and nothing else is lost."""
    rows = make_rows(6, 203, device)
    rows.raw += offset - rows.raw.amax(1, keepdim=True)  # the maximum of a row is the offset itself
    top = rows.raw.argmax(1)
    rows.labels[1] = top[1]
    for row, distance in ((2, 1), (3, 2), (4, 3)):  # 1, 2, 3 steps of 2^-10 below the maximum
        rows.raw[row, rows.labels[row]] = offset - distance * 2.0**-10
    truth, table = truth_of(rows), run_stats(rows)
    for name in ("logprobs", "entropy"):
        assert float((table.column(name) - getattr(truth, name)).abs().max()) < 1e-6 * LOOSER, name
    assert_stats(table, truth, 1e-6 * LOOSER)
    assert_grad(run_grad(rows, table.stats()), truth.d_raw, GRAD)


def test_is_top1_at_ties_and_beside_them(device):
    rows = make_rows(5, 130, device, spread=2.0)
    rows.raw[:, 3] = 11.5
    rows.raw[1:, 129] = 11.5
    rows.raw[3:, 70] = 11.5 - 2.0**-20  # one step below
    rows.labels[:] = torch.tensor([129, 3, 129, 70, 3])
    table = run_stats(rows)
    assert table.column("is_top1").tolist() == [0.0, 1.0, 1.0, 0.0, 1.0]
    assert_stats(table, truth_of(rows), NATS)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_peaked_row_keeps_its_true_class_gradient(dtype, device):
    """1 - p_y is formed in fp32, within some steps of fp32 at 1, and rounded once.

    In bf16, whose step at 1 is 8e-3, p_y - 1 would be 0 for all of these rows but the last.
    """
    rests = torch.tensor([1e-7, 1e-6, 1e-5, 1e-4, 1e-2], dtype=torch.float64)
    vocab = 203
    rows = make_rows(len(rests), vocab, device)
    rows.raw[:] = (rests / (1 - rests) / (vocab - 1)).log().float().unsqueeze(1).to(device)
    rows.labels[:] = torch.tensor([0, 63, 64, 130, 202])
    rows.raw.scatter_(1, rows.labels.unsqueeze(1), 0.0)
    rows.slopes[0] = 1.0
    truth, table = truth_of(rows), run_stats(rows)
    assert_stats(table, truth, NATS)
    d_raw = run_grad(rows, table.stats(), dtype, has=(False, False))
    got = d_raw.gather(1, rows.labels.unsqueeze(1)).squeeze(1).double().cpu()
    for value, rest in zip(got.tolist(), rests.tolist(), strict=True):
        step = 0.0 if dtype == torch.float32 else 2.0**-7 * rest + 2.0**-24
        assert abs(value - rest) <= 6e-7 + 1e-6 * rest + step, (value, rest)
        assert value > 0 or rest == 1e-7


@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_nan_stays_in_its_row(special, device):
    rows = make_rows(4, 203, device, options=("bias",))
    clean = run_stats(rows)
    clean_grad = run_grad(rows, clean.stats())
    rows.raw[1, 70], rows.raw[2, 200] = special, special  # a full tile and the tail
    table = run_stats(rows)
    d_raw = run_grad(rows, table.stats())
    for name in ("logprobs", "entropy", "lse"):
        assert table.column(name).isnan().tolist() == [False, True, True, False], name
    for row in (0, 3):
        assert torch.equal(table.values[:, row], clean.values[:, row])
        assert torch.equal(d_raw[row], clean_grad[row])
    assert d_raw[1:3].isnan().any(1).all()


def test_nan_beyond_the_vocabulary_is_not_read(device):
    rows = make_rows(3, 203, device, options=("bias",))
    padded = torch.full((3, 208), torch.nan, device=device)
    padded[:, :203] = rows.raw
    bias = torch.full((208,), torch.nan, device=device)
    bias[:203] = rows.bias
    rows.raw, rows.bias = padded[:, :203], bias[:203]
    check(rows)


def test_rows_of_the_gradient_sum_to_the_slope_of_lse(device):
    rows = make_rows(6, 700, device, options=("tokens",))
    d_raw = run_grad(rows, run_stats(rows).stats())
    sums = d_raw.double().sum(1) * rows.temperature
    scale = d_raw.double().abs().sum(1)
    assert ((sums - rows.slopes[2]).abs() <= GRAD * scale).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_beyond_2_to_31_elements(dtype, device):
    """Row 2 begins 2^31 + 32 elements behind row 0 in both buffers: int32 would wrap."""
    pitch, vocab = 2**30 + 16, 150
    rows = make_rows(3, vocab, device)
    truth = truth_of(rows)
    far = sparse((3, vocab), pitch, torch.float32, device)
    out = sparse((3, vocab), pitch, dtype, device)
    far.copy_(rows.raw)
    rows.raw = far
    table = run_stats(rows)
    assert_stats(table, truth, NATS)
    assert_grad(run_grad(rows, table.stats(), dtype, out=out), truth.d_raw, GRAD)


def sparse(shape, pitch, dtype, device):
    """Rows that lie ``pitch`` elements apart; on a CPU the pages between them are never touched.

    They begin at element 2^31, so that what int32 would make of their addresses is memory too.
    """
    num_elements = 2**31 + (shape[0] - 1) * pitch + shape[1]
    num_bytes = num_elements * dtype.itemsize
    if device == "cuda":
        if torch.cuda.mem_get_info()[0] < num_bytes + 2**30:
            pytest.skip(f"needs {num_bytes >> 30} GiB of free GPU memory")
        flat = torch.empty(num_elements, dtype=dtype, device=device)
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
        flat = torch.frombuffer(mmap.mmap(-1, num_bytes, flags=flags), dtype=dtype)
    return flat.as_strided(shape, (pitch, 1), 2**31)


def test_no_rows_launch_nothing(device):
    rows = make_rows(0, 70, device)
    assert run_stats(rows).values.shape == (7, 0)
    guarded = Guarded((0, 70), torch.float32, device)
    run_grad(rows, run_stats(rows).stats(), out=guarded.tensor)
    guarded.check()

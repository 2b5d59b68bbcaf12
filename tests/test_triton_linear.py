"""Scoring in one kernel against fp64: sizes, splits, options, layouts and special values.

Every case goes through the shipped tile of the interpreter (16 rows, 32 columns, steps of 16), so
that a few rows and columns are several tiles with ragged edges. Products of fp32 operands are exact
to some units in the last place of logits of some tens.
"""

from __future__ import annotations

import itertools
import mmap
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import triton_tools

if reason := triton_tools.why_no_triton():
    pytest.skip(reason, allow_module_level=True)

from crpo_kernels import linear_tiles, linear_triton
from crpo_kernels.launch_triton import recording
from crpo_kernels.linear_triton import linear_stats
from crpo_kernels.row_table import OUTPUTS, SUMS, RowTable
from row_cases import Rows, assert_stats, make_rows, run_stats, truth_of
from triton_cases import LOOSER
from triton_tools import Guarded

NATS = 6e-6 * LOOSER
COLUMNS = (*SUMS, *OUTPUTS)


def make(num_rows, vocab, dim, device="cpu", *, seed=0, options=(), dtype=torch.float32):
    """(hidden, weight, rows): operands, and the rows of their exact products with all options."""
    rows = make_rows(num_rows, vocab, device, seed=seed, options=options)
    g = torch.Generator().manual_seed(seed + 1)
    hidden = torch.randn(num_rows, dim, generator=g).to(device, dtype)
    weight = (3 * dim**-0.5 * torch.randn(vocab, dim, generator=g)).to(device, dtype)
    rows.raw = hidden.double() @ weight.double().t()
    return hidden, weight, rows


def run(hidden, weight, rows: Rows, *, before=0, after=0, **options) -> RowTable:
    """`linear_stats` into rows ``before ..`` of a guarded table: all written, nothing beside."""
    num_rows = hidden.shape[0]
    size = before + num_rows + after
    table = RowTable(COLUMNS, size, torch.empty(0, device=hidden.device), torch.float32)
    guarded = Guarded((len(COLUMNS), size), torch.float32, hidden.device)
    table.values = guarded.tensor
    own = slice(before, before + num_rows)
    linear_stats(hidden, weight, rows.labels, rows.view(), table, own, **options)
    guarded.check()
    assert table.values[:, :before].isnan().all()
    assert table.values[:, before + num_rows :].isnan().all()
    table.values = table.values[:, own]
    return table


def tile_of(hidden: Tensor, weight: Tensor) -> linear_tiles.Tile:
    """The tile that a call chooses."""
    return linear_tiles.choose_tile(hidden, weight)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 2, 3), (5, 31, 16), (16, 32, 16), (17, 33, 17), (33, 100, 40)], ids=str
)
def test_any_size(shape, device):
    for options in ((), ("bias", "scale", "softcap", "tokens")):
        hidden, weight, rows = make(*shape, device, options=options)
        rows.labels[0], rows.labels[-1] = shape[1] - 1, 0
        table = run(hidden, weight, rows, before=2, after=1)
        assert_stats(table, truth_of(rows), NATS)


def test_a_label_alone_on_an_edge_is_found(device):
    """One row, whose label is the first or the last column of a half tile, of a tile, of all."""
    hidden, weight, rows = make(1, 70, 16, device)
    for label in (0, 15, 16, 31, 32, 47, 48, 63, 64, 69):
        rows.labels[0] = label
        assert_stats(run(hidden, weight, rows, num_splits=2), truth_of(rows), NATS)


@pytest.mark.parametrize("options", [(), ("bias", "softcap", "tokens")], ids=["plain", "all"])
def test_splits_of_the_vocabulary_are_equal(options, device):
    hidden, weight, rows = make(19, 150, 24, device, options=options)
    truth = truth_of(rows)
    tables = {n: run(hidden, weight, rows, num_splits=n) for n in (1, 2, 3, 4, 5, 99, None)}
    for table in tables.values():
        assert_stats(table, truth, NATS)
        torch.testing.assert_close(table.values, tables[1].values, atol=2 * NATS, rtol=0)
    assert len({float(t.column("log_sum").double().sum()) for t in tables.values()}) > 1


@pytest.mark.parametrize("temperature", [(), ("all",), ("tokens",)], ids="+".join)
def test_every_combination_of_options(temperature, device):
    for number in range(4):
        for chosen in itertools.combinations(("bias", "scale", "softcap"), number):
            hidden, weight, rows = make(6, 70, 16, device, options=chosen + temperature)
            assert_stats(run(hidden, weight, rows), truth_of(rows), NATS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [24, 23], ids=["descriptors", "pointers"])
def test_16_bit_operands(dtype, dim, device):
    hidden, weight, rows = make(18, 70, dim, device, dtype=dtype)
    assert_stats(run(hidden, weight, rows), truth_of(rows), NATS)


def test_8_bit_operands_with_a_scale_per_row(device):
    hidden, weight, rows = make(18, 70, 32, device, dtype=torch.float8_e4m3fn, options=("bias",))
    if tile_of(hidden.float(), weight.float()) != linear_tiles.SMALL:
        capability = torch.cuda.get_device_capability()
        if torch.version.hip or capability[0] not in (9, 10):
            pytest.skip("this GPU has no tile for 8-bit operands")
    g = torch.Generator().manual_seed(7)
    scales = [(0.5 + torch.rand(n, generator=g)).to(device) for n in (18, 70)]
    rows.raw = rows.raw * scales[0].double()[:, None] * scales[1].double()
    found = run(hidden, weight, rows, num_splits=2, scales=tuple(scales))
    assert_stats(found, truth_of(rows), NATS)


def test_row_order_and_top1_are_those_of_the_row_kernel(device):
    """Small integers: both kernels see the same logits to the bit, many of them equal."""
    g = torch.Generator().manual_seed(3)
    hidden = torch.randint(-2, 3, (40, 16), generator=g).float().to(device)
    weight = torch.randint(-1, 2, (90, 16), generator=g).float().to(device)
    rows = make_rows(40, 90, device, seed=3)
    rows.raw = hidden @ weight.t()
    rows.labels[::2] = rows.raw.argmax(1)[::2]
    expected, table = run_stats(rows), run(hidden, weight, rows, num_splits=3)
    assert 0 < table.column("is_top1").sum() < 40
    for name in ("maximum", "is_top1"):
        assert torch.equal(table.column(name), expected.column(name)), name
    torch.testing.assert_close(table.values, expected.values, atol=NATS, rtol=0)


def test_labels_of_another_shard_and_of_none(device):
    hidden, weight, rows = make(6, 70, 16, device)
    truth = truth_of(rows)
    rows.labels[1], rows.labels[2], rows.labels[3], rows.labels[4] = -1, 70, -100, 2**40 + 5
    table = run(hidden, weight, rows, num_splits=2)
    logprobs = table.column("logprobs")
    assert -1.1e30 < logprobs[1] < -0.9e30
    assert logprobs[2:5].isnan().all()
    assert table.column("is_top1")[1:5].sum() == 0
    for name in ("entropy", "lse"):
        torch.testing.assert_close(
            table.column(name).double(), getattr(truth, name), atol=NATS, rtol=0
        )
    for row in (0, 5):
        assert abs(float(logprobs[row]) - float(truth.logprobs[row])) <= NATS


@pytest.mark.parametrize("num_splits", [1, 2, None])
def test_logits_of_minus_infinity(num_splits, device):
    """A first tile and split of them, a padded end, a label on one, rows of nothing else."""
    hidden, weight, rows = make(18, 100, 16, device, options=("bias",))
    assert rows.bias is not None
    rows.bias[:50] = -torch.inf
    rows.bias[90:] = -torch.inf
    rows.labels[:] = torch.arange(50, 68, device=device)
    table = run(hidden, weight, rows, num_splits=num_splits)
    assert table.values.isfinite().all()
    assert_stats(table, truth_of(rows), NATS)
    rows.labels[3] = 7
    assert float(run(hidden, weight, rows, num_splits=num_splits).column("logprobs")[3]) < -1e29
    rows.bias[:] = -torch.inf
    table = run(hidden, weight, rows, num_splits=num_splits)
    entropy = table.column("entropy").double()
    torch.testing.assert_close(entropy, torch.full_like(entropy, 100.0).log(), atol=NATS, rtol=0)
    assert table.values.isfinite().all()


@pytest.mark.parametrize("column", [0, 40, 69])
def test_not_a_number_reaches_its_row_or_all(column, device):
    hidden, weight, rows = make(20, 70, 16, device)
    truth = truth_of(rows)
    poisoned = hidden.clone()
    poisoned[17, 3] = torch.nan
    table = run(poisoned, weight, rows, num_splits=2)
    for name in ("logprobs", "entropy", "lse"):
        value = table.column(name)
        assert value[17].isnan(), name
        kept = torch.arange(20, device=device) != 17
        error = (value.double() - getattr(truth, name))[kept].abs().max()
        assert error <= NATS, name
    broken = weight.clone()
    broken[column, 5] = torch.nan  # in the first tile, in the middle, in the tail
    for name in ("logprobs", "entropy", "lse"):
        assert run(hidden, broken, rows, num_splits=2).column(name).isnan().all(), name


def test_an_infinite_logit_is_no_probability(device):
    hidden, weight, rows = make(3, 70, 16, device, options=("bias",))
    assert rows.bias is not None
    rows.bias[65] = torch.inf
    table = run(hidden, weight, rows, num_splits=2)
    assert table.column("logprobs").isnan().all()
    assert table.column("entropy").isnan().all()


def test_a_common_offset_costs_nothing(device):
    """Exact logits near 10 000, where E[z] - lse would keep three digits."""
    g = torch.Generator().manual_seed(4)
    hidden = torch.randint(-2, 3, (5, 8), generator=g).float().to(device)
    weight = torch.randint(-1, 2, (90, 8), generator=g).float().to(device)
    rows = make_rows(5, 90, device, seed=4)
    rows.bias = torch.full((90,), 10_000.0, device=device)
    rows.raw = hidden.double() @ weight.double().t()
    truth, table = truth_of(rows), run(hidden, weight, rows, num_splits=2)
    for name in ("logprobs", "entropy"):
        error = (table.column(name).double() - getattr(truth, name)).abs().max()
        assert error <= 2e-6 * LOOSER, name


def layouts(device):
    """Operands as a caller may have them, and whether a descriptor can read them."""
    hidden, weight, _ = make(18, 70, 20, device, seed=2)
    wide = torch.randn(71, 28, device=device)
    wide[1:, 4:24] = weight
    odd = torch.randn(71, 29, device=device)
    odd[1:, 5:25] = weight
    return {
        "contiguous": (hidden, weight, True),
        "a pitch of 16 bytes": (hidden, wide[1:, 4:24], True),
        "an odd pitch and base": (hidden, odd[1:, 5:25], False),
        "transposed": (hidden, weight.t().contiguous().t(), False),
        "hidden transposed": (hidden.t().contiguous().t(), weight, False),
        "one row for all": (hidden[:1].expand(18, 20), weight, False),
        "every other column": (torch.stack((hidden, hidden), 2)[:, :, 0], weight, False),
    }


def test_any_layout(device):
    for name, (hidden, weight, has_descriptors) in layouts(device).items():
        _, _, rows = make(18, 70, 20, device, seed=2, options=("tokens",))
        rows.raw = hidden.double() @ weight.double().t()
        reasons = [linear_tiles.descriptor_obstacle(m) for m in (hidden, weight)]
        assert (reasons == [None, None]) == has_descriptors, (name, reasons)
        if not hidden.is_cuda:
            assert tile_of(hidden, weight).uses_tma == has_descriptors, name
        assert_stats(run(hidden, weight, rows), truth_of(rows), NATS)


def test_vectors_may_be_views(device):
    hidden, weight, rows = make(18, 70, 16, device, options=("bias", "tokens"))
    rows.bias = torch.randn(70, 2, device=device)[:, 1]
    rows.temperature = torch.rand(18, 3, device=device)[:, 1] + 0.5
    rows.labels = torch.stack((rows.labels, torch.full_like(rows.labels, -7)), 1)[:, 0]
    assert_stats(run(hidden, weight, rows), truth_of(rows), NATS)


def test_groups_of_rows_cover_everything_once(device, monkeypatch):
    """Groups of two row tiles, the last of one; programs that take items of several groups."""
    monkeypatch.setattr(linear_tiles, "HIDDEN_CACHE_BYTES", 2 * 16 * 16 * 4)
    hidden, weight, rows = make(70, 100, 16, device)
    for num_splits in (1, 2, 3):
        assert_stats(run(hidden, weight, rows, num_splits=num_splits), truth_of(rows), NATS)


@pytest.mark.parametrize("num_rows", [5, 35])
def test_more_splits_and_rows_than_are_joined_at_once(num_rows, device):
    hidden, weight, rows = make(num_rows, 600, 16, device, options=("bias", "tokens"))
    tile = replace(tile_of(hidden, weight), block_v=16)
    num_splits = linear_triton.JOIN_SPLITS + 5
    with recording() as launches:
        table, own = RowTable(COLUMNS, num_rows, hidden, torch.float32), slice(0, num_rows)
        operands = hidden, weight, rows.labels, rows.view()
        linear_stats(*operands, table, own, tile=tile, num_splits=num_splits)
    joined = launches[-1].arguments
    assert joined["num_splits"] == num_splits
    assert -(-num_splits // joined["BLOCK_S"]) == 2  # read one by one, each waits for memory
    table = run(hidden, weight, rows, tile=tile, num_splits=num_splits)
    assert_stats(table, truth_of(rows), NATS)


def test_runs_repeat_bit_by_bit(device):
    hidden, weight, rows = make(35, 150, 24, device, options=("bias", "tokens"))
    first, second = (run(hidden, weight, rows).values for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_buffers_are_written_before_they_are_read(num_splits, device, guarded_empty):
    hidden, weight, rows = make(21, 100, 24, device)
    values = torch.full((len(COLUMNS), 21), torch.nan, device=device)
    table = RowTable(COLUMNS, 21, hidden, torch.float32)
    table.values = values
    view = rows.view()
    linear_stats(hidden, weight, rows.labels, view, table, slice(0, 21), num_splits=num_splits)
    assert_stats(table, truth_of(rows), NATS)


def test_rows_of_the_weight_behind_2_to_31_elements(device):
    """The second row begins at element 2^31: an int32 offset would read before the storage."""
    hidden, _, rows = make(3, 3, 8, device)
    pitch, num_bytes = 2**30, 4 * (3 * 2**30)
    if device == "cuda":
        if torch.cuda.mem_get_info()[0] < 1.1 * num_bytes:
            pytest.skip(f"needs {num_bytes >> 30} GiB of free GPU memory")
        flat = torch.empty(num_bytes // 4, device=device)
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # no memory is promised
        flat = torch.frombuffer(mmap.mmap(-1, num_bytes, flags=flags), dtype=torch.float32)
    weight = flat.as_strided((3, 8), (pitch, 1))
    weight.copy_(torch.randn(3, 8, device=device))
    rows.raw = hidden.double() @ weight.double().t()
    for view in (weight, weight.t().contiguous().t()):
        assert_stats(run(hidden, view, rows), truth_of(rows), NATS)
    pointers = replace(tile_of(hidden, weight), uses_tma=False)
    assert_stats(run(hidden, weight, rows, tile=pointers), truth_of(rows), NATS)


def test_no_rows_launch_nothing(device):
    hidden, weight, rows = make(0, 70, 16, device)
    with recording() as launches:
        run(hidden, weight, rows)
    assert launches == []


def test_a_split_that_cannot_be_is_refused(device):
    hidden, weight, rows = make(3, 70, 16, device)
    with pytest.raises(ValueError, match=r"num_splits: expected 1 or more, got 0\. Pass None"):
        run(hidden, weight, rows, num_splits=0)

"""Tiles, splits and order of the scoring kernel: what is chosen for which GPU and operands."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.compile_gate.report import TARGETS
from crpo_kernels import explain, linear_tiles, scorer
from crpo_kernels.dispatch import BackendChoice
from crpo_kernels.linear_tiles import NARROW, TILES, Tile, choose_order, choose_tile
from crpo_kernels.plan import HeadSizes

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def operands(num_rows=8192, vocab=1000, dim=64, pitch=None, dtype=BF16):
    with FakeTensorMode():
        return [torch.empty(size, pitch or dim, dtype=dtype)[:, :dim] for size in (num_rows, vocab)]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_each_gpu_has_tiles_that_fit_its_shared_memory(target):
    tiles = TILES[target]
    assert choose_tile(*operands(), target) == tiles.many
    assert choose_tile(*operands(num_rows=tiles.few.block_t), target) == tiles.few
    assert choose_tile(*operands(dtype=torch.float32), target) == tiles.single
    assert tiles.many.uses_tma == (target in ("sm_90", "sm_100"))
    for tile, item in ((tiles.many, 2), (tiles.few, 2), (tiles.single, 4), (tiles.fp8, 1)):
        if tile is None:
            continue
        stages = tile.num_stages - (target in ("sm_80", "gfx942"))  # one is in registers
        shared = stages * (tile.block_t + tile.block_v) * tile.block_d * item
        assert shared <= TARGETS[target].shared_limit
        if target == "sm_80":
            assert shared <= 99 * 1024, "GPUs of this family after the A100 have 99 KB"


def test_operands_that_cannot_be_described_are_read_through_pointers():
    many = TILES["sm_90"].many
    assert choose_tile(*operands(pitch=72), "sm_90") == many
    assert choose_tile(*operands(pitch=72), "sm_80") == NARROW  # no hint of wide loads
    assert choose_tile(*operands(pitch=68), "sm_90") == NARROW
    assert choose_tile(*operands(dim=63), "gfx942") == NARROW
    hidden, weight = operands(vocab=64)
    assert choose_tile(hidden, weight.t(), "sm_90") == NARROW
    assert choose_tile(*operands(dtype=FP8, dim=72), "sm_90") == NARROW
    assert choose_tile(*operands(dtype=FP8, dim=80), "sm_90") == TILES["sm_90"].fp8


def test_why_a_matrix_cannot_be_described():
    reason = linear_tiles.descriptor_obstacle
    (plain, _), (odd, _) = operands(), operands(pitch=68)
    assert reason(plain) is None
    assert reason(odd) == "its rows are 136 bytes apart, not a multiple of 16"
    assert reason(plain.t()) == "its rows are not contiguous (stride 64)"
    assert reason(plain[:, 4:]) == "it begins 8 bytes behind a multiple of 16"
    assert reason(plain[:, 8:]) is None
    assert reason(plain[:1].expand(8, 64)) == "its rows are 0 bytes apart, not a multiple of 16"
    values = torch.empty(40, dtype=BF16)
    where = values.data_ptr() % 16 // 2
    assert reason(values[(8 - where) % 8 :][:16].view(2, 8)) is None
    assert "it begins 2 bytes" in reason(values[(8 - where) % 8 + 1 :][:16].view(2, 8))


def test_what_is_read_an_element_at_a_time_is_scored_by_chunks():
    hidden, weight = operands(dim=1001, vocab=50_257)
    reason = linear_tiles.narrow_reason(hidden, weight, "sm_90")
    assert reason == (
        "hidden is read an element at a time: its rows are 2002 bytes apart, not a multiple of 16"
    )
    sizes = HeadSizes(hidden, weight, 8192, "triton", None)
    choice = scorer.cheaper_scorer(sizes)
    assert choice == ("chunks", f"for the fused kernel {reason}")
    fewer = linear_tiles.narrow_reason(*operands(dim=1000), "sm_80")
    assert fewer is not None
    assert "begin every 1000 and 1000 elements, not at multiples of 16" in fewer
    assert linear_tiles.narrow_reason(*operands(dim=1000), "sm_90") is None
    eight = sizes._replace(head_dtype=FP8)
    assert "its rows are 1001 bytes apart" in scorer.cheaper_scorer(eight).reason
    aligned = HeadSizes(*operands(dim=1024, vocab=50_257), 8192, "triton", None)
    assert "cost model" in scorer.cheaper_scorer(aligned).reason
    odd, _ = operands(dim=1024, pitch=1028)
    assert "2056 bytes apart" in scorer.cheaper_scorer(aligned._replace(hidden=odd)).reason
    gathered = aligned._replace(hidden=odd, is_gathered=True)
    assert "cost model" in scorer.cheaper_scorer(gathered).reason


@pytest.mark.parametrize(
    ("dim", "words"), [(1024, "by the cost model"), (1001, "its rows are 2002 bytes apart")]
)
def test_an_explanation_by_sizes_alone_is_that_of_contiguous_tensors(dim, words, monkeypatch):
    """On a GPU it said that the weight's rows are not contiguous: its stand-in has no memory."""
    monkeypatch.setattr(explain, "choose_backend", lambda *_: BackendChoice("triton", "chosen"))
    found, _ = explain.explain_choice(
        num_rows=8192, vocab_size=50_257, hidden_size=dim, device="meta", is_scoring=True
    )
    assert words in found
    _, weight = operands(dim=dim, vocab=50_257)
    called = HeadSizes(operands(dim=dim)[0], weight, 8192, "triton", None)
    assert found.endswith(scorer.scorer_reason(scorer.cheaper_scorer(called)))


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_gpus_without_eight_bit_products_say_so(target):
    with pytest.raises(
        ValueError, match=rf"on {target}, for which no tile multiplies e4m3.*head_dtype"
    ):
        choose_tile(*operands(dtype=FP8), target)


def test_splits_fill_the_device():
    """Whole rounds of 132 programs; the hidden states of a group stay in 16 MiB."""
    many = TILES["sm_90"].many
    order = choose_order((8192, 131_072, 4096), 2, many, 132)
    assert order.group_tiles * 128 * 4096 * 2 <= 16 << 20
    assert order.num_splits * order.group_tiles >= 132
    rounds = -(-64 * order.num_splits // 132) * -(-512 // order.num_splits)
    assert rounds <= 1.05 * 64 * 512 / 132
    one = choose_order((1, 131_072, 4096), 2, TILES["sm_90"].few, 132)
    assert one.num_splits >= 128
    assert one.num_programs <= 132
    assert choose_order((65_536, 151_936, 1024), 2, many, 132).num_splits <= 16


@pytest.mark.parametrize("num_splits", [None, 1, 3, 7, 1000])
def test_every_tile_of_the_work_is_somebodys_once(num_splits, monkeypatch):
    """The kernel's numbering of its items, written out."""
    monkeypatch.setattr(linear_tiles, "HIDDEN_CACHE_BYTES", 3 * 4 * 16 * 2)
    tile = Tile(4, 8, 16, 4, 1)
    for num_rows, vocab_size in ((1, 1), (4, 8), (29, 50), (40, 9)):
        order = choose_order((num_rows, vocab_size, 16), 2, tile, 5, num_splits)
        row_tiles, vocab_tiles = -(-num_rows // 4), -(-vocab_size // 8)
        assert order.num_splits <= vocab_tiles
        assert order.num_programs <= row_tiles * order.num_splits
        seen = []
        for item in range(row_tiles * order.num_splits):
            first = item // (order.group_tiles * order.num_splits) * order.group_tiles
            tiles = min(order.group_tiles, row_tiles - first)
            split, row = divmod(item - first * order.num_splits, tiles)
            begin, end = ((split + i) * vocab_tiles // order.num_splits for i in (0, 1))
            seen += [(first + row, column) for column in range(begin, end)]
        assert sorted(seen) == list(itertools.product(range(row_tiles), range(vocab_tiles)))


def test_a_number_of_splits_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="num_splits: expected 1 or more, got -1"):
        choose_order((4, 8, 16), 2, NARROW, 5, -1)

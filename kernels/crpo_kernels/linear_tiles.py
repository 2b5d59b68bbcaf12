"""Sizes of the fused scoring kernel: tiles of each GPU, splits of the vocabulary, order of work.

A program's work is a tile of rows against a range of tiles of the vocabulary (a split). Items are
numbered group by group, in a group split by split, in a split row tile by row tile, and program p
of P takes items p, p + P, ...: at any time the programs share the hidden states of one group, which
stay in the L2 cache, and each tile of the weight is read by all row tiles of the group at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from .host import is_fake

HIDDEN_CACHE_BYTES = 1 << 24  # of the hidden states of a group: a third of an H100's L2 cache
PLANNED_UNITS = 132  # multiprocessors where no device is asked: those of an H100
INTERPRETED_UNITS = 3  # in the interpreter: several items a program
FLUSH_TILES = 0.25  # writing a split's sums takes about as long as this share of a tile (assumed)
WIDE_PITCH = 16  # elements
TMA_BYTES = 16  # what the hardware's descriptors want bases and pitches to be multiples of


@dataclass(frozen=True)
class Tile:
    """How one program works.

    Attributes:
        block_t: rows.
        block_v: columns of the vocabulary whose products exist at once, in registers.
        block_d: of the hidden size, a step of the product.
        num_warps: of a program.
        num_stages: steps of the product that are under way.
        programs: that share one multiprocessor: one's statistics run beside the other's product.
        uses_tma: operands come through tensor descriptors (TMA), not pointers.
    """

    block_t: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    programs: int = 1
    uses_tma: bool = False


@dataclass(frozen=True)
class Tiles:
    """The tiles of one kind of GPU.

    Attributes:
        many: rows of 16-bit operands.
        few: at most its own ``block_t`` rows of them.
        fp8: of e4m3 operands, None where the GPU has no such products (or none is made for it).
        single: of fp32 operands, for checking: exact products, which no tensor core makes.
    """

    many: Tile
    few: Tile
    fp8: Tile | None
    single: Tile


NARROW = Tile(64, 64, 32, 8, 2)  # where each element is a load of its own: more would spill
SINGLE = Tile(32, 32, 16, 4, 2)
SMALL = Tile(16, 32, 16, 4, 1, uses_tma=True)
TILES: dict[str, Tiles] = {
    # 148 KB of 227 shared; two groups of four warps with 64 x 256 fp32 products each: 128 registers
    "sm_90": Tiles(
        many=Tile(128, 256, 64, 8, 3, uses_tma=True),
        few=Tile(64, 128, 64, 4, 4, uses_tma=True),
        fp8=Tile(128, 128, 128, 8, 4, uses_tma=True),
        single=SINGLE,
    ),
    # products live in tensor memory, registers are free for the statistics
    "sm_100": Tiles(
        many=Tile(128, 256, 64, 8, 3, uses_tma=True),
        few=Tile(128, 128, 64, 8, 4, uses_tma=True),
        fp8=Tile(128, 128, 128, 8, 4, uses_tma=True),
        single=SINGLE,
    ),
    # 96 KB of the 163 of an A100, the 99 of later ones; mma.sync keeps operands in registers
    "sm_80": Tiles(
        many=Tile(128, 128, 64, 8, 4), few=Tile(64, 128, 64, 8, 4), fp8=None, single=SINGLE
    ),
    # 64 KB of shared memory: one step of 48 KB, the next waits in registers; smaller tiles spill
    "gfx942": Tiles(
        many=Tile(128, 256, 64, 8, 2), few=Tile(128, 256, 64, 8, 2), fp8=None, single=SINGLE
    ),
    # small: several tiles of everything at sizes that the interpreter can do
    "interpreter": Tiles(many=SMALL, few=SMALL, fp8=SMALL, single=SMALL),
}

# what a sweep on a card times beside them; two programs on a multiprocessor: one multiplies while
# the other takes its statistics, which at a small D are a fifth of the work
CANDIDATES: dict[str, tuple[Tile, ...]] = {
    "sm_90": (
        Tile(128, 128, 64, 8, 4, uses_tma=True),
        Tile(128, 128, 64, 4, 3, programs=2, uses_tma=True),
        Tile(64, 128, 64, 4, 4, programs=2, uses_tma=True),
        Tile(128, 256, 64, 8, 4, uses_tma=True),
    ),
    "sm_100": (
        Tile(128, 128, 64, 8, 4, uses_tma=True),
        Tile(128, 128, 64, 8, 3, programs=2, uses_tma=True),
        Tile(128, 256, 64, 8, 4, uses_tma=True),
    ),
    "sm_80": (Tile(128, 128, 64, 8, 3), Tile(64, 256, 32, 8, 4), Tile(64, 128, 64, 8, 4)),
    "gfx942": (Tile(128, 256, 32, 8, 2),),
    "interpreter": (Tile(16, 16, 16, 4, 1),),
}


def target_of(device: torch.device) -> str:
    """The row of TILES for a device; a CPU stands for the interpreter."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def descriptor_obstacle(matrix: Tensor) -> str | None:
    """Why a matrix ``[n, D]`` cannot be read through a tensor descriptor, or None."""
    pitch = matrix.stride(0) * matrix.element_size()
    if matrix.stride(1) != 1:
        return f"its rows are not contiguous (stride {matrix.stride(1)})"
    if pitch % TMA_BYTES or not pitch:
        return f"its rows are {pitch} bytes apart, not a multiple of {TMA_BYTES}"
    address = matrix.storage_offset() * matrix.element_size()
    if not (is_fake(matrix) or matrix.is_meta):
        address = matrix.data_ptr()
    if address % TMA_BYTES:
        return f"it begins {address % TMA_BYTES} bytes behind a multiple of {TMA_BYTES}"
    return None


def has_wide_rows(matrix: Tensor) -> bool:
    """Whether pointers into a matrix load 16 bytes at once: Triton's hint is multiples of 16."""
    return descriptor_obstacle(matrix) is None and matrix.stride(0) % WIDE_PITCH == 0


def choose_tile(hidden: Tensor, weight: Tensor, target: str | None = None) -> Tile:
    """The tile for ``hidden`` ``[n, D]`` and ``weight`` ``[V, D]``; pointers where TMA cannot read.

    Raises:
        ValueError: this kind of GPU has no tile for 8-bit operands.
    """
    if target is None:  # fake: who plans for a GPU needs none
        target = "sm_90" if is_fake(hidden) else target_of(hidden.device)
    tiles = TILES[target]
    tile = tiles.few if hidden.shape[0] <= tiles.few.block_t else tiles.many
    if hidden.element_size() == 1:
        if tiles.fp8 is None:
            raise ValueError(
                f"hidden: expected bf16, fp16 or fp32 on {target}, for which no tile multiplies "
                f"e4m3, got {hidden.dtype}. Leave head_dtype out."
            )
        tile = tiles.fp8
    elif hidden.element_size() == 4:
        tile = tiles.single
    operands = (hidden, weight)
    if tile.uses_tma and all(descriptor_obstacle(matrix) is None for matrix in operands):
        return tile
    if tile in (SMALL, SINGLE) or all(has_wide_rows(matrix) for matrix in operands):
        return replace(tile, uses_tma=False)
    return NARROW


def narrow_reason(hidden: Tensor, weight: Tensor, target: str | None = None) -> str | None:
    """Why the operands would be read an element at a time, several times slower, or None."""
    if choose_tile(hidden, weight, target) != NARROW:
        return None
    for name, matrix in (("hidden", hidden), ("weight", weight)):
        if reason := descriptor_obstacle(matrix):
            return f"{name} is read an element at a time: {reason}"
    pitches = f"{hidden.stride(0)} and {weight.stride(0)}"
    return (
        "hidden and weight are read an element at a time: their rows begin every "
        f"{pitches} elements, not at multiples of {WIDE_PITCH}"
    )


def num_units(device: torch.device, *, is_planned: bool) -> int:
    """Multiprocessors of a device."""
    if is_planned:
        return PLANNED_UNITS
    if device.type != "cuda":
        return INTERPRETED_UNITS
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class Order:
    """How the work of one call is dealt out.

    Attributes:
        num_programs: that run at once, each over several items.
        num_splits: parts of the vocabulary; each leaves its sums of every row.
        group_tiles: row tiles whose hidden states stay in the cache together.
    """

    num_programs: int
    num_splits: int
    group_tiles: int


@lru_cache(maxsize=1024)  # hundreds are compared where rows are few and the kernel takes .1 ms
def best_splits(row_tiles: int, vocab_tiles: int, programs: int, group: int) -> int:
    """Parts of the vocabulary that fill the device in the fewest rounds; tiles, and of a group."""
    least = min(vocab_tiles, -(-programs // group))

    def seconds(splits: int) -> float:
        """Rounds of all programs times the vocabulary tiles of an item."""
        rounds = -(-row_tiles * splits // programs)
        return rounds * (-(-vocab_tiles // splits) + FLUSH_TILES)

    return min(range(least, min(vocab_tiles, 4 * least) + 1), key=seconds)


def choose_order(
    shape: tuple[int, int, int],  # n, V, D
    item: int,  # bytes of an element of hidden
    tile: Tile,
    units: int,
    num_splits: int | None = None,
) -> Order:
    """The order of the work; None: as many splits as fill the device in the fewest rounds.

    Raises:
        ValueError: ``num_splits`` is not positive.
    """
    num_rows, vocab_size, dim = shape
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits: expected 1 or more, got {num_splits}. Pass None.")
    row_tiles, vocab_tiles = -(-num_rows // tile.block_t), -(-vocab_size // tile.block_v)
    programs = units * tile.programs
    group = max(1, min(row_tiles, HIDDEN_CACHE_BYTES // max(1, tile.block_t * dim * item)))
    if num_splits is None:
        num_splits = best_splits(row_tiles, vocab_tiles, programs, group)
    num_splits = min(num_splits, vocab_tiles)
    return Order(min(programs, row_tiles * num_splits), num_splits, group)

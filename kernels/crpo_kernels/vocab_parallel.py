"""A head whose vocabulary is spread over ranks: each has some rows of the weight, all have hidden.

    each rank      its columns of the logits, and for every row of them
                       m = max z,  s = sum e^(z-m),  t = sum e^(z-m) (z-m),  z_y if it owns y
    one all-gather of [4, C], joined by every rank in the same order, so with the same bits:
                       M = max_r m_r,  d_r = m_r - M
                       S = sum_r e^(d_r) s_r,  T = sum_r e^(d_r) (t_r + d_r s_r)
    each rank      the gradient of its columns, its rows of d_weight, its part of d_hidden
    one all-reduce of d_hidden

A rank that does not own a label sends -1e30 for its logit. One pass gathers once a chunk (the
objective needs its statistics at once), two passes and scoring once a call (but once a chunk where
exponentials are kept, which are taken of the joined maximum). d_hidden is summed in fp32 and
rounded once: 4 T D bytes, a gradient, no part of the workspace. An adapter of the head has its B
sharded like the weight; its states of rank r are all-reduced like d_hidden.

What autograd sees: every rank's loss (and logprobs, entropy, lse) is that of the whole vocabulary.
Every rank calls backward on it, with the same upstream gradient; then d_hidden is complete on every
rank and must not be summed again, while d_weight and d_bias are those of the rank's own rows. The
all-reduce runs where d_hidden is made: in forward with mode one_pass, else in backward.

Chunks have the same rows on every rank: they are planned by the largest shard, and where
``workspace_bytes`` is None without asking how much memory of a GPU is free, which ranks may not
agree on.

Before anything else ranks tell each other what they were called with, in one all-to-all of a few
integers: whether shards tile the vocabulary, whether all else is the same everywhere. Calls that do
not fit together raise the same error on every rank then, and nobody waits; what is wrong on one
rank alone (two dtypes, say) raises there, before. On a CPU each call is checked. On a GPU, where
reading the answer stops the host, the first call of a layout (group, start, shape and dtype of the
shard) is, and every call with CRPO_CHECK_LABELS=1 in the environment.
"""

from __future__ import annotations

import weakref
import zlib
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .host import check_not_capturing
from .row_table import UNJOINED, RowTable, RowWork, exp_work
from .rows import LOWEST_LOGIT, LogitView, RowStats, finish_stats
from .rows_torch import TorchRows
from .spec import RunOptions
from .terms import Coefficients
from .validate import is_checked

if TYPE_CHECKING:
    from .chunked import Gradients

ELSEWHERE, NOWHERE = -1, -2  # labels of another rank's rows, and of none
SAME = ("num_rows", "hidden_size", "dtype", "labels", "gradients", "options")  # on every rank
REMEDIES = {
    "num_rows": "Pass the same rows of hidden on every rank: all-gather what is split over tokens",
    "hidden_size": "Pass shards of one head",
    "dtype": "Cast hidden and the shards of weight to one dtype",
    "labels": "Pass the same labels (and hidden) on every rank of the group, which shares a model, "
    "no batch",
    "gradients": "Let hidden, weight and bias each need a gradient on all ranks or on none",
    "options": "Call the same function with the same options on every rank",
}


@dataclass(frozen=True)
class Shard:
    """One rank's rows of the vocabulary, and how the ranks' statistics become those of the whole.

    Attributes:
        group: the ranks.
        start: row of the vocabulary at which this rank's weight begins.
        size: rows of this rank's weight.
        most: rows of the largest shard.
        vocab_size: rows of all shards.
    """

    group: dist.ProcessGroup
    start: int
    size: int
    most: int
    vocab_size: int

    @property
    def num_ranks(self) -> int:
        """How many ranks share the vocabulary."""
        return dist.get_world_size(self.group)

    def local(self, labels: Tensor) -> Tensor:  # [n]
        """Labels as rows of this shard, `ELSEWHERE` (another has the row) or `NOWHERE` (none)."""
        own = labels - self.start
        is_own = (own >= 0) & (own < self.size)
        is_known = (labels >= 0) & (labels < self.vocab_size)
        return torch.where(is_own, own, torch.where(is_known, ELSEWHERE, NOWHERE))

    def join(
        self,
        sums: Tensor,  # [4, C] m, s, t, z_y of this shard; z_y only of labels that it owns
        labels: Tensor,  # [C] local
        rounding: float,
    ) -> RowStats:  # of [C]
        """Statistics over the whole vocabulary; a collective.

        ``rounding`` is how far the label's own logit may be from the largest and be the top still,
        as a part of it.
        """
        missing = torch.where(labels == ELSEWHERE, LOWEST_LOGIT, float("nan")).to(sums.dtype)
        sums = torch.cat((sums[:3], torch.where(labels >= 0, sums[3], missing).unsqueeze(0)))
        gathered = sums.new_empty(self.num_ranks, *sums.shape)
        dist.all_gather(list(gathered), sums, group=self.group)
        maximum, s, t, label_logit = gathered.unbind(1)  # [ranks, C]
        top, label_logit = maximum.amax(0), label_logit.amax(0)  # [C]
        d = maximum - top
        w = d.exp()
        total_s, total_t = (w * s).sum(0), (w * (t + d * s)).sum(0)  # [C]
        return finish_stats(top, total_s, total_t, label_logit, rounding)

    def join_table(self, table: RowTable, rows: slice, labels: Tensor, rounding: float) -> None:
        """Statistics over the whole vocabulary where the table has the sums of this shard."""
        sums = torch.stack([table.column(name, rows) for name in UNJOINED])  # [4, C]
        table.put(rows, self.join(sums, labels[rows], rounding))

    def complete(self, gradients: Gradients, dtype: torch.dtype) -> None:
        """Sum the ranks' parts of what they share, and round to ``dtype``; a collective of each."""
        for name in ("d_hidden", "d_states"):
            part = getattr(gradients, name)  # [T, D] or [T, r] fp32 (fp64)
            if part is not None:
                dist.all_reduce(part, group=self.group)
                setattr(gradients, name, part.to(dtype))


class ShardedRows(TorchRows):
    """The row work of a backend on this rank's columns; the objective in torch between its passes.

    ``work`` sees local labels. `put_stats` leaves the sums of this shard, to be joined later.
    """

    def __init__(self, work: RowWork, shard: Shard, dtype: torch.dtype) -> None:
        self.work, self.shard, self.dtype = work, shard, dtype

    def rounding(self, view: LogitView) -> float:
        """As in `Shard.join`."""
        return self.work.rounding(view)

    def sums(self, raw: Tensor, labels: Tensor, view: LogitView) -> Tensor:  # [4, C]
        """Sums of this shard, of no columns too."""
        if raw.shape[1]:
            return self.work.sums(raw, labels.clamp(min=0), view)
        return no_sums(raw.shape[0], self.dtype, raw)

    def stats(self, raw: Tensor, labels: Tensor, view: LogitView) -> RowStats:
        """Joined statistics of the rows of ``raw`` ``[C, V]``, which stays as it is."""
        return self.shard.join(self.sums(raw, labels, view), labels, self.rounding(view))

    def put_stats(
        self, raw: Tensor, labels: Tensor, view: LogitView, table: RowTable, rows: slice
    ) -> None:
        """Sums of this shard, into the columns `UNJOINED` of the table."""
        put_sums(table, rows, self.sums(raw, labels, view))

    def grad_(
        self,
        raw: Tensor,  # [C, V]
        d_raw: Tensor,  # [C, V] written
        labels: Tensor,  # [C]
        view: LogitView,
        stats: RowStats,
        coefficients: Coefficients,
    ) -> None:
        """Write d loss / d raw of this shard's columns."""
        if raw.shape[1]:
            self.work.grad_(raw, d_raw, labels, view, stats, coefficients)

    def put_exps(self, raw: Tensor, exps: Tensor, view: LogitView, maximum: Tensor) -> None:
        """Write e^(z - m) of this shard's columns, m the joined maximum."""
        if raw.shape[1]:
            exp_work(self.work).put_exps(raw, exps, view, maximum)

    def grad_of_exps_(
        self,
        exps: Tensor,  # [C, V] from e^(z - m) to d loss / d raw
        labels: Tensor,  # [C]
        view: LogitView,
        stats: RowStats,
        coefficients: Coefficients,
    ) -> None:
        """Turn exponentials into d loss / d raw in place."""
        if exps.shape[1]:
            exp_work(self.work).grad_of_exps_(exps, labels, view, stats, coefficients)


def put_sums(table: RowTable, rows: slice, sums: Tensor) -> None:
    """Sums ``[4, C]`` of one shard into the table, where `Shard.join_table` finds them."""
    for name, column in zip(UNJOINED, sums, strict=True):
        table.column(name, rows).copy_(column)


def no_sums(num_rows: int, dtype: torch.dtype, like: Tensor) -> Tensor:  # [4, num_rows]
    """Sums over no columns."""
    sums = like.new_zeros(4, num_rows, dtype=dtype)
    sums[0] = LOWEST_LOGIT
    return sums


class ShardRequest(NamedTuple):
    """``process_group`` and ``vocab_start`` of a call, and what else all ranks must agree on."""

    group: dist.ProcessGroup
    start: int
    options: tuple

    def meet(
        self,
        hidden: Tensor,  # [..., D]
        weight: Tensor,  # [V of this rank, D]
        labels: Tensor,  # [T]
        needs: tuple[bool, ...],
    ) -> Shard:
        """The shard, once the ranks have told each other what they were called with.

        Raises:
            ValueError: the same on every rank: shards that do not tile the vocabulary, or calls
                that differ.
        """
        layouts = _KNOWN.setdefault(self.group, {})
        layout = (self.start, *weight.shape, hidden.dtype)
        if layout in layouts and not is_checked(hidden):
            return layouts[layout]
        check_not_capturing(
            hidden.device,
            "process_group: expected a layout that an earlier call has checked while a CUDA graph "
            "is captured. Call the function once before the capture, with CRPO_CHECK_LABELS unset.",
        )
        shared = {
            "num_rows": hidden.numel() // hidden.shape[-1],
            "hidden_size": hidden.shape[-1],
            "dtype": _digest(str(hidden.dtype)),
            "labels": _checksum(labels),
            "gradients": _digest(str(needs)),
            "options": _digest(repr(self.options)),
        }
        table = self._told([self.start, weight.shape[0], *(shared[name] for name in SAME)], hidden)
        for column, name in enumerate(SAME, start=2):
            _check_same(name, [row[column] for row in table])
        sizes = [row[1] for row in table]
        _check_tiles([row[0] for row in table], sizes)
        made = Shard(self.group, self.start, weight.shape[0], max(sizes), sum(sizes))
        layouts[layout] = made
        return made

    def _told(self, values: list[int], like: Tensor) -> list[list[int]]:
        """Every rank's ``values``; a collective, and the host waits for it."""
        num_ranks = dist.get_world_size(self.group)
        own = torch.tensor(values, dtype=torch.int64).to(like.device)
        told = own.new_empty(num_ranks * len(values))
        dist.all_to_all_single(told, own.repeat(num_ranks), group=self.group)
        return told.view(num_ranks, len(values)).tolist()


_KNOWN: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple, Shard]]
_KNOWN = weakref.WeakKeyDictionary()


def shard_request(
    process_group: Any, vocab_start: Any, run: RunOptions, *options: Any
) -> ShardRequest | None:
    """What the two arguments ask for; None without a process group.

    Args:
        process_group: as in the call.
        vocab_start: as in the call.
        run: how the call shall run.
        options: whatever else must be the same on every rank, with a ``repr`` that says so.

    Raises:
        ValueError: one without the other, no group that this rank belongs to, or the oracle.
    """
    is_number = isinstance(vocab_start, int) and not isinstance(vocab_start, bool)
    if process_group is None:
        if not is_number or vocab_start != 0:
            raise ValueError(
                f"vocab_start: expected 0 without a process_group, got {vocab_start!r}. "
                "Pass the whole weight."
            )
        return None
    if not is_member(process_group):
        raise ValueError(
            "process_group: expected a torch.distributed ProcessGroup that this rank belongs to, "
            f"got {process_group!r}. Pass dist.group.WORLD, dist.new_group(ranks) or "
            "mesh['tp'].get_group()."
        )
    if not is_number:
        raise ValueError(
            f"vocab_start: expected a whole number, got {vocab_start!r}. Pass the number of rows "
            "of the vocabulary before those of this rank's weight."
        )
    if run.backend == "dense":
        raise ValueError(
            "backend: expected 'auto', 'triton' or 'torch' with a process_group, got 'dense', "
            "which makes the logits of the whole vocabulary in one process. Pass backend='auto', "
            "or the whole weight without a process_group."
        )
    return ShardRequest(process_group, vocab_start, (tuple(run), *options))


def is_member(group: object) -> bool:
    """Whether ``group`` is a process group with this rank in it."""
    is_group = dist.is_available() and isinstance(group, dist.ProcessGroup)
    return is_group and dist.is_initialized() and dist.get_rank(group) >= 0


def _digest(text: str) -> int:
    return zlib.crc32(text.encode())


def _checksum(labels: Tensor) -> int:
    """A number that other labels, or the same in another order, hardly have."""
    flat = labels.reshape(-1).long()
    odd = torch.arange(1, 2 * flat.numel() + 1, 2, device=flat.device)
    return int((flat * odd).sum())


def _check_same(name: str, values: list[int]) -> None:
    """One argument, which all ranks share.

    Raises:
        ValueError: they do not; the same on every rank.
    """
    other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
    if other is None:
        return
    found = f"{values[0]} on rank 0 and {values[other]} on rank {other} of the group"
    if name not in ("num_rows", "hidden_size"):
        found = f"others on rank {other} than on rank 0 of the group"
    raise ValueError(
        f"process_group: expected the same {name} on every rank, got {found}. {REMEDIES[name]}."
    )


def _check_tiles(starts: list[int], sizes: list[int]) -> None:
    """Shards that are the vocabulary side by side, in whatever order; some may be empty.

    Raises:
        ValueError: they overlap or miss rows; the same on every rank.
    """
    ranks = range(len(sizes))
    shards = sorted((starts[rank], sizes[rank], rank) for rank in ranks if sizes[rank])
    ends = accumulate((size for _, size, _ in shards), initial=0)
    if shards and all(start == next(ends) for start, _, _ in shards):
        return
    found = ", ".join(f"{start}..{start + size - 1} on rank {rank}" for start, size, rank in shards)
    raise ValueError(
        "vocab_start: expected shards that tile the vocabulary from 0 without gap or overlap, got "
        f"rows {found} of the group. Pass the number of rows of the vocabulary before those of "
        "this rank's weight, and the group of the ranks that share one head."
    )

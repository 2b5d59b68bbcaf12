"""The per-row results of one call: one table, one column a name, filled chunk by chunk.

Kernels write straight into it, torch's row work is copied into it, and what a caller sees is
scattered back to ``[T]`` with one copy of the whole table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .rows import LogitView, RowStats
from .spec import ObjectiveSpec, TokenInputs
from .terms import Coefficients, LossRows, Sequences

SUMS: tuple[str, ...] = ("maximum", "log_sum", "mean_shift")  # what the gradient of a row needs
OUTPUTS: tuple[str, ...] = ("logprobs", "entropy", "lse", "is_top1")
TERMS: tuple[str, ...] = ("token_loss", "ratio", "kl", "rho", "is_clipped", "loss")
UNJOINED: tuple[str, ...] = (*SUMS, "logprobs")  # hold m, s, t, z_y until shards are joined
SLOPES: tuple[str, ...] = ("d_logprobs", "d_lse")
COLUMNS: tuple[str, ...] = (*SUMS, *OUTPUTS, *TERMS, *SLOPES)  # the order that kernels write


@dataclass(frozen=True)
class Objective:
    """What is minimised over the counted rows of one call."""

    spec: ObjectiveSpec
    inputs: TokenInputs  # of [n]
    sequences: Sequences | None  # of [n], for gspo

    @property
    def is_by_sequence(self) -> bool:
        """Whether a row's coefficients depend on the other rows of its sequence."""
        return self.spec.policy == "gspo" and self.inputs.old_logprobs is not None

    def take(self, rows: slice) -> Objective:
        """The objective of some rows, whole sequences where it is by sequence."""
        sequences = self.sequences and self.sequences._replace(ids=self.sequences.ids[rows])
        return Objective(self.spec, self.inputs.take(rows), sequences)


class RowTable:
    """``[columns, n]`` in the dtype of the statistics; flags are 0 or 1."""

    def __init__(
        self, names: tuple[str, ...], num_rows: int, like: Tensor, dtype: torch.dtype
    ) -> None:
        self.names = names
        self.values = like.new_empty(len(names), num_rows, dtype=dtype)

    def column(self, name: str, rows: slice = slice(None)) -> Tensor:  # [C]
        """A view of one column."""
        return self.values[self.names.index(name), rows]

    def stats(self, rows: slice = slice(None)) -> RowStats:  # of [C]
        """The statistics of some rows, as views."""
        return RowStats(*(self.column(name, rows) for name in RowStats._fields))

    def put(
        self, rows: slice, *records: RowStats | LossRows, names: tuple[str, ...] | None = None
    ) -> None:
        """Copy what some rows' records say of the table's columns, or of ``names`` among them."""
        for name in self.names if names is None else names:
            record = next(record for record in records if hasattr(record, name))
            self.column(name, rows).copy_(getattr(record, name))


class RowWork(Protocol):
    """The row work of a backend on one chunk of C rows.

    Attributes:
        loss_columns: what it writes of a loss.
    """

    loss_columns: tuple[str, ...]

    def sums(self, raw: Tensor, labels: Tensor, view: LogitView) -> Tensor:  # [4, C]
        """M, s, t and the label's logit of the rows of ``raw`` ``[C, V]``."""
        ...

    def rounding(self, view: LogitView) -> float:
        """How far `sums` may have a label's logit from m, as a part of it, where it is m."""
        ...

    def put_stats(
        self,
        raw: Tensor,  # [C, V]
        labels: Tensor,  # [C]
        view: LogitView,
        table: RowTable,
        rows: slice,
    ) -> None:
        """Statistics, into the table."""

    def put_loss(
        self,
        raw: Tensor,  # [C, V]
        labels: Tensor,  # [C]
        view: LogitView,
        table: RowTable,
        rows: slice,
        objective: Objective,
    ) -> tuple[RowStats, Coefficients]:
        """Statistics and loss, into the table; what the gradient of the rows needs."""
        ...

    def grad_(
        self,
        raw: Tensor,  # [C, V]
        d_raw: Tensor,  # [C, V] written
        labels: Tensor,  # [C]
        view: LogitView,
        stats: RowStats,
        coefficients: Coefficients,
    ) -> None:
        """Write d loss / d raw."""


@runtime_checkable
class ExpWork(RowWork, Protocol):
    """Row work that can keep e^(z - m) instead of logits."""

    def put_exps(
        self,
        raw: Tensor,  # [C, V]
        exps: Tensor,  # [C, V] written
        view: LogitView,
        maximum: Tensor,  # [C]
    ) -> None:
        """Write e^(z - m)."""

    def grad_of_exps_(
        self,
        exps: Tensor,  # [C, V] from e^(z - m) to d loss / d raw
        labels: Tensor,  # [C]
        view: LogitView,
        stats: RowStats,
        coefficients: Coefficients,
    ) -> None:
        """Turn exponentials into d loss / d raw in place."""


def exp_work(work: RowWork) -> ExpWork:
    """``work`` of a plan that keeps exponentials."""
    assert isinstance(work, ExpWork), "planned for a backend that keeps no exponentials"
    return work

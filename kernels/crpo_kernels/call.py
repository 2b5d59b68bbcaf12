"""One call of the head, from checked arguments to scattered results.

Constants are made compact first (ignored rows dropped), then a backend runs, then per-token results
are scattered back to ``[T]``. ``n`` is the number of counted rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .aligned import Lengths, counted_lengths
from .autograd import ObjectiveLoss, OnePassLoss, head_logprobs
from .chunked import Head, one_pass, stats_dtype
from .compilation import uncompiled_reason
from .dispatch import (
    choose_backend,
    choose_plan,
    log_choice,
    mode_reason,
    one_pass_reason,
    plan_scoring,
    spread,
)
from .factors import Adapter, Factors, Needs
from .host import is_fake
from .lora import operations, with_adapter
from .plan import HeadSizes
from .products import without_autocast
from .quantised import check_head_dtype, widened
from .reference import dense_logits, dense_logprobs
from .row_table import Objective, RowTable
from .rows import LogitView
from .spec import Logprobs, ObjectiveSpec, RunOptions, TokenInputs, TokenStats
from .terms import LossRows, Sequences
from .validate import (
    check_labels,
    check_scale,
    check_temperature,
    check_temperatures,
    check_tensors,
    check_workspace,
    counted_rows,
    token_vector,
)
from .vocab_parallel import ShardRequest
from .weights import sequence_of_token


class HeadCall:
    """The differentiable factors, the compact constants and the plan of one call."""

    def __init__(
        self,
        hidden: Tensor,  # [..., D]
        weight: Tensor,  # [V, D]
        labels: Tensor,  # [T]
        bias: Tensor | None,  # [V]
        transform: tuple[Tensor | float, float, float | None],
        rows: Tensor | Sequence[int] | None,
        lora_head: Any = None,
        needs: Needs | None = None,
        request: ShardRequest | None = None,
    ) -> None:
        """Check everything about the head itself.

        Args:
            hidden: the states.
            weight: of the head.
            labels: of the rows.
            bias: of the head.
            transform: temperature, logit_scale and logit_softcap.
            rows: that count.
            lora_head: (A, B, scaling) of an adapter, or what was made of them (states, up).
            needs: which factors need a gradient; None: as autograd says.
            request: of a vocabulary-parallel head, whose ranks meet here.

        Raises:
            ValueError: an argument that cannot be right.
        """
        temperature, logit_scale, logit_softcap = transform
        if isinstance(hidden, Tensor) and isinstance(weight, Tensor):
            hidden, weight = cast_for_autocast(hidden, weight)
        check_tensors(hidden, weight, labels, bias)
        check_scale(logit_scale, logit_softcap)
        flat = hidden.reshape(-1, hidden.shape[-1])  # [T, D]
        if isinstance(lora_head, Adapter):
            states, up = lora_head
            self.factors = Factors(flat, weight, bias, states.reshape(-1, up.shape[1]), up)
        else:
            self.factors = with_adapter(Factors(flat, weight, bias), lora_head)
        self.needs = self.factors.needs() if needs is None else needs
        self.hidden, self.weight = flat, weight
        self.dtype = stats_dtype(hidden)
        self.num_rows = self.hidden.shape[0]
        self.shard = None if request is None else request.meet(hidden, weight, labels, self.needs)
        vocab_size = weight.shape[0] if self.shard is None else self.shard.vocab_size
        all_labels = check_labels(labels, self.num_rows, vocab_size)
        self.rows, self.given_rows = counted_rows(rows, all_labels), rows
        self.labels = self.compact(all_labels)  # [n]
        temperature = check_temperature(temperature, self.num_rows, hidden, self.dtype)
        if isinstance(temperature, Tensor):
            temperature = self.compact(temperature)
        check_temperatures(temperature)
        self.options = {
            "bias": bias,
            "temperature": temperature,
            "logit_scale": logit_scale,
            "logit_softcap": logit_softcap,
        }
        constant_bias = None if bias is None else bias.detach().to(self.dtype)
        self.view = LogitView.make(constant_bias, temperature, logit_scale, logit_softcap)

    def compact(self, vector: Tensor) -> Tensor:  # [T] -> [n]
        """The counted rows of a per-token vector."""
        return vector if self.rows is None else vector[self.rows]

    def scatter(self, vector: Tensor) -> Tensor:  # [n] -> [T]
        """Back to all rows; ignored rows are 0. Differentiable."""
        if self.rows is None:
            return vector
        return vector.new_zeros(self.num_rows).index_copy(0, self.rows, vector)

    def token_inputs(self, vectors: dict[str, Tensor | None]) -> TokenInputs:  # of [n]
        """Per-token constants, checked and compact."""
        checked = {
            name: token_vector(name, value, self.num_rows, self.hidden, self.dtype)
            for name, value in vectors.items()
        }
        token_weights = checked.pop("token_weights")
        if token_weights is None:
            raise ValueError(
                "token_weights: expected one weight per token, got None. "
                "Pass aggregation_weights(...)."
            )
        compact = {k: None if v is None else self.compact(v) for k, v in checked.items()}
        return TokenInputs(self.labels, self.compact(token_weights), **compact)

    def sequence_lengths(self, cu_seqlens: Tensor | Sequence[int]) -> Lengths:
        """Counted rows of each sequence, where the host knows; ``cu_seqlens`` has been checked."""
        return counted_lengths(cu_seqlens, self.rows, self.given_rows)

    def plan_loss(
        self,
        run: RunOptions,
        vectors: dict[str, Tensor | None],  # of [T]
        spec: ObjectiveSpec,
        cu_seqlens: Tensor | None,  # [B + 1]
    ) -> Objective:
        """Choose how the loss runs; returns what is minimised over the counted rows.

        Raises:
            ValueError: an argument that cannot be right.
        """
        is_on_policy = vectors["old_logprobs"] is None
        sequences, lengths = None, None
        if spec.policy == "gspo" and cu_seqlens is not None:
            ids, count = sequence_of_token(cu_seqlens, self.num_rows, self.hidden.device)
            sequences = Sequences(self.compact(ids), count)
            lengths = None if is_on_policy else self.sequence_lengths(cu_seqlens)
        self.plan(run, one_pass_reason(spec, is_on_policy), lengths)
        return Objective(spec, self.token_inputs(vectors), sequences)

    def plan_logprobs(self, run: RunOptions, needs_any: bool) -> None:
        """Choose how statistics are made, for a gradient or without one.

        Raises:
            ValueError: an argument that cannot be right, or a mode that cannot run.
        """
        if run.head_dtype is not None:
            check_head_dtype(run.head_dtype, self.hidden, needs_any)
        if needs_any:
            self.plan(run, one_pass_reason(None, is_on_policy=True))
        else:
            self.plan(run, None, is_scoring=True)

    def plan(
        self,
        run: RunOptions,
        one_pass_reason: str | None,
        lengths: Lengths | None = None,
        *,
        may_keep: bool = True,
        is_scoring: bool = False,
    ) -> None:
        """Choose backend, mode and chunk size.

        Args:
            run: as in the call.
            one_pass_reason: why chunks that know no sequences cannot be one pass, or None.
            lengths: of the sequences, where whole ones in a chunk can be.
            may_keep: whether forward may keep something of all rows for the gradient.
            is_scoring: statistics alone are wanted, by whatever code.

        Raises:
            ValueError: an unknown name, or a backend or mode that cannot run, with the reason.
        """
        check_workspace(run.workspace_bytes)
        choice = choose_backend(
            run.backend, self.hidden.device, self.hidden.dtype,
            is_fake=is_fake(self.hidden),
        )  # fmt: skip
        num_rows, shard = self.labels.numel(), self.shard
        rank = 0 if self.factors.up is None else self.factors.up.shape[1]
        eager_reason = uncompiled_reason(self.hidden, num_rows, self.weight.shape[0])
        sizes = HeadSizes(
            self.hidden, self.weight, num_rows, choice.name, run.workspace_bytes,
            needs=self.needs[:2], is_compiled=eager_reason is None,
            may_keep=any(self.needs) and may_keep, is_gathered=self.rows is not None,
            head_dtype=run.head_dtype, lora_rank=rank,
            most_rows=None if shard is None else shard.most,
        )  # fmt: skip
        if is_scoring:
            plan, why = plan_scoring(sizes, run.mode, choice.reason)
        else:
            plan, reason = choose_plan(sizes, run.mode, one_pass_reason, lengths)
            why = mode_reason(plan, reason)
        why += operations(plan, self.needs, rank)
        why += spread(1 if shard is None else shard.num_ranks)
        log_choice(plan, choice, why, eager_reason)
        self.head = Head(
            rows=self.rows,
            labels=self.labels if shard is None else shard.local(self.labels),
            view=self.view,
            plan=plan,
            needs=self.needs,
            head_dtype=run.head_dtype,
            shard=shard,
        )

    def logprobs(self) -> tuple[Logprobs, Tensor]:
        """(logprobs, entropy, lse) and is_top1, ``[n]``."""
        if self.head.plan.backend != "dense":
            return head_logprobs(self.factors, self.head)
        hidden, weight, states = self.hidden, self.weight, self.factors.states
        if self.rows is not None:
            hidden = hidden[self.rows]  # [n, D]
            states = None if states is None else states[self.rows]  # [n, r]
        if self.head.head_dtype is not None:
            hidden, weight = widened(hidden), widened(weight)
        with without_autocast(hidden):
            logits = dense_logits(  # [n, V]
                hidden, weight, states=states, up=self.factors.up, **self.options
            )
            *outputs, is_top1 = dense_logprobs(logits, self.labels)
        return Logprobs(*outputs), is_top1

    def policy_loss(self, objective: Objective) -> tuple[Tensor, TokenStats]:
        """Loss ``[]`` and statistics ``[T]``."""
        if self.head.plan.backend != "dense" and self.head.plan.mode == "one_pass":
            tables: list[RowTable] = []
            if any(self.needs):
                loss = OnePassLoss.apply(*self.factors, self.head, objective, tables)
            else:
                tables.append(one_pass(self.factors, self.head, objective)[1])
                loss = tables[0].column("loss").sum()
            return loss, self.token_stats(tables[0].values, tables[0].names)
        results: list[LossRows] = []
        values, is_top1 = self.logprobs()
        loss = ObjectiveLoss.apply(*values, objective, results)
        return loss, self.two_pass_stats(values, is_top1, results[0])

    def two_pass_stats(self, values: Logprobs, is_top1: Tensor, result: LossRows) -> TokenStats:
        """Statistics ``[T]`` from the results ``[n]`` of two passes."""
        columns = {**values._asdict(), "is_top1": is_top1, **vars(result)}
        names = [name for name in TokenStats._fields if name in columns]
        table = torch.stack([columns[name].detach().to(self.dtype) for name in names])
        return self.token_stats(table, names)

    def token_stats(self, table: Tensor, names: Sequence[str]) -> TokenStats:
        """Statistics scattered to ``[T]`` from the columns of ``table`` ``[names, n]``."""
        if self.rows is not None:
            table = table.new_zeros(table.shape[0], self.num_rows).index_copy_(1, self.rows, table)
        columns = dict(zip(names, table.unbind(), strict=True))
        counted = self.scatter(torch.ones_like(self.labels, dtype=torch.bool))
        values = {name: columns[name] for name in TokenStats._fields if name in columns}
        flags = {name: values[name] > 0 for name in ("is_clipped", "is_top1")}
        return TokenStats(**{**values, **flags}, is_counted=counted)


def cast_for_autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's dtype, as in a Linear; fp64 stays. The casts are part of the graph."""
    device = hidden.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return hidden, weight
    dtype = torch.get_autocast_dtype(device)
    tensors = (hidden, weight)
    cast = (
        t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )
    return tuple(cast)  # type: ignore[return-value]

"""Sequences -> micro-batches under a token budget. Pure functions of records.

A sequence of P prompt and C completion ids has one *row* per completion token: row P-1+j of the
sequence predicts completion token j (labels are shifted here, once). The per-token vectors of the
loss live on the completion tokens of all sequences of this rank, concatenated in rollout order
("flat": [N]); packing copies them to the rows of a micro-batch, so that weights never depend on the
layout:

    packed   one row of T tokens, position_ids restart at 0, no attention mask
    padded   one sequence a row, right padded to the longest of the micro-batch (T = rows * longest)

A completion may be empty (a truncated one that is kept out of the loss): it counts as a sequence in
every denominator, has no rows, and is in no micro-batch.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sequence:
    """One prompt with one completion, which may be empty.

    Attributes:
        prompt_ids: at least one id.
        completion_ids: what the loss is about; empty: the sequence counts, but adds nothing.
        stage_ids: per completion token, -1 = none.
        rollout_logprobs: per completion token, nats.
        advantage: of the whole completion.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    stage_ids: list[int]
    rollout_logprobs: list[float] | None = None
    advantage: float = 0.0
    trace: int = -1  # place of the first token in the step's TokenTrace; -1: not traced

    def __post_init__(self) -> None:
        """Vectors of other lengths would give a token the values of another one."""
        count, logprobs = len(self.completion_ids), self.rollout_logprobs
        aligned = len(self.stage_ids) == count and (logprobs is None or len(logprobs) == count)
        assert aligned, f"{count} completion ids, {len(self.stage_ids)} stage ids, {logprobs=}"

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward sees: T tokens, of which R are completion tokens ("rows").

    Attributes:
        input_ids: [1, T] (packed) or [B, longest] (padded), int64.
        position_ids: like ``input_ids``.
        attention_mask: None (packed) or bool, like ``input_ids``.
        rows: [R] int64, where among the T flattened tokens the R completion tokens are predicted.
        labels: [R] int64, the completion tokens.
        source: [R] int64, for each row its index in the flat vectors.
        cu_seqlens: [B+1] int32 over the R rows, on the CPU.
        vectors: name -> [R], see ``attach``; `score_head.ERRORS` have fewer rows.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    rows: Tensor
    labels: Tensor
    source: Tensor
    cu_seqlens: Tensor
    vectors: dict[str, Tensor] = field(default_factory=dict)

    def attach(self, **flat: Tensor | None) -> MicroBatch:
        """The same micro-batch with flat vectors [N] gathered to its rows [R]; None stays out."""
        vectors = {name: v[self.source] for name, v in flat.items() if v is not None}
        return self.with_vectors(**vectors)

    def with_vectors(self, **rows: Tensor) -> MicroBatch:
        """The same micro-batch with further vectors [R]."""
        return replace(self, vectors={**self.vectors, **rows})

    def to(self, device: torch.device) -> MicroBatch:
        """All tensors on ``device`` but ``cu_seqlens``, by which the host plans."""
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}
        moved = {k: v.to(device) for k, v in tensors.items() if k != "cu_seqlens"}
        return replace(self, **moved, vectors={k: v.to(device) for k, v in self.vectors.items()})


def assign(lengths: list[int], token_budget: int, *, layout: str) -> list[list[int]]:
    """First-fit decreasing: indices of the sequences of each micro-batch, in a deterministic order.

    A micro-batch costs the sum of its lengths (packed) or longest * count (padded); as lengths come
    in descending order, the first sequence of a padded micro-batch is its longest.

    Raises:
        ValueError: a sequence is longer than ``token_budget``.
    """
    longest = max(lengths, default=0)
    if longest > token_budget:
        raise ValueError(
            f"train.token_budget: expected at least the longest sequence, {longest} tokens, got "
            f"{token_budget}. Type --train.token_budget {longest}."
        )
    bins: list[list[int]] = []
    loads: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for b, members in enumerate(bins):
            cost = lengths[i] if layout == "packed" else lengths[members[0]]
            if loads[b] + cost <= token_budget:
                members.append(i)
                loads[b] += cost
                break
        else:
            bins.append([i])
            loads.append(lengths[i])
    return [sorted(members) for members in bins]


def pack(
    sequences: list[Sequence], token_budget: int, *, layout: str = "packed", pad_id: int = 0
) -> list[MicroBatch]:
    """Micro-batches that hold every sequence with a completion token exactly once.

    Args:
        sequences: this rank's sequences in rollout order; none, or empty completions alone, make no
            micro-batch.
        token_budget: most tokens of one micro-batch (padding included).
        layout: "packed" or "padded".
        pad_id: any valid token id; its rows are ignored.
    """
    if layout not in ("packed", "padded"):
        raise ValueError(f"layout: expected packed or padded, got {layout!r}.")
    for i, sequence in enumerate(sequences):
        if not sequence.prompt_ids:
            raise ValueError(f"sequences[{i}]: expected at least one prompt token, got none.")
    offsets = [0, *itertools.accumulate(len(s.completion_ids) for s in sequences)]
    pairs = list(zip(sequences, offsets[:-1], strict=True))
    pairs = [(s, offset) for s, offset in pairs if s.completion_ids]
    bins = assign([len(s) for s, _ in pairs], token_budget, layout=layout)
    build = _packed if layout == "packed" else _padded
    return [build([pairs[i][0] for i in b], [pairs[i][1] for i in b], pad_id) for b in bins]


def dummy(layout: str = "packed", pad_id: int = 0) -> MicroBatch:
    """Two prompt tokens and no row, for ranks with fewer micro-batches than the others.

    Its backward adds zeros; what it is there for are the collectives of forward and backward.
    """
    ids, none = torch.full((1, 2), pad_id), torch.empty(0, dtype=torch.long)
    return MicroBatch(
        input_ids=ids,
        position_ids=torch.arange(2)[None],
        attention_mask=None if layout == "packed" else torch.ones_like(ids, dtype=torch.bool),
        rows=none,
        labels=none,
        source=none,
        cu_seqlens=torch.zeros(1, dtype=torch.int32),
    )


def _micro_batch(
    input_ids: Tensor,  # [B, L]
    position_ids: Tensor,  # [B, L]
    attention_mask: Tensor | None,  # [B, L]
    sequences: list[Sequence],
    starts: list[int],  # of each sequence in the flattened ids
    offsets: list[int],  # of each completion in the flat vectors
) -> MicroBatch:
    rows, source, ends = [], [], [0]
    for sequence, start, offset in zip(sequences, starts, offsets, strict=True):
        first, count = start + len(sequence.prompt_ids) - 1, len(sequence.completion_ids)
        rows.append(torch.arange(first, first + count))
        source.append(torch.arange(offset, offset + count))
        ends.append(ends[-1] + count)
    return MicroBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=attention_mask,
        rows=torch.cat(rows),
        labels=torch.tensor([i for s in sequences for i in s.completion_ids], dtype=torch.long),
        source=torch.cat(source),
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),
    )


def _packed(sequences: list[Sequence], offsets: list[int], pad_id: int) -> MicroBatch:
    del pad_id  # nothing is padded
    starts = [0, *itertools.accumulate(len(s) for s in sequences)][:-1]
    ids = [i for s in sequences for i in (*s.prompt_ids, *s.completion_ids)]
    positions = torch.cat([torch.arange(len(s)) for s in sequences])  # [T]
    return _micro_batch(torch.tensor(ids)[None], positions[None], None, sequences, starts, offsets)


def _padded(sequences: list[Sequence], offsets: list[int], pad_id: int) -> MicroBatch:
    longest = max(len(s) for s in sequences)
    ids = torch.full((len(sequences), longest), pad_id)  # [B, longest]
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor([*sequence.prompt_ids, *sequence.completion_ids])
        mask[row, : len(sequence)] = True
    positions = torch.arange(longest).expand(len(sequences), -1).contiguous()
    starts = [row * longest for row in range(len(sequences))]
    return _micro_batch(ids, positions, mask, sequences, starts, offsets)

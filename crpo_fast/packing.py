"""Sequences -> micro-batches under a token budget. Pure functions of records.

A sequence of P prompt and C completion ids has one *row* per completion token: row P-1+j of the
sequence predicts completion token j (labels are shifted here, once). The per-token vectors of the
loss live on the completion tokens of all sequences of this rank, concatenated in rollout order
("flat": [N]); packing copies them to the rows of a micro-batch, so that weights never depend on the
layout:

    packed   one row of T tokens, position_ids restart at 0, no attention mask
    shared   packed, but a prompt stands once before its completions: position_ids restart at its
             length for each of them (`attention.segments`)
    padded   one sequence a row, right padded to the longest of the micro-batch (T = rows * longest)

A completion may be empty (a truncated one that is kept out of the loss): it counts as a sequence in
every denominator, has no rows, and is in no micro-batch.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from crpo_fast.batch import LAYOUTS


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
        input_ids: [1, T] (packed, shared) or [B, longest] (padded), int64.
        position_ids: like ``input_ids``.
        attention_mask: None (packed, shared) or bool, like ``input_ids``.
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

    A micro-batch costs longest * count (padded) or the sum of its lengths; as lengths come in
    descending order, the first sequence of a padded micro-batch is its longest.

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
            cost = lengths[members[0]] if layout == "padded" else lengths[i]
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
        layout: "packed", "shared" or "padded".
        pad_id: any valid token id; its rows are ignored.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}.")
    for i, sequence in enumerate(sequences):
        if not sequence.prompt_ids:
            raise ValueError(f"sequences[{i}]: expected at least one prompt token, got none.")
    offsets = [0, *itertools.accumulate(len(s.completion_ids) for s in sequences)]
    pairs = list(zip(sequences, offsets[:-1], strict=True))
    pairs = [(s, offset) for s, offset in pairs if s.completion_ids]
    build = {"packed": _packed, "shared": _shared, "padded": _padded}[layout]
    units = _families(pairs, token_budget) if layout == "shared" else [[pair] for pair in pairs]
    lengths = [_family_tokens(u) if layout == "shared" else len(u[0][0]) for u in units]
    bins = assign(lengths, token_budget, layout=layout)
    members = [[pair for i in b for pair in units[i]] for b in bins]
    return [build([s for s, _ in m], [offset for _, offset in m], pad_id) for m in members]


def _families(
    pairs: list[tuple[Sequence, int]], token_budget: int
) -> list[list[tuple[Sequence, int]]]:
    """Neighbours of one prompt, as many as fit into ``token_budget`` together."""
    families: list[list[tuple[Sequence, int]]] = []
    for pair in pairs:
        last = families[-1] if families else []
        is_related = bool(last) and last[0][0].prompt_ids == pair[0].prompt_ids
        if is_related and _family_tokens([*last, pair]) <= token_budget:
            last.append(pair)
        else:
            families.append([pair])
    return families


def _family_tokens(family: list[tuple[Sequence, int]]) -> int:
    """The prompt once; a completion's last token predicts nothing and stays out."""
    return len(family[0][0].prompt_ids) + sum(len(s.completion_ids) - 1 for s, _ in family)


def dummy(layout: str = "packed", pad_id: int = 0) -> MicroBatch:
    """Two prompt tokens and no row, for ranks with fewer micro-batches than the others.

    Its backward adds zeros; what it is there for are the collectives of forward and backward.
    """
    ids, none = torch.full((1, 2), pad_id), torch.empty(0, dtype=torch.long)
    return MicroBatch(
        input_ids=ids,
        position_ids=torch.arange(2)[None],
        attention_mask=torch.ones_like(ids, dtype=torch.bool) if layout == "padded" else None,
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
    starts: list[int],  # of each prompt in the flattened ids
    offsets: list[int],  # of each completion in the flat vectors
    firsts: list[int] | None = None,  # of each completion there; None: right after its prompt
) -> MicroBatch:
    rows, source, ends = [], [], [0]
    for i, (sequence, start, offset) in enumerate(zip(sequences, starts, offsets, strict=True)):
        after, count = start + len(sequence.prompt_ids), len(sequence.completion_ids)
        first = after if firsts is None else firsts[i]
        rows += [torch.tensor([after - 1]), torch.arange(first, first + count - 1)]
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


def _shared(sequences: list[Sequence], offsets: list[int], pad_id: int) -> MicroBatch:
    del pad_id  # nothing is padded
    ids: list[int] = []
    positions: list[int] = []
    starts: list[int] = []
    firsts: list[int] = []
    prompt: list[int] = []
    start = 0
    for sequence in sequences:
        if sequence.prompt_ids != prompt:
            prompt, start = sequence.prompt_ids, len(ids)
            ids += prompt
            positions += range(len(prompt))
        starts.append(start)
        firsts.append(len(ids))
        ids += sequence.completion_ids[:-1]
        positions += range(len(prompt), len(sequence) - 1)
    row, places = torch.tensor(ids)[None], torch.tensor(positions)[None]  # [1, T] each
    return _micro_batch(row, places, None, sequences, starts, offsets, firsts)


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

"""Packing: every completion token once, in its row, under the budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crpo_fast.packing import Sequence, assign, dummy, pack

shapes = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=0, max_size=12)


def make(shape: list[tuple[int, int]]) -> list[Sequence]:
    ids = iter(range(1, 10_000))
    return [
        Sequence([next(ids) for _ in range(p)], [next(ids) for _ in range(c)], [-1] * c)
        for p, c in shape
    ]


@settings(max_examples=60, deadline=None)
@given(shapes, st.sampled_from(["packed", "padded"]), st.integers(18, 60))
def test_every_token_once(shape: list[tuple[int, int]], layout: str, budget: int) -> None:
    sequences = make(shape)
    flat = torch.tensor([i for s in sequences for i in s.completion_ids])
    seen = []
    for batch in pack(sequences, budget, layout=layout):
        assert batch.input_ids.numel() <= budget
        ids, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
        assert torch.equal(flat[batch.source], batch.labels)
        assert torch.equal(ids[batch.rows + 1], batch.labels)  # a row predicts the token after it
        assert torch.equal(
            positions[batch.rows + 1], positions[batch.rows] + 1
        )  # of the same sequence
        assert int(batch.cu_seqlens[-1]) == batch.labels.numel()
        seen += batch.source.tolist()
    assert sorted(seen) == list(range(flat.numel()))


def test_packed_by_hand() -> None:
    (batch,) = pack(make([(2, 1), (1, 2)]), 6, layout="packed")
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert batch.attention_mask is None
    assert batch.rows.tolist() == [1, 3, 4]
    assert batch.labels.tolist() == [3, 5, 6]
    assert batch.cu_seqlens.tolist() == [0, 1, 3]
    attached = batch.attach(w=torch.tensor([0.1, 0.2, 0.3]), none=None)
    assert attached.vectors["w"].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert "none" not in attached.vectors


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_empty_completions_are_in_no_micro_batch(layout: str) -> None:
    full, empty = make([(2, 1), (3, 0), (1, 2), (20, 0)]), make([(5, 0)])
    (batch,) = pack(full, 6, layout=layout)  # the longest prompt alone is over the budget
    assert batch.labels.tolist() == [3, 8, 9]
    assert batch.source.tolist() == [0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 1, 3]
    assert pack(empty, 6, layout=layout) == pack([], 6, layout=layout) == []


def test_vectors_of_another_length_are_refused() -> None:
    with pytest.raises(AssertionError, match="2 completion ids, 1 stage ids"):
        Sequence([1], [2, 3], [0])
    with pytest.raises(AssertionError, match=r"logprobs=\[-1.0\]"):
        Sequence([1], [], [], [-1.0])


def test_padded_by_hand() -> None:
    (batch,) = pack(make([(2, 2), (1, 1)]), 8, layout="padded", pad_id=9)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4], [5, 6, 9, 9]]
    assert batch.attention_mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.rows.tolist() == [1, 2, 4]


def test_first_fit_decreasing() -> None:
    assert assign([3, 5, 2, 4], 7, layout="packed") == [[1, 2], [0, 3]]
    assert assign([3, 5, 2, 4], 8, layout="padded") == [[1], [0, 3], [2]]


def test_too_long_a_sequence_names_the_flag() -> None:
    with pytest.raises(
        ValueError, match=r"longest sequence, 9 tokens, got 8\. Type --train\.token_budget 9"
    ):
        pack(make([(4, 5)]), 8)


def test_dummy_has_no_rows() -> None:
    batch = dummy()
    assert batch.input_ids.shape == (1, 2)
    assert batch.rows.numel() == batch.labels.numel() == 0

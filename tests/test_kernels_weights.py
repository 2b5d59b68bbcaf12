"""The two weight vectors: tables by hand, invariance under any split, and refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crpo_kernels import aggregation_weights, stage_entropy_weights

MASK = torch.tensor([False, True, True, True, False, True, False])  # sequences of 4, 0 and 3 tokens
CU = torch.tensor([0, 4, 4, 7], dtype=torch.int32)


def test_aggregations_by_hand():
    def weights(aggregation, **options):
        return aggregation_weights(MASK, CU, aggregation=aggregation, **options)

    def at(*values):
        return torch.tensor([0, values[0], values[1], values[2], 0, values[3], 0])

    torch.testing.assert_close(aggregation_weights(MASK, CU), at(*[1 / 4] * 4))
    torch.testing.assert_close(weights("token_mean", num_tokens=10), at(*[0.1] * 4))
    torch.testing.assert_close(weights("sequence_mean"), at(*[1 / 9] * 3, 1 / 3))
    torch.testing.assert_close(weights("sequence_mean", num_sequences=8), at(*[1 / 24] * 3, 1 / 8))
    torch.testing.assert_close(weights("constant", max_length=20), at(*[1 / 60] * 4))
    torch.testing.assert_close(
        weights("constant", max_length=20, num_sequences=5), at(*[1 / 100] * 4)
    )
    torch.testing.assert_close(weights("bnpo", group_ids=[0, 0, 1]), at(*[1 / 6] * 3, 1 / 2))
    torch.testing.assert_close(
        weights("bnpo", group_ids=[2, 2, 0], group_tokens=torch.tensor([10, 7, 5])),
        at(*[1 / 15] * 3, 1 / 30),
    )


def test_counts_are_clamped_to_one():
    none = torch.zeros(3, dtype=torch.bool)
    cu = torch.tensor([0, 3])
    for options in ({}, {"num_tokens": 0}, {"aggregation": "sequence_mean", "num_sequences": 0}):
        assert aggregation_weights(none, cu, **options).tolist() == [0, 0, 0]
    empty = aggregation_weights(torch.zeros(0, dtype=torch.bool), torch.tensor([0]))
    assert empty.shape == (0,)


STAGES = torch.tensor([-1, 0, 0, 1, 1, 1, -1, 0, 2])  # sequences of 6 and 3 tokens
STAGE_CU = torch.tensor([0, 6, 9], dtype=torch.int32)
COEFS = [-0.6, 0.3, 1.2]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, -0.15, -0.15, 0.05, 0.05, 0.05, 0, -0.3, 0.6]),
        ({"num_sequences": 10}, [0, -0.03, -0.03, 0.01, 0.01, 0.01, 0, -0.06, 0.12]),
        ({"reduction": "present_only"}, [0, -0.15, -0.15, 0.1, 0.1, 0.1, 0, -0.3, 1.2]),
        (
            {"reduction": "present_only", "num_present": [4, 2, 3]},
            [0, -0.075, -0.075, 0.05, 0.05, 0.05, 0, -0.15, 0.4],
        ),
        ({"reduction": "token_mean"}, [0, -0.2, -0.2, 0.1, 0.1, 0.1, 0, -0.2, 1.2]),
        (
            {"reduction": "token_mean", "num_stage_tokens": torch.tensor([6, 30, 4])},
            [0, -0.1, -0.1, 0.01, 0.01, 0.01, 0, -0.1, 0.3],
        ),
        ({"reference_length": 3}, [0, -0.1, -0.1, 0.05, 0.05, 0.05, 0, -0.1, 0.2]),
        (
            {"reduction": "token_mean", "reference_length": 4},
            [0, -0.1, -0.1, 0.075, 0.075, 0.075, 0, -0.05, 0.3],
        ),
    ],
)
def test_stage_weights_by_hand(options, expected):
    weights = stage_entropy_weights(STAGES, STAGE_CU, COEFS, **options)
    torch.testing.assert_close(weights, torch.tensor(expected))


def test_the_paper_s_formula():
    """sum_k coef_k mean_b mean_(t in stage k of b) H, a missing stage counting 0."""
    entropy = torch.rand(9, dtype=torch.float64)
    weights = stage_entropy_weights(STAGES, STAGE_CU, torch.tensor(COEFS, dtype=torch.float64))
    expected = 0.0
    for k, coef in enumerate(COEFS):
        for begin, end in ((0, 6), (6, 9)):
            inside = entropy[begin:end][STAGES[begin:end] == k]
            expected += coef * (float(inside.mean()) if inside.numel() else 0.0) / 2
    assert float((weights * entropy).sum()) == pytest.approx(expected, rel=1e-14)


def test_no_stages_and_no_tokens():
    assert stage_entropy_weights(torch.tensor([-1, -1]), torch.tensor([0, 2]), []).tolist() == [
        0,
        0,
    ]
    empty = stage_entropy_weights(torch.zeros(0, dtype=torch.long), torch.tensor([0]), [0.1])
    assert empty.shape == (0,)


def test_dtypes_follow_mask_and_coefs():
    assert aggregation_weights(MASK, CU).dtype == torch.float32
    assert aggregation_weights(MASK.double(), CU).dtype == torch.float64
    coefs = torch.tensor(COEFS, dtype=torch.float64)
    assert stage_entropy_weights(STAGES, STAGE_CU, coefs).dtype == torch.float64
    assert stage_entropy_weights(STAGES, STAGE_CU, COEFS).dtype == torch.float32


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(0, 2**31), st.data())
def test_any_split_of_the_sequences_gives_the_same_weights(lengths, seed, data):
    g = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    mask = torch.rand(total, generator=g) < 0.7
    stages = torch.randint(-1, 3, (total,), generator=g)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    cut = data.draw(st.integers(0, len(lengths)))
    groups = torch.arange(len(lengths)) // 2
    middle = int(cu[cut])
    tokens = torch.zeros(int(groups.max()) + 1)
    owners = torch.repeat_interleave(groups, torch.tensor(lengths))
    tokens.index_add_(0, owners, mask.float())
    lasting = {
        "num_tokens": int(mask.sum()),
        "num_sequences": len(lengths),
        "max_length": 9,
        "group_tokens": tokens,
    }

    def both(m, s, c, g_ids):
        made = [
            aggregation_weights(m, c, aggregation=name, group_ids=g_ids, **lasting)
            for name in ("token_mean", "sequence_mean", "constant", "bnpo")
        ]
        made.append(stage_entropy_weights(s, c, COEFS, num_sequences=len(lengths)))
        return torch.stack(made)

    whole = both(mask, stages, cu, groups)
    first = both(mask[:middle], stages[:middle], cu[: cut + 1], groups[:cut])
    second = both(mask[middle:], stages[middle:], cu[cut:] - middle, groups[cut:])
    assert torch.equal(torch.cat([first, second], dim=1), whole)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: aggregation_weights(MASK, CU, aggregation="mean"), "aggregation: expected one of"),
        (lambda: aggregation_weights(MASK, CU, aggregation="constant"), "max_length: expected"),
        (lambda: aggregation_weights(MASK, CU, aggregation="bnpo"), "group_ids: expected"),
        (
            lambda: aggregation_weights(MASK, CU, aggregation="bnpo", group_ids=[0, 1]),
            "group_ids: expected 3 values, .* got 2",
        ),
        (
            lambda: aggregation_weights(
                MASK, CU, aggregation="bnpo", group_ids=[0, 1, 2], group_tokens=[1, 2]
            ),
            r"group_ids: expected values in 0\.\.1 .* got 0\.\.2",
        ),
        (lambda: aggregation_weights(MASK, CU[:-1]), "cu_seqlens: expected .* T = 7, got"),
        (lambda: aggregation_weights(MASK, CU.flip(0)), "cu_seqlens: expected a rising"),
        (lambda: aggregation_weights(MASK, CU.float()), "cu_seqlens: expected integers"),
        (
            lambda: stage_entropy_weights(STAGES, STAGE_CU, COEFS[:2]),
            r"stage_ids: expected values in -1\.\.1 .* got -1\.\.2",
        ),
        (
            lambda: stage_entropy_weights(STAGES, STAGE_CU, COEFS, reduction="sum"),
            "reduction: expected one of .* got 'sum'",
        ),
        (
            lambda: stage_entropy_weights(STAGES, STAGE_CU, COEFS, reference_length=0),
            "reference_length: expected a positive",
        ),
        (
            lambda: stage_entropy_weights(
                STAGES, STAGE_CU, COEFS, reduction="present_only", num_present=[1]
            ),
            "num_present: expected 3 values, one per stage, got 1",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()

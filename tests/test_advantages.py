"""Group advantages against hand-computed tables and torch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crpo_fast.advantages import group_advantages


def test_group_std_by_hand():
    """Group (1, 0, 0, 1): mean .5, unbiased std sqrt(1/3)."""
    unit = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    values = group_advantages([1, 0, 0, 1, 3, 3, 3, 3], 4)
    assert values == pytest.approx([unit, -unit, -unit, unit, 0, 0, 0, 0], abs=1e-15)


def test_equal_rewards_give_exact_zeros():
    for scale in ("group_std", "batch_std", "none"):
        values = group_advantages([0.1] * 3 + [0.1, 0.2, 0.7], 3, scale=scale)
        assert values[:3] == [0.0] * 3
        assert values[3] < 0 < values[5]


def test_batch_std_and_none_by_hand():
    rewards = [1.0, 0.0, 5.0, 3.0]  # mean 2.25, squared deviations 1.5625 5.0625 7.5625 .5625
    std = math.sqrt(14.75 / 3)
    expected = [x / (std + 0.01) for x in (0.5, -0.5, 1.0, -1.0)]
    assert group_advantages(rewards, 2, scale="batch_std", eps=0.01) == pytest.approx(expected)
    assert group_advantages(rewards, 2, scale="none") == [0.5, -0.5, 1.0, -1.0]


def test_batch_std_is_that_of_all_ranks():
    rewards = [1.0, 0.0, 5.0, 3.0, math.nan, 2.0]
    whole = group_advantages(rewards, 2, scale="batch_std")
    parts = [
        group_advantages(mine, 2, scale="batch_std", batch=rewards[::-1])
        for mine in (rewards[:4], rewards[4:])
    ]
    assert parts[0] + parts[1] == whole
    assert group_advantages(rewards[:4], 2, scale="batch_std") != whole[:4]


@settings(deadline=None)  # the first call of torch is slow
@given(
    st.integers(2, 5).flatmap(
        lambda g: st.tuples(
            st.just(g),
            st.lists(st.lists(st.floats(-10, 10), min_size=g, max_size=g), min_size=1, max_size=5),
        )
    )
)
def test_against_torch(case):
    group_size, groups = case
    r = torch.tensor(groups, dtype=torch.float64)
    centred = r - r.mean(1, keepdim=True)
    flat = r.flatten().tolist()
    expected = {
        "group_std": centred / (r.std(1, keepdim=True) + 1e-4),
        "batch_std": centred / (r.std() + 1e-4),
        "none": centred,
    }
    for scale, value in expected.items():
        got = torch.tensor(group_advantages(flat, group_size, scale=scale), dtype=torch.float64)
        torch.testing.assert_close(got, value.flatten(), rtol=1e-9, atol=1e-9)


def test_the_weight_cancels_in_the_group_and_not_as_an_advantage_weight():
    """The trap of crpo.md: rewards +-W give the same advantages whatever W is."""
    small = group_advantages([0.26, -0.26, -0.26, 0.26], 4, eps=0.0)
    assert small == pytest.approx(group_advantages([1.77, -1.77, -1.77, 1.77], 4, eps=0.0))
    assert small[0] == pytest.approx(0.866, abs=1e-3)
    weighted = group_advantages([1, -1, -1, 1], 4, weights=[0.26] * 4, eps=0.0)
    assert weighted == pytest.approx([0.26 * a for a in small])


def test_nan_rewards_are_excluded():
    rewards = [1.0, math.nan, 0.0, 1.0, math.inf, math.nan, math.nan, 2.0]
    values = group_advantages(rewards, 4)
    three = group_advantages([1.0, 0.0, 1.0], 3)
    assert values == [three[0], 0.0, three[1], three[2], 0.0, 0.0, 0.0, 0.0]
    batch = group_advantages([1.0, math.nan, 0.0, 3.0], 2, scale="batch_std")
    std = math.sqrt(((1 - 4 / 3) ** 2 + (4 / 3) ** 2 + (3 - 4 / 3) ** 2) / 2)
    assert batch == pytest.approx([0, 0, -1.5 / (std + 1e-4), 1.5 / (std + 1e-4)])


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (([1.0], 1), {}, "group_size: expected at least 2.*got 1.*--rollout.group_size 4"),
        (([1.0] * 3, 2), {}, "rewards: expected a multiple of group_size = 2, got 3"),
        (([1.0] * 2, 2), {"weights": [1.0]}, "weights: expected one per reward, 2, got 1"),
        (([1.0] * 2, 2), {"scale": "std"}, "scale: expected one of group_std, batch_std, none"),
    ],
)
def test_refusals(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(*args, **kwargs)


def test_empty_batch():
    assert group_advantages([], 4, scale="batch_std") == []

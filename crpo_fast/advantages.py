"""Group-relative advantages.

    group_std   A = (r - mean_group) / (std_group + eps)      the paper's; std unbiased, eps = 1e-4
    batch_std   A = (r - mean_group) / (std_batch + eps)      std of all rewards of all ranks
    none        A =  r - mean_group                           Dr.GRPO

All samples of a prompt share one balance weight, so under ``group_std`` it cancels wherever their
formats agree; ``weights`` multiplies the finished advantage instead (config: rewards.balance =
"advantage").

    >>> group_advantages([1.0, 0.0, 3.0, 3.0], group_size=2, scale="none")
    [0.5, -0.5, 0.0, 0.0]

Source: group_std GRPO (arXiv 2402.03300), none Dr.GRPO (2503.20783).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

SCALES = ("group_std", "batch_std", "none")  # values of ``scale``


def group_advantages(
    rewards: Sequence[float],  # [P * G], the G samples of a prompt side by side
    group_size: int,
    *,
    scale: str = "group_std",
    eps: float = 1e-4,
    weights: Sequence[float] | None = None,  # [P * G]
    batch: Sequence[float] | None = None,
) -> list[float]:
    """Advantages [P * G] in fp64, in standard deviations (in units of the reward with "none").

    A reward that is not finite has no part in any mean or std, and its sample gets advantage 0.
    A group whose rewards are all equal, or with fewer than two usable ones, gets zeros.

    Args:
        rewards: ``[P * G]``; not finite where a sample has none.
        group_size: G, samples of a prompt.
        scale: "group_std", "batch_std" or "none".
        eps: added to the standard deviation.
        weights: ``[P * G]`` multiply the finished advantages.
        batch: the rewards that "batch_std" is of, those of all ranks in any order; None: these
            here are all that there are.

    Raises:
        ValueError: group_size below 2, lengths that do not fit, unknown scale.
    """
    _check(rewards, group_size, scale, weights)
    groups = [rewards[i : i + group_size] for i in range(0, len(rewards), group_size)]
    batch_std = _std(_usable(rewards if batch is None else batch)) if scale == "batch_std" else 0.0
    advantages = []
    for group in groups:
        usable = _usable(group)
        if len(usable) < 2 or max(usable) == min(usable):
            advantages += [0.0] * group_size
            continue
        mean = math.fsum(usable) / len(usable)
        divisor = {"group_std": _std(usable) + eps, "batch_std": batch_std + eps, "none": 1.0}[
            scale
        ]
        advantages += [(r - mean) / divisor if math.isfinite(r) else 0.0 for r in group]
    if weights is None:
        return advantages
    return [a * w for a, w in zip(advantages, weights, strict=True)]


def _usable(rewards: Sequence[float]) -> list[float]:
    return [float(r) for r in rewards if math.isfinite(r)]


def _std(values: list[float]) -> float:
    """Unbiased standard deviation; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def _check(
    rewards: Sequence[float], group_size: int, scale: str, weights: Sequence[float] | None
) -> None:
    if group_size < 2:
        raise ValueError(
            f"group_size: expected at least 2 completions per prompt, got {group_size}. "
            "Advantages compare the samples of one prompt; type --rollout.group_size 4."
        )
    if scale not in SCALES:
        raise ValueError(
            f"scale: expected one of {', '.join(SCALES)}, got {scale!r}. "
            "Type --advantages.scale group_std."
        )
    if len(rewards) % group_size:
        raise ValueError(
            f"rewards: expected a multiple of group_size = {group_size}, got {len(rewards)}. "
            "Hand over every sample of every prompt, in rollout order."
        )
    if weights is not None and len(weights) != len(rewards):
        raise ValueError(
            f"weights: expected one per reward, {len(rewards)}, got {len(weights)}. "
            "Repeat a prompt's weight for each of its samples."
        )

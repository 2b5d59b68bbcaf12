"""Dynamic sampling (DAPO, 2503.14476): groups without reward variance are replaced.

A group whose usable rewards are all equal, or fewer than two, has zero advantages and teaches
nothing. It is dropped, and further prompts are sampled in its place, in at most ``max_rounds``
further rounds. What is still missing then stays missing: the step trains on fewer groups.

Rank r holds every R-th of the shuffled rows that are not in the step's first round; round k takes
from position (k - 1) * share of these. So rows and seeds of a round are a pure function of (seed,
step, round, rank), no prompt comes twice in a step, and a small data set ends the rounds early.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from crpo_fast.batch import Row


@dataclass(frozen=True)
class Resampling:
    """What further rounds need.

    Attributes:
        max_rounds: further rounds, at most.
        rows: (round from 1, how many) -> this rank's rows of it, fewer where the data end.
        seed: round -> seed of its sampling on this rank.
        all_max: the largest value of any rank, so that all agree on the number of rounds:
            generation is a collective on a sharded model.
    """

    max_rounds: int
    rows: Callable[[int, int], list[Row]]
    seed: Callable[[int], int]
    all_max: Callable[[int], int]


def has_signal(rewards: Sequence[float]) -> bool:
    """Whether the usable rewards of a group differ."""
    usable = [r for r in rewards if math.isfinite(r)]
    return len(usable) > 1 and max(usable) > min(usable)


def further_rows(
    num_rows: int,
    used: Sequence[int],
    *,
    seed: int,
    step: int,
    round_: int,
    rank: int,
    world_size: int,
    share: int,
) -> list[int]:
    """Indices of up to ``share`` rows for one rank's further round, none of them in ``used``.

    Args:
        num_rows: of the data.
        used: indices in the step's first round, of all ranks.
        seed: of the run.
        step: of the phase.
        round_: from 1.
        rank: of the data-parallel ranks.
        world_size: how many there are.
        share: most rows of one rank and round.
    """
    unused = sorted(set(range(num_rows)) - set(used))
    random.Random(f"{seed}/{step}/further").shuffle(unused)
    mine = unused[rank::world_size]
    return mine[(round_ - 1) * share : round_ * share]


def round_seed(seed: int, step: int, round_: int, rank: int) -> int:
    """Seed of the sampling of a further round."""
    return random.Random(f"{seed}/{step}/{round_}/{rank}").getrandbits(62)

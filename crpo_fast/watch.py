"""What a person sees of a step: what it cost by the clock, and the line that shows it."""

from __future__ import annotations

import torch

from crpo_fast import distributed, timing
from crpo_fast.distributed import World
from crpo_fast.experience import Experience


def tokens_and_seconds(batch: Experience, world: World) -> dict[str, float]:
    """Token counts of the step over all ranks, and its seconds: of the slowest rank, by part.

    They begin at the previous record: the checkpoint and the evaluation after a step are in the
    next one.
    """
    seconds = timing.lap()
    seconds = distributed.largest({**seconds, "step": sum(seconds.values())}, world)
    lengths = sum(map(len, batch.sequences))
    local = torch.tensor([lengths, batch.num_sampled], dtype=torch.float64)
    tokens, sampled = distributed.all_sum(local.to(world.device)).tolist()
    return {"tokens": tokens, **timing.rates(seconds, tokens, sampled)}

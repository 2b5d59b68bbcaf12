"""Other projects as candidates: what each computes, what it lacks, where it runs.

Nothing of theirs is imported before `Needs` asks for it, so that one which is broken or absent
costs its own row and nothing else. What a project cannot do is a reason in `lacks`, by column.
"""

from __future__ import annotations

from benchmarks.losses.baselines import Candidate

from . import cce, liger, own, quack, trl, verl


def loss_peers(device: str) -> list[Candidate]:
    """With both gradients; those that cannot run on the type of device say why.

    The last ones generate code first: when time is short, they go first.
    """
    makers = (liger, trl, verl, quack, own, cce)
    made = [candidate for maker in makers for candidate in maker.losses()]
    return [*made, own.compiled(device)]


def score_peers(device: str) -> list[Candidate]:
    """Log-probabilities, and entropies where there are any, without gradients."""
    makers = (liger, trl, verl, quack, own, cce)
    made = [candidate for maker in makers for candidate in maker.scores()]
    return [*made, own.compiled_scored(device)]

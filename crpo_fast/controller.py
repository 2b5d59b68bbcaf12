"""Who sets the entropy coefficients beta_k of a phase: the schedule alone, or dual ascent.

``fixed``: beta_k of the schedule times the annealing factor of the step.

``dual``: stage k shall keep its mean entropy H_k at a target T_k. This is the method of
multipliers for the constraint gap_k = log(H_k / T_k) = 0: an integral (the multiplier) and a term
proportional to the gap (the quadratic penalty), both as shares of the bound,

    multiplier_k <- clip(multiplier_k + integral * gap_k, -1, 1)
    beta_k        = bound * clip(multiplier_k + proportional * gap_k, -1, 1)

beta_k > 0 penalises entropy, so a stage above its target is pressed harder. The gap is a log-ratio:
a stage of .02 nats and one of 3 are held with the same gains. The multiplier starts at the
schedule's beta_k and rests while beta_k is at its bound and the gap pushes outwards (no windup). A
step's coefficients come from the entropies of the steps before it, so they are known before the
head runs and one pass over the logits is enough; a stage that does not occur leaves its state as
it is. The annealing factor scales the targets, never the bound.

Both see global means only: every rank computes the same coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crpo_fast.config_file import ConfigError
from crpo_fast.stages import check_one_per_stage, check_same_stages

if TYPE_CHECKING:
    from crpo_fast.config import EntropyConfig, PhaseConfig
    from crpo_fast.stages import StageGrammar

_LARGEST_GAP = math.log(10.0)  # what one step may say; an almost deterministic stage has log(0)


@dataclass(frozen=True, slots=True)
class Anneal:
    """A factor that goes from 1 at a phase's first step to ``final`` at its last.

    Attributes:
        kind: none | linear | cosine.
        final: factor of the last step.
        steps: of the phase.
    """

    kind: str = "none"
    final: float = 0.0
    steps: int = 1

    def __call__(self, step: int) -> float:
        """The factor of the 0-based ``step``: a pure function, so resuming needs no state."""
        done = min(1.0, step / max(1, self.steps - 1))
        if self.kind == "linear":
            return 1.0 + (self.final - 1.0) * done
        if self.kind == "cosine":
            return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * done))
        return 1.0


@dataclass(frozen=True, slots=True)
class DualOptions:
    """How `DualAscent` holds its targets.

    Attributes:
        bound: of every |beta_k|.
        targets: nats, one per stage; empty: ``fractions`` of the first entropy seen.
        fractions: of a stage's entropy at the first step it occurs in; one number or one per stage.
        floor: least target, nats.
        proportional: share of the bound per unit of the gap.
        integral: the same per step.
    """

    bound: float
    targets: tuple[float, ...] = ()
    fractions: tuple[float, ...] = (1.0,)
    floor: float = 0.02
    proportional: float = 4.0
    integral: float = 0.2


class DualAscent:
    """Dual ascent on the coefficients (formulas above).

    Args:
        names: of the K stages.
        schedule: [K] coefficients of the first step.
        options: targets, bound and gains.

    Raises:
        ValueError: a number out of its range, or not one per stage.
    """

    def __init__(
        self,
        names: Sequence[str],
        schedule: Sequence[float],
        options: DualOptions,
    ) -> None:
        self.names, self.options = list(names), options
        self._check(schedule)
        count = len(self.names)
        fractions = options.fractions
        self._fractions = fractions * count if len(fractions) == 1 else fractions
        self._start: list[float | None] = list(options.targets) or [None] * count
        self._multiplier = [beta / options.bound for beta in schedule]
        self._coefs = [float(beta) for beta in schedule]

    @property
    def coefs(self) -> tuple[float, ...]:
        """beta_1..beta_K after the steps seen so far."""
        return tuple(self._coefs)

    def targets(self, factor: float = 1.0) -> tuple[float | None, ...]:
        """Target entropies under an annealing factor, nats; None for a stage never seen."""
        floor = self.options.floor
        return tuple(None if t is None else max(factor * t, floor) for t in self._start)

    def update(self, entropies: Sequence[float | None], factor: float = 1.0) -> dict[str, float]:
        """Move the coefficients; returns target (nats) and gap (log-ratio) of every stage seen.

        Args:
            entropies: [K] mean entropy over the tokens of each stage, nats; None (or NaN) where the
                step has none of that stage.
            factor: annealing factor of the targets in that step.

        Raises:
            ValueError: not one entropy per stage.
        """
        check_one_per_stage(self.names, entropies)
        metrics = {}
        for k, entropy in enumerate(entropies):
            if entropy is None or not math.isfinite(entropy):
                continue
            if self._start[k] is None:
                self._start[k] = self._fractions[k] * entropy
            target = self.targets(factor)[k]
            assert target is not None, "a stage that occurred has a target"
            gap = math.log(entropy / target) if entropy > 0 else -_LARGEST_GAP
            self._move(k, max(-_LARGEST_GAP, min(gap, _LARGEST_GAP)))
            metrics |= {f"stage_target/{k}": target, f"stage_gap/{k}": gap}
        return metrics

    def _move(self, k: int, gap: float) -> None:
        options, before = self.options, self._multiplier[k]
        multiplier = _clip(before + options.integral * gap)
        share = multiplier + options.proportional * gap
        if abs(share) > 1 and share * gap > 0:  # at the bound already: do not wind up
            multiplier = before
        self._multiplier[k] = multiplier
        self._coefs[k] = options.bound * _clip(share)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on with the same coefficients; plain JSON types."""
        return {
            "names": list(self.names),
            "start": list(self._start),
            "multiplier": list(self._multiplier),
            "coefs": list(self._coefs),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state.

        Raises:
            ValueError: it is of other stages.
        """
        check_same_stages(self.names, state["names"])
        self._start = [None if t is None else float(t) for t in state["start"]]
        self._multiplier = list(map(float, state["multiplier"]))
        self._coefs = list(map(float, state["coefs"]))

    def _check(self, schedule: Sequence[float]) -> None:
        count, o = len(self.names), self.options
        if not _is_positive(o.bound):
            raise ValueError(
                f"entropy.dual_bound: expected a positive number, got {o.bound} (it is "
                "entropy.magnitude unless given). Type --entropy.dual_bound 0.06."
            )
        largest = max((abs(beta) for beta in schedule), default=0.0)
        if largest > o.bound:
            raise ValueError(
                "entropy.dual_bound: expected at least the largest coefficient of the schedule, "
                f"{largest}, got {o.bound}. Type --entropy.dual_bound {largest}."
            )
        if not _is_positive(o.floor):
            raise ValueError(
                f"entropy.target_floor: expected more than 0 nats, got {o.floor}. Type "
                "--entropy.target_floor 0.02."
            )
        fits = all(_is_positive(t) and t >= o.floor for t in o.targets)
        if o.targets and not (len(o.targets) == count and fits):
            raise ValueError(
                f"entropy.targets: expected {count} numbers, one per stage, of at least "
                f"{o.floor} nats (entropy.target_floor), got {list(o.targets)}. Correct them, or "
                "leave them out for entropy.target_fraction."
            )
        if len(o.fractions) not in (1, count) or not all(map(_is_positive, o.fractions)):
            raise ValueError(
                f"entropy.target_fraction: expected a positive number, or {count}, one per stage, "
                f"got {list(o.fractions)}. Type --entropy.target_fraction 1.0."
            )
        if min(o.proportional, o.integral) < 0 or not _is_positive(o.proportional + o.integral):
            raise ValueError(
                "entropy.dual_proportional, entropy.dual_integral: expected no negative number "
                f"and not two zeros, got {o.proportional} and {o.integral}. Leave them out for "
                "the defaults."
            )


def _is_positive(number: float) -> bool:
    return 0 < number < math.inf  # False for NaN


def _clip(share: float) -> float:
    return max(-1.0, min(1.0, share))


class StageController:
    """Coefficients of each step of a phase: the schedule times a factor, or dual ascent.

    Args:
        schedule: [K] coefficients.
        anneal: factor of the coefficients, or of the targets of ``dual``.
        dual: None: ``fixed``.
    """

    def __init__(
        self,
        schedule: Sequence[float],
        anneal: Anneal | None = None,
        dual: DualAscent | None = None,
    ) -> None:
        self._schedule, self._anneal, self._dual = tuple(schedule), anneal or Anneal(), dual

    def coefs(self, step: int) -> tuple[float, ...]:
        """beta_1..beta_K of the phase's 0-based ``step``."""
        if self._dual is not None:
            return self._dual.coefs
        factor = self._anneal(step)
        return tuple(factor * beta for beta in self._schedule)

    def targets(self, step: int) -> tuple[float | None, ...]:
        """Target entropy of every stage in ``step``, nats; None where there is none."""
        if self._dual is None:
            return (None,) * len(self._schedule)
        return self._dual.targets(self._anneal(step))

    def update(self, step: int, entropies: Sequence[float | None]) -> dict[str, float]:
        """Take up the entropies of ``step`` [K], nats, None where absent; returns its metrics.

        They are stage_target/k (nats) and stage_gap/k (log-ratio) of every stage that occurs.
        """
        return {} if self._dual is None else self._dual.update(entropies, self._anneal(step))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs; plain JSON types. Empty for ``fixed``."""
        return {} if self._dual is None else self._dual.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        if self._dual is not None:
            self._dual.load_state_dict(state)


def build(
    entropy: EntropyConfig, phase: PhaseConfig, grammar: StageGrammar
) -> StageController | None:
    """The controller of a phase; None for a phase without an entropy term.

    Raises:
        ConfigError: a number of ``[entropy]`` that does not fit the stages.
    """
    if phase.algorithm != "crpo" or not grammar.num_stages:
        return None
    anneal = Anneal(entropy.anneal, entropy.anneal_to, phase.steps)
    if entropy.controller == "fixed":
        return StageController(grammar.coefs(), anneal)
    fraction = entropy.target_fraction
    options = DualOptions(
        bound=entropy.magnitude if entropy.dual_bound is None else entropy.dual_bound,
        targets=entropy.targets,
        fractions=fraction if isinstance(fraction, tuple) else (fraction,),
        floor=entropy.target_floor,
        proportional=entropy.dual_proportional,
        integral=entropy.dual_integral,
    )
    try:
        dual = DualAscent(grammar.names, grammar.coefs(), options)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return StageController(grammar.coefs(), anneal, dual)

"""The entropy alarm: a stage whose entropy runs away from where it started.

Full-vocabulary entropy bonuses do explode: the pressure on one token is beta_k / (tokens of the
stage), so a magnitude that suits stages of a hundred tokens drives stages of five into noise
within some ten steps.
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

_ADVICE = (
    "Lower entropy.magnitude, or set entropy.reference_length (80 suits stages of a few tokens), "
    'or let entropy.controller = "dual" hold the entropies'
)
_ADVICE_CONTROLLED = (
    "The dual controller cannot hold it: lower the lr, raise entropy.dual_bound if stage_coef is "
    "at it, or set entropy.reference_length"
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one step's entropies call for: messages to print, and why to stop (None: go on)."""

    warnings: tuple[str, ...] = ()
    stop: str | None = None


class EntropyAlarm:
    """Compares each stage's mean entropy with its start, once per optimizer step.

    A stage's start is the mean over the first ``start_steps`` steps in which it occurs, at least
    ``floor``: a stage that starts at .01 nats may reach ``factor * floor`` before anybody minds.

    Args:
        names: of the K stages.
        warn_factor: multiple of the start above which a stage is warned about, once in a run.
        stop_factor: multiple above which training should stop.
        floor: nats.
        start_steps: steps that make up the start.
        is_controlled: a controller holds the entropies; the advice differs.

    Raises:
        ValueError: factors not in 1 < warn <= stop, floor not positive, start_steps below 1.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        warn_factor: float = 3.0,
        stop_factor: float = 10.0,
        floor: float = 0.2,
        start_steps: int = 3,
        is_controlled: bool = False,
    ) -> None:
        if not 1 < warn_factor <= stop_factor:
            raise ValueError(
                "entropy.alarm_warn_factor, entropy.alarm_stop_factor: expected 1 < warn <= stop, "
                f"got {warn_factor} and {stop_factor}. Type --entropy.alarm_warn_factor 3.0 "
                "--entropy.alarm_stop_factor 10.0."
            )
        if not floor > 0:
            raise ValueError(
                f"entropy.alarm_floor: expected more than 0 nats, got {floor}. Type "
                "--entropy.alarm_floor 0.2."
            )
        if start_steps < 1:
            raise ValueError(
                f"start_steps: expected at least 1 step, got {start_steps}. Pass start_steps=3."
            )
        self.names = list(names)
        self.warn_factor, self.stop_factor, self.floor = warn_factor, stop_factor, floor
        self.start_steps, self.is_controlled = start_steps, is_controlled
        self._first: list[list[float]] = [[] for _ in self.names]
        self._warned = [False] * len(self.names)

    def update(
        self,
        step: int,
        entropies: Sequence[float | None],
        targets: Sequence[float | None] | None = None,
    ) -> Verdict:
        """Judge one step.

        Args:
            step: for the messages.
            entropies: [K] mean entropy over the tokens of each stage, nats; None or NaN where the
                step has none of that stage.
            targets: [K] of a controller, nats; a stage is judged by the larger of its start and
                its target.

        Raises:
            ValueError: not one entropy per stage.
        """
        check_one_per_stage(self.names, entropies)
        warnings, stops = [], []
        for k, entropy in enumerate(entropies):
            if entropy is None or math.isnan(entropy):
                continue
            if len(self._first[k]) < self.start_steps:
                self._first[k].append(float(entropy))
                continue
            start = max(self._start(k), (targets[k] if targets else None) or 0.0)
            if entropy > self.stop_factor * start:
                stops.append(self._message(k, step, entropy, start, self.stop_factor))
            elif entropy > self.warn_factor * start and not self._warned[k]:
                self._warned[k] = True
                warnings.append(self._message(k, step, entropy, start, self.warn_factor))
        return Verdict(tuple(warnings), "\n".join(stops) or None)

    def _start(self, k: int) -> float:
        return max(math.fsum(self._first[k]) / len(self._first[k]), self.floor)

    def _message(self, k: int, step: int, entropy: float, start: float, factor: float) -> str:
        return (
            f"stage {self.names[k]!r}: expected an entropy of at most {factor * start:.3g} nats "
            f"({factor:g} times its {'start or target' if self.is_controlled else 'start'}, floor "
            f"{self.floor:g}), got {entropy:.3g} at step {step}. "
            f"{_ADVICE_CONTROLLED if self.is_controlled else _ADVICE}; --entropy.no-alarm turns "
            "this off."
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on judging by the same start; plain JSON types."""
        first = [list(values) for values in self._first]
        return {"names": list(self.names), "first": first, "warned": list(self._warned)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state.

        Raises:
            ValueError: it is of other stages.
        """
        check_same_stages(self.names, state["names"])
        self._first = [list(map(float, values)) for values in state["first"]]
        self._warned = list(map(bool, state["warned"]))


def build(entropy: EntropyConfig, phase: PhaseConfig, names: Sequence[str]) -> EntropyAlarm | None:
    """The alarm of a phase; None in sft, where it is off, and without stages.

    Raises:
        ConfigError: factors or a floor that no alarm can have.
    """
    if phase.algorithm == "sft" or not entropy.alarm or not names:
        return None
    try:
        return EntropyAlarm(
            names,
            warn_factor=entropy.alarm_warn_factor,
            stop_factor=entropy.alarm_stop_factor,
            floor=entropy.alarm_floor,
            is_controlled=entropy.controller == "dual" and phase.algorithm == "crpo",
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error

"""What a phase does with its stage entropies: coefficients of each step, and the alarm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from crpo_fast import alarm, controller
from crpo_fast.alarm import EntropyAlarm, Verdict
from crpo_fast.config import EntropyConfig, PhaseConfig
from crpo_fast.controller import StageController
from crpo_fast.metrics import Metrics
from crpo_fast.stages import StageGrammar


@dataclass(frozen=True)
class EntropyWatch:
    """Alarm and controller of a phase; each None where the phase has none."""

    alarm: EntropyAlarm | None = None
    controller: StageController | None = None

    @classmethod
    def build(
        cls, entropy: EntropyConfig, phase: PhaseConfig, grammar: StageGrammar
    ) -> EntropyWatch:
        """Both as the config says.

        Raises:
            ConfigError: a number of ``[entropy]`` that does not fit the stages.
        """
        return cls(
            alarm.build(entropy, phase, grammar.names), controller.build(entropy, phase, grammar)
        )

    def coefs(self, step: int, default: tuple[float, ...]) -> tuple[float, ...]:
        """Coefficients of the phase's 0-based ``step``; ``default`` without a controller."""
        return default if self.controller is None else self.controller.coefs(step)

    def update(self, metrics: Metrics, num_stages: int, *, step: int, at: int) -> Verdict:
        """Take up the entropies of a step; adds targets and gaps to ``metrics``.

        Args:
            metrics: of the step, over all ranks; None for a stage that does not occur.
            num_stages: K.
            step: 0-based step of the phase.
            at: step of the run, for messages.
        """
        entropies = [metrics[f"stage_entropy/{k}"] for k in range(num_stages)]
        targets = None
        if self.controller is not None:
            metrics.update(self.controller.update(step, entropies))
            targets = self.controller.targets(step)
        return Verdict() if self.alarm is None else self.alarm.update(at, entropies, targets)

    def state_dict(self) -> dict[str, Any]:
        """State of the parts that have any, by name."""
        parts = {"alarm": self.alarm, "entropy": self.controller}
        states = {name: part.state_dict() for name, part in parts.items() if part is not None}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, states: dict[str, Any]) -> None:
        """Take up what ``states`` holds of the parts; what it lacks starts anew."""
        for name, part in (("alarm", self.alarm), ("entropy", self.controller)):
            if part is not None and name in states:
                part.load_state_dict(states[name])

"""How a run ends before its time."""

from __future__ import annotations

from typing import Any

from crpo_fast.config import Config


def same_command(config: Config | None) -> str:
    """What continues a run; None: refused before there was a config.

    ``--run.resume never`` would move the run aside; with ``best`` or a folder the second start of
    the same run continues (`run_folder`).
    """
    is_never = config is not None and config.run.resume == "never"
    return "same command with --run.resume auto" if is_never else "same command"


class Stopped(Exception):
    """The run was asked to stop; its state is saved."""


class MismatchError(RuntimeError):
    """The engine samples from other weights than the trainer trains."""


class EntropyExplosionError(RuntimeError):
    """A stage's entropy ran away; the message gives advice and the state is saved."""


class StopSignal:
    """Remembers SIGTERM and SIGINT; all ranks agree on it once per step."""

    def __init__(self) -> None:
        self.received = 0

    def __call__(self, signum: int, _frame: Any) -> None:
        """The handler that Python calls."""
        self.received = signum

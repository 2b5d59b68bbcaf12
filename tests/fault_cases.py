"""What test_faults.py injects into a run of one rank, and how the run must end.

goes on    status 0: the fault is counted or named, everything after it is as it should be
stops      status 1: one line says what to do, the state is saved or was saved, nothing is torn
is refused status 2: one line says what to type, nothing has been written or changed
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import pickle
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from crpo_fast import checkpoint_files, step
from crpo_fast.alarm import EntropyAlarm, Verdict
from crpo_fast.rollout.static import StaticEngine

TINY = str(Path(__file__).with_name("tiny.toml"))
Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Fault:
    """``inject`` gets the monkeypatch and the run's folder, which stands after step 6 of 8."""

    name: str
    inject: Callable[[Patch, Path], None]
    status: int
    says: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    check: Callable[[Path], None] = lambda run_dir: None


def nothing(patch: Patch, run_dir: Path) -> None:
    """The arguments are the fault."""


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def complete(run_dir: Path) -> None:
    assert [r["step"] for r in records(run_dir)] == list(range(1, 9))
    assert (run_dir / "summary.json").exists()
    assert (run_dir / "final" / "model.safetensors").exists()


def at_step_6(run_dir: Path) -> None:
    """The state before the fault is what is left."""
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_6"
    assert not (run_dir / "summary.json").exists()


# --- the engine


def completions(change: Callable[[list[Any]], Any]) -> Callable[[Patch, Path], None]:
    def inject(patch: Patch, run_dir: Path) -> None:
        original = StaticEngine._complete
        patch.setattr(StaticEngine, "_complete", lambda *a, **k: change(original(*a, **k)))

    return inject


def shifted(found: list[Any]) -> list[Any]:
    for c in found:
        c.logprobs[:] = [x - 1.0 for x in c.logprobs]
    return found


def not_finite(found: list[Any]) -> list[Any]:
    found[1].logprobs[0] = math.nan
    return found


def without_tokens(found: list[Any]) -> list[Any]:
    found[1].token_ids.clear()
    found[1].logprobs.clear()
    return found


def logprobs_missing(found: list[Any]) -> list[Any]:
    found[1].logprobs.pop()
    return found


ENGINE = [
    Fault(
        "other weights",
        completions(shifted),
        1,
        ("the engine serves other weights", "1.0"),
        (),
        at_step_6,
    ),
    Fault(
        "one completion lost",
        completions(lambda f: f[:-1]),
        1,
        ("expected 4 completions, got 3",),
        (),
        at_step_6,
    ),
    Fault(
        "no tokens",
        completions(without_tokens),
        1,
        ("expected 1 to 16 tokens", "got 0"),
        (),
        at_step_6,
    ),
    Fault("a logprob lost", completions(logprobs_missing), 1, ("one logprob each",), (), at_step_6),
    Fault("NaN logprob", completions(not_finite), 1, ("expected finite logprobs",), (), at_step_6),
]

# --- the mathematics


def loss_times(factor: float, calls: range) -> Callable[[Patch, Path], None]:
    def inject(patch: Patch, run_dir: Path) -> None:
        original, seen = step.micro_batch_loss, 0

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            loss, stats = original(*args, **kwargs)
            return (loss * factor if seen - 1 in calls else loss), stats

        patch.setattr(step, "micro_batch_loss", wrapped)

    return inject


def infinite_gradient(patch: Patch, run_dir: Path) -> None:
    original = step.micro_batch_loss

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        loss, stats = original(*args, **kwargs)
        return loss + 0.0 * torch.sqrt(loss - loss), stats  # finite, with an infinite derivative

    patch.setattr(step, "micro_batch_loss", wrapped)


def one_skipped(run_dir: Path) -> None:
    complete(run_dir)
    assert [r["skipped"] for r in records(run_dir)[6:]] == [1, 0]
    assert list((run_dir / "nonfinite").glob("step_7*"))


def alarm(patch: Patch, run_dir: Path) -> None:
    patch.setattr(EntropyAlarm, "update", lambda *_: Verdict((), "stage 'stimulus': explodes"))


MATHEMATICS = [
    Fault("NaN loss once", loss_times(math.nan, range(1)), 0, ("not finite",), (), one_skipped),
    Fault(
        "infinite loss once", loss_times(math.inf, range(1)), 0, ("not finite",), (), one_skipped
    ),
    Fault(
        "NaN loss for ever",
        loss_times(math.nan, range(99)),
        1,
        ("not finite", "optim.lr"),
        ("--train.max_nonfinite", "2"),
    ),
    Fault(
        "infinite gradient",
        infinite_gradient,
        1,
        ("not finite", "optim.lr"),
        ("--train.max_nonfinite", "2"),
    ),
    Fault("entropy explodes", alarm, 1, ("stage 'stimulus': explodes",)),
]

# --- the system


def sent(number: int) -> Callable[[Patch, Path], None]:
    def send(found: list[Any]) -> list[Any]:
        os.kill(os.getpid(), number)
        return found

    return completions(send)


def stopped_at_7(run_dir: Path) -> None:
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_7"
    assert [r["step"] for r in records(run_dir)] == list(range(1, 8))


def torn_line(patch: Patch, run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "phase": "crpo", "lo')


SYSTEM = [
    Fault(
        "SIGTERM in generation",
        sent(signal.SIGTERM),
        0,
        ("The same command continues",),
        (),
        stopped_at_7,
    ),
    Fault(
        "SIGINT in generation",
        sent(signal.SIGINT),
        0,
        ("The same command continues",),
        (),
        stopped_at_7,
    ),
    Fault("torn line of metrics", torn_line, 0, ("resumed from",), (), complete),
]

# --- the rewards


def reward(mark: str) -> Callable[[Patch, Path], None]:
    return lambda patch, run_dir: patch.setenv("REWARD_FAULT", mark)


def reward_fault(mark: str, kind: str, status: int = 0, *arguments: str) -> Fault:
    """All four samples of a step fail; with max_error_rate 1 the run goes on."""

    def counted(run_dir: Path) -> None:
        complete(run_dir)
        for record in records(run_dir)[6:]:
            assert record[f"reward/errors/{kind}"] == 4
            assert record["reward/error_rate"] == 1
            assert record["reward/not_usable"] == 1
            assert record["loss"] == 0  # no advantage without a reward

    allowed = ("--rewards.max_error_rate", "1") if status == 0 else ()
    counts = f"step 8: reward {kind} x 4, first: function by_environment"
    says = ("rewards.max_error_rate",) if status else (counts,)
    name = f"reward: {kind}{', too many' if status else ''}"
    check = counted if status == 0 else lambda run_dir: None
    return Fault(name, reward(mark), status, says, (*allowed, *arguments), check)


REWARDS = [
    reward_fault("raise", "exception"),
    reward_fault("hang", "timeout", 0, "--rewards.timeout", "0.2"),
    reward_fault("nan", "nan"),
    reward_fault("drop", "wrong_length"),
    reward_fault("crash", "crash"),
    reward_fault("raise", "exception", 1),
]

# --- the checkpoint that the run would continue from


def damaged(change: Callable[[Path], Any]) -> Callable[[Patch, Path], None]:
    return lambda patch, run_dir: change(run_dir / "checkpoints" / "step_6")


def cut_short(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate((folder / "model.safetensors").stat().st_size // 2)


def one_bit(folder: Path) -> None:
    content = bytearray((folder / "optimizer.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "optimizer.safetensors").write_bytes(content)


def garbage(folder: Path) -> None:
    (folder / "state.json").write_text("{")


def half_written(folder: Path) -> None:
    folder.rename(folder.with_name("step_6.tmp"))


class Payload:
    """Code that runs where a pickle is loaded."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("payload_ran",)


def pickled(folder: Path) -> None:
    os.chdir(folder.parent.parent)
    (folder / "optimizer.safetensors").write_bytes(pickle.dumps(Payload()))


def no_code_ran(run_dir: Path) -> None:
    complete(run_dir)
    assert not (run_dir / "payload_ran").exists()


def full_disk(patch: Patch, run_dir: Path) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(checkpoint_files, "save_file", full)


def goes_on_from_6(run_dir: Path) -> None:
    complete(run_dir)
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_6"
    assert not list((run_dir / "checkpoints").glob("*.tmp"))


def another_run(patch: Patch, run_dir: Path) -> None:
    file = (run_dir / "lock").open("a+")
    fcntl.flock(file, fcntl.LOCK_EX)
    HELD.append(file)


HELD: list[Any] = []
SKIPS_6 = ("skipping", "step_6", "step_5 (step 5)")
CHECKPOINTS = [
    Fault("cut short", damaged(cut_short), 0, SKIPS_6, (), complete),
    Fault("one bit", damaged(one_bit), 0, SKIPS_6, (), complete),
    Fault("no state", damaged(lambda f: (f / "state.json").unlink()), 0, SKIPS_6, (), complete),
    Fault(
        "garbage", damaged(lambda f: (f / "state.json").write_text("{")), 0, SKIPS_6, (), complete
    ),
    Fault("half written", damaged(half_written), 0, ("step_5 (step 5)",), (), complete),
    Fault("a pickle", damaged(pickled), 0, SKIPS_6, (), no_code_ran),
    Fault("full disk", full_disk, 0, ("No space left", "step_6"), (), goes_on_from_6),
    Fault("two runs", another_run, 2, ("no other run uses", "--run.dir"), (), at_step_6),
]

# --- what was typed

TYPED = [
    Fault(
        "other config",
        nothing,
        2,
        ("optim.lr: 0.01 -> 0.5", "--run.dir"),
        ("--optim.lr", "0.5"),
        at_step_6,
    ),
    Fault("no such model", nothing, 2, ("model.path",), ("--model.path", "no/such"), at_step_6),
    Fault("no such data", nothing, 2, ("no/such",), ("--data.root", "no/such"), at_step_6),
    Fault(
        "no such reward",
        nothing,
        2,
        ("nothing",),
        ("--rewards.functions", "crpo_fast.rewards:nothing"),
        at_step_6,
    ),
    Fault(
        "one sample a group",
        nothing,
        2,
        ("--rollout.group_size 4",),
        ("--rollout.group_size", "1"),
        at_step_6,
    ),
    Fault(
        "budget too small",
        nothing,
        2,
        ("--train.token_budget 112",),
        ("--train.token_budget", "20"),
        at_step_6,
    ),
]

ALONE = [*ENGINE, *MATHEMATICS, *SYSTEM, *REWARDS, *CHECKPOINTS, *TYPED]

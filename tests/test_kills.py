"""A run that is killed by SIGKILL and started again ends as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import children

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
PYTHON = [sys.executable]
LAUNCH = [*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
LOGS = ("metrics.jsonl", "samples.jsonl")
# draws: how far a process may get before it dies, in units of the moment (killed_train.py)
MOMENTS = {"generation": 40, "backward": 3, "save": 16, "torn": 4, "time": 3}


def arguments(run_dir: Path, *, sft: int = 3, crpo: int = 5) -> list[str]:
    return [
        str(HERE / "tiny.toml"),
        *("--run.dir", str(run_dir), "--train.threads", "1"),
        *("--eval.every", "3", "--checkpoint.every", "2"),
        *("--phases.0.steps", str(sft), "--phases.1.steps", str(crpo)),
    ]


NEEDED = "cannot be resumed without it (its KL reference)"


def start(command: list[str]) -> subprocess.Popen[str]:
    """In a process group of its own, as a shell would start it."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=children.environment(),
        start_new_session=True,
    )


def finish(command: list[str]) -> str:
    process = start(command)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out[-4000:]
    return out


def kill_in_time(command: list[str], log: Path, steps: int, delay: float) -> bool:
    """Kill the whole tree some time after ``steps`` more lines in ``log``; False: too late."""
    process = start(command)
    wanted = count_lines(log) + steps
    while process.poll() is None and count_lines(log) < wanted:
        time.sleep(0.01)
    time.sleep(delay)
    tree = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    for child in tree:
        child.kill()
    process.communicate(timeout=60)
    return process.returncode == -signal.SIGKILL


def count_lines(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def kill_at(command: list[str], moment: str, count: int) -> str:
    """Run until the moment kills it: ""; the output of a process that does not get there.

    Or of one that ends because the disk is full at the end of a phase that the next one needs.
    """
    script = command.index("SCRIPT")
    wrapped = [str(HERE / "killed_train.py"), moment, str(count)]
    process = start([*command[:script], *wrapped, *command[script + 1 :]])
    out, _ = process.communicate(timeout=300)
    needed = process.returncode == 1 and NEEDED in out
    assert needed or process.returncode in (-signal.SIGKILL, 0), (process.returncode, out[-4000:])
    return "" if process.returncode == -signal.SIGKILL else out


def plain(command: list[str]) -> list[str]:
    return [str(ROOT / "crpo_fast" / "train.py") if x == "SCRIPT" else x for x in command]


def without_times(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text().splitlines()
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in json.loads(x).items() if not k.startswith(timed)} for x in lines]


def digest(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "final" / "model.safetensors").read_bytes()).hexdigest()


def assert_same_end(run_dir: Path, expected: Path, *, best: bool = True) -> None:
    assert digest(run_dir) == digest(expected)
    for log in LOGS:
        assert without_times(run_dir / log) == without_times(expected / log), log
    evaluations = [json.loads((r / "evaluations.json").read_text()) for r in (run_dir, expected)]
    assert evaluations[0] == evaluations[1]
    found = [json.loads((r / "summary.json").read_text())["best"] for r in (run_dir, expected)]
    assert not best or found[0] == found[1]
    left = names(run_dir)
    assert not [name for name in left if name.endswith((".tmp", ".old"))], left


def names(run_dir: Path) -> set[str]:
    return {p.name for p in (run_dir / "checkpoints").iterdir()}


def draw(moments: list[str], rng: random.Random) -> Iterator[tuple[str, int]]:
    for moment in moments:
        yield moment, rng.randint(1, MOMENTS[moment])


def kill_and_resume(
    command: list[str], run_dir: Path, moments: list[str], rng: random.Random
) -> list[str]:
    """Kill at each of ``moments``, then let it end; returns what happened."""
    story = []
    for moment, count in draw(moments, rng):
        if moment == "time":
            log, delay = run_dir / LOGS[0], rng.uniform(0, 0.5)
            killed = kill_in_time(plain(command), log, count - 1, delay)
        else:
            killed = not kill_at(command, moment, count)
        what = f"killed after step {count_lines(run_dir / LOGS[0])}" if killed else "not reached"
        story.append(f"{moment} {count}: {what}")
    finish(plain(command))
    return story


def seed() -> int:
    """Other moments in every session; KILL_SEED repeats those of a failure."""
    return int(os.environ.get("KILL_SEED") or random.SystemRandom().randrange(10**6))


def test_three_random_kills_change_nothing(tmp_path: Path) -> None:
    moments, number = ["generation", "backward", "save"], seed()
    rng = random.Random(number)
    rng.shuffle(moments)
    finish(plain([*PYTHON, "SCRIPT", *arguments(tmp_path / "whole")]))
    command = [*PYTHON, "SCRIPT", *arguments(tmp_path / "killed")]
    story = kill_and_resume(command, tmp_path / "killed", moments, rng)
    print(f"KILL_SEED={number}", *story, sep="\n")
    assert_same_end(tmp_path / "killed", tmp_path / "whole")
    assert names(tmp_path / "killed") == names(tmp_path / "whole")


@pytest.mark.multirank
def test_a_kill_and_a_full_disk_under_torchrun_change_nothing(tmp_path: Path) -> None:
    """Both ranks die in one run; in the next the disk is full once, and both ranks go on."""
    number = seed()
    rng = random.Random(number)
    print(f"KILL_SEED={number}")
    finish(plain([*LAUNCH, "SCRIPT", *arguments(tmp_path / "whole", crpo=3)]))
    command = [*LAUNCH, "SCRIPT", *arguments(tmp_path / "killed", crpo=3)]
    ((moment, count),) = draw([rng.choice(["generation", "backward", "save"])], rng)
    assert not kill_at(command, moment, count), (moment, count)
    out = kill_at(command, "full", 1)
    assert "could not be written ([Errno 28] No space left on device; " in out
    assert "Training goes on" in out
    if NEEDED in out:  # the first kill was before the end of SFT
        finish(plain(command))
    # what could not be saved is no best checkpoint
    assert_same_end(tmp_path / "killed", tmp_path / "whole", best=False)


@pytest.mark.slow
def test_twenty_random_kills_change_nothing(tmp_path: Path) -> None:
    """Each of the twenty dies; CI runs three of them."""
    number = seed()
    rng = random.Random(number)
    steps = {"sft": 6, "crpo": 60}
    finish(plain([*PYTHON, "SCRIPT", *arguments(tmp_path / "whole", **steps)]))
    command = [*PYTHON, "SCRIPT", *arguments(tmp_path / "killed", **steps)]
    moments = [*MOMENTS] * 4
    rng.shuffle(moments)
    story = kill_and_resume(command, tmp_path / "killed", moments, rng)
    print(f"KILL_SEED={number}", *story, sep="\n")
    assert len([line for line in story if "killed after" in line]) == 20, story
    assert_same_end(tmp_path / "killed", tmp_path / "whole")

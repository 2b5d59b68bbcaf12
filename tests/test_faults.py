"""Injected faults and how the run must end: a named cause, nothing lost, nothing hanging."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crpo_fast import train
from fault_cases import ALONE, TINY, Fault, Patch

FAULTY = str(Path(__file__).with_name("faulty_train.py"))
REWARDS = ("crpo_fast.rewards:format_reward", "faulty_rewards:by_environment")
BASE = [TINY, "--rewards.functions", *REWARDS, "--rewards.balance", "none"]


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stands after step 6 of 8."""
    run_dir = tmp_path_factory.mktemp("half") / "r"
    assert train.main([*BASE, "--run.dir", str(run_dir)]) == 0
    for n in (7, 8):
        shutil.rmtree(run_dir / "checkpoints" / f"step_{n}")
    (run_dir / "checkpoints" / "latest").write_text("step_6")
    (run_dir / "summary.json").unlink()
    shutil.rmtree(run_dir / "final")
    return run_dir


@pytest.mark.parametrize("fault", ALONE, ids=lambda fault: fault.name)
def test_fault_and_its_ending(
    fault: Fault,
    half: Path,
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = tmp_path / "r"
    shutil.copytree(half, run_dir)
    monkeypatch.chdir(tmp_path)
    fault.inject(monkeypatch, run_dir)
    assert train.main([*BASE, "--run.dir", str(run_dir), *fault.arguments]) == fault.status
    out, err = capsys.readouterr()
    said = err if fault.status else out + err
    assert all(part in said for part in fault.says), said
    if fault.status:
        assert err.count("error: ") == 1
    fault.check(run_dir)


# --- one rank of two


def launch(fault: str, run_dir: Path, *arguments: str, ranks: int = 2) -> tuple[str, str, float]:
    """torchrun with ``fault`` injected on the last rank: (stdout, stderr, seconds)."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc_per_node={ranks}", FAULTY, fault, str(ranks - 1), TINY),
        *("--run.dir", str(run_dir), "--train.threads", "1", *arguments),
    ]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1, done.stderr[-3000:]
    return done.stdout, done.stderr, time.monotonic() - start


# fault on rank 1 -> what the one message says
RANKS = {
    "die": ["lost rank 1 while in exchange (step", "Last seen:", "rank 1 in", "last checkpoint"],
    "die@forward": ["lost rank 1 while in", "last checkpoint"],
    "hang": ["waited more than train.timeout = 8 s", "rank 1 in generation (step", "py-spy"],
    "hang@forward": ["waited more than train.timeout = 8 s", "rank 0 of 2", "(step 4)"],
    "refuse": ["rank 1: the injected engine gave up"],
    "bug": [],  # the traceback of rank 1 is the message
    "oom@forward": ["rank 1: out of memory in forward", "--train.token_budget"],
}


@pytest.mark.multirank
@pytest.mark.parametrize("fault", RANKS)
def test_one_rank_ends_all_with_one_message(fault: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "r"
    patience = ("--train.timeout", "8") if "hang" in fault else ()
    _, err, seconds = launch(fault, run_dir, *patience)
    messages = [line for line in err.splitlines() if line.startswith("error: ")]
    if RANKS[fault]:
        assert len(messages) == 1, err[-3000:]
        assert all(part in messages[0] for part in RANKS[fault]), messages[0]
    else:
        assert not messages
        assert "[rank1]: KeyError: 'an injected bug'" in err
        assert "[rank0]:" not in err
    assert seconds < 60 + 30  # the start and the first steps included
    done = len((run_dir / "metrics.jsonl").read_text().splitlines())
    assert (run_dir / "checkpoints" / "latest").read_text() == f"step_{done}"
    assert done == (3 if fault.endswith("forward") else 7)

"""What a rank says of errors that come from other ranks or from torch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from crpo_fast.config import parse_arguments
from crpo_fast.peers import Peers


def pair(resume: str = "auto") -> tuple[Peers, Peers]:
    store = dist.HashStore()
    config = parse_arguments(["--train.timeout", "5", "--run.resume", resume])
    return Peers(0, 2, store, config), Peers(1, 2, store, config)


def test_the_first_rank_speaks_the_others_leave(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = pair()
    assert second.refuse(ValueError("data.root: expected a folder"), 2) == 2
    assert first.refuse(ValueError("data.root: expected a folder"), 2) == 2
    assert capsys.readouterr().err == "error: rank 1: data.root: expected a folder\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("[/x/pair.cc:5] Connection closed by peer [::1]:7. This is"), "lost another"),
        (RuntimeError("[/x/b.cc:81] Timed out waiting 5000ms for recv"), "train.timeout = 5 s"),
        (dist.DistBackendError("NCCL error: remote process exited"), "lost another rank"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "--train.token_budget"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "out of memory"),
    ],
)
def test_errors_of_torch_become_one_line(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pair()[0].explain(error) == 1
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert "/x/" not in err


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_the_command_that_continues_moves_nothing_aside(
    resume: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for error in (RuntimeError("Connection closed by peer"), torch.OutOfMemoryError("CUDA")):
        assert pair(resume)[0].explain(error) == 1
        err = capsys.readouterr().err
        assert "ame command" in err
        assert ("ame command with --run.resume auto continues" in err) == (resume == "never")


def test_bugs_keep_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    alone, (first, second) = Peers(), pair()
    assert alone.explain(RuntimeError("connection closed")) == 0  # one rank has no peers
    assert first.explain(KeyError("bug")) == 0
    assert capsys.readouterr().err == ""
    assert second.refuse(ValueError("follows from the bug"), 1) == 1
    assert capsys.readouterr().err == ""  # the first rank's traceback is the message

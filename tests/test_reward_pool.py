"""Rewards in worker processes: equal to calls in this one, and no failure harms the run."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import children
from crpo_fast import rewards
from crpo_fast.reward_calls import RewardError, RewardTable
from crpo_fast.reward_pool import InProcessRewards, RewardPool
from crpo_fast.reward_worker import describe
from crpo_fast.stages import StageGrammar

BUILT_IN = ["crpo_fast.rewards:format_reward", "crpo_fast.rewards:answer_reward"]


def pool(*names: str, **options) -> RewardPool:
    paths = [name if ":" in name else f"faulty_rewards:{name}" for name in names]
    return RewardPool(paths, **{"timeout": 30.0, **options})


def errors(table: RewardTable) -> list[tuple[int, str, str]]:
    return [(e.sample, e.kind, e.text) for e in table.errors]


def is_gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether no process, not even a zombie, has the number soon."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


# ---- functions that work


@pytest.mark.parametrize("workers", [1, 3])
def test_good_functions_give_the_same_bits_as_in_process(workers):
    grammar, rng = StageGrammar.preset("mental_r1"), random.Random(1)
    answers = [rng.choice(["Yes", "No"]) for _ in range(6) for _ in range(4)]
    good = grammar.render(dict.fromkeys(grammar.names, "words"), "Yes")
    completions = [rng.choice([good, good.replace("Yes", "No"), good[:-9], ""]) for _ in answers]
    columns = {"answer": answers, "dataset_id": ["A"] * 24, "level": list(range(24))}
    shared = {"grammar": grammar, "match": "prefix", "balance_weights": {("A", "Yes"): 1 / 3}}
    names = [*BUILT_IN, *(f"faulty_rewards:{f}" for f in ("above_mean", "twice", "thrice"))]
    weights = [1.0, 0.7, 0.1, 1e-3, 0.3]
    here = InProcessRewards([rewards.load_reward(name) for name in names], weights)
    here.bind(**shared)
    with pool(*names, weights=weights, workers=workers) as there:
        there.bind(**shared)
        found = there.score(["p"] * 24, completions, columns, 4)
    assert found == here.score(["p"] * 24, completions, columns, 4)
    assert found.errors == ()
    assert list(found.parts) == [
        "format_reward",
        "answer_reward",
        "above_mean",
        "scaled",
        "Thrice",
    ]
    assert len(set(found.total)) > 4


def test_none_does_not_apply_and_is_no_error():
    with pool("marked", "length") as there:
        table = there.score(["p"] * 2, ["none", "good"], {}, 2)
    assert table == RewardTable([0.4, 1.4], {"marked": [None, 1.0], "length": [0.4, 0.4]})


def test_random_numbers_depend_on_the_texts_alone():
    texts = [str(i) for i in range(12)]
    with pool("draws", workers=1) as one, pool("draws", workers=3) as three:
        first = one.score(texts, texts, {}, 2)
        again = one.score(texts[:2], texts[:2], {}, 2)
        assert three.score(texts, texts, {}, 2) == first
    assert len(set(first.total)) == 12
    assert again.total == first.total[:2]


def test_coroutines_of_all_groups_wait_together():
    with pool("judge", workers=2) as there:
        there.wait_ready()
        start = time.monotonic()
        assert there.score(["p"] * 64, ["x"] * 64, {}, 2).total == [1.0] * 64
        assert time.monotonic() - start < 3  # 32 groups of .2 s are 3.2 s in two workers


def test_the_surroundings_of_a_worker(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.txt").touch()
    monkeypatch.setenv("PYTHONPATH", "somewhere")
    with open(os.devnull) as file, pool("environment") as there:
        os.set_inheritable(file.fileno(), True)
        (pid,) = there.pids
        there.wait_ready()
        os.kill(pid, signal.SIGTERM)  # as a scheduler does to all processes of a job
        os.kill(pid, signal.SIGINT)
        texts = [str(file.fileno()), "somewhere", "", "", ""]
        table = there.score(["p"] * 5, texts, {}, 5)
        assert os.getpgid(pid) == pid
        if sys.platform == "linux":  # when memory runs out the kernel takes it, not the trainer
            assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n"
    torch_is_loaded, worker, descriptor, here, same_path = table.total
    assert torch_is_loaded == 0
    assert worker == pid
    assert descriptor == -1
    assert here == 1
    assert same_path == 1
    captured = capfd.readouterr()
    assert "a line of the reward function" in captured.err
    assert captured.out == ""


# ---- functions that fail


@pytest.mark.parametrize(
    ("mark", "kind", "text"),
    [
        ("raise", "exception", "ValueError('no such label')"),
        ("leave", "exception", "SystemExit('enough')"),
        ("memory", "exception", "MemoryError()"),
        ("drop", "wrong_length", "returned 0 values for 1"),
        ("nan", "nan", "returned nan"),
        ("inf", "nan", "returned inf"),
        ("word", "nan", "returned str"),
        ("exit", "crash", "the worker ended: exit status 3"),
        ("crash", "crash", "the worker ended: killed by SIGSEGV"),
        ("kill", "crash", "the worker ended: killed by SIGKILL (out of memory?)"),
    ],
)
def test_only_the_guilty_sample_has_no_reward(mark, kind, text):
    completions = ["a", "b", "c", "d", "e", mark, "f", "g"]
    with pool("marked", "length", workers=2) as there:
        table = there.score(["p"] * 8, completions, {}, 4)
        assert errors(table) == [(5, kind, text)]
        assert table.parts["marked"] == [1.0] * 5 + [None] + [1.0] * 2
        assert table.parts["length"] == [len(c) / 10 for c in completions]
        assert table.total[:5] == [1.1] * 5
        assert math.isnan(table.total[5])
        assert (table.recovered, table.not_run) == (0, 0)
        assert there.score(["p"] * 4, list("abcd"), {}, 4).total == [1.1] * 4  # a new worker
        assert len(there.pids) == 2


@pytest.mark.parametrize("mark", ["hang", "spin"])
def test_a_function_that_hangs_is_killed(mark):
    with pool("marked", timeout=1.0) as there:
        (before,) = there.pids
        there.wait_ready()
        start = time.monotonic()
        table = there.score(["p"] * 4, ["a", "b", mark, "c"], {}, 2)
        assert time.monotonic() - start < 10
        assert errors(table) == [(2, "timeout", "no answer within 1 s")]
        assert table.parts["marked"] == [1.0, 1.0, None, 1.0]
        assert is_gone(before)


def test_several_kinds_at_once():
    completions = ["raise", "a", "b", "exit", "word", "drop", "c", "nan"]
    with pool("marked", workers=2) as there:
        table = there.score(["p"] * 8, completions, {}, 4)
    assert [(i, kind) for i, kind, _ in errors(table)] == [
        (0, "exception"),
        (3, "crash"),
        (4, "nan"),
        (5, "wrong_length"),
        (7, "nan"),
    ]
    assert table.parts["marked"] == [None, 1.0, 1.0, None, None, None, 1.0, None]


def test_samples_are_compared_without_the_guilty():
    with pool("above_mean") as there:
        table = there.score(["p"] * 4, ["a", "raise", "bbb", "ccccc"], {}, 4)
    assert table.parts["above_mean"] == [-2.0, None, 0.0, 2.0]  # the mean of 1, 3 and 5 letters
    assert errors(table) == [(1, "exception", "ValueError('no such label')")]


def test_a_group_that_fails_only_together_has_no_rewards():
    with pool("not_together") as there:
        table = there.score(["p"] * 3, list("abc"), {}, 3)
    assert errors(table) == [(i, "exception", "RuntimeError('one at a time')") for i in range(3)]
    assert all(map(math.isnan, table.total))


def test_a_passing_failure_is_counted_as_recovered():
    with pool("first_call_fails") as there:
        table = there.score(["p"] * 6, list("abcdef"), {}, 3)
    assert table == RewardTable([3.0] * 6, {"first_call_fails": [3.0] * 6}, recovered=3)


def test_no_list_at_all():
    with pool("not_a_list") as there:
        table = there.score(["p"] * 2, ["a", "b"], {}, 2)
    assert errors(table) == [(i, "wrong_length", "returned float, not a list") for i in range(2)]


def test_coroutines_fail_alone():
    completions = ["a", "b", "hang", "c", "raise", "d", "e", "f"]
    with pool("judge", timeout=1.0) as there:
        table = there.score(["p"] * 8, completions, {}, 2)
        assert errors(table) == [
            (2, "timeout", "no answer within 1 s"),
            (4, "exception", "ValueError('no such label')"),
        ]
        (pid,) = there.pids
        table = there.score(["p"] * 4, ["a", "b", "c", "crash"], {}, 2)
        assert errors(table) == [(3, "crash", "the worker ended: killed by SIGSEGV")]
        assert table.parts["judge"] == [1.0, 1.0, 1.0, None]
        assert there.pids != [pid]


def test_too_many_failures_end_the_scoring_early():
    with pool("marked") as there:
        table = there.score(["p"] * 40, ["raise"] * 40, {}, 2, max_failed=3)
        assert len(table.errors) == 4
        assert table.not_run == 36
        assert all(map(math.isnan, table.total))
        assert there.score(["p"] * 2, ["a", "b"], {}, 2, max_failed=3).total == [1.0, 1.0]


def test_exceptions_do_not_quote_posts():
    post = "I cannot sleep since my sister moved out,\nand nobody calls"
    with pool("quotes") as there:
        table = there.score([post] * 2, ["the writer feels lonely tonight"] * 2, {}, 2)
    assert {e.text for e in table.errors} == {
        """ValueError("cannot score [text] of '[text]': no tag")"""
    }
    call = {"prompts": [post], "completions": ["short"]}
    assert describe(KeyError(post[7:30]), call) == "KeyError('[text]')"
    assert describe(KeyError("short"), call) == "KeyError('short')"  # a label, say
    assert describe(ValueError("x" * 1000), call) == "ValueError('" + "x" * 288 + " ..."


# ---- start and end


def test_names_are_refused_as_in_process(tmp_path, monkeypatch):
    with pool("nothing") as there, pytest.raises(RewardError, match="'nothing' in faulty_rewards"):
        there.wait_ready()
    (tmp_path / "dies_at_import.py").write_text("import os\nos._exit(9)\n")
    (tmp_path / "hangs_at_import.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pool("dies_at_import:f") as there, pytest.raises(RewardError, match="exit status 9"):
        there.wait_ready()
    with (
        pool("hangs_at_import:f", start_timeout=0.5) as there,
        pytest.raises(RewardError, match=r"not within 0\.5 s"),
    ):
        there.wait_ready()


def test_closing_leaves_no_process_not_even_of_a_function(tmp_path):
    file = tmp_path / "pid"
    with pool("with_child", "marked", workers=2, timeout=0.5) as there:
        pids = there.pids
        there.score(["p"] * 2, [str(file)] * 2, {}, 2, max_failed=0)
        pids += there.pids
        assert is_gone(int(file.read_text()))
    assert all(is_gone(pid, 0.1) for pid in pids)
    there = pool("marked", workers=3)
    there.close()  # before they are ready
    there.close()


PARENT = """
import sys, threading
from crpo_fast.reward_pool import RewardPool
pool = RewardPool(["faulty_rewards:marked"], workers=3)
pool.wait_ready()
while not all(w.ready for w in pool._workers):
    pool._exchange(None)
print(*pool.pids, flush=True)
pool.score(["p"] * 4, ["hang", "hang", "spin", "spin"], {}, 2)
"""


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_workers_die_with_the_trainer(signum):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdout=subprocess.PIPE,
        text=True,
        env=children.environment(),
    )
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 3
    time.sleep(0.3)  # two of them are in a function that hangs
    parent.send_signal(signum)
    assert parent.wait(10) == -signum
    assert all(is_gone(pid) for pid in pids)
    parent.stdout.close()

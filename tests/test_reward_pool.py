"""Rewards in worker processes: equal to calls in this one, and no failure harms the run."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from crpo_fast import reward_errors, rewards, train
from crpo_fast.batch import Row
from crpo_fast.config import load_config
from crpo_fast.metrics import Sums
from crpo_fast.reward_calls import RewardError, RewardFailure, RewardTable
from crpo_fast.reward_pool import InProcessRewards, RewardPool
from crpo_fast.reward_worker import describe
from crpo_fast.run_folder import RunFolder
from crpo_fast.stages import StageGrammar
from crpo_fast.task import load_rows, order

TINY = str(Path(__file__).with_name("tiny.toml"))
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
    assert table == RewardTable([0.4, 1.4], {"marked": [None, 1.0], "length": [0.4, 0.4]}, 0)


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
        assert (table.failures, table.recovered, table.not_run) == (1, 0, 0)
        assert there.score(["p"] * 4, list("abcd"), {}, 4).total == [1.1] * 4  # a new worker
        assert len(there.pids) == 2


@pytest.mark.parametrize("mark", ["hang", "spin"])
def test_a_function_that_hangs_is_killed(mark):
    with pool("marked", timeout=0.5) as there:
        (before,) = there.pids
        there.wait_ready()
        start = time.monotonic()
        table = there.score(["p"] * 4, ["a", "b", mark, "c"], {}, 2)
        assert time.monotonic() - start < 10
        assert errors(table) == [(2, "timeout", "no answer within 0.5 s")]
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
    assert table == RewardTable([3.0] * 6, {"first_call_fails": [3.0] * 6}, 0, recovered=3)


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
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, env=environment
    )
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 3
    time.sleep(0.3)  # two of them are in a function that hangs
    parent.send_signal(signum)
    assert parent.wait(10) == -signum
    assert all(is_gone(pid) for pid in pids)
    parent.stdout.close()


# ---- metrics


def test_counts_over_ranks_and_lines():
    nan, rows = math.nan, [Row("t", "l", dataset_id=d) for d in ("A", "A", "B", "B")]
    first = RewardTable([1.0] * 4, {"f": [1.0] * 4}, 0)
    failed = (RewardFailure("nan", "f", 1, "returned nan"), RewardFailure("crash", "g", 3, "gone"))
    second = RewardTable([1.0, nan, nan, nan], {}, 2, failed, recovered=2, not_run=1)
    sums, notes = [Sums(), Sums()], [{}, {}]
    for s, note, table in zip(sums, notes, (first, second), strict=True):
        reward_errors.record(s, table)
        reward_errors.note(note, table, rows)
    alone = sums[0].means(lambda x: x)
    assert alone == dict.fromkeys(alone, 0.0)
    added = []
    sums[0].means(lambda x: added.append(x) or x)
    metrics = sums[1].means(lambda x: x + added.pop(0) if added else x)
    assert metrics.keys() == alone.keys()
    assert metrics == {
        "reward/error_rate": 3 / 8,
        "reward/errors/exception": 0,
        "reward/errors/timeout": 0,
        "reward/errors/nan": 1,
        "reward/errors/wrong_length": 0,
        "reward/errors/crash": 1,
        "reward/errors/recovered": 2,
        "reward/errors/not_run": 1,
    }
    assert reward_errors.lines(notes, metrics, 7) == [
        "step 7: reward nan x 1, first: function f, rank 1, sample 1, data set A: returned nan",
        "step 7: reward crash x 1, first: function g, rank 1, sample 3, data set B: gone",
    ]
    assert reward_errors.verdict(metrics, 0.375, 7) is None
    message = reward_errors.verdict(metrics, 0.37, 7)
    assert "got 37.5% at step 7 (1 nan, 1 crash, 1 not_run" in message
    assert "--rewards.timeout" in message


# ---- a run

FAULTY = [TINY, "--rewards.functions", "faulty_rewards:by_dataset", "--rewards.workers", "2"]
FAULTY += ["--rollout.prompts_per_step", "16", "--rewards.timeout", "1", "--train.max_steps", "2"]


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_counts_what_fails_and_stops_above_the_bound(tmp_path, capsys):
    run_dir = tmp_path / "r"
    arguments = [*FAULTY, "--run.dir", str(run_dir)]
    assert train.main(arguments) == 1  # rows of five of eight data sets fail, the bound is 5 %
    captured = capsys.readouterr()
    assert "expected at most 5.0% of a step's samples without a reward" in captured.err
    assert "The state is saved: the same command continues." in captured.err
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_3"
    assert train.main([*arguments, "--rewards.max_error_rate", "1"]) == 0
    captured = capsys.readouterr()
    rows = load_rows(load_config(TINY), run_dir, write=False).train
    logged = [r for r in records(run_dir) if r["phase"] == "crpo"]
    assert len(logged) == 2
    found = order(len(rows), 5, 16, 16)
    sets = Counter(rows[i].dataset_id for i in found)  # of the second step, which ran to its end
    step = logged[1]
    expected = {"exception": "Dreaddit", "timeout": "DATD", "crash": "SDCNL", "nan": "FIG"}
    for kind, name in {**expected, "wrong_length": "RSD"}.items():
        assert step[f"reward/errors/{kind}"] == 2 * sets[name]
        if sets[name]:
            assert f"step 4: reward {kind} x {2 * sets[name]}, first: function" in captured.out
            assert f"data set {name}" in captured.out
    failed = sum(2 * sets[n] for n in ("Dreaddit", "DATD", "SDCNL", "FIG", "RSD"))
    assert failed > 8
    assert step["reward/error_rate"] == step["reward/not_usable"] == failed / 32
    assert step["reward"] == step["reward/by_dataset"] == 1.0
    assert step["reward/errors/recovered"] == step["reward/errors/not_run"] == 0
    assert logged[0]["reward/error_rate"] > 0.05
    assert logged[0].keys() == step.keys()
    assert not any(row.text[:20] in captured.out + captured.err for row in rows)


def test_workers_change_nothing_in_a_run(tmp_path):
    timed = ("seconds", "tokens_per_second")
    logs = []
    for workers in ("0", "2"):
        run_dir = tmp_path / workers
        arguments = [TINY, "--run.dir", str(run_dir), "--rewards.workers", workers]
        assert train.main([*arguments, "--train.max_steps", "1"]) == 0
        logs.append(
            [{k: v for k, v in r.items() if not k.startswith(timed)} for r in records(run_dir)]
        )
    assert logs[0] == logs[1]
    assert logs[0][-1]["reward/error_rate"] == 0
    assert logs[0][-1]["reward/errors/timeout"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rewards.functions", "faulty_rewards:nothing"], "'nothing' in faulty_rewards"),
        (["--rewards.functions", "no_such_module_here:f"], "importable module"),
        (["--rewards.workers", "-1"], "rewards.workers: expected 0"),
        (["--rewards.timeout", "0"], "rewards.timeout: expected a positive number"),
        (["--rewards.max_error_rate", "5"], "rewards.max_error_rate: expected a share"),
    ],
)
def test_refusals_come_before_anything_is_written(tmp_path, capsys, arguments, message):
    assert train.main([TINY, "--run.dir", str(tmp_path / "r"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not RunFolder(tmp_path / "r").path.exists()

"""The compile gate refuses what it should, passes what it may, and the shipped kernels pass it.

Kernels of the test process may be there for Triton's interpreter, so the gate runs in processes of
its own, as a user starts it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import pytest

import children
from benchmarks.__main__ import main as benchmarks_main
from benchmarks.compile_gate import command as compile_gate_module
from benchmarks.compile_gate import farm
from benchmarks.compile_gate.report import TARGETS, Job, Report, problems
from conftest import ROOT
from crpo_kernels.spec import PRESETS


def missing_tools() -> str | None:
    """Why nothing can be compiled for NVIDIA here, or None."""
    knobs = pytest.importorskip("triton").knobs.nvidia
    for name in ("ptxas", "ptxas_blackwell", "cuobjdump"):
        try:
            path = getattr(knobs, name).path
        except RuntimeError as error:
            return str(error)
        if not os.access(path, os.X_OK):
            return f"{path} is not there"
    return None


@pytest.fixture
def compile_gate(tmp_path):
    """Runs the command; returns its exit status, its rows by configuration, and what it printed."""
    reason = missing_tools()
    if reason:
        pytest.skip(f"triton came without its NVIDIA tools: {reason}")

    def run(*options, **variables):
        path = tmp_path / "gate.json"
        made = subprocess.run(
            [sys.executable, "-m", "benchmarks", "compile-gate", "--json", str(path), *options],
            cwd=ROOT,
            env=children.environment(**variables),
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )
        assert path.exists(), made.stderr
        rows = json.loads(path.read_text("utf-8"))["rows"]
        return made.returncode, rows, made.stdout

    return run


def test_clean_kernels_pass_on_every_target(compile_gate):
    status, rows, printed = compile_gate("--launches", "gate_kernels:clean")
    assert status == 0, printed
    assert {row["target"] for row in rows} == set(TARGETS)
    assert len(rows) == 7 * len(TARGETS)  # the eighth is the first again
    found = {(row["configuration"], row["target"]): row for row in rows}
    matrix = {t: found["tensor cores", t]["matrix_instruction"] for t in TARGETS}
    assert matrix == {t.name: t.matrix_instruction for t in TARGETS.values()}
    assert {found["tensor cores", t]["has_dot"] for t in TARGETS} == {True}
    assert {found["wide", t]["has_dot"] for t in TARGETS} == {False}
    # one bf16 tile of [2, 64, 64] is the least that two stages of a product can hold
    assert all(found["tensor cores", t]["shared_bytes"] >= 2 * 64 * 64 * 2 for t in TARGETS)
    assert all(row["registers"] > 0 and row["stack_bytes"] == 0 for row in rows)
    assert found["wide", "sm_90"]["load_bytes"] == [16] * 4  # 2048 fp32 on 128 threads
    assert found["wide, bf16", "gfx942"]["load_bytes"] == [16]  # 2048 bf16 on 256 threads
    assert "28 compilations" in printed
    assert printed.count(" ok\n") == 28


def test_each_fault_is_refused_by_its_name(compile_gate):
    options = ("--launches", "gate_kernels:refused", "--target", "sm_90")
    status, rows, printed = compile_gate(*options, TRITON_INTERPRET="1")
    assert status == 1
    found = {row["configuration"]: "; ".join(row["problems"]) for row in rows}
    expected = {
        "mask on every tile": "narrow loads: [4, 4,",
        "odd pitch": "narrow loads: [4, 4,",
        "row of 16384 in one warp": "bytes of stack",
        "four huge stages": "shared memory: 393216 bytes, limit 232448",
        "tile of 16": "tl.dot became mma.sync, not wgmma.mma_async",
        "minimum": "drops NaN: 8 instructions, the first is min.f32",
        "clamp": "drops NaN: 16 instructions, the first is max.f32",
        "wrong shapes": "CompilationError",
        "missing argument": "TypeError",
        "not a kernel": "expected a triton.jit function",
    }
    assert found.keys() == expected.keys()
    for name, text in expected.items():
        assert text in found[name], name
        assert f"{found[name][-100:]}\n" in printed
    assert "10 failed" in printed


def test_a_slow_compiler_costs_its_row(compile_gate):
    options = ("--launches", "gate_kernels:slow", "--target", "gfx942", "--target", "sm_80")
    status, rows, _ = compile_gate(*options, "--timeout", ".6", "--jobs", "2", **fresh_cache())
    assert status == 1
    failed = {(row["configuration"], row["target"]): row["problems"] for row in rows}
    assert failed["row of 16384 in one warp", "gfx942"] == ["no result within 0.6 s"]


def fresh_cache():
    """Triton compiles anew."""
    return {"TRITON_ALWAYS_COMPILE": "1"}


def test_shipped_kernels_pass(compile_gate):
    """A launch of each kernel for each target; the command by itself compiles all of them."""
    status, rows, printed = compile_gate("--launches", "gate_kernels:shipped")
    assert status == 0, printed
    assert {row["target"] for row in rows} == set(TARGETS)
    objective = [row for row in rows if row["kernel"] == "objective_kernel"]
    seen = {row["configuration"].split(" ", 1)[0] for row in objective}
    assert seen == {"clip", "gspo", "cispo", "sft"}
    scoring = [row for row in rows if row["kernel"] == "linear_stats_kernel"]
    assert all(row["has_dot"] for row in scoring)
    assert {row["target"] for row in scoring if row["matrix_instruction"]} == set(TARGETS)
    for kernel in ("row_stats", "row_grad", "stage_counts", "stage_weights", "linear_"):
        seen = {row["target"] for row in rows if row["kernel"].startswith(kernel)}
        assert seen == set(TARGETS), kernel


def test_shipped_calls_cover_every_pair_of_options():
    from benchmarks.compile_gate import shipped_calls

    calls = shipped_calls.head_calls()
    options = shipped_calls.OPTIONS
    of_modes = {
        "one_pass": [name for name in options if name != "kept"],
        "two_pass": [name for name in options if name not in shipped_calls.OF_LOSS],
    }
    for mode, names in of_modes.items():
        seen = {
            ((a, call[a]), (b, call[b]))
            for call in calls
            for a, b in combinations(names, 2)
            if call["mode"] == mode and a in call and b in call
        }
        assert seen >= {
            ((a, x), (b, y))
            for a, b in combinations(names, 2)
            for x, y in product(options[a], options[b])
        }
    assert {call.get("preset") for call in calls} == {None, *PRESETS}
    assert calls == shipped_calls.head_calls()


def test_a_kernel_that_no_call_launches_is_named(monkeypatch):
    from benchmarks.compile_gate import shipped_calls

    names = {name.split("_")[0] for name in shipped_calls.shipped_kernels()}
    assert names >= {"row", "stage"}
    monkeypatch.setattr(shipped_calls, "stage_jobs", list)
    monkeypatch.setattr(
        shipped_calls, "head_calls", lambda: [{"mode": "one_pass", "shape": (32, 700)}]
    )
    with pytest.raises(ValueError, match=r"got none for .*'stage_counts\w*', 'stage_weights\w*'\]"):
        shipped_calls.shipped_jobs()


def test_without_triton_the_command_says_what_to_type(monkeypatch, capsys):
    monkeypatch.setattr(compile_gate_module, "triton_version", lambda: None)
    assert compile_gate_module.run(argparse.Namespace(), "command") == 2
    assert "pip install 'triton>=3.6'" in capsys.readouterr().out


@pytest.mark.parametrize("jobs", ["0", "-1", "two"])
def test_a_number_of_jobs_that_cannot_be_is_refused(jobs, capsys):
    with pytest.raises(SystemExit) as refused:
        benchmarks_main(["compile-gate", f"--jobs={jobs}"])
    assert refused.value.code == 2
    assert f"expected a whole number above 0, got '{jobs}'" in capsys.readouterr().err


AMD_TAIL = """
.LBB0_0:
    global_load_dword v1, v[2:3], off
    s_cbranch_scc1 .LBB0_4
.LBB0_1:
    global_load_dwordx4 v[4:7], v[2:3], off
    s_cbranch_vccnz .LBB0_1
    s_branch .LBB0_3
.LBB0_2:
    global_load_dwordx2 v[4:5], v[2:3], off
    s_endpgm
.LBB0_3:
    s_branch .LBB0_2
.LBB0_4:
    s_branch .LBB0_2
"""
PTX_NEST = """
    ld.global.b32 { %r1 }, [ %rd1 + 0 ];
$L__BB0_1:
    ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ];
    @%p1 bra $L__BB0_3;
    ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    @%p2 ret;
    cp.async.cg.shared.global [ %r7 + 0 ], [ %rd2 + 0 ], 0x10, %r8;
    bra.uni $L__BB0_1;
$L__BB0_3:
    ld.global.L1::evict_first.b16 { %rs1 }, [ %rd1 + 0 ];
    ret;
"""


def test_loads_are_counted_where_control_comes_back():
    """Compilers place the end of a function wherever they like: a branch back alone is no loop."""
    from benchmarks.compile_gate.inspect_triton import loop_loads

    assert loop_loads(AMD_TAIL, "hip") == [16]
    assert loop_loads(PTX_NEST, "cuda") == [8, 16, 16]
    assert loop_loads(PTX_NEST.replace("@%p2 ret", "ret"), "cuda") == []


def test_loads_of_two_bytes_and_one_have_their_size():
    from benchmarks.compile_gate.inspect_triton import GLOBAL_LOAD, load_size

    names = {"buffer_load_ushort": 2, "global_load_sshort": 2, "buffer_load_ubyte": 1}
    names |= {"global_load_short_d16_hi": 2, "buffer_load_dwordx4": 16, "global_load_sbyte": 1}
    for name, size in names.items():
        found = GLOBAL_LOAD["hip"].search(f"    {name} v1, v2, s[0:3], 0 offen")
        assert found is not None
        assert load_size(found) == size, name


def test_a_launch_of_one_target_is_compiled_for_no_other(monkeypatch):
    from benchmarks.compile_gate import inspect_triton

    monkeypatch.setattr(inspect_triton, "specialisation_key", lambda job, target: job.name)
    jobs = [Job("all", None, {}), Job("one", None, {}, targets=("sm_80", "gfx942"))]
    found = compile_gate_module.distinct(jobs, list(TARGETS))
    assert [target for job, target in found if job.name == "one"] == ["sm_80", "gfx942"]
    assert len([target for job, target in found if job.name == "all"]) == len(TARGETS)


def test_exact_products_need_no_tensor_cores():
    report = replace(REPORT, has_dot=True)
    assert problems(report, Job("c", None, {})) == ["tl.dot became scalar code, not mma.sync"]
    exact = Job("c", None, {}, is_exact=True)
    assert problems(report, exact) == []
    assert problems(replace(report, stack_bytes=16), exact) == []
    assert "spills" in problems(replace(report, stack_bytes=24), exact)[0]


REPORT = Report("k", "c", "sm_80", registers=32, load_bytes=(16, 16))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"stack_bytes": 8}, "spills"),
        ({"num_spilled": 1, "target": "gfx942"}, "spills"),
        ({"shared_bytes": 166912}, None),
        ({"shared_bytes": 166913}, "shared memory"),
        ({"shared_bytes": 166913, "target": "sm_90"}, None),
        ({"shared_bytes": 65537, "target": "gfx942"}, "shared memory"),
        ({"has_dot": True}, "scalar code"),
        ({"has_dot": True, "matrix_instruction": "mma.sync"}, None),
        ({"has_dot": True, "matrix_instruction": "mma.sync", "target": "sm_100"}, "tcgen05"),
        ({"load_bytes": (16, 32)}, None),
        ({"load_bytes": (8, 16)}, "narrow loads"),
        ({"load_bytes": ()}, "narrow loads"),
        ({"min_max": ("min.f32 a, b, c",)}, "drops NaN"),
        ({"error": "no result within 1 s"}, "no result"),
    ],
)
def test_rules(changes, expected):
    job = Job("c", None, {}, streams_rows=True, is_objective=True)
    found = problems(replace(REPORT, **changes), job)
    assert len(found) == (expected is not None)
    assert expected is None or expected in found[0]


def behave(item):
    """What may happen to a worker."""
    if item == "raises":
        raise ValueError("no\nuse")
    if item == "hangs":
        subprocess.run(["sleep", "600"], check=False)
    if item == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "leaves":
        os._exit(3)
    return item.upper()


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    code = (
        "import os, sys, time\nfrom pathlib import Path\nfrom benchmarks.compile_gate import farm\n"
        "def work(path):\n    Path(path).write_text(str(os.getpid()))\n    time.sleep(600)\n"
        "list(farm.run(work, [sys.argv[1]], 1, timeout=600.0))\n"
    )
    path = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT)
    try:
        wait_until(lambda: path.exists() and path.read_text())
        worker = int(path.read_text())
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not is_alive(worker))


def is_alive(process: int) -> bool:
    """Whether it runs; one that ended but was not collected does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(holds, seconds=30.0):
    """Polls; the test fails when it never holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_that_hang_or_die_cost_their_item_only(num_workers):
    items = ["a", "raises", "hangs", "b", "dies", "leaves", "c"]
    found = dict(farm.run(behave, items, num_workers, timeout=1.0))
    reasons = [r.reason if isinstance(r, farm.Failure) else r for _, r in sorted(found.items())]
    assert reasons == [
        "A",
        "ValueError: no use",
        "no result within 1 s",
        "B",
        "its process died with signal SIGKILL",
        "its process died with exit status 3",
        "C",
    ]

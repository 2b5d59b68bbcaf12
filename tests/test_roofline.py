"""The cost model against numbers worked out by hand, and against the plan that really runs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from unittest.mock import patch

import pytest

from benchmarks import roofline
from benchmarks.__main__ import main
from benchmarks.devices import DEVICES
from benchmarks.roofline import PATHS, Sizes
from crpo_kernels import linear_tiles

# 8 rows, vocabulary 100, hidden 10, bf16, chunks of 4 rows; one group of dZ, or two
ONE = Sizes(8, 100, 10, 2, chunk=4, group=8, workspace=0)
TWO = Sizes(8, 100, 10, 2, chunk=4, group=4, workspace=0)


def counted(path, sizes):
    return {
        step.name: (step.operations, step.num_bytes, step.is_product)
        for step in PATHS[path].steps(sizes)
    }


def test_mode_a_by_hand():
    assert counted("one pass", ONE) == {
        "Z product": (16_000, 2 * (80 + 2 * 1000) + 3200, True),  # the weight is read per chunk
        "row_stats": (6400, 3200, False),
        "row_grad": (4800, 3200 + 1600, False),
        "d_hidden": (16_000, 1600 + 2000 + 80 * (4 + 4 + 2), True),
        "d_weight": (16_000, 1600 + 160 + 2000, True),
    }


def test_two_groups_add_to_a_fp32_sum():
    steps = counted("one pass", TWO)
    # the first group writes 4000 bytes, the second reads and writes them; rounded in backward
    assert steps["d_weight"] == (16_000, 1600 + 160 + 3 * 4000, True)
    assert steps["fp32 d_weight, rounded"] == (1000, 4000 + 2000, False)
    assert steps["d_hidden"] == (16_000, 1600 + 2 * 2000 + 800, True)


@pytest.mark.parametrize(
    ("path", "products", "names"),
    [
        ("two passes, E kept", 3, ["Z product", "row_stats", "E cache", "row_grad of E"]),
        ("two passes, recomputed", 4, ["Z product", "row_stats", "Z product again", "row_grad"]),
        ("frozen head", 3, ["Z product", "row_stats", "row_grad", "d_hidden"]),
        ("scoring only", 1, ["Z product", "row_stats"]),
    ],
)
def test_the_other_paths(path, products, names):
    steps = counted(path, ONE)
    assert list(steps)[: len(names)] == names
    made = [step for step in PATHS[path].steps(ONE) if step.is_product]
    if path == "frozen head":
        products = 2
    assert len(made) == products
    if path == "two passes, E kept":
        assert steps["E cache"][1] == 3200 + 1600
        assert steps["row_grad of E"][1] == 1600 + 1600


def test_fused_scoring_by_hand():
    """Tiles of 4 x 50, 3 programs: two row tiles, two of the vocabulary, so 2 splits, one group."""
    sizes = replace(ONE, tile=linear_tiles.Tile(4, 50, 16, 4, 1), units=3)
    assert counted("fused scoring", sizes) == {
        "fused product": (16_000, 2 * (80 + 1000) + 16 * 2 * 8, True),
        "statistics in it": (6400, 0, False),
        "join of the splits": (8 * 2 * 8, 16 * 2 * 8, False),
    }
    assert roofline.extra_memory(sizes, "fused scoring") == {"sums of the splits": 256}
    cached = 2 * 4 * 10  # hidden states of one row tile alone: the weight is read for each
    with patch.object(linear_tiles, "HIDDEN_CACHE_BYTES", cached):
        bytes_read = counted("fused scoring", sizes)["fused product"][1]
    assert bytes_read == 2 * (80 + 2 * 1000) + 16 * 2 * 8


def test_a_floor_is_the_larger_of_both_and_says_which():
    step = roofline.Step("x", 6e12, 3.35e9, is_product=True)
    device = DEVICES["h100"]
    assert step.floor(989.4e12, 67e12, 3.35e12) == pytest.approx(6 / 989.4)
    assert step.bound(device, "bfloat16") == "operations"
    assert step.floor(1e20, 67e12, 3.35e12) == pytest.approx(1e-3)
    step = roofline.Step("y", 67e9, 6.7e9)
    assert step.floor(989.4e12, 67e12, 3.35e12) == pytest.approx(2e-3)
    assert step.bound(device, "bfloat16") == "bytes"


def test_memory_by_hand():
    assert roofline.extra_memory(TWO, "one pass") == {
        "fp32 logits": 4 * 4 * 112,  # rows on a pitch of 16 elements
        "gradient factors": 2 * 4 * 112,
        "fp32 part of d_hidden": 4 * 4 * 10,
        "fp32 d_weight": 4000,
        "d_hidden, twice": 320,
        "d_weight": 2000,
    }
    assert sum(roofline.extra_memory(ONE, "scoring only").values()) == 16 * 112
    assert roofline.extra_memory(ONE, "two passes, E kept")["E cache"] == 2 * 8 * 112
    assert roofline.extra_memory(TWO, "frozen head")["fp32 d_weight"] == 0


def test_the_sizes_are_those_of_the_plan():
    shape = (8192, 131072, 4096)
    full = roofline.planned(shape, "bfloat16", None, "one pass")
    assert (full.chunk, full.group, full.num_chunks, full.num_groups) == (1024, 8192, 8, 1)
    assert full.workspace == 4 * 131072 * 4096 + 8 * 1024 * 131072
    small = roofline.planned(shape, "bfloat16", 1 << 30, "one pass")
    assert small.num_groups > 1
    assert 131072 * (4 * small.chunk + 2 * small.group) <= 1 << 30
    assert roofline.planned(shape, "bfloat16", None, "two passes, E kept").has_exps
    frozen = roofline.planned(shape, "bfloat16", None, "frozen head")
    assert frozen.group == frozen.chunk == 1024


def test_the_command_prints_the_steps_of_the_design_shape(capsys):
    assert main(["roofline", "--shape", "8192,131072,4096", "--device", "h100"]) == 0
    out = capsys.readouterr().out
    # 2 T V D = 8.796e12 operations at 989.4 TFLOP/s; 4 T V bytes at 3.35 TB/s
    assert "  Z product                   8.8e+12" in out
    assert "     8.890  operations" in out
    assert "     1.282  bytes" in out
    assert "A model, no measurement" in out
    for path in PATHS:
        assert f"{path}: " in out
    assert "  3 bare products                                  26.671" in out


def test_devices_dtypes_shapes_and_workspaces(capsys):
    shapes = ["--shape", "64,1000,32", "--shape", "32,500,16"]
    for name in DEVICES:
        options = [*shapes, "--device", name, "--dtype", "float32", "--workspace", "100000"]
        assert main(["roofline", *options]) == 0
        out = capsys.readouterr().out
        assert out.count(f" float32 on {name} ") == 2
        assert f"products {DEVICES[name].single_flops / 1e12:.0f} TFLOP/s" in out


def test_a_cache_that_does_not_fit_is_not_modelled(capsys):
    options = ["--shape", "8192,131072,4096", "--workspace", str(1 << 30)]
    assert main(["roofline", *options]) == 0
    out = capsys.readouterr().out
    assert "two passes, E kept: E of all rows, 2.00 GiB, exceeds the workspace: recomputed" in out
    assert "two passes, recomputed: 8NVD" in out


@pytest.mark.parametrize("text", ["8192,131072", "8192,x,4096", "0,1,1", "1,2,3,4"])
def test_a_bad_shape_says_what_to_type(text, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["roofline", "--shape", text])
    assert stop.value.code == 2
    assert "Write --shape 8192,131072,4096" in capsys.readouterr().err


def test_a_workspace_below_one_row_is_what_a_call_would_refuse(capsys):
    assert main(["roofline", "--shape", "64,1000,32", "--workspace", "100"]) == 2
    assert "workspace_bytes: expected at least" in capsys.readouterr().out


def test_it_needs_no_triton_and_no_peer(root):
    code = (
        "import sys; sys.modules.update(triton=None, trl=None, liger_kernel=None)\n"
        "from benchmarks.__main__ import main\n"
        "raise SystemExit(main(['roofline', '--shape', '64,1000,32']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
